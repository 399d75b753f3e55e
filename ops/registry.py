"""Chooses the implementation of each op for a model.

    kernels = choose({"attention": "reference"}, device="CPU", dtype="float32")
    attend = pick(kernels, "attention")(scale)

The module of an op has a factory for each of its implementations:

    reference   plain MindSpore ops, on every device
    cpu         a C++ kernel for CPU
    vendor      a MindSpore kernel for Ascend. vendor_missing(use) says why it cannot be used, and returns "" if it can
    ascendc     our own kernel for Ascend, in the module ops/ascendc/OP.py; an emulator runs it on CPU. It is used only if asked for

A module with several functions has factories such as `reference_add` and `cpu_add`.
"""

import importlib
import inspect
from dataclasses import asdict, dataclass, fields, replace

from ops import build
from ops.ascendc import build as ascendc

# The most documents of a call of MindSpore's flash attention, by its docstring; CANN's documentation of the function under it says 2,048
LENGTHS = 1024
DEVICES = {"vendor": "Ascend", "cpu": "CPU"}  # implementations that run on one device only; auto tries them in this order
IMPLEMENTATIONS = ("reference", *reversed(DEVICES), "ascendc")


@dataclass(frozen=True)
class Kernels:
    """The name of the implementation of each op."""

    adamw: str = "reference"
    attention: str = "reference"
    cache_write: str = "reference"
    cross_entropy: str = "reference"
    decode_attention: str = "reference"
    decode_mlp: str = "reference"
    embedding: str = "reference"
    grouped_matmul: str = "reference"
    head_loss: str = "reference"
    matmul: str = "reference"
    paged_attention: str = "reference"
    paged_write: str = "reference"
    rms_norm: str = "reference"
    rope: str = "reference"
    routing: str = "reference"
    rows_matmul: str = "reference"
    sampling: str = "reference"
    stack_write: str = "reference"
    swiglu: str = "reference"


@dataclass(frozen=True)
class Use:
    """The properties of a model and device on which the choice of implementations depends.

    device: MindSpore's name. dtype: the compute dtype of the model. head_dim: None if not known; then no kernel that depends on it is used.
    router_bias: whether the choice of experts has a bias. expert_shards: the number of ranks that experts are spread over. spans: the
    number of ranks of an attention ring. documents: 0, or the most documents of a row if attention takes them by their lengths. padded:
    whether grouped_matmul takes blocks of several rows, which are padded. options: pairs of an op and the name of an option that its
    factory has to take.
    """

    device: str
    dtype: str
    head_dim: int | None = None
    router_bias: bool = False
    expert_shards: int = 1
    spans: int = 1
    documents: int = 0
    padded: bool = False
    options: tuple = ()


OPS = tuple(field.name for field in fields(Kernels))
PARTS = {  # fused ops -> the ops that they replace. A fused op is chosen if all of these have its implementation
    "decode_attention": ("attention", "cache_write", "matmul", "paged_attention", "paged_write", "rms_norm", "rope"),
    "decode_mlp": ("matmul", "rms_norm", "swiglu"),
    "head_loss": ("cross_entropy", "matmul"),
}
ANY_DTYPE = ("adamw", "sampling", "stack_write")  # ops whose kernels do not depend on the compute dtype


def pick(kernels, op, function=""):
    """Returns the factory of the chosen implementation of an op, or of its function `function`."""
    name = getattr(kernels, op)
    return getattr(_module(op, name), f"{name}_{function}" if function else name)


def check_options(kernels, op, function, options):
    """Raises ValueError if the factory that `pick` returns does not take one of these options."""
    if lacking := _lacking(pick(kernels, op, function), options):
        name = "_".join(filter(None, (getattr(kernels, op), function)))
        raise ValueError(f"ops.{op}={getattr(kernels, op)}: {name} of {op} has no option {lacking[0]!r}, which this model needs")


def _lacking(factory, options):
    return [option for option in options if option not in inspect.signature(factory).parameters]


def choose(asked, device, dtype, **more):
    """Returns the Kernels for a device, a compute dtype and further fields of Use.

    asked: {op: implementation}. "auto", the default, takes the fastest implementation that can be used. Raises ValueError for an op or an
    implementation that does not exist or cannot be used.
    """
    unknown = [op for op in asked if op not in OPS]
    if unknown:
        raise ValueError(f"ops.{unknown[0]}: there is no such op; they are {', '.join(OPS)}")
    use = Use(device, dtype, **more)
    use = replace(use, padded=_choose("grouped_matmul", asked, use) == "reference")
    chosen = {op: _choose(op, asked, use) for op in OPS}
    for op, parts in PARTS.items():
        others = [part for part in parts if chosen[part] != chosen[op]]
        if chosen[op] != "reference" and others:
            if asked.get(op, "auto") != "auto":
                part = others[0]
                raise ValueError(f"ops.{op}={chosen[op]} does what ops.{part} does too, which is {chosen[part]}; leave out one of the two")
            chosen[op] = "reference"
    return Kernels(**chosen)


def _choose(op, asked, use):
    name = asked.get(op, "auto")
    if name == "auto":
        return next((name for name in DEVICES if not _missing(op, name, use)), "reference")
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"ops.{op}={name!r} is not one of auto, {', '.join(IMPLEMENTATIONS)}")
    if missing := _missing(op, name, use):
        raise ValueError(f"ops.{op}={name} {missing}; use --config.ops.{op}=reference")
    return name


def _missing(op, name, use):
    """Returns why an implementation of an op cannot be used; "" if it can."""
    if name == "ascendc":
        return _ascendc_missing(op, use)
    if name == "vendor" and not hasattr(_module(op), "vendor_missing"):
        return "does not exist, as MindSpore has no such kernel"
    if name in DEVICES and use.device != DEVICES[name]:
        return f"runs on {DEVICES[name]}, and this is {use.device}"
    if name == "vendor":
        return _module(op).vendor_missing(use)
    if name == "cpu" and use.dtype != "float32" and op not in ANY_DTYPE:
        return f"computes in float32, and the model in {use.dtype}"
    if name == "cpu" and build.compiler() is None:
        return "is built with g++ on first use, and there is none"
    asked = [option for of, option in use.options if of == op]
    lacking = _lacking(getattr(_module(op, name), name), asked) if asked else []
    return f"has no option {lacking[0]!r}, which this model needs" if lacking else ""


def _ascendc_missing(op, use):
    if op not in ascendc.families():
        return "does not exist, as no kernel was written for it"
    if use.device == "CPU" and build.compiler() is None:
        return "is emulated here, by what g++ builds on first use, and there is none"
    if use.device == "Ascend" and (missing := ascendc.not_installed()):
        return f"needs the operator package: {missing}"
    if use.device not in ("CPU", "Ascend"):
        return f"runs on Ascend, and emulated on CPU, and this is {use.device}"
    return _module(op, "ascendc").ascendc_missing(use)


def _module(op, name=""):
    return importlib.import_module(f"ops.ascendc.{op}" if name == "ascendc" else f"ops.{op}")


def describe(kernels, device):
    """Returns one line of text with the ops of each implementation, and the reason if C++ kernels cannot be built."""
    groups = {}
    for op, name in asdict(kernels).items():
        groups.setdefault(name, []).append(op)
    if len(groups) == 1:
        text = f"{next(iter(groups))}, all of them"
    else:
        text = "; ".join(f"{name}: {' '.join(ops)}" for name, ops in sorted(groups.items()))
    slow = device == "CPU" and "reference" in groups and build.compiler() is None
    return text + (" (no g++ was found to build the C++ kernels with)" if slow else "")
