"""The pieces of cross-entropy over a vocabulary that may be sharded, in float32.

Each function takes `first`, the id of the first of its columns, an int or an int32 tensor of 0 dims; z_RV, the logits of these columns, in
which -inf is padding; and ids_R int32. `picked` is z[r, ids[r] - first] where that is one of the columns, else 0.
"""

import mindspore as ms
from mindspore import nn, ops

from ops.custom import kernel


def reference():
    """first, z_RV, ids_R -> lse [R, 1] = log(sum(exp(z))), picked [R, 1]. A row of nothing but -inf has an lse of -inf and no gradient.

    lse - picked loses digits where logits are large: an lse of 1e4 is a multiple of 0.001. reference_sums keeps them.
    """
    return _log_sum_exp(reference_sums())


def cpu():
    """The same as reference, from cpu_sums."""
    return _log_sum_exp(cpu_sums())


def _log_sum_exp(sums):
    log, select, differs, ones_like = ops.Log(), ops.Select(), ops.NotEqual(), ops.OnesLike()

    def measure(first, z, ids):
        top, total, picked = sums(first, z, ids)
        some = differs(total, 0)  # of a NaN too
        return select(some, log(select(some, total, ones_like(total))) + top, top), picked

    return measure


def reference_sums():
    """first, z_RV, ids_R -> top [R, 1], the largest logit; sum(exp(z - top)) [R, 1]; picked [R, 1].

    top is a constant to the gradient, so what is made of the three must not depend on it: log(sum) + (top - picked) does not. A row of
    nothing but -inf has a top of -inf, a sum of 0 and no gradient.
    """
    largest, total, exp = ops.ReduceMax(keep_dims=True), ops.ReduceSum(keep_dims=True), ops.Exp()
    select, greater, zeros_like, pick = ops.Select(), ops.Greater(), ops.ZerosLike(), _pick()

    def measure(first, z, ids):
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


def cpu_sums():
    """The same as reference_sums without an array of probabilities: one pass over z forward, and one backward."""
    sums = _Sums()

    def measure(first, z, ids):
        return sums(z, ids - first)

    return measure


class _Sums(nn.Cell):
    def __init__(self):
        super().__init__()
        self.forward = kernel("cross_entropy", "cross_entropy", 2, _three_columns, _first_thrice)
        self.backward = kernel("cross_entropy", "cross_entropy_grad", 5, _like_z, _first)
        self.zeros_like = ops.ZerosLike()

    def construct(self, z, at):
        return self.forward(z, at)

    def bprop(self, z, at, out, dout):
        return self.backward(z, at, out[0], dout[1], dout[2]), self.zeros_like(at)


def _three_columns(z, at):
    if len(z) != 2 or tuple(at) != tuple(z[:1]):
        raise ValueError(f"cross_entropy: z {tuple(z)} has to be [R, V], and ids {tuple(at)} [R]")
    return (z[0], 1), (z[0], 1), (z[0], 1)


def _first_thrice(z, at):
    return z, z, z


def _like_z(z, at, top, dtotal, dpicked):
    return z


def _first(z, at, top, dtotal, dpicked):
    return z
