"""The pieces of cross-entropy in AscendC. See ops/cross_entropy.py for what they are, and docs/ops.md for how they are made."""

from mindspore import nn, ops

from ops.ascendc.custom import kernel
from ops.cross_entropy import ARGUMENTS


def ascendc():
    """The same as reference without an array of probabilities: one pass over z forward, and one backward."""
    sums = _Sums()

    def measure(first, z, ids):
        return sums(z, ids - first)

    return measure


def ascendc_missing(use):
    return ""


class _Sums(nn.Cell):
    def __init__(self):
        super().__init__()
        self.forward = kernel("cross_entropy", "qwen_cross_entropy", ARGUMENTS, _three_columns, _first_thrice)
        self.backward = kernel("cross_entropy", "qwen_cross_entropy_grad", 5, _first, _first)
        self.zeros_like = ops.ZerosLike()

    def construct(self, z, at):
        return self.forward(z, at)

    def bprop(self, z, at, out, dout):
        return self.backward(z, at, out[0], dout[1], dout[2]), self.zeros_like(at)


def _three_columns(z, at):
    return (z[0], 1), (z[0], 1), (z[0], 1)


def _first_thrice(z, at):
    return z, z, z


def _first(z, *rest):
    return z
