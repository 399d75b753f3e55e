"""SwiGLU: silu(gate) * up. Source: Shazeer 2020."""

from mindspore import nn, ops
from mindspore.ops.auto_generate import SiLU, Swiglu

from ops.custom import kernel
from ops.signature import check

ARGUMENTS = "gate ...; up same ..."


def reference():
    """Returns swiglu(gate, up) -> silu(gate) * up, all of one shape and dtype."""
    silu, require = SiLU(), check("swiglu", ARGUMENTS)

    def swiglu(gate, up):
        require((gate.shape, up.shape), (gate.dtype, up.dtype))
        return silu(gate) * up

    return swiglu


def vendor():
    """Returns swiglu by MindSpore's kernel, which takes gate and up concatenated along the last dim."""
    act, join, require = Swiglu(), ops.Concat(-1), check("swiglu", ARGUMENTS)

    def swiglu(gate, up):
        require((gate.shape, up.shape), (gate.dtype, up.dtype))
        return act(join((gate, up)), -1)

    return swiglu


def vendor_missing(use):
    return ""


def cpu():
    """Returns swiglu as a float32 C++ kernel with one pass over memory in the forward and one in the backward."""
    return ByKernels(kernel)


class ByKernels(nn.Cell):
    """swiglu by two kernels with the names `prefix`swiglu and `prefix`swiglu_grad. kernel: the factory of kernels."""

    def __init__(self, kernel, prefix=""):
        super().__init__()
        self.forward = kernel("swiglu", f"{prefix}swiglu", ARGUMENTS, _first, _first)
        self.backward = kernel("swiglu", f"{prefix}swiglu_grad", 3, _first_two, _first_two)

    def construct(self, gate, up):
        return self.forward(gate, up)

    def bprop(self, gate, up, out, dout):
        return self.backward(gate, up, dout)


def _first(gate, up):
    return gate


def _first_two(gate, up, dy):
    return gate, up
