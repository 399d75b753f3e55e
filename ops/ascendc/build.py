"""The AscendC operators: emulated ones for CPU, built with g++ on first use, and the operator package for Ascend, built with CANN.

    python -m ops.ascendc.build                 # says what is here, and builds what can be built: the emulated ones, and the package
    python -m ops.ascendc.build --install=DIR   # installs the package into DIR; set ASCEND_CUSTOM_OPP_PATH as it then says

This module is the one place that knows CANN. Sources: op_host/FAMILY.cpp, the definitions and tiling functions of a family of operators,
and op_kernel/qwen_NAME.cpp, the kernel of each.
"""

import argparse
import fcntl
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

HERE = Path(__file__).parent
EMULATOR = HERE.parent / "emulator"
HOST, KERNEL = HERE / "op_host", HERE / "op_kernel"
FLAGS = ("-O2", "-march=native", "-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unused-parameter")
# KERNEL_TYPE_...: cube cores, vector cores
CORES = {"AIV_ONLY": "false, true", "MIX_AIV_1_0": "false, true", "AIC_ONLY": "true, false", "MIX_AIC_1_2": "true, true"}
CHIP, VENDOR = "ascend910b", "qwen3"
COMPILER = "lib/plugin/ascend/custom_compiler"  # MindSpore's, beside its plugin


def families():
    """{family: the names of its operators}"""
    found = {path.stem: [] for path in sorted(HOST.glob("*.cpp"))}
    for path in sorted(KERNEL.glob("*.cpp")):
        found[_family(path)].append(path.stem)
    return found


def _family(path):
    return re.search(r'#include "(\w+)\.h"', path.read_text())[1]


def type_of(name):
    """qwen_rms_norm -> QwenRmsNorm"""
    return "".join(part.capitalize() for part in name.split("_"))


def emulator():
    """The path of the emulator's library. Raises RuntimeError where it cannot be built."""
    return _library("emulator", EMULATOR / "machine.cc", ())


def emulated(family):
    """The path of a library with the function NAME_emulated for each operator of a family, for MindSpore's Custom on CPU."""
    names = families()[family]
    tilings = re.findall(r"BEGIN_TILING_DATA_DEF\((\w+)\)", (HOST / f"{family}_tiling.h").read_text())
    lines = [f'#include "{family}.cpp"', *(f"using optiling::{tiling};" for tiling in tilings)]
    lines += [*(f'#include "{name}.cpp"' for name in names), '#include "launch.h"']
    for name in names:
        kind = re.search(r"KERNEL_TYPE_(\w+)", (KERNEL / f"{name}.cpp").read_text())[1]
        lines.append(f"EMULATED({name}, {type_of(name)}, {CORES[kind]})")
    return built(family, "\n".join(lines) + "\n", (HOST / f"{family}.cpp", *(KERNEL / f"{name}.cpp" for name in names)))


def built(name, text, sources):
    """The library of a text that includes `sources`, written against the emulator."""
    machine = emulator()
    include = [f"-I{folder}" for folder in (EMULATOR / "include", EMULATOR, HOST, KERNEL)]
    # hidden: what inline functions keep would else be shared by all libraries, and outlive the one that made it
    return _library(name, text, ("-fvisibility=hidden", *include, machine, f"-Wl,-rpath,{Path(machine).parent}"), sources)


