"""RMS norm in AscendC. ops/rms_norm.py defines it; docs/ops.md describes the kernels."""

from mindspore import nn

from ops.ascendc.custom import kernel
from ops.rms_norm import ARGUMENTS, SUMMED


def ascendc(eps):
    """Returns rms_norm, which computes in float32 and rounds once."""
    return _Norm(eps)


def ascendc_add(eps):
    """Returns add_norm, which computes in float32. The norm is that of the rounded sum, and is rounded once."""
    return _AddNorm(eps)


def ascendc_missing(use):
    return ""


class _Norm(nn.Cell):
    def __init__(self, eps):
        super().__init__()
        attrs = {"eps": float(eps)}
        self.forward = kernel("rms_norm", "qwen_rms_norm", ARGUMENTS.replace("w n", "w same n"), _first, _first, attrs=attrs)
        self.backward = kernel("rms_norm", "qwen_rms_norm_grad", 3, _first_two, _first_two, attrs=attrs)

    def construct(self, x, w):
        return self.forward(x, w)

    def bprop(self, x, w, out, dout):
        return self.backward(x, w, dout)


class _AddNorm(nn.Cell):
    def __init__(self, eps):
        super().__init__()
        attrs = {"eps": float(eps)}
        arguments = SUMMED.replace("w n", "w same n")
        self.forward = kernel("rms_norm", "qwen_add_rms_norm", arguments, _first_twice, _first_twice, attrs=attrs)
        self.backward = kernel("rms_norm", "qwen_add_rms_norm_grad", 4, _first_two, _first_two, attrs=attrs)

    def construct(self, x, y, w):
        return self.forward(x, y, w)

    def bprop(self, x, y, w, out, dout):
        dx, dw = self.backward(out[0], w, dout[1], dout[0])
        return dx, dx, dw


def _first(x, *rest):
    return x


def _first_two(x, w, *rest):
    return x, w


def _first_twice(x, *rest):
    return x, x
