"""Rotary embedding in AscendC, alone and after an RMS norm of each head. ops/rope.py defines it; docs/ops.md describes the kernels."""

from mindspore import nn, ops

from ops.ascendc.custom import kernel
from ops.rope import ARGUMENTS, NORMED, Rotate


def ascendc():
    """Returns rotate as reference does. The gradients of cos and sin are 0."""
    backward = kernel("rope", "qwen_rope", 3, _first, _first, attrs={"sign": -1})
    return Rotate(kernel("rope", "qwen_rope", ARGUMENTS, _first, _first, attrs={"sign": 1}), backward)


def ascendc_norm(eps):
    """Returns norm_rotate, which computes in float32 and rounds once. The gradients of cos and sin are 0."""
    return _NormRotate(eps)


def ascendc_missing(use):
    if use.head_dim is not None and use.head_dim % 2:
        return f"needs an even head_dim, and this is {use.head_dim}"
    return ""


class _NormRotate(nn.Cell):
    def __init__(self, eps):
        super().__init__()
        attrs = {"eps": float(eps)}
        self.forward = kernel("rope", "qwen_rope_norm", NORMED.replace("w H", "w same H"), _first, _first, attrs=attrs)
        self.backward = kernel("rope", "qwen_rope_norm_grad", 5, _first_two, _first_two, attrs=attrs)
        self.zeros_like = ops.ZerosLike()

    def construct(self, x, w, cos, sin):
        return self.forward(x, w, cos, sin)

    def bprop(self, x, w, cos, sin, out, dout):
        dx, dw = self.backward(x, w, cos, sin, dout)
        return dx, dw, self.zeros_like(cos), self.zeros_like(sin)


def _first(x, *rest):
    return x


def _first_two(x, w, *rest):
    return x, w