@functools.cache
def _library(name, source, flags, sources=()):
    """The library of a source, its text or a path; named for all that it is made of, and built once."""
    cxx = cpu.compiler()
    if cxx is None:
        raise RuntimeError("emulated AscendC kernels are built with g++, and there is none; install it, or use ops.*=reference")
    digest = hashlib.sha256()
    for used in sorted([*EMULATOR.rglob("*.h"), *EMULATOR.glob("*.cc"), *HOST.glob("*.h"), *KERNEL.glob("*.h"), *sources]):
        digest.update(used.read_bytes())
    digest.update("\0".join([str(source), *flags, *FLAGS, cpu.target(cxx)]).encode())
    path = Path(cpu.cache_folder()) / "ascendc" / f"lib{name}-{digest.hexdigest()[:16]}.so"
    if path.exists():
        return str(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _compile(cxx, source, flags, path)
    return str(path)


def _compile(cxx, source, flags, path):
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        if isinstance(source, str):
            text, source = source, Path(folder) / "all.cc"
            source.write_text(text)
        aside = Path(folder) / "new.so"
        command = [cxx, *FLAGS, str(source), "-o", str(aside), *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\nfailed:\n{done.stderr[-4000:]}")
        os.replace(aside, path)


def cann():
    """(the folder of CANN, None where there is none; what is missing to build with it, empty if nothing is)"""
    home = os.environ.get("ASCEND_HOME_PATH") or "/usr/local/Ascend/ascend-toolkit/latest"
    if not os.path.isdir(home):
        return None, f"CANN is not in {home}; install its toolkit, and source its set_env.sh, which sets ASCEND_HOME_PATH"
    parts = {
        "the compiler of kernels": ("compiler/ccec_compiler/bin/ccec", "bin/ccec"),
        "the AscendC headers": ("compiler/tikcpp/tikcfw/kernel_operator.h", "include/ascendc"),
        "the template of an operator project": ("tools/op_project_templates/ascendc", "tools/msopgen/template/operator_demo_projects"),
    }
    for what, places in parts.items():
        if not any(os.path.exists(os.path.join(home, place)) for place in places):
            return home, f"CANN in {home} lacks {what} ({' or '.join(places)}); install its toolkit with development files"
    for tool in ("cmake", "bash"):
        if shutil.which(tool) is None:
            return home, f"CANN builds operators with {tool}, which PATH lacks"
    if _compiler_of_mindspore() is None:
        return home, "this MindSpore has no custom_compiler beside its Ascend plugin; install the wheel of PyPI"
    return home, ""


def _compiler_of_mindspore():
    import mindspore

    path = Path(mindspore.__file__).parent / COMPILER / "setup.py"
    return path if path.exists() else None


def not_installed():
    """Why the operators cannot run on Ascend, with the fix; empty if they can. In simulation nothing runs, and nothing is needed."""
    if os.environ.get("MS_SIMULATION_LEVEL"):
        return ""
    places = [path for path in os.environ.get("ASCEND_CUSTOM_OPP_PATH", "").split(":") if path]
    if any(Path(path).name == VENDOR and Path(path).is_dir() for path in places):
        return ""
    return "ASCEND_CUSTOM_OPP_PATH names no folder vendors/qwen3; python -m ops.ascendc.build --install=DIR builds it"


def install(folder):
    """Builds the operator package with CANN and installs it into a folder. Raises RuntimeError where that fails."""
    home, missing = cann()
    if missing:
        raise RuntimeError(missing)
    setup = _compiler_of_mindspore()
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:  # setup.py makes its project beside itself, so it is copied
        for name in ("setup.py", "start.sh"):
            shutil.copy(setup.parent / name, work)
        command = [sys.executable, "setup.py", "-o", str(HOST), "-k", str(KERNEL), "--soc_version", CHIP, "--vendor_name", VENDOR]
        command += ["--ascend_cann_package_path", home, "--install_path", os.path.abspath(folder), "-i"]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True)
        log = Path(work, "build.log")
        if done.returncode:
            words = log.read_text()[-4000:] if log.exists() else ""
            raise RuntimeError(f"{' '.join(command)}\nfailed:\n{words}{(done.stdout + done.stderr)[-4000:]}")
    return os.path.join(os.path.abspath(folder), "vendors", VENDOR)


def main():
    parser = argparse.ArgumentParser(description="Builds the AscendC operators: emulated for CPU, and with CANN for Ascend.")
    parser.add_argument("--install", metavar="DIR", help="install the package for Ascend there")
    args = parser.parse_args()
    for family, names in families().items():
        print(f"{family:16} {len(names)} operators, emulated: {emulated(family)}", flush=True)
    home, missing = cann()
    if missing:
        print(f"package for Ascend: not built. {missing}")
    elif not args.install:
        print(f"package for Ascend: CANN is in {home}; --install=DIR builds the package with it")
    else:
        print(f"package for Ascend: export ASCEND_CUSTOM_OPP_PATH={install(args.install)}:$ASCEND_CUSTOM_OPP_PATH")
    if missing and args.install:
        raise RuntimeError("nothing was installed")


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(str(error))
