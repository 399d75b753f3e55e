"""Which implementation is chosen, what is refused, and how kernels are built."""

import os
import subprocess
import sys

import pytest

from ops import build, registry
from ops.ascendc import build as ascendc
from ops.registry import OPS, Kernels, choose, describe, pick


def test_auto_is_the_kernel_where_it_serves_and_the_reference_elsewhere():
    assert set(vars(choose({}, "CPU", "float32")).values()) == {"cpu"}
    half = choose({}, "CPU", "float16")
    assert half.attention == "reference" and half.adamw == "cpu"  # the optimizer's arrays are float32 in any case


SERVED = dict(
    adamw="vendor", attention="vendor", grouped_matmul="vendor", rms_norm="vendor", rope="vendor", routing="vendor", swiglu="vendor"
)


@pytest.mark.parametrize(
    "asked, dtype, more, not_served",
    [
        ({}, "bfloat16", dict(head_dim=128), ""),
        ({}, "float16", dict(head_dim=16), ""),
        ({}, "float32", dict(head_dim=128), "attention"),
        ({}, "bfloat16", dict(head_dim=72), "attention"),
        ({}, "bfloat16", dict(head_dim=1024), "attention rope"),
        ({}, "bfloat16", {}, "attention rope"),  # a head_dim that is not known
        ({}, "bfloat16", dict(head_dim=64, router_bias=True), "routing"),
        ({}, "bfloat16", dict(head_dim=64, expert_shards=2), "routing"),
        ({"grouped_matmul": "reference"}, "bfloat16", dict(head_dim=64), "grouped_matmul routing"),
        ({"rope": "reference"}, "bfloat16", dict(head_dim=64), "rope"),
    ],
)
def test_auto_on_ascend_is_mindspores_kernel_where_it_serves(asked, dtype, more, not_served):
    kernels = choose(asked, "Ascend", dtype, **more)
    assert kernels == Kernels(**{op: name for op, name in SERVED.items() if op not in not_served.split()})
    assert describe(kernels, "Ascend").count("vendor: ") == 1


def test_one_op_is_chosen_alone():
    kernels = choose({"attention": "reference"}, "CPU", "float32")
    assert kernels.attention == "reference" and kernels.rope == "cpu"
    assert describe(kernels, "CPU").endswith("reference: attention decode_attention")  # which does attention too
    assert choose({"cache_write": "reference"}, "CPU", "float32").decode_attention == "reference"  # it writes in place


def test_ops_that_do_what_others_do_are_chosen_where_those_are():
    kernels = choose({"swiglu": "reference"}, "CPU", "float32")
    assert (kernels.decode_mlp, kernels.decode_attention) == ("reference", "cpu")
    message = "ops.decode_mlp=cpu does what ops.swiglu does too, which is reference; leave out one of the two"
    with pytest.raises(ValueError, match=message):
        choose({"swiglu": "reference", "decode_mlp": "cpu"}, "CPU", "float32")


@pytest.mark.parametrize(
    "asked, device, dtype, message",
    [
        ({"attention": "fast"}, "CPU", "float32", "ops.attention='fast' is not one of auto, reference, cpu, vendor"),
        ({"atention": "cpu"}, "CPU", "float32", "ops.atention: there is no such op; they are adamw, attention"),
        ({"rope": "cpu"}, "Ascend", "float32", "ops.rope=cpu runs on CPU, and this is Ascend; use --config.ops.rope=reference"),
        ({"rope": "cpu"}, "CPU", "float16", "ops.rope=cpu computes in float32, and the model in float16"),
    ],
)
def test_what_cannot_be_honoured_is_refused(asked, device, dtype, message):
    with pytest.raises(ValueError, match=message):
        choose(asked, device, dtype)


@pytest.mark.parametrize(
    "asked, device, dtype, more, message",
    [
        (
            {"attention": "vendor"},
            "CPU",
            "float32",
            dict(head_dim=64),
            "attention=vendor runs on Ascend, and this is CPU; use",
        ),
        ({"sampling": "vendor"}, "Ascend", "bfloat16", {}, "ops.sampling=vendor does not exist, as MindSpore has no such kernel; use"),
        (
            {"attention": "vendor"},
            "Ascend",
            "float32",
            dict(head_dim=64),
            "computes in bfloat16 or float16, and the model in float32",
        ),
        (
            {"attention": "vendor"},
            "Ascend",
            "float16",
            dict(head_dim=8),
            "a head_dim that is a multiple of 16, up to 512, and this is 8",
        ),
        ({"rope": "vendor"}, "Ascend", "float32", dict(head_dim=900), "needs an even head_dim below 896, and this is 900"),
        (
            {"routing": "vendor"},
            "Ascend",
            "float32",
            dict(router_bias=True),
            "which model_args.router_bias asks for; use",
        ),
        (
            {"routing": "vendor"},
            "Ascend",
            "float32",
            dict(expert_shards=4),
            "experts are spread over 4 ranks; use",
        ),
        ({"routing": "vendor", "grouped_matmul": "reference"}, "Ascend", "float32", {}, "which ops.grouped_matmul=reference needs; use"),
    ],
)
def test_what_mindspores_kernels_cannot_do_is_refused(asked, device, dtype, more, message):
    with pytest.raises(ValueError, match=message):
        choose(asked, device, dtype, **more)


def test_without_a_compiler_the_references_run_and_say_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    kernels = choose({}, "CPU", "float32")
    assert kernels == Kernels() and "no g++ was found" in describe(kernels, "CPU")
    with pytest.raises(ValueError, match="ops.swiglu=cpu is built with g\\+\\+ on first use, and there is none"):
        choose({"swiglu": "cpu"}, "CPU", "float32")


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_implementations(op):
    for name in ("reference", "cpu", *(["vendor"] if op in SERVED else []), *(["ascendc"] if op in ascendc.families() else [])):
        assert callable(pick(Kernels(**{op: name}), op, {"routing": "permute"}.get(op, "")))
    assert set(registry.IMPLEMENTATIONS) == {"reference", "cpu", "vendor", "ascendc"}


def test_our_own_kernels_for_ascend_are_taken_where_they_are_asked_for(monkeypatch):
    kernels = choose({"rms_norm": "ascendc"}, "CPU", "float32")
    assert kernels.rms_norm == "ascendc" and kernels.swiglu == "cpu" and kernels.decode_mlp == "reference"
    assert choose({"rms_norm": "ascendc"}, "CPU", "float16").rms_norm == "ascendc"
    with pytest.raises(ValueError, match="ops.adamw=ascendc does not exist, as no kernel was written for it; use"):
        choose({"adamw": "ascendc"}, "CPU", "float32")
    monkeypatch.delenv("ASCEND_CUSTOM_OPP_PATH", raising=False)
    with pytest.raises(
        ValueError, match="ops.rms_norm=ascendc needs the operator package: ASCEND_CUSTOM_OPP_PATH names no folder vendors/qwen3"
    ):
        choose({"rms_norm": "ascendc"}, "Ascend", "bfloat16")


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
