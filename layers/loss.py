"""Cross-entropy of next tokens, in float32, over a vocabulary that may be sharded. Dims: R rows, D model, V vocab."""

import mindspore as ms
from mindspore import ops

from ops.rearrange import rearrange

cast, maximum = ops.Cast(), ops.Maximum()
PIECES = "tokens vocab_parts, tokens vocab_parts, tokens vocab_parts"


def nats(op, x, w, targets):
    """Returns the cross-entropy [R, 1] in nats of the targets_BS under the logits x_RD w_VD^T."""
    targets = rearrange(targets, "batch seq -> (batch seq)", {})
    if op.fused_head:
        return joined(op, *op.head_loss(x, w, targets, "rows>tokens embed, vocab embed, tokens -> " + PIECES))[0]
    logits = op.head(x, w, "rows>tokens embed, vocab embed -> tokens vocab")
    return joined(op, *op.cross_entropy(logits, targets, "tokens vocab, tokens -> " + PIECES))[0]


def nats_and_gap(op, logits, targets):
    """logits_RV, targets_BS -> (nats, gap), both [R, 1]. gap is the difference between the largest logit and the target's, 0 where the
    target has the largest."""
    targets = rearrange(targets, "batch seq -> (batch seq)", {})
    return joined(op, *op.cross_entropy(logits, targets, "tokens vocab, tokens -> " + PIECES))


def joined(op, largest, total, picked):
    """Joins the shards of the vocabulary. Arguments [R, shards]: in each shard the largest logit, the sum of exp(logit - largest), and the
    target's logit, or 0 where the shard does not have it. Returns (nats, gap), see nats_and_gap."""
    largest = ops.stop_gradient(largest)  # its gradient is 0: it is subtracted from one logarithm and added to another
    highest = op.largest(largest, "tokens vocab_parts -> tokens one")
    shift = op.exp(op.sub(largest, highest, "tokens vocab_parts, tokens one -> tokens vocab_parts"), "tokens vocab_parts")
    total = op.sum_columns(op.mul(total, shift, "tokens vocab_parts"), "tokens vocab_parts -> tokens one")
    # total is at least 1. MindSpore's Log rounds an element by its place among those of a thread, and so by how often it has run.
    log_total = op.log1p(op.sub(total, op.ones_like(total, "tokens one"), "tokens one, tokens one -> tokens one"), "tokens one")
    picked = op.sum_columns(picked, "tokens vocab_parts -> tokens one")
    gap = op.sub(highest, picked, "tokens one, tokens one -> tokens one")
    return op.add(log_total, gap, "tokens one"), gap  # in this order, so that huge logits cancel exactly


def weighted_mean(op, x, weights):
    """x [R, 1], weights_BS -> (sum(w * x) / sum(w), sum(w)), over all ranks; 0 where every weight is 0."""
    w = rearrange(cast(weights, ms.float32), "batch seq -> (batch seq) 1", {})
    weight = op.sum(w, "tokens one ->")
    return op.sum(op.mul(x, w, "tokens one"), "tokens one ->") / maximum(weight, 1e-9), weight


def sums_of_rows(op, x, weights):
    """x [R, 1], weights_BS -> (sum(w * x), sum(w)) [B] of each row of the batch."""
    B, S = weights.shape
    x = rearrange(x, "(batch seq) 1 -> batch seq", {"batch": B, "seq": S})
    weights = cast(weights, x.dtype)
    return op.sum_seq(op.mul(x, weights, "batch seq"), "batch seq -> batch"), op.sum_seq(weights, "batch seq -> batch")
