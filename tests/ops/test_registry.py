"""Which implementation is chosen, what is refused, and how kernels are built."""

import os
import subprocess
import sys

import pytest

from ops import build, registry
from ops.registry import OPS, Kernels, choose, describe, pick


def test_auto_is_the_kernel_where_it_serves_and_the_reference_elsewhere():
    assert set(vars(choose({}, "CPU", "float32")).values()) == {"cpu"}
    assert choose({}, "Ascend", "float32") == choose({}, "Ascend", "bfloat16") == Kernels()
    half = choose({}, "CPU", "float16")
    assert half.attention == "reference" and half.adamw == "cpu"  # the optimizer's arrays are float32 in any case


def test_one_op_is_chosen_alone():
    kernels = choose({"attention": "reference"}, "CPU", "float32")
    assert kernels.attention == "reference" and kernels.rope == "cpu"
    assert describe(kernels, "CPU").endswith("reference: attention")


@pytest.mark.parametrize(
    "asked, device, dtype, message",
    [
        ({"attention": "fast"}, "CPU", "float32", "ops.attention='fast' is not one of auto, reference, cpu"),
        ({"atention": "cpu"}, "CPU", "float32", "ops.atention: there is no such op; they are adamw, attention"),
        ({"rope": "cpu"}, "Ascend", "float32", "ops.rope=cpu runs on CPU, and this is Ascend; use --config.ops.rope=reference"),
        ({"rope": "cpu"}, "CPU", "float16", "ops.rope=cpu computes in float32, and the model in float16"),
    ],
)
def test_what_cannot_be_honoured_is_refused(asked, device, dtype, message):
    with pytest.raises(ValueError, match=message):
        choose(asked, device, dtype)


def test_without_a_compiler_the_references_run_and_say_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    kernels = choose({}, "CPU", "float32")
    assert kernels == Kernels() and "no g++ was found" in describe(kernels, "CPU")
    with pytest.raises(ValueError, match="ops.swiglu=cpu is built with g\\+\\+ on first use, and there is none"):
        choose({"swiglu": "cpu"}, "CPU", "float32")


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_both_implementations(op):
    for name in registry.IMPLEMENTATIONS:
        assert callable(pick(Kernels(**{op: name}), op, {"grouped_matmul": "", "routing": "plan"}.get(op, "")))


def test_processes_that_build_at_once_build_one_library(tmp_path):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", "from ops import build; print(build.library('swiglu'))"]
    running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    paths = {process.communicate()[0].strip() for process in running}
    assert len(paths) == 1 and {p.name for p in (tmp_path / "qwen3_mindspore" / "kernels").glob("*.so")} == {os.path.basename(*paths)}


def test_a_source_that_does_not_compile_shows_what_the_compiler_says(tmp_path, monkeypatch):
    (tmp_path / "broken.cc").write_text("int f( { }\n")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="broken.cc:1"):
        build.library("broken")
    assert not list((tmp_path / "qwen3_mindspore" / "kernels").glob("*.so*")) and not list(tmp_path.rglob("*.new"))
