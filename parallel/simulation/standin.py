"""A stand-in for CANN, with which MindSpore's Ascend plugin loads and compiles on a machine without an NPU.

MindSpore's wheel contains its Ascend plugin, but not the libraries of Huawei's CANN that the plugin links to. One generated library of
functions that do nothing replaces them. A process with the variables of `environment(...)` can then `set_device("Ascend")` and compile a
program for one rank of a cluster in MindSpore's simulation mode: MindSpore partitions it, plans its memory and runs it without computing.
Values are meaningless, kernels do not check their arguments, and no allocation fails.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TOOLS = {"gcc": "gcc", "nm": "binutils", "readelf": "binutils"}  # command -> Debian package
LOADED_BY_NAME = ("libopapi.so", "libacl_op_compiler.so", "libacl_tdt_channel.so")  # loaded with dlopen, so that no library lists them
TYPE_INFO = ("_ZTV", "_ZTI", "_ZTS")  # C++ symbols that are data: virtual tables, type information, names of types
PYTHON = "latest/cann/opp/built-in/op_impl/ai_core/tbe"  # MindSpore checks the versions of CANN's Python modules here
MODULES = {  # without `te`: MindSpore warns if it is missing, but imports all of it if it exists
    "hccl/__init__.py": "from . import sys_version\n",
    "hccl/sys_version.py": '__sys_version__ = "8.5.0"\n',
}
HEADERS = {
    "latest/cann/include/acl/acl_base.h": "#pragma once\n#include <cstdint>\n"
}  # included by the wrapper that MindSpore compiles for a custom op

# The functions that must do more than return 0.
SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

static long zeros[4096];
static long nothing(void) { return 0; }
static void *object(void) { return zeros; }

/* Zeros in which word 1 is the header of an empty std::map: its leftmost and rightmost node are the header itself. */
static void *empty(long *words) {
  if (!words[3]) words[3] = words[4] = (long)(words + 1);
  return words;
}

static int handle(void **out) { *out = zeros; return 0; }
int aclrtCreateContext(void **out, int device) { return handle(out); }
int aclrtGetCurrentContext(void **out) { return handle(out); }
int aclrtCreateStream(void **out) { return handle(out); }
int aclrtCreateStreamWithConfig(void **out, unsigned priority, unsigned flag) { return handle(out); }
int aclrtCreateEvent(void **out) { return handle(out); }
int aclrtCreateEventWithFlag(void **out, unsigned flag) { return handle(out); }
int aclrtCreateEventExWithFlag(void **out, unsigned flag) { return handle(out); }

const char *aclrtGetSocName(void) { return getenv("STANDIN_SOC"); }
int aclrtGetMemInfo(int kind, size_t *available, size_t *total) {
  *available = *total = (size_t)(atof(getenv("STANDIN_HBM_GIB")) * (1l << 30));
  return 0;
}
int aclrtMallocHost(void **out, size_t bytes) { *out = calloc(1, bytes ? bytes : 1); return 0; }
int aclrtFreeHost(void *memory) { free(memory); return 0; }

/* Returns a ge::Operator, 24 bytes, by value: x86-64 passes the place for it as a hidden first argument. */
void *_ZN2ge15OperatorFactory14CreateOperatorEPKcS2_(void *out) { return memset(out, 0, 24); }

/* Functions of CANN that are looked up by name at run time exist too. */
static const char *families[] = {"acl", "Hccl", "hccl", "rt", "Ascend", "mspti", "tsd", "ge", "Ge", "halM", "Adx", "Adump",
                                 "ASD", "Lcal", "Shmem", "mssanitizer", 0};
void *dlsym(void *library, const char *name) {
  static void *(*real)(void *, const char *);
  if (!real) real = dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.34");
  if (!real) real = dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.2.5"); /* before glibc 2.34 */
  void *found = real(library, name);
  if (found || library == RTLD_NEXT || library == RTLD_DEFAULT || !name) return found;
  for (const char **family = families; *family; family++)
    if (!strncmp(name, *family, strlen(*family))) return strncmp(name, "aclCreate", 9) ? (void *)nothing : (void *)object;
  return found;
}
"""


