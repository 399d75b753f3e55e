"""SwiGLU in AscendC. See ops/swiglu.py for what it computes, and docs/ops.md for how."""

from ops.ascendc.custom import kernel
from ops.swiglu import ByKernels


def ascendc():
    """The same as reference, in float32 within, rounded once."""
    return ByKernels(kernel, "qwen_")


def ascendc_missing(use):
    return ""
