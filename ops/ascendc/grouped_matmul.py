"""Grouped matrix product in AscendC. ops/grouped_matmul.py defines it; docs/ops.md describes the kernels."""

import mindspore as ms
from mindspore import nn, ops

from ops.ascendc.custom import kernel
from ops.grouped_matmul import ARGUMENTS, group_ends
from ops.signature import check


def ascendc():
    """Returns grouped_matmul for blocks in order of group, as those of a routing plan are.

    The kernel takes the index at which the rows of each group end. Empty blocks count for the last group; their zero rows change nothing.
    """
    multiply, ends_of = _GroupedMatMul(), group_ends()
    reshape, cast, require = ops.Reshape(), ops.Cast(), check("grouped_matmul", ARGUMENTS)

    def grouped_matmul(x, w, group):
        require((x.shape, w.shape, group.shape), (x.dtype, w.dtype, group.dtype))
        n, b, i = x.shape
        ends = cast(ends_of(group, w.shape[0], b), ms.int32)
        return reshape(multiply(reshape(x, (n * b, i)), cast(w, x.dtype), ends), (n, b, w.shape[2]))

    return grouped_matmul


def ascendc_block(limit):
    """Returns 1: blocks of one row need no padding."""
    return 1


def ascendc_missing(use):
    return ""


class _GroupedMatMul(nn.Cell):
    def __init__(self):
        super().__init__()
        self.forward = kernel("grouped_matmul", "qwen_grouped_matmul", 3, _product, _first)
        self.to_x = kernel("grouped_matmul", "qwen_grouped_matmul_dx", 3, _dx, _first)
        self.to_w = kernel("grouped_matmul", "qwen_grouped_matmul_dw", 3, _dw, _first)
        self.zeros_like = ops.ZerosLike()

    def construct(self, x, w, ends):
        return self.forward(x, w, ends)

    def bprop(self, x, w, ends, out, dout):
        return self.to_x(dout, w, ends), self.to_w(x, dout, ends), self.zeros_like(ends)


def _product(x, w, ends):
    return x[0], w[2]


def _dx(dy, w, ends):
    return dy[0], w[1]


def _dw(x, dy, ends):
    return ends[0], x[1], dy[1]


def _first(x, *rest):
    return x
