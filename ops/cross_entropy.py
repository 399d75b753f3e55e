"""The terms of cross-entropy over a vocabulary that may be sharded, in float32.

measure(first, z_RV, ids_R) -> (top, total, picked), each [R, 1]. z: the logits of this shard, with -inf for padding. first: the id of the
first column of z, an int or an int32 scalar. ids: the int32 targets.

    top      the largest logit of the row
    total    the sum of exp(z - top)
    picked   the logit of the target, z[r, ids[r] - first]; 0 if the target is in another shard
"""

import mindspore as ms
from mindspore import nn, ops

from ops import iota
from ops.custom import kernel
from ops.signature import check

ARGUMENTS = "z float32 R V; ids int32 R"


def reference():
    """Returns measure.

    The gradient treats top as a constant, so a loss made of the three terms must not depend on top: log(total) + (top - picked) does not,
    and is accurate for large logits. A row with only -inf has top -inf, total 0 and no gradient.
    """
    terms, require = _Terms(), check("cross_entropy", ARGUMENTS)

    def measure(first, z, ids):
        require((z.shape, ids.shape), (z.dtype, ids.dtype))
        return terms(z, ids - first)

    return measure


class _Terms(nn.Cell):
    """The terms of z_RV and the targets' columns at_R. It has a backward of its own, because MindSpore's keeps exp(z - top) and adds two
    arrays of the size of z, one of which is zeros but for the targets."""

    def __init__(self):
        super().__init__()
        self.largest, self.total, self.exp = ops.ReduceMax(keep_dims=True), ops.ReduceSum(keep_dims=True), ops.Exp()
        self.greater, self.select, self.gather, self.zeros_like = ops.Greater(), ops.Select(), ops.GatherD(), ops.ZerosLike()
        self.column, self.gradient = _column(), gradient()

    def construct(self, z, at):
        top = self.largest(z, 1)
        return top, self.total(self.exp(z - self.finite(top)), 1), self.pick(z, at)

    def bprop(self, z, at, out, dout):
        z = ops.depend(z, (out[2], dout[1]))  # or the compiler would keep the exponentials of the forward
        return self.gradient(z, at, self.finite(out[0]), dout[1], dout[2]), self.zeros_like(at)

    def finite(self, top):
        """Returns top, with 0 in place of -inf: -inf - -inf is NaN."""
        return self.select(self.greater(top, float("-inf")), top, self.zeros_like(top))

    def pick(self, z, at):
        """Returns z[r, at[r]] [R, 1]; 0 if at[r] is no column."""
        mine, column = self.column(z, at)
        picked = self.gather(z, 1, column)
        return self.select(mine, picked, self.zeros_like(picked))  # the column gathered instead may be -inf


def without_logits_of_padding(vocab_size, last):
    """Returns masked(z_RV, first, start) -> z with -inf for columns past the vocabulary. z: the logits of the columns from `start` on of a
    shard of the vocabulary that starts at token id `first`.

    last: the token id at which the last shard starts. If these columns of that shard have padding, the graphs of all shards have the mask:
    ranks whose graphs differ run their collectives in different orders, and wait for each other for ever.
    """
    less, count, select, zeros_like = ops.Less(), iota.reference(), ops.Select(), ops.ZerosLike()

    def masked(z, first, start):
        if last + start + z.shape[1] <= vocab_size:
            return z
        real = ops.BroadcastTo(z.shape)(less(count(z.shape[1]), vocab_size - (first + start)))  # count + 0 would be folded
        return select(real, z, zeros_like(z) + float("-inf"))

    return masked


def gradient():
    """Returns f(z_RV, at_R, top, dtotal, dpicked [R, 1]) -> the gradient of z. top has to be finite. at: the columns of the targets."""
    exp, select, zeros_like, add_at, column_of = ops.Exp(), ops.Select(), ops.ZerosLike(), ops.TensorScatterElements(1, "add"), _column()

    def gradient_of_logits(z, at, top, dtotal, dpicked):
        mine, column = column_of(z, at)
        return add_at(exp(z - top) * dtotal, column, select(mine, dpicked, zeros_like(dpicked)))

    return gradient_of_logits


def _column():
    """Returns f(z_RV, at_R) -> (whether at[r] is a column of z, and at[r] if so, else 0), both [R, 1]."""
    greater_equal, less, both, expand, cast = ops.GreaterEqual(), ops.Less(), ops.LogicalAnd(), ops.ExpandDims(), ops.Cast()

    def column(z, at):
        mine = both(greater_equal(at, 0), less(at, z.shape[1]))
        return expand(mine, 1), expand(at * cast(mine, ms.int32), 1)

    return column


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
