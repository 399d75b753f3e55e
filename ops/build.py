"""Builds the C++ kernels for CPU with g++ on first use. `python -m ops.build` builds all of them beforehand.

Each source ops/cpu/NAME.cc becomes a shared library in the cache (ops/cache.py). Its file name has a digest of the source, the headers, the
compiler, the flags and the CPU type of this machine.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from ops import cache

SOURCES = Path(__file__).parent / "cpu"
# avoid-fma-max-bits=0: for some processors GCC replaces fused multiply-adds by a product and a sum in some loops only. Equal sums would
# then round differently, and it is slower.
FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "--param=avoid-fma-max-bits=0"),
    *("-fPIC", "-shared", "-Wall", "-Wextra"),
)


def compiler():
    """Returns the path of the C++ compiler, $CXX or g++; None if there is none."""
    return shutil.which(os.environ.get("CXX") or "g++")


def names():
    """Returns the names of all kernel sources."""
    return sorted(path.stem for path in SOURCES.glob("*.cc"))


@functools.cache
def library(name):
    """Returns the path of the shared library of ops/cpu/NAME.cc, and builds it if needed. Raises RuntimeError if that fails."""
    cxx = compiler()
    if cxx is None:
        raise RuntimeError(f"the CPU kernel {name!r} needs a C++ compiler, and there is no g++; install it, or use ops.*=reference")
    include, link = _blas() if _needs_blas(name) else ((), ())
    path = cache.folder("kernels") / f"{name}-{_key(name, cxx, (*include, *link))}.so"
    return cache.library(path, lambda file: compile_library([cxx, *FLAGS, *include, str(SOURCES / f"{name}.cc"), "-o", str(file), *link]))


def compile_library(command):
    """Runs a compiler. Raises RuntimeError with its complaint if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\nfailed:\n{done.stderr[-4000:]}")


def _needs_blas(name):
    return '#include "blas.h"' in (SOURCES / f"{name}.cc").read_text()


def _blas():
    """Returns (compile flags, link flags) for the OpenBLAS of the package scipy-openblas32."""
    import scipy_openblas32 as blas

    folder = blas.get_lib_dir()
    return (f"-I{blas.get_include_dir()}",), (f"-L{folder}", f"-l{blas.get_library()}", f"-Wl,-rpath,{folder}")


def _key(name, cxx, flags):
    """Returns a digest of everything that a library depends on."""
    digest = hashlib.sha256()
    for path in [SOURCES / f"{name}.cc", *sorted(SOURCES.glob("*.h"))]:
        digest.update(path.read_bytes())
    digest.update("\0".join([target(cxx), *FLAGS, *flags]).encode())
    return digest.hexdigest()[:16]


def target(cxx):
    """Returns the version of the compiler and its settings for the CPU of this machine, as text."""
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
