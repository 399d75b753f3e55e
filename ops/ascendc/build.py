"""Builds the AscendC operators: emulated ones for CPU with g++ on first use, and the operator package for Ascend with CANN.

    python -m ops.ascendc.build                 # builds the emulated operators, and prints what is missing to use CANN
    python -m ops.ascendc.build --install=DIR   # installs the package into DIR, and prints the ASCEND_CUSTOM_OPP_PATH to set

Only this module calls CANN. op_host/FAMILY.cpp has the definitions and tiling functions of a family of operators, and
op_kernel/qwen_NAME.cpp the kernel of each operator. modes/run.cpp runs a kernel without a package, in CANN's CPU mode or in its simulator;
tests/ops/test_ascendc_modes.py uses it.
"""

import argparse
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ops import build as cpu
from ops import cache

HERE = Path(__file__).parent
EMULATOR = HERE.parent / "emulator"
HOST, KERNEL, RUN = HERE / "op_host", HERE / "op_kernel", HERE / "modes" / "run.cpp"
FLAGS = ("-O2", "-march=native", "-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unused-parameter")
# KERNEL_TYPE_... -> whether it uses cube cores, vector cores
CORES = {"AIV_ONLY": "false, true", "MIX_AIV_1_0": "false, true", "AIC_ONLY": "true, false", "MIX_AIC_1_2": "true, true"}
CHIP, VENDOR = "ascend910b", "qwen3"
COMPILER = "lib/plugin/ascend/custom_compiler"  # in MindSpore's package
PART = "Ascend910B1"  # the chip for CANN's CPU mode and simulator
MODES = {"cpu": "CPU mode", "sim": "simulator"}
CORE_MODES = {
    "AIV_ONLY": "AIV_MODE",
    "MIX_AIV_1_0": "AIV_MODE",
    "AIC_ONLY": "AIC_MODE",
    "MIX_AIC_1_2": "MIX_MODE",
}  # the kernel modes of CANN's CPU mode
WRITTEN_FOR = ("9.0", "9.1")  # the versions of CANN whose public headers the kernels were compared with
VERSIONS = ("version.cfg", "*/ascend_toolkit_install.info", "compiler/version.info", "share/info/*/version.info")  # files that say it
SYSTEM_WORKSPACE = 16 << 20  # the bytes of a workspace that CANN uses itself

_COMPILER = {"the compiler of kernels": ("compiler/ccec_compiler/bin/ccec", "bin/ccec")}
_HEADERS = {"the AscendC headers": ("compiler/tikcpp/tikcfw/kernel_operator.h", "include/ascendc")}
# {target: {component: its possible paths in CANN}}. CANN 9.1 has tools/cpudebug where other versions have tools/tikicpulib.
NEEDS = {
    "package": {
        **_COMPILER,
        **_HEADERS,
        "the template of an operator project": ("tools/op_project_templates/ascendc", "tools/msopgen/template/operator_demo_projects"),
    },
    "cpu": {
        **_HEADERS,
        "the CMake package of the CPU mode": (
            "tools/tikicpulib/lib/cmake/tikicpulib-config.cmake",
            "tools/cpudebug/cmake/tikicpulib-config.cmake",
        ),
        "the header of the CPU mode": ("tools/tikicpulib/lib/include/tikicpulib.h", "tools/cpudebug/include/tikicpulib.h"),
        f"the libraries of the CPU mode for {PART}": (f"tools/tikicpulib/lib/{PART}", f"tools/cpudebug/lib64/{PART}"),
    },
    "sim": {
        **_COMPILER,
        **_HEADERS,
        "ascendc_library for CMake": (
            "compiler/tikcpp/ascendc_kernel_cmake/ascendc.cmake",
            "tools/tikcpp/ascendc_kernel_cmake/ascendc.cmake",
        ),
        "the header of its runtime": ("include/acl/acl.h",),
        f"the simulator of {PART}": (f"tools/simulator/{PART}/lib/libruntime_camodel.so",),
    },
}
TOOLS = {"package": ("cmake", "bash"), "cpu": ("cmake", "make"), "sim": ("cmake", "make")}


def families():
    """Returns {family: the names of its operators}."""
    found = {path.stem: [] for path in sorted(HOST.glob("*.cpp"))}
    for path in sorted(KERNEL.glob("*.cpp")):
        found[_family(path)].append(path.stem)
    return found


def _family(path):
    return re.search(r'#include "(\w+)\.h"', path.read_text())[1]


def type_of(name):
    """Returns the type name of an operator: QwenRmsNorm for qwen_rms_norm."""
    return "".join(part.capitalize() for part in name.split("_"))


