"""SwiGLU in AscendC. See ops/swiglu.py for what it computes, and docs/ops.md for how."""

from mindspore import nn

from ops.ascendc.custom import kernel
from ops.swiglu import ARGUMENTS


def ascendc():
    """The same as reference, in float32 within, rounded once."""
    return _SwiGLU()


def ascendc_missing(use):
    return ""


class _SwiGLU(nn.Cell):
    def __init__(self):
        super().__init__()
        self.forward = kernel("swiglu", "qwen_swiglu", ARGUMENTS, _first, _first)
        self.backward = kernel("swiglu", "qwen_swiglu_grad", 3, _first_two, _first_two)

    def construct(self, gate, up):
        return self.forward(gate, up)

    def bprop(self, gate, up, out, dout):
        return self.backward(gate, up, dout)


def _first(gate, up):
    return gate


def _first_two(gate, up, dy):
    return gate, up
