"""SwiGLU in AscendC. ops/swiglu.py defines it; docs/ops.md describes the kernels."""

from ops.ascendc.custom import kernel
from ops.swiglu import ByKernels


def ascendc():
    """Returns swiglu, which computes in float32 and rounds once."""
    return ByKernels(kernel, "qwen_")


def ascendc_missing(use):
    return ""