def emulator():
    """Returns the path of the emulator's library, and builds it if needed. Raises RuntimeError if that fails."""
    return _library("emulator", EMULATOR / "machine.cc", ())


def emulated(family):
    """Returns the path of a library with a function NAME_emulated for each operator of a family, for MindSpore's Custom on CPU."""
    names = families()[family]
    tilings = re.findall(r"BEGIN_TILING_DATA_DEF\((\w+)\)", (HOST / f"{family}_tiling.h").read_text())
    lines = [f'#include "{family}.cpp"', *(f"using optiling::{tiling};" for tiling in tilings)]
    lines += [*(f'#include "{name}.cpp"' for name in names), '#include "launch.h"']
    for name in names:
        kind = re.search(r"KERNEL_TYPE_(\w+)", (KERNEL / f"{name}.cpp").read_text())[1]
        lines.append(f"EMULATED({name}, {type_of(name)}, {CORES[kind]})")
    return built(family, "\n".join(lines) + "\n", (HOST / f"{family}.cpp", *(KERNEL / f"{name}.cpp" for name in names)))


def built(name, text, sources):
    """Returns the path of the library of a source text that includes `sources` and uses the emulator."""
    machine = emulator()
    include = [f"-I{folder}" for folder in (EMULATOR / "include", EMULATOR, HOST, KERNEL)]
    # hidden: otherwise all libraries would share the static variables of inline functions
    return _library(name, text, ("-fvisibility=hidden", *include, machine, f"-Wl,-rpath,{Path(machine).parent}"), sources)


@functools.cache
def _library(name, source, flags, sources=()):
    """Returns the path of the library of a source (text or Path), built if needed. Its name has a digest of everything it depends on."""
    cxx = cpu.compiler()
    if cxx is None:
        raise RuntimeError("emulated AscendC kernels are built with g++, and there is none; install it, or use ops.*=reference")
    digest = hashlib.sha256()
    for used in sorted([*EMULATOR.rglob("*.h"), *EMULATOR.glob("*.cc"), *HOST.glob("*.h"), *KERNEL.glob("*.h"), *sources]):
        digest.update(used.read_bytes())
    digest.update("\0".join([str(source), *flags, *FLAGS, cpu.target(cxx)]).encode())
    path = cache.folder("ascendc") / f"lib{name}-{digest.hexdigest()[:16]}.so"
    return cache.library(path, lambda file: _compile(cxx, source, flags, file))


def _compile(cxx, source, flags, file):
    if isinstance(source, str):
        text, source = source, file.with_name("all.cc")
        source.write_text(text)
    cpu.compile_library([cxx, *FLAGS, str(source), "-o", str(file), *flags])


def home():
    """Returns the folder of CANN, whether or not it exists."""
    return os.environ.get("ASCEND_HOME_PATH") or "/usr/local/Ascend/ascend-toolkit/latest"


def version():
    """Returns the version of the CANN in home(), such as "9.0.1"; "" if none of its files says it."""
    for pattern in VERSIONS:
        for path in sorted(Path(home()).glob(pattern)):
            if found := re.search(r"(?im)^\s*\w*version\w*\s*=\s*\[?(?:[A-Za-z-]*:)?(\d+(?:\.\d+)+)", path.read_text(errors="replace")):
                return found[1]
    return ""


def missing(what):
    """Returns a text of everything that is missing for a target ("package", "cpu" or "sim"), with paths; "" if nothing is."""
    cann = home()
    if not os.path.isdir(cann):
        return f"CANN is not in {cann}; install its toolkit, and source its set_env.sh, which sets ASCEND_HOME_PATH"
    lacks = [f"{part} ({' or '.join(places)})" for part, places in NEEDS[what].items() if _place(cann, places) is None]
    tools = [tool for tool in TOOLS[what] if shutil.which(tool) is None]
    found = [f"CANN in {cann} lacks {', '.join(lacks)}; install its toolkit with development files"] if lacks else []
    found += [f"PATH lacks {', '.join(tools)}"] if tools else []
    if version() and not version().startswith(tuple(f"{known}." for known in WRITTEN_FOR)) and version() not in WRITTEN_FOR:
        found.append(f"CANN in {cann} is {version()}, and the kernels are written for {' and '.join(WRITTEN_FOR)}; install one of these")
    if what == "package" and _compiler_of_mindspore() is None:
        found.append("this MindSpore has no custom_compiler beside its Ascend plugin; install the wheel of PyPI")
    return ". ".join(found)


def _place(cann, places):
    return next((path for path in (os.path.join(cann, place) for place in places) if os.path.exists(path)), None)


