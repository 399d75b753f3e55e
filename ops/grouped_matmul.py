"""Matrix products of blocks of rows, each with its own group's matrix: what dropless experts compute.

A block of group E has none: its rows are zeros, and so are those of its result; what is made of them has no gradient.
"""

import mindspore as ms
from mindspore import nn, ops
from mindspore.ops.auto_generate import GroupedMatmulV4

from ops.custom import kernel
from ops.signature import check

ARGUMENTS = "x n b i; w E i o; group int32 n"
ONE_RESULT, ROWS_IN_GROUPS, GIVEN_ENDS, NO_ACTIVATION = 3, 0, 0, 0  # GroupedMatmulV4: split_item, group_type, group_list_type, act_type


def reference():
    """x [blocks, b, i], w [E, i, o], group [blocks] int32 -> [blocks, b, o]: x[n] @ w[group[n]].

    The weights of each block are gathered, so memory grows by blocks * i * o elements.
    """
    gather, matmul, cast, minimum = ops.Gather(), ops.BatchMatMul(), ops.Cast(), ops.Minimum()
    require = check("grouped_matmul", ARGUMENTS)

    def grouped_matmul(x, w, group):
        require((x.shape, w.shape, group.shape), (x.dtype, w.dtype, group.dtype))
        return matmul(x, gather(cast(w, x.dtype), minimum(group, w.shape[0] - 1), 0))

    return grouped_matmul


def reference_block(limit):
    """The largest block that suits it, up to `limit` rows: fewer rows a block are less padding and more copies of weights."""
    return limit


def vendor():
    """The same in MindSpore's kernel, for groups in rising order, as a plan's are: it is given where each group's rows end.

    The rows of blocks without a group are taken as the last group's: as they are zeros, nothing comes of them.
    """
    multiply, reshape, cast, ends_of = GroupedMatmulV4(), ops.Reshape(), ops.Cast(), group_ends()
    require = check("grouped_matmul", ARGUMENTS)

    def grouped_matmul(x, w, group):
        require((x.shape, w.shape, group.shape), (x.dtype, w.dtype, group.dtype))
        n, b, i = x.shape
        rows, ends = reshape(x, (n * b, i)), ends_of(group, w.shape[0], b)
        unused = None, None, None, None, None, None  # bias, and what quantised weights need
        how = ONE_RESULT, ROWS_IN_GROUPS, GIVEN_ENDS, NO_ACTIVATION
        y = multiply((rows,), (cast(w, x.dtype),), *unused, ends, None, None, None, *how)
        return reshape(y[0], (n, b, w.shape[2]))

    return grouped_matmul


def group_ends():
    """ends(group_n int32, the number of groups E, the rows of a block) -> int64 [E]: how many rows there are up to a group's last."""
    segment_sum, cumsum, cast = ops.UnsortedSegmentSum(), ops.CumSum(), ops.Cast()
    ones_like, minimum = ops.OnesLike(), ops.Minimum()

    def ends(group, groups, rows):
        blocks = segment_sum(ones_like(group), minimum(group, groups - 1), groups)
        return cast(cumsum(cast(blocks, ms.float32), 0) * rows, ms.int64)  # float32 counts are exact below 2**24

    return ends


def vendor_block(limit):
    """One row, as in cpu_block."""
    return 1


def vendor_missing(use):
    return ""


def cpu():
    """The same in float32, w too, without copies of weights. Groups are best in order: neighbouring blocks of one group are one product."""
    return _GroupedMatMul()


def cpu_block(limit):
    """One row: nothing is padded, and no more is computed."""
    return 1


class _GroupedMatMul(nn.Cell):
    def __init__(self):
        super().__init__()
        self.forward = kernel("grouped_matmul", "grouped_matmul", ARGUMENTS, _product, _dtype)
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
