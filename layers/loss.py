"""Cross-entropy of next tokens, in float32, over a vocabulary that may be sharded."""

from functools import partial

import mindspore as ms
from mindspore import ops

from ops.registry import pick

cast = ops.Cast()


def build(vocab_size, sharding, kernels):
    """nll(logits_RV, targets_BS) -> nats [R, 1] float32."""
    both = build_with_gap(vocab_size, sharding, kernels)

    def nll(logits, targets):
        return both(logits, targets)[0]

    return nll


def build_with_gap(vocab_size, sharding, kernels):
    """f(logits_RV, targets_BS) -> (nats, gap), both [R, 1] float32: gap is how far the target's logit is below the largest, and 0 where it
    is the largest."""
    dims, sizes = "tokens vocab, tokens -> " + ", ".join(["tokens vocab_parts"] * 3), {"vocab_parts": sharding.shards("vocab")}
    part = ("vocab", vocab_size, _of_part)
    measure = sharding.op(pick(kernels, "cross_entropy")(), dims, kind="kernel", call=_of_all, part=part, sizes=sizes, dtype=ms.float32)
    join = _join(sharding)
    reshape = ops.Reshape()

    def both(logits, targets):
        return join(*measure(logits, reshape(targets, (-1,))))

    return both


def build_with_head(vocab_size, sharding, kernels, head):
    """nll(w_VD, x_RD, targets_BS) -> nats [R, 1] float32 of head(w, x), by one op where it is chosen and the vocabulary is in one part."""
    if kernels.head_loss == "reference" or sharding.shards("vocab") > 1:
        return _with_head(build(vocab_size, sharding, kernels), head)
    join, reshape = _join(sharding), ops.Reshape()
    dims = "rows>tokens embed, vocab embed, tokens -> " + ", ".join(["tokens vocab_parts"] * 3)
    measure = pick(kernels, "head_loss")()
    measure = sharding.op(measure, dims, kind="kernel", call=_of_states, sizes={"vocab_parts": 1}, dtype=ms.float32)

    def of_states(w, x, targets):
        return join(*measure(x, w, reshape(targets, (-1,))))[0]

    return of_states


def _with_head(nll, head):
    def of_states(w, x, targets):
        return nll(head(w, x), targets)

    return of_states


def _of_states(measure, x, w, targets):
    return measure(x, cast(w, x.dtype), targets)


def _join(sharding):
    """join(the largest logit, the sum of exp(logit - largest), the target's logit or 0), each of one rank, -> (nats, gap)."""
    reduce, kept = partial(sharding.op, kind="reduction"), partial(ops.ReduceSum, keep_dims=True)
    largest = reduce(ops.ReduceMax(keep_dims=True), "tokens vocab_parts -> tokens one", reduce="max")
    sum_exp, sum_picked = (reduce(kept(), "tokens vocab_parts -> tokens one") for _ in range(2))
    shift = sharding.op(ops.Sub(), "tokens vocab_parts, tokens one -> tokens vocab_parts", kind="kernel")
    exp, mul = (sharding.op(op(), "tokens vocab_parts", kind="elementwise") for op in (ops.Exp, ops.Mul))
    log1p, add, sub = (sharding.op(op(), "tokens one", kind="elementwise") for op in (ops.Log1p, ops.Add, ops.Sub))
    ones_like = sharding.op(ops.OnesLike(), "tokens one", kind="elementwise")

    def join(top, total, picked):
        top = ops.stop_gradient(top)  # its gradient is 0, as what is taken from one logarithm is added again
        highest = largest(top, 1)
        total = sum_exp(mul(total, exp(shift(top, highest))), 1)
        # total is at least 1. MindSpore's Log rounds an element by its place among those of a thread, and so by how often it has run.
        log_total = log1p(sub(total, ones_like(total)))
        gap = sub(highest, sum_picked(picked, 1))
        return add(log_total, gap), gap  # so that huge logits cancel exactly

    return join


def _of_all(measure, logits, targets):
    return measure(0, logits, targets)


def _of_part(measure, first, logits, targets):
    return measure(first, logits, targets)


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