def _compiler_of_mindspore():
    import mindspore

    path = Path(mindspore.__file__).parent / COMPILER / "setup.py"
    return path if path.exists() else None


def not_installed():
    """Returns why the operators cannot run on Ascend, with the fix; "" if they can. Simulation runs no kernels, so it needs nothing."""
    if os.environ.get("MS_SIMULATION_LEVEL"):
        return ""
    places = [path for path in os.environ.get("ASCEND_CUSTOM_OPP_PATH", "").split(":") if path]
    if any(Path(path).name == VENDOR and Path(path).is_dir() for path in places):
        return ""
    return "ASCEND_CUSTOM_OPP_PATH names no folder vendors/qwen3; python -m ops.ascendc.build --install=DIR builds it"


def install(folder):
    """Builds the operator package with CANN and installs it into a folder. Returns its path. Raises RuntimeError if that fails."""
    if lacks := missing("package"):
        raise RuntimeError(lacks)
    setup = _compiler_of_mindspore()
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:  # setup.py writes into its own folder, so it is copied
        for name in ("setup.py", "start.sh"):
            shutil.copy(setup.parent / name, work)
        command = [sys.executable, "setup.py", "-o", str(HOST), "-k", str(KERNEL), "--soc_version", CHIP, "--vendor_name", VENDOR]
        command += ["--ascend_cann_package_path", home(), "--install_path", os.path.abspath(folder), "-i"]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True)
        log = Path(work, "build.log")
        if done.returncode:
            words = log.read_text()[-4000:] if log.exists() else ""
            raise RuntimeError(f"{' '.join(command)}\nfailed:\n{words}{(done.stdout + done.stderr)[-4000:]}")
    return os.path.join(os.path.abspath(folder), "vendors", VENDOR)


def program(mode, name, key, folder):
    """Builds in `folder` the program of modes/run.cpp, which runs a kernel with a tiling key in a mode of CANN ("cpu" or "sim").

    Returns (the path of the program, the environment that it needs). Raises RuntimeError if that fails.
    """
    if lacks := missing(mode):
        raise RuntimeError(lacks)
    folder, cann = Path(folder), home()
    texts = {"kernel.cpp": _kernel(name, key), "call.h": _CALLS[mode](name, key), "CMakeLists.txt": _CMAKE[mode]}
    for file, text in {**texts, "run.cpp": RUN.read_text()}.items():
        (folder / file).write_text(text)
    simulator = os.path.join(cann, "tools/simulator", PART, "lib")
    libraries = [simulator, os.path.join(cann, "runtime/lib64/stub")]
    if mode == "cpu":
        libraries = [os.path.join(cann, place) for place in ("tools/tikicpulib/lib", "tools/cpudebug/lib64")]
        libraries += [*(os.path.join(library, PART) for library in libraries), simulator]
    libraries += filter(None, [os.environ.get("LD_LIBRARY_PATH")])  # an empty path would mean the current folder
    env = {**os.environ, "LD_LIBRARY_PATH": ":".join(libraries), "CAMODEL_LOG_PATH": str(folder)}
    # Makefiles, since CANN's extraction of host stubs does not find the paths that CMake writes for Ninja
    command = ["cmake", "-S", str(folder), "-B", str(folder / "build"), "-G", "Unix Makefiles", "-DCMAKE_BUILD_TYPE=Release"]
    command += [f"-DRUN_MODE={mode}", f"-DSOC_VERSION={PART}", f"-DASCEND_CANN_PACKAGE_PATH={cann}"]
    if mode == "sim":
        command.append(f"-DASCENDC_CMAKE={_place(cann, NEEDS[mode]['ascendc_library for CMake'])}")
    for step in (command, ["cmake", "--build", str(folder / "build"), "--verbose"]):
        done = subprocess.run(step, capture_output=True, text=True, env=env)
        if done.returncode:
            raise RuntimeError(f"{' '.join(step)}\nfailed:\n{(done.stdout + done.stderr)[-4000:]}")
    return folder / "build" / "run", env


def _kernel(name, key):
    """Returns the source text of a kernel, with the struct of its tiling data and the macro that reads it, which a package would add."""
    kernel = KERNEL / f"{name}.cpp"
    structs = (HOST / f"{_family(kernel)}_tiling.h").read_text()
    lines = [f"#define TILING_KEY_VAR {key}", '#include "kernel_operator.h"']
    for tiling, fields in re.findall(r"BEGIN_TILING_DATA_DEF\((\w+)\);?(.*?)END_TILING_DATA_DEF", structs, re.S):
        lines += [f"struct {tiling} {{", *(f"  {kind} {field};" for kind, field in re.findall(r"FIELD_DEF\((\w+), (\w+)\)", fields)), "};"]
    return "\n".join([*lines, _READ_TILING, f'#include "{kernel}"']) + "\n"


