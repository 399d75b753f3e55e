"""The terms of cross-entropy over a vocabulary that may be sharded, in float32.

measure(first, z_RV, ids_R) -> (top, total, picked), each [R, 1]. z: the logits of this shard, with -inf for padding. first: the id of the
first column of z, an int or an int32 scalar. ids: the int32 targets.

    top      the largest logit of the row
    total    the sum of exp(z - top)
    picked   the logit of the target, z[r, ids[r] - first]; 0 if the target is in another shard
"""

import mindspore as ms
from mindspore import nn, ops

from ops.custom import kernel
from ops.signature import check

ARGUMENTS = "z float32 R V; ids int32 R"


def reference():
    """Returns measure.

    The gradient treats top as a constant, so a loss made of the three terms must not depend on top: log(total) + (top - picked) does not,
    and is accurate for large logits. A row with only -inf has top -inf, total 0 and no gradient.
    """
    largest, total, exp = ops.ReduceMax(keep_dims=True), ops.ReduceSum(keep_dims=True), ops.Exp()
    select, greater, zeros_like, pick = ops.Select(), ops.Greater(), ops.ZerosLike(), _pick()
    require = check("cross_entropy", ARGUMENTS)

    def measure(first, z, ids):
        require((z.shape, ids.shape), (z.dtype, ids.dtype))
        top = ops.stop_gradient(largest(z, 1))
        shift = select(greater(top, float("-inf")), top, zeros_like(top))  # -inf - -inf is NaN
        return top, total(exp(z - shift), 1), pick(z, ids - first)

    return measure


def _pick():
    """Returns pick(z_RV, at_R) -> z[r, at[r]] [R, 1]; 0 if at[r] is no column."""
    greater_equal, less, logical_and = ops.GreaterEqual(), ops.Less(), ops.LogicalAnd()
    gather, expand, cast, select, zeros_like = ops.GatherD(), ops.ExpandDims(), ops.Cast(), ops.Select(), ops.ZerosLike()

    def pick(z, at):
        mine = logical_and(greater_equal(at, 0), less(at, z.shape[1]))
        picked = gather(z, 1, expand(at * cast(mine, ms.int32), 1))
        return select(expand(mine, 1), picked, zeros_like(picked))  # not a product, since the column that was gathered instead may be -inf

    return pick


def cpu():
    """Returns measure as a float32 C++ kernel with one pass over z in each direction. It stores no probabilities."""
    return by_kernels(kernel)


def by_kernels(kernel, prefix=""):
    """Returns measure by two kernels, `prefix`cross_entropy and `prefix`cross_entropy_grad. kernel: the factory of kernels."""
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
