"""C++ kernels for CPU, built with g++ on first use: python -m ops.build builds all of them beforehand.

A source ops/cpu/NAME.cc becomes one shared library in the cache, named for all that it is made of: the source, the headers beside it, the
compiler, its flags, and this machine's kind of CPU. Any number of processes may ask at once; one builds, the others wait.
"""

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "cpu"
# The parameter: for some processors GCC makes a product and a sum of what could be one instruction, in some loops and not in others, and
# then the same sum would round in different ways; and it is slower here.
FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "--param=avoid-fma-max-bits=0"),
    *("-fPIC", "-shared", "-Wall", "-Wextra"),
)


def cache_folder():
    """Where what can be made again is kept between runs: $XDG_CACHE_HOME/qwen3_mindspore."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "qwen3_mindspore")


def compiler():
    """The path of the C++ compiler, $CXX or g++; None where there is none."""
    return shutil.which(os.environ.get("CXX") or "g++")


def names():
    """Every kernel source, by name."""
    return sorted(path.stem for path in SOURCES.glob("*.cc"))


@functools.cache
def library(name):
    """The path of the shared library of ops/cpu/NAME.cc, built if it is not in the cache. Raises RuntimeError where that fails."""
    cxx = compiler()
    if cxx is None:
        raise RuntimeError(f"the CPU kernel {name!r} needs a C++ compiler, and there is no g++; install it, or use ops.*=reference")
    include, link = _blas() if _needs_blas(name) else ((), ())
    path = Path(cache_folder()) / "kernels" / f"{name}-{_key(name, cxx, (*include, *link))}.so"
    if path.exists():
        return str(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _compile(cxx, SOURCES / f"{name}.cc", include, link, path)
    return str(path)


def _compile(cxx, source, include, link, path):
    handle, aside = tempfile.mkstemp(dir=path.parent, suffix=".new")
    os.close(handle)
    try:
        command = [cxx, *FLAGS, *include, str(source), "-o", aside, *link]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\nfailed:\n{done.stderr[-4000:]}")
        os.chmod(aside, 0o755)
        os.replace(aside, path)
    finally:
        if os.path.exists(aside):
            os.remove(aside)


def _needs_blas(name):
    return '#include "blas.h"' in (SOURCES / f"{name}.cc").read_text()


def _blas():
    """(compile flags, link flags) for OpenBLAS as scipy-openblas32 brings it."""
    import scipy_openblas32 as blas

    folder = blas.get_lib_dir()
    return (f"-I{blas.get_include_dir()}",), (f"-L{folder}", f"-l{blas.get_library()}", f"-Wl,-rpath,{folder}")


def _key(name, cxx, flags):
    """A digest of everything that the library depends on."""
    digest = hashlib.sha256()
    for path in [SOURCES / f"{name}.cc", *sorted(SOURCES.glob("*.h"))]:
        digest.update(path.read_bytes())
    digest.update("\0".join([target(cxx), *FLAGS, *flags]).encode())
    return digest.hexdigest()[:16]


def target(cxx):
    """The compiler, and what it takes this machine's kind of CPU for."""
    return _run(cxx, "--version") + _run(cxx, *FLAGS[:2], "-Q", "--help=target")


@functools.cache
def _run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main():
    for name in names():
        print(f"{name:16} {library(name)}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(str(error))