_READ_TILING = """\
#undef GET_TILING_DATA_WITH_STRUCT
#define GET_TILING_DATA_WITH_STRUCT(type, name, from)                   \\
  type name;                                                            \\
  for (uint32_t word = 0; word < sizeof(type) / sizeof(uint32_t); word++) \\
  reinterpret_cast<uint32_t *>(&name)[word] = reinterpret_cast<__gm__ uint32_t *>(from)[word]"""


def _pointers(name):
    return (KERNEL / f"{name}.cpp").read_text().split("{", 1)[0].count("GM_ADDR ")


def _call_on_cpu(name, key):
    n, kind = _pointers(name), re.search(r"KERNEL_TYPE_(\w+)", (KERNEL / f"{name}.cpp").read_text())[1]
    return f"""\
#pragma once
#include "tikicpulib.h"
#define ARRAYS {n}
extern "C" __global__ __aicore__ void {name}({", ".join(["GM_ADDR"] * n)});
inline void Call(uint32_t blocks, uint8_t **a) {{
  AscendC::SetKernelMode(KernelMode::{CORE_MODES[kind]});
  ICPU_SET_TILING_KEY({key});
  ICPU_RUN_KF({name}, blocks, {", ".join(f"a[{i}]" for i in range(n))});
}}
"""


def _call_on_device(name, key):
    n = _pointers(name)
    return f"""\
#pragma once
#include "acl/acl.h"
#include "aclrtlaunch_{name}.h"
#define ARRAYS {n}
inline void Call(uint32_t blocks, aclrtStream stream, uint8_t **a) {{
  ACLRT_LAUNCH_KERNEL({name})(blocks, stream, {", ".join(f"a[{i}]" for i in range(n))});
}}
"""


_CALLS = {"cpu": _call_on_cpu, "sim": _call_on_device}
_CMAKE = {
    "cpu": """\
cmake_minimum_required(VERSION 3.16)
project(kernel LANGUAGES CXX)
set(CMAKE_CXX_STANDARD 17)
list(APPEND CMAKE_PREFIX_PATH ${ASCEND_CANN_PACKAGE_PATH}/tools/tikicpulib/lib/cmake ${ASCEND_CANN_PACKAGE_PATH}/tools/cpudebug/cmake)
find_package(tikicpulib REQUIRED)
add_executable(run run.cpp kernel.cpp)
target_compile_definitions(run PRIVATE ASCENDC_CPU_DEBUG=1)
target_link_directories(run PRIVATE ${ASCEND_CANN_PACKAGE_PATH}/lib64)
target_link_libraries(run PRIVATE tikicpulib::${SOC_VERSION} ascendcl c_sec)
""",
    # One source only, since one that only declares a kernel gets a stub too. The libraries of the simulator are linked at run time.
    "sim": """\
cmake_minimum_required(VERSION 3.16)
project(kernel)
set(CMAKE_CXX_STANDARD 17)
include(${ASCENDC_CMAKE})
ascendc_library(kernels SHARED kernel.cpp)
ascendc_compile_definitions(kernels PRIVATE -DHAVE_WORKSPACE -DHAVE_TILING)
add_executable(run run.cpp)
target_link_libraries(run PRIVATE kernels)
target_link_options(run PRIVATE -Wl,-rpath-link,${ASCEND_CANN_PACKAGE_PATH}/tools/simulator/${SOC_VERSION}/lib -Wl,--allow-shlib-undefined)
""",
}


def main():
    parser = argparse.ArgumentParser(description="Builds the AscendC operators: emulated for CPU, and with CANN for Ascend.")
    parser.add_argument("--install", metavar="DIR", help="install the package for Ascend there")
    args = parser.parse_args()
    for family, names in families().items():
        print(f"{family:16} {len(names)} operators, emulated: {emulated(family)}", flush=True)
    for mode, words in MODES.items():
        print(f"CANN's {words}: {missing(mode) or f'in {home()}; pytest -m slow tests/ops/test_ascendc_modes.py runs kernels in it'}")
    if args.install:
        print(f"package for Ascend: export ASCEND_CUSTOM_OPP_PATH={install(args.install)}:$ASCEND_CUSTOM_OPP_PATH")
    else:
        print(f"package for Ascend: {missing('package') or f'CANN is in {home()}; --install=DIR builds the package with it'}")


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(str(error))
