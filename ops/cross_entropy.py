"""The pieces of cross-entropy over a vocabulary that may be sharded, in float32.

Each function takes `first`, the id of the first of its columns, an int or an int32 tensor of 0 dims; z_RV, the logits of these columns, in
which -inf is padding; and ids_R int32. `picked` is z[r, ids[r] - first] where that is one of the columns, else 0.
"""

import mindspore as ms
from mindspore import nn, ops

from ops.custom import kernel
from ops.signature import check

ARGUMENTS = "z float32 R V; ids int32 R"


def reference():
    """first, z_RV, ids_R -> top [R, 1], the largest logit; sum(exp(z - top)) [R, 1]; picked [R, 1].

    top is a constant to the gradient, so what is made of the three must not depend on it: log(sum) + (top - picked) does not, and keeps the
    digits of large logits. A row of nothing but -inf has a top of -inf, a sum of 0 and no gradient.
    """
    largest, total, exp = ops.ReduceMax(keep_dims=True), ops.ReduceSum(keep_dims=True), ops.Exp()
    select, greater, zeros_like, pick = ops.Select(), ops.Greater(), ops.ZerosLike(), _pick()
    require = check("cross_entropy", ARGUMENTS)

    def measure(first, z, ids):
        require((z.shape, ids.shape), (z.dtype, ids.dtype))
        top = ops.stop_gradient(largest(z, 1))
        shift = select(greater(top, float("-inf")), top, zeros_like(top))  # as -inf - -inf is NaN
        return top, total(exp(z - shift), 1), pick(z, ids - first)

    return measure


def _pick():
    """z_RV, at_R -> z[r, at[r]], 0 for a place in no column, [R, 1]"""
    greater_equal, less, logical_and = ops.GreaterEqual(), ops.Less(), ops.LogicalAnd()
    gather, expand, cast, select, zeros_like = ops.GatherD(), ops.ExpandDims(), ops.Cast(), ops.Select(), ops.ZerosLike()

    def pick(z, at):
        mine = logical_and(greater_equal(at, 0), less(at, z.shape[1]))
        picked = gather(z, 1, expand(at * cast(mine, ms.int32), 1))
        return select(expand(mine, 1), picked, zeros_like(picked))  # not a product: the column in its place may be -inf

    return pick


def cpu():
    """The same without an array of probabilities: one pass over z forward, and one backward."""
    return by_kernels(kernel)


def by_kernels(kernel, prefix=""):
    """The function of two kernels, by the factory and under the names of an implementation: `prefix`cross_entropy and its _grad."""
    sums = _Sums(kernel, prefix)

    def measure(first, z, ids):
        return sums(z, ids - first)

    return measure


class _Sums(nn.Cell):
    def __init__(self, kernel, prefix):
        super().__init__()
        self.forward = kernel("cross_entropy", f"{prefix}cross_entropy", ARGUMENTS, _three_columns, _first_thrice)
        self.backward = kernel("cross_entropy", f"{prefix}cross_entropy_grad", 5, _like_z, _first)
        self.zeros_like = ops.ZerosLike()

    def construct(self, z, at):
        return self.forward(z, at)

    def bprop(self, z, at, out, dout):
        return self.backward(z, at, out[0], dout[1], dout[2]), self.zeros_like(at)


def _three_columns(z, at):
    return (z[0], 1), (z[0], 1), (z[0], 1)


def _first_thrice(z, at):
    return z, z, z


def _like_z(z, at, top, dtotal, dpicked):
    return z


def _first(z, at, top, dtotal, dpicked):
    return z
