"""CANN's own CPU mode and its simulator as a gate for the AscendC kernels: where they are, kernels run in them and are held to formulas;
where not, what is missing is said. What builds and calls them is tested here with stand-ins for CANN's files and tools."""

import os
import stat
import subprocess
import sys

import numpy as np
import pytest

from ops.ascendc import build
from tests.ops import test_attention as attention_cases
from tests.ops import test_rms_norm as norm_cases
from tests.ops.emulated import cores, tiled
from tests.ops.test_references import draw
from tests.tiny import assert_close

EPS = norm_cases.EPS


def rms_norm():
    x, w = draw(5, 37), draw(37)
    return "rms_norm", "qwen_rms_norm", [x, w], [EPS], [norm_cases.formula(x, w)]


def permute():
    x, expert = draw(6, 20), np.array([[2, 0], [0, 1], [2, 3], [3, 0], [1, 0], [0, 2]], np.int32)
    order = np.argsort(expert.ravel(), kind="stable")
    slot = np.argsort(order).astype(np.int32)
    return "routing", "qwen_permute", [x, expert], [4], [x[order // 2], slot, np.sort(expert.ravel())]


def grouped_matmul():
    x, w, group = draw(9, 20), draw(3, 20, 33), np.array([0, 0, 0, 2, 2, 2, 2, 2, 2])
    ends = np.array([3, 3, 9], np.int32)
    return "grouped_matmul", "qwen_grouped_matmul", [x, w, ends], None, [np.einsum("ri,rio->ro", x, w[group])]


def attention():
    q, k, v = attention_cases.qkv(1, 70, 70, 2, 1, 16)
    mask = attention_cases.documents(1, 70, 70)
    o, lse = attention_cases.formula(*(x.astype(np.float64) for x in (q, k, v)), *mask)
    return "attention", "qwen_attention", [q, k, v, *mask], [attention_cases.SCALE, 0], [o, lse.swapaxes(1, 2)]


KERNELS = (rms_norm, permute, grouped_matmul, attention)  # one of each kind: vector cores, those with SyncAll, cube, both


def run_in(mode, folder, case):
    """The outputs of a case's kernel, built for a mode of CANN in a folder, and what they have to be."""
    family, name, inputs, attrs, expected = case()
    outputs = [np.full(x.shape, -1, np.int32 if x.dtype == np.int32 else np.float32) for x in expected]
    with cores(2):
        blocks, key, workspace, tiling = tiled(build.emulated(family), name, inputs, outputs, attrs)
    program, env = build.program(mode, name, key, folder)
    kept = [*inputs, *outputs]
    for i, array in enumerate(kept):
        np.ascontiguousarray(array).tofile(folder / f"{i}.bin")
    tiling.tofile(folder / f"{len(kept) + 1}.bin")
    sizes = [*(x.nbytes for x in kept), build.SYSTEM_WORKSPACE + workspace, tiling.nbytes]
    done = subprocess.run([str(program), str(blocks), *map(str, sizes)], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    found = [np.fromfile(folder / f"{len(inputs) + i}.bin", x.dtype).reshape(x.shape) for i, x in enumerate(outputs)]
    return expected, found


@pytest.mark.slow
@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.__name__)
@pytest.mark.parametrize("mode", build.MODES)
def test_a_kernel_in_a_mode_of_cann(mode, case, tmp_path):
    if build.missing(mode):
        pytest.skip(build.missing(mode))
    for a, b in zip(*run_in(mode, tmp_path, case)):
        assert_close(a, b, 1e-5)


def plant(cann, mode):
    """Empty files where CANN would have what a mode needs: the first of the places that each may be in."""
    for places in build.NEEDS[mode].values():
        (cann / places[0]).parent.mkdir(parents=True, exist_ok=True)
        (cann / places[0]).touch()


def tool(folder, name, text):
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def cann(tmp_path, monkeypatch):
    """An empty folder for CANN, and none but our own tools on PATH, of which there are none yet."""
    for folder in ("cann", "bin", "work"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "cann"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "cann"


@pytest.mark.parametrize("mode", build.MODES)
def test_what_a_mode_lacks_is_named_file_by_file(mode, cann, monkeypatch):
    for what, places in build.NEEDS[mode].items():
        assert f"{what} ({' or '.join(places)})" in build.missing(mode)
    assert build.missing(mode).endswith("PATH lacks cmake, make")
    with pytest.raises(RuntimeError, match="CANN in .* lacks the"):
        build.program(mode, "qwen_rms_norm", 0, cann.parent / "work")
    for what, places in build.NEEDS[mode].items():
        (cann / places[-1]).parent.mkdir(parents=True, exist_ok=True)
        (cann / places[-1]).touch()
        assert what not in build.missing(mode)
    assert build.missing(mode) == "PATH lacks cmake, make"
    for name in ("cmake", "make"):
        tool(cann.parent / "bin", name, "")
    assert build.missing(mode) == ""
    monkeypatch.setenv("ASCEND_HOME_PATH", str(cann / "none"))
    assert build.missing(mode).startswith(f"CANN is not in {cann}/none; install its toolkit")


RECORD = """
import os, sys
with open(os.path.join({folder!r}, "calls"), "a") as f:
    print(*sys.argv[1:], file=f)
sys.exit("the linker's words" if "--build" in sys.argv and {fails} else 0)
"""


@pytest.mark.parametrize("mode", build.MODES)
def test_what_cmake_is_asked_for(mode, cann):
    """The commands, the sources and the environment of a program; a step that fails is an error with its words."""
    plant(cann, mode)
    bin, work = cann.parent / "bin", cann.parent / "work"
    tool(bin, "make", "")
    tool(bin, "cmake", RECORD.format(folder=str(bin), fails=False))
    program, env = build.program(mode, "qwen_attention_grad", 2, work)
    assert program == work / "build" / "run" and env["LD_LIBRARY_PATH"].startswith(str(cann / "tools"))
    configure, compile = (bin / "calls").read_text().splitlines()
    assert configure.startswith(f"-S {work} -B {work}/build -G Unix Makefiles ")
    assert f"-DRUN_MODE={mode} -DSOC_VERSION=Ascend910B1 -DASCEND_CANN_PACKAGE_PATH={cann}" in configure
    assert compile.startswith(f"--build {work}/build")
    lists, call, kernel = ((work / name).read_text() for name in ("CMakeLists.txt", "call.h", "kernel.cpp"))
    if mode == "sim":
        assert f"-DASCENDC_CMAKE={cann}/compiler/tikcpp/ascendc_kernel_cmake/ascendc.cmake" in configure
        assert "ascendc_library(kernels SHARED kernel.cpp)" in lists and "-DHAVE_WORKSPACE -DHAVE_TILING" in lists
        assert "ACLRT_LAUNCH_KERNEL(qwen_attention_grad)(blocks, stream, a[0], " in call and 'aclrtlaunch_qwen_attention_grad.h"' in call
    else:
        assert "find_package(tikicpulib REQUIRED)" in lists and "tikicpulib::${SOC_VERSION}" in lists
        assert "SetKernelMode(KernelMode::MIX_MODE)" in call and "ICPU_RUN_KF(qwen_attention_grad, blocks, a[0], " in call
    assert "#define ARRAYS 16" in call and "a[15])" in call and "a[16]" not in call
    assert "struct AttentionTiling {" in kernel and f'#include "{build.KERNEL}/qwen_attention_grad.cpp"' in kernel
    tool(bin, "cmake", RECORD.format(folder=str(bin), fails=True))
    with pytest.raises(RuntimeError, match="cmake --build .*\nfailed:\nthe linker's words"):
        build.program(mode, "qwen_attention_grad", 2, work)


# What CANN's tikicpulib.h gives to a program, on the emulator: memory that a kernel may use, and the call of a kernel.
STAND_IN = """
#pragma once
#include "kernel_operator.h"
#include <vector>
enum class KernelMode { MIX_MODE, AIC_MODE, AIV_MODE };
inline std::vector<emulator::Array> given;
inline uint64_t key_of_call;
inline KernelMode mode_of_call;
namespace AscendC {
inline void *GmAlloc(size_t bytes) {
  given.push_back({static_cast<uint8_t *>(std::malloc(bytes + 64)), bytes, 4});
  return given.back().data;
}
inline void GmFree(void *array) { std::free(array); }
inline void SetKernelMode(KernelMode mode) { mode_of_call = mode; }
}
#define ICPU_SET_TILING_KEY(key) key_of_call = key
#define ICPU_RUN_KF(kernel, number, ...)                                                                                  \\
  auto body = [](void *arrays) { [](uint8_t **a) { kernel(__VA_ARGS__); }(static_cast<uint8_t **>(arrays)); };            \\
  emulator::Launch launch{static_cast<int>(number), mode_of_call != KernelMode::AIV_MODE, mode_of_call != KernelMode::AIC_MODE, \\
                          key_of_call, given};                                                                            \\
  const std::string message = emulator::run(launch, body, a);                                                             \\
  if (!message.empty()) std::fprintf(stderr, "%s\\n", message.c_str()), std::exit(1);
"""
# A cmake that builds the program with g++ and the emulator.
COMPILES = """
import os, subprocess, sys
if "--build" in sys.argv:
    build = sys.argv[sys.argv.index("--build") + 1]
    work = os.path.dirname(build)
    os.makedirs(build, exist_ok=True)
    sources = [os.path.join(work, name) for name in ("run.cpp", "kernel.cpp")]
    include = ["-I" + folder for folder in {include!r}]
    flags = ["-std=c++17", "-O1", "-DASCENDC_CPU_DEBUG=1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-uninitialized"]
    flags += ["-Wno-maybe-uninitialized", "-Wno-unused-variable"]
    made = ["-o", os.path.join(build, "run"), {machine!r}, "-Wl,-rpath," + os.path.dirname({machine!r})]
    sys.exit(subprocess.run([{cxx!r}, *flags, *include, *sources, *made]).returncode)
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.__name__)
def test_a_kernel_in_a_stand_in_for_the_cpu_mode(case, cann, monkeypatch):
    """All of the CPU mode's way but CANN: the sources that are written, what goes in and what comes out."""
    bin = cann.parent / "bin"
    monkeypatch.setenv("PATH", os.pathsep.join((str(bin), os.defpath)))
    plant(cann, "cpu")
    header = cann / build.NEEDS["cpu"]["the header of the CPU mode"][0]
    header.write_text(STAND_IN)
    include = [str(header.parent), str(build.EMULATOR / "include"), str(build.EMULATOR)]
    tool(bin, "make", "")
    tool(bin, "cmake", COMPILES.format(include=include, cxx=build.cpu.compiler(), machine=build.emulator()))
    for a, b in zip(*run_in("cpu", cann.parent / "work", case)):
        assert_close(a, b, 1e-5)
