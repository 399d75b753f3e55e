"""Cross-entropy of next tokens, in float32, over a vocabulary that may be sharded."""

import mindspore as ms
from mindspore import ops

from ops import cross_entropy


def build(vocab_size, sharding):
    """nll(logits_RV, targets_BS) -> nats [R, 1] float32."""
    vmax = sharding.op(ops.ReduceMax(keep_dims=True), "tokens vocab -> tokens one", kind="reduction", reduce="max")
    vsum = sharding.op(ops.ReduceSum(keep_dims=True), "tokens vocab -> tokens one", kind="reduction")
    shift = sharding.op(ops.Sub(), "tokens vocab, tokens one -> tokens vocab", kind="kernel")
    exp = sharding.op(ops.Exp(), "tokens vocab", kind="elementwise")
    log, sub = sharding.op(ops.Log(), "tokens one", kind="elementwise"), sharding.op(ops.Sub(), "tokens one", kind="elementwise")
    part = ("vocab", vocab_size, cross_entropy.pick_part())
    pick = sharding.op(cross_entropy.pick(), "tokens vocab, tokens -> tokens one", kind="contraction", part=part)
    reshape = ops.Reshape()

    def nll(logits, targets):
        z = shift(logits, ops.stop_gradient(vmax(logits, 1)))
        return sub(log(vsum(exp(z), 1)), pick(z, reshape(targets, (-1,))))

    return nll


def weighted_mean(sharding):
    """mean(x [R, 1], weights_BS) -> (sum(w * x) / sum(w), sum(w)); 0 where every weight is 0."""
    total = sharding.op(ops.ReduceSum(), "tokens one ->", kind="reduction")
    mul = sharding.op(ops.Mul(), "tokens one", kind="elementwise")
    reshape, cast, maximum = ops.Reshape(), ops.Cast(), ops.Maximum()

    def mean(x, weights):
        w = reshape(cast(weights, ms.float32), (-1, 1))
        weight = total(w, (0, 1))
        return total(mul(x, w), (0, 1)) / maximum(weight, 1e-9), weight

    return mean
