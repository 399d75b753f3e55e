"""Matrix products of blocks of rows, each with its own group's matrix: what dropless experts compute.

A block of group E has none: its rows are zeros, and so are those of its result; what is made of them has no gradient.
"""

from mindspore import nn, ops

from ops.custom import kernel


def reference():
    """x [blocks, b, i], w [E, i, o], group [blocks] int32 -> [blocks, b, o]: x[n] @ w[group[n]].

    The weights of each block are gathered, so memory grows by blocks * i * o elements.
    """
    gather, matmul, cast, minimum = ops.Gather(), ops.BatchMatMul(), ops.Cast(), ops.Minimum()

    def grouped_matmul(x, w, group):
        return matmul(x, gather(cast(w, x.dtype), minimum(group, w.shape[0] - 1), 0))

    return grouped_matmul


def reference_block(limit):
    """The largest block that suits it, up to `limit` rows: fewer rows a block are less padding and more copies of weights."""
    return limit


def cpu():
    """The same in float32, w too, without copies of weights. Groups are best in order: neighbouring blocks of one group are one product."""
    return _GroupedMatMul()


def cpu_block(limit):
    """One row: nothing is padded, and no more is computed."""
    return 1


class _GroupedMatMul(nn.Cell):
    def __init__(self):
        super().__init__()
        self.forward = kernel("grouped_matmul", "grouped_matmul", 3, _product, _dtype)
        self.to_x = kernel("grouped_matmul", "grouped_matmul_dx", 3, _dx, _dtype)
        self.to_w = kernel("grouped_matmul", "grouped_matmul_dw", 4, _dw, _dtype)
        self.zeros_like = ops.ZerosLike()

    def construct(self, x, w, group):
        return self.forward(x, w, group)

    def bprop(self, x, w, group, out, dout):
        return self.to_x(dout, w, group), self.to_w(x, w, group, dout), self.zeros_like(group)


def _product(x, w, group):
    return x[0], x[1], w[2]


def _dx(dy, w, group):
    return dy[0], dy[1], w[1]


def _dw(x, w, group, dy):
    return w


def _dtype(x, *rest):
    return x
