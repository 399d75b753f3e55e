"""Which implementation of each op a model is built with.

    kernels = choose({"attention": "reference"}, device="CPU", dtype="float32")
    attend = pick(kernels, "attention")(scale)

An op's module has a factory for each implementation: `reference`, in plain MindSpore ops; `cpu`, in C++. Where a module has several
functions, theirs are named `reference_add`, `cpu_add` and so on.
"""

import importlib
from dataclasses import asdict, dataclass, fields

from ops import build

IMPLEMENTATIONS = ("reference", "cpu")


@dataclass(frozen=True)
class Kernels:
    """For each op the name of its implementation."""

    adamw: str = "reference"
    attention: str = "reference"
    cache_write: str = "reference"
    cross_entropy: str = "reference"
    embedding: str = "reference"
    grouped_matmul: str = "reference"
    matmul: str = "reference"
    rms_norm: str = "reference"
    rope: str = "reference"
    routing: str = "reference"
    sampling: str = "reference"
    swiglu: str = "reference"


OPS = tuple(field.name for field in fields(Kernels))
ANY_DTYPE = ("adamw", "sampling")  # not computed in the model's dtype


def pick(kernels, op, function=""):
    """The factory of an op's implementation, or of one of its functions."""
    name = getattr(kernels, op)
    return getattr(importlib.import_module(f"ops.{op}"), f"{name}_{function}" if function else name)


def choose(asked, device, dtype):
    """The Kernels for a device (MindSpore's name) and the dtype that the model computes in.

    asked: {op: implementation}, in which auto, the default, is the fastest that serves. Raises ValueError for an op or implementation
    that does not exist, or that cannot do what it is asked for.
    """
    unknown = [op for op in asked if op not in OPS]
    if unknown:
        raise ValueError(f"ops.{unknown[0]}: there is no such op; they are {', '.join(OPS)}")
    return Kernels(**{op: _choose(op, asked.get(op, "auto"), device, dtype) for op in OPS})


def _choose(op, asked, device, dtype):
    missing = _missing(op, device, dtype)
    if asked == "auto":
        return "reference" if missing else "cpu"
    if asked not in IMPLEMENTATIONS:
        raise ValueError(f"ops.{op}={asked!r} is not one of auto, {', '.join(IMPLEMENTATIONS)}")
    if asked == "cpu" and missing:
        raise ValueError(f"ops.{op}=cpu {missing}; use --config.ops.{op}=reference")
    return asked


def _missing(op, device, dtype):
    """Why an op's C++ kernel cannot serve; empty if it can."""
    if device != "CPU":
        return f"runs on CPU, and this is {device}"
    if dtype != "float32" and op not in ANY_DTYPE:
        return f"computes in float32, and the model in {dtype}"
    if build.compiler() is None:
        return "is built with g++ on first use, and there is none"
    return ""


def describe(kernels, device):
    """One line: the ops of each implementation, and why the C++ kernels are not used where they could be."""
    groups = {}
    for op, name in asdict(kernels).items():
        groups.setdefault(name, []).append(op)
    if len(groups) == 1:
        text = f"{next(iter(groups))}, all of them"
    else:
        text = "; ".join(f"{name}: {' '.join(ops)}" for name, ops in sorted(groups.items()))
    slow = device == "CPU" and "reference" in groups and build.compiler() is None
    return text + (" (no g++ was found to build the C++ kernels with)" if slow else "")
