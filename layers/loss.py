"""Cross-entropy of the next tokens in float32, with a vocabulary that may be sharded. Dims: R rows, D model, V vocab."""

import mindspore as ms
from mindspore import ops

from ops.int8 import is_int8
from ops.rearrange import rearrange

cast, maximum = ops.Cast(), ops.Maximum()
STATISTICS = "tokens vocab_parts, tokens vocab_parts, tokens vocab_parts"


def of_states(op, x, w, targets):
    """Returns nats_and_gap of the targets_BS under the logits x_RD w_VD^T."""
    if not op.fused_head or is_int8(w):
        return nats_and_gap(op, op.head(x, w, "rows>tokens embed, vocab embed -> tokens vocab"), targets)
    targets = rearrange(targets, "batch seq -> (batch seq)", {})
    return joined(op, *op.head_loss(x, w, targets, "rows>tokens embed, vocab embed, tokens -> " + STATISTICS))


def nats_and_gap(op, logits, targets):
    """logits_RV, targets_BS -> (nats, gap), both [R, 1]: the cross-entropy of each target, and the largest logit minus the target's logit,
    which is 0 if the target's is the largest."""
    targets = rearrange(targets, "batch seq -> (batch seq)", {})
    return joined(op, *op.cross_entropy(logits, targets, "tokens vocab, tokens -> " + STATISTICS))


def joined(op, largest, total, picked):
    """Combines the statistics of all vocabulary shards. Arguments [R, shards]: for each shard the largest logit, the sum of
    exp(logit - largest), and the target's logit, or 0 if the target is in another shard. Returns (nats, gap), see nats_and_gap."""
    largest = ops.stop_gradient(largest)  # its gradient is 0: it is subtracted from one logarithm and added to another
    highest = op.largest(largest, "tokens vocab_parts -> tokens one")
    shift = op.exp(op.sub(largest, highest, "tokens vocab_parts, tokens one -> tokens vocab_parts"), "tokens vocab_parts")
    total = op.sum_columns(op.mul(total, shift, "tokens vocab_parts"), "tokens vocab_parts -> tokens one")
    # total is at least 1, so log1p(total - 1) is defined. Not Log: MindSpore's Log rounds an element differently at another place in a
    # thread's range of elements, so results would not repeat bit for bit.
    log_total = op.log1p(op.sub(total, op.ones_like(total, "tokens one"), "tokens one, tokens one -> tokens one"), "tokens one")
    picked = op.sum_columns(picked, "tokens vocab_parts -> tokens one")
    gap = op.sub(highest, picked, "tokens one, tokens one -> tokens one")
    return op.add(log_total, gap, "tokens one"), gap  # in this order, so that huge logits cancel exactly


def weighted_mean(op, x, weights):
    """x [R, 1], weights_BS -> (sum(w * x) / sum(w), sum(w)), summed over all ranks. The mean is 0 if all weights are 0."""
    w = rearrange(cast(weights, ms.float32), "batch seq -> (batch seq) 1", {})
    weight = op.sum(w, "tokens one ->")
    return op.sum(op.mul(x, w, "tokens one"), "tokens one ->") / maximum(weight, 1e-9), weight


def sums_of_rows(op, x, weights):
    """x [R, 1], weights_BS -> (sum(w * x), sum(w)), each [B]: the sums over each row of the batch."""
    B, S = weights.shape
    x = rearrange(x, "(batch seq) 1 -> batch seq", {"batch": B, "seq": S})
    weights = cast(weights, x.dtype)
    return op.sum_seq(op.mul(x, weights, "batch seq"), "batch seq -> batch"), op.sum_seq(weights, "batch seq -> batch")
