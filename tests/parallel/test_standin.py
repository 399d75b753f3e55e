"""The stand-in for CANN: MindSpore compiles for Ascend on a machine without an NPU."""

import os
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest

from parallel.simulation import standin

needs_standin = pytest.mark.skipif(standin.unavailable() is not None, reason=str(standin.unavailable()))

PROGRAM = """
    import mindspore as ms
    import numpy as np
    from mindspore import ops

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("Ascend")
    matmul = ops.MatMul()

    @ms.jit
    def twice(x):
        return matmul(x, x) * 2

    x = ms.Tensor(np.ones((4, 4), np.float32))
    print("computed", twice(x).shape, ms.get_context("device_target"))
"""


@needs_standin
def test_a_function_compiles_for_ascend(tmp_path):
    program = tmp_path / "program.py"  # a file, as MindSpore compiles from source
    program.write_text(textwrap.dedent(PROGRAM))
    environment = {**os.environ, **standin.environment(2, 1), "GLOG_v": "3"}
    done = subprocess.run([sys.executable, program], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "computed (4, 4) Ascend" in done.stdout, done.stdout


@needs_standin
@pytest.mark.slow
def test_processes_that_make_the_library_at_once_share_one(tmp_path):
    make = [sys.executable, "-c", f"from parallel.simulation import standin; print(standin.library({str(tmp_path)!r}))"]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: subprocess.run(make, capture_output=True, text=True, timeout=300), range(2)))
    assert [d.returncode for d in done] == [0, 0], done[0].stderr
    (folder,) = {d.stdout.strip() for d in done}
    assert [str(path) for path in (tmp_path / "qwen3_mindspore").iterdir()] == [folder]


def test_a_missing_tool_is_named_with_its_package(monkeypatch):
    monkeypatch.setattr(standin.sys, "platform", "linux")
    monkeypatch.setattr(standin.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "readelf" else f"/usr/bin/{tool}")
    assert "readelf" in standin.unavailable() and "apt-get install binutils" in standin.unavailable()
    with pytest.raises(RuntimeError, match="binutils"):
        standin.library()


def test_another_machine_is_refused(monkeypatch):
    monkeypatch.setattr(standin.platform, "machine", lambda: "aarch64")
    assert "aarch64" in standin.unavailable()