def unavailable():
    """Returns why the stand-in cannot be built on this machine, with the fix; None if it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the stand-in for CANN follows the calling convention of Linux on x86_64; this is {sys.platform} on {platform.machine()}"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        packages = " ".join(sorted({TOOLS[tool] for tool in missing}))
        return f"the stand-in for CANN is built with {', '.join(missing)}, which PATH lacks; apt-get install {packages}"
    if not list(_wheel().glob("lib/plugin/libmindspore_ascend*.so*")):
        return f"the MindSpore in {_wheel()} has no Ascend plugin; install the wheel of PyPI: pip install mindspore"
    return None


def environment(world, rank, soc="Ascend910B2", hbm_gib=64):
    """Returns environment variables for a process that runs as rank `rank` of `world` simulated NPUs.

    soc: the name of the chip. hbm_gib: the size of its memory. The first call builds the library. Raises RuntimeError if it cannot.
    """
    cann = library()
    lib = _wheel() / "lib"
    search = [cann / "latest/cann/lib64", lib, lib / "plugin", lib / "plugin/ascend"]
    return {
        "LD_LIBRARY_PATH": _joined("LD_LIBRARY_PATH", *search),
        "LD_PRELOAD": str(search[0] / "libascendcl.so"),
        "PYTHONPATH": _joined("PYTHONPATH", cann / PYTHON),
        "ASCEND_OPP_PATH": str(cann / "latest/cann/opp"),
        "STANDIN_SOC": soc,
        "STANDIN_HBM_GIB": str(hbm_gib),
        "MS_SIMULATION_LEVEL": "1",  # 1: compile and plan memory, compute nothing
        "RANK_SIZE": str(world),
        "RANK_ID": str(rank),
    }


def _joined(variable, *paths):
    return os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get(variable)])])


def library(cache=None):
    """Returns the folder of the library for the installed MindSpore. The first call builds it in `cache` (default ~/.cache)."""
    reason = unavailable()
    if reason:
        raise RuntimeError(reason)
    cache = Path(cache or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen3_mindspore"
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    folder = cache / f"cann-for-mindspore-{importlib.metadata.version('mindspore')}-{source}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=cache))
        try:
            _make(aside)
            aside.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process has built it meanwhile
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def _make(folder):
    names, symbols = _missing()
    lib64 = folder / "latest/cann/lib64"
    for path in (lib64, folder / "latest/cann/opp", folder / "latest/cann/opp_kernel"):
        path.mkdir(parents=True, exist_ok=True)
    (folder / "latest/lib64").symlink_to("cann/lib64")  # MindSpore 2.7 looks in `latest`, MindSpore 2.9 in `latest/cann`
    for name, text in MODULES.items():
        (folder / PYTHON / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / PYTHON / name).write_text(text)
    for name, text in HEADERS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    source = folder / "standin.c"
    source.write_text(SOURCE + "".join(_definition(i, name) for i, name in enumerate(symbols) if f" {name}(" not in _flat(SOURCE)))
    target = lib64 / "libascendcl.so"
    built = subprocess.run(["gcc", "-w", "-O1", "-shared", "-fPIC", "-o", target, source, "-ldl"], capture_output=True, text=True)
    if built.returncode:
        raise RuntimeError(f"gcc could not build the stand-in for CANN:\n{built.stderr}")
    for name in names - {target.name}:
        (lib64 / name).symlink_to(target.name)


def _flat(source):
    return source.replace("*", " ")


def _definition(i, name):
    if name.startswith(TYPE_INFO):
        return f"void *{name}[64];\n"
    if name.startswith("_Z"):
        return f"static long words{i}[512];\nvoid *{name}(void) {{ return empty(words{i}); }}\n"
    return f"long {name}(void) {{ return 0; }}\n"


def _missing():
    """Returns (names of libraries, symbols) that the plugin needs and neither the wheel nor the system has."""
    wheel = [path for path in sorted(_wheel().rglob("*.so*")) if path.is_file() and _runs_here(path)]
    plugin = [path for path in wheel if path.is_relative_to(_wheel() / "lib/plugin") and "gpu" not in str(path.relative_to(_wheel()))]
    listed = {name for path in plugin for name in _needed(path)} - {path.name for path in wheel}
    system = {name: _system_library(name) for name in sorted(listed)}
    absent = {name for name, path in system.items() if path is None}
    defined = {name for path in [*wheel, *filter(None, system.values())] for name, _ in _symbols(path, "--defined-only")}
    needed = {
        name for path in plugin for name, kind in _symbols(path, "--undefined-only") if kind not in "wv"
    }  # weak symbols may stay undefined
    ours = sorted(name for name in needed - defined if not name.startswith(("Py", "_Py")))  # those of Python are in its executable
    return absent | set(LOADED_BY_NAME), ours


@functools.lru_cache(maxsize=1)
def _wheel():
    return Path(importlib.util.find_spec("mindspore").origin).parent


def _machine(path):
    with open(path, "rb") as f:
        header = f.read(20)
    return header[18:20] if header[:4] == b"\x7fELF" else None


def _runs_here(path):
    return _machine(path) == _machine(sys.executable)  # the plugin also has libraries for the aarch64 cores of the NPU


def _needed(path):
    lines = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.partition("[")[2].rstrip("]") for line in lines if "(NEEDED)" in line]


def _symbols(path, which):
    """Returns [(name, kind)] of the dynamic symbols of a library."""
    lines = subprocess.run(["nm", "-D", which, path], capture_output=True, text=True, check=True).stdout.splitlines()
    return [(words[-1].partition("@")[0], words[-2]) for words in map(str.split, lines)]


def _system_library(name):
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    return None if found == name else found
