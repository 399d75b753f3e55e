"""Grouped matrix product, for dropless experts: each block of rows is multiplied with the matrix of its group.

Groups are numbered from 0 to E - 1. A block with the number E is empty: its rows must be zeros, its results are zeros, and no gradient must
flow through them.
"""

import mindspore as ms
from mindspore import nn, ops
from mindspore.ops.auto_generate import GroupedMatmulV4

from ops import int8
from ops.custom import kernel
from ops.signature import check

ARGUMENTS = "x n b i; w E i o; group int32 n"
INT8 = "x n b i; w int8 E o i; group int32 n; scale float32 E o g"
GROUPS = {"divides": ("g", "i")}
ONE_RESULT, ROWS_IN_GROUPS, GIVEN_ENDS, NO_ACTIVATION = 3, 0, 0, 0  # GroupedMatmulV4: split_item, group_type, group_list_type, act_type


def reference():
    """Returns grouped_matmul(x [blocks, b, i], w [E, i, o], group int32 [blocks]) -> [blocks, b, o], x[n] @ w[group[n]] for block n.

    It gathers the weights of each block, which takes blocks * i * o elements of memory.
    """
    gather, matmul, cast, minimum = ops.Gather(), ops.BatchMatMul(), ops.Cast(), ops.Minimum()
    require = check("grouped_matmul", ARGUMENTS)

    def grouped_matmul(x, w, group):
        require((x.shape, w.shape, group.shape), (x.dtype, w.dtype, group.dtype))
        return matmul(x, gather(cast(w, x.dtype), minimum(group, w.shape[0] - 1), 0))

    return grouped_matmul


def reference_block(limit):
    """Returns the number of rows of a block, at most `limit`. Small blocks have less padding, but need more copies of the weights."""
    return limit


def vendor():
    """Returns grouped_matmul by MindSpore's kernel, for blocks in order of group, as those of a routing plan are.

    The kernel takes the index at which the rows of each group end. Empty blocks count for the last group; their zero rows change nothing.
    """
    multiply, reshape, cast, ends_of = GroupedMatmulV4(), ops.Reshape(), ops.Cast(), group_ends()
    require = check("grouped_matmul", ARGUMENTS)

    def grouped_matmul(x, w, group):
        require((x.shape, w.shape, group.shape), (x.dtype, w.dtype, group.dtype))
        n, b, i = x.shape
        rows, ends = reshape(x, (n * b, i)), ends_of(group, w.shape[0], b)
        unused = None, None, None, None, None, None  # the bias, and arguments of quantised weights
        how = ONE_RESULT, ROWS_IN_GROUPS, GIVEN_ENDS, NO_ACTIVATION
        y = multiply((rows,), (cast(w, x.dtype),), *unused, ends, None, None, None, *how)
        return reshape(y[0], (n, b, w.shape[2]))

    return grouped_matmul


def group_ends():
    """Returns ends(group_n int32, number of groups E, rows of a block) -> int64 [E], the index after the last row of each group."""
    segment_sum, cumsum, cast = ops.UnsortedSegmentSum(), ops.CumSum(), ops.Cast()
    ones_like, minimum = ops.OnesLike(), ops.Minimum()

    def ends(group, groups, rows):
        blocks = segment_sum(ones_like(group), minimum(group, groups - 1), groups)
        return cast(cumsum(cast(blocks, ms.float32), 0) * rows, ms.int64)  # float32 counts are exact below 2**24

    return ends


def vendor_block(limit):
    """Returns 1: blocks of one row need no padding."""
    return 1


def vendor_missing(use):
    return ""


def cpu():
    """Returns grouped_matmul as a float32 C++ kernel, which copies no weights. Neighbouring blocks of one group are one product."""
    return _GroupedMatMul()


def cpu_block(limit):
    """Returns 1: blocks of one row need no padding, and the kernel joins them."""
    return 1


def reference_int8():
    """Returns grouped_matmul(x [blocks, b, i], w int8 [E, o, i], group int32 [blocks], scale float32 [E, o, g]) -> [blocks, b, o], the
    product of block n with the transpose of matrix group[n], which is in 8 bits (ops/int8.py)."""
    gather, matmul, minimum = ops.Gather(), ops.BatchMatMul(transpose_b=True), ops.Minimum()
    wide, require = int8.widen(), check("grouped_matmul", INT8, **GROUPS)

    def grouped_matmul(x, w, group, scale):
        require((x.shape, w.shape, group.shape, scale.shape), (x.dtype, w.dtype, group.dtype, scale.dtype))
        group = minimum(group, w.shape[0] - 1)
        return matmul(x, wide(gather(w, group, 0), gather(scale, group, 0), x))

    return grouped_matmul


def cpu_int8():
    """Returns grouped_matmul as `reference_int8` does, as a C++ kernel for float32 x, without gradient. See matmul.cpu_int8."""
    return _Int8()


class _Int8(nn.Cell):
    def __init__(self):
        super().__init__()
        self.forward = kernel("grouped_matmul", "grouped_matmul_int8", INT8, _product_int8, _dtype, **GROUPS)

    def construct(self, x, w, group, scale):
        return self.forward(x, w, group, scale)

    def bprop(self, x, w, group, scale, out, dout):
        raise RuntimeError("the grouped_matmul kernel for weights in 8 bits has no gradient; use ops.grouped_matmul=reference")


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


def _product_int8(x, w, group, scale):
    return x[0], x[1], w[1]


def _dx(dy, w, group):
    return dy[0], dy[1], w[1]


def _dw(x, w, group, dy):
    return w


def _dtype(x, *rest):
    return x
