"""Mixture of experts: softmax router in float32, top-k, dropless experts. Source: HF modeling_qwen3_moe; Fedus et al. 2021
(load-balancing loss), Zoph et al. 2022 (z-loss), Wang et al. 2024 (balancing by a bias on the choice of experts, without a loss)."""

import mindspore as ms
from mindspore import nn, ops

from layers import lora
from layers.lora import adapted, adapted_experts
from ops.int8 import is_int8
from ops.rearrange import rearrange
from parallel.specs import ParamSpec, normal, zeros

_reshape, _concat, _segment_sum = ops.Reshape(), ops.Concat(0), ops.UnsortedSegmentSum()
_log1p, _exp, _maximum, _total = ops.Log1p(), ops.Exp(), ops.Maximum(), ops.ReduceSum()
_largest, _total_kept = ops.ReduceMax(keep_dims=True), ops.ReduceSum(keep_dims=True)
NO_OVERFLOW = ms.Tensor([0.0], ms.float32)

ADAPTED = {"router": "router", "experts.gate": "w_gate", "experts.up": "w_up", "experts.down": "w_down"}


def specs(cfg):
    D, E, F, init = cfg.hidden_size, cfg.num_experts, cfg.moe_ffn_size, normal(cfg.initializer_range)
    p = {
        "router": ParamSpec((D, E), ("embed", "router"), init),
        "w_gate": ParamSpec((E, D, F), ("experts", "embed", "expert_ffn"), init),
        "w_up": ParamSpec((E, D, F), ("experts", "embed", "expert_ffn"), init),
        "w_down": ParamSpec((E, F, D), ("experts", "expert_ffn", "embed"), init),
    }
    if cfg.router_bias:
        p["router_bias"] = ParamSpec((E,), ("router",), zeros(), optimizer="sign")
    return lora.specs(cfg, p, ADAPTED)


def stats_size(cfg):
    """Returns the length of a layer's router statistics: load [E], probability [E], z, tokens, all of them sums over the valid tokens, and
    overflow, the number of assignments for which the buffers between expert parallel ranks had no slot. Overflow is 0 unless
    moe_capacity_factor bounds these buffers."""
    return 2 * cfg.num_experts + 3


def moe(cfg, op, p, x, rows):
    """x_RD -> y_RD, stats [2E + 3] float32, see stats_size. rows["valid"] [R] is 1 for tokens and 0 for padding, which no statistic
    counts."""
    valid = rows["valid"]
    logits = router_logits(cfg, op, p, x, rows)
    if cfg.router_bias:
        dims = "rows router, router, rows -> rows router, rows choice, rows choice"
        probs, expert, weight = op.biased_top_k(logits, p["router_bias"], valid, dims)
    else:
        probs, expert, weight = op.top_k(logits, "rows router -> rows router, rows choice, rows choice")
    stats = op.router_stats(logits, probs, expert, valid, "rows router, rows router, rows choice, rows -> router_stats")
    if op.has_regions and not is_int8(p["w_gate"]):
        y, overflow = op.experts(x, expert, weight, p["w_gate"], p["w_up"], p["w_down"], EXPERTS)
    else:
        y, overflow = experts(cfg, op.inside, p, x, expert, weight)
    return y, op.concat(stats, overflow, "router_stats, one -> stats")


def router_logits(cfg, op, p, x, rows):
    """x_RD -> [R, E] float32"""
    logits = op.router(x, p["router"], "rows embed, embed router -> rows router")
    return adapted(cfg, op, p, "router", x, logits, rows)


def router_entropy(cfg, op, p, x, rows):
    """x_RD -> the entropy of the router in nats, summed over the valid tokens of the global batch."""
    return op.router_entropy(router_logits(cfg, op, p, x, rows), rows["valid"], "rows router, rows ->")


def losses(cfg, op, stats):
    """stats [layers, 2E + 3] -> the load-balancing loss over all layers (without its coefficient), the z-loss, each expert's share of the
    assignments [layers, E], and the overflow (see stats_size)."""
    balance, z, load, overflow = op.router_losses(stats, "layers stats -> one, one, layers router, one")
    return _reshape(balance, ()), _reshape(z, ()), load, _reshape(overflow, ())


# The experts. These functions run on a rank's shards. MindSpore's partitioner sees them as one op with the signature EXPERTS.

EXPERTS = (
    "rows embed, rows choice, rows choice, experts embed expert_ffn, experts embed expert_ffn, experts expert_ffn embed -> rows embed, one"
)


def experts(cfg, op, p, x, expert, weight):
    """x_RD, the experts [R, k] of each row and their weights [R, k] -> y_RD, overflow [1].

    Assignments are sorted by expert into blocks of rows (ops/routing.py). If experts are sharded over ranks, an all-to-all first sends each
    row to the rank of its expert, with equally many slots for each rank, and a second one returns the results. In the signatures,
    `to_shard>shard sent>received` is that all-to-all: send buffers indexed by target rank become receive buffers indexed by source rank.
    """
    if op.expert_shards == 1:
        dims = "rows>expert_rows embed, rows>expert_rows choice -> blocks block_rows embed, assignments, blocks"
        blocks, slot, group = op.permute(x, expert, dims)
        y = feed_forward(cfg, op, p, blocks, group)
        dims = "blocks block_rows embed, assignments, rows>expert_rows choice -> expert_rows>rows embed"
        return op.combine(y, slot, weight, dims), NO_OVERFLOW
    dims = "rows>expert_rows choice -> assignments, to_shard sent, to_shard>shard sent>received, expert_rows choice"
    place, source, received, lost = op.send_plan(expert, dims)
    sent = op.take(x, source, "rows>expert_rows embed, to_shard sent -> to_shard>shard sent>received embed")
    slot, source, group = op.plan_received(received, "shard received -> shard received, blocks block_rows, blocks")
    blocks = op.take(sent, source, "shard received embed, blocks block_rows -> blocks block_rows embed")
    y = feed_forward(cfg, op, p, blocks, group)
    returned = op.take(y, slot, "blocks block_rows embed, shard received -> shard>to_shard received>sent embed")
    y = op.combine(returned, place, weight, "to_shard sent embed, assignments, rows>expert_rows choice -> expert_rows>rows embed")
    return y, ops.stop_gradient(_reshape(op.count_lost(lost, "expert_rows choice ->"), (1,)))


def feed_forward(cfg, op, p, x, group):
    """Applies expert group[i] to block i of x [blocks, b, D] -> [blocks, b, D]. The results are partial sums if expert_ffn is sharded."""
    up_dims = "blocks block_rows embed, experts embed expert_ffn, blocks -> blocks block_rows part_ffn"
    gate, up = op.grouped_matmul(x, p["w_gate"], group, up_dims), op.grouped_matmul(x, p["w_up"], group, up_dims)
    gate, up = adapted_experts(cfg, op, p, "w_gate", x, group, gate), adapted_experts(cfg, op, p, "w_up", x, group, up)
    h = op.glu(gate, up, "blocks block_rows part_ffn")
    y = op.grouped_matmul(h, p["w_down"], group, "blocks block_rows part_ffn, experts expert_ffn embed, blocks -> blocks block_rows embed")
    return adapted_experts(cfg, op, p, "w_down", h, group, y)


def experts_of(cfg, op):
    """Returns `experts` as a function that takes only tensors, as MindSpore's partitioner needs it."""

    def of_tensors(x, expert, weight, w_gate, w_up, w_down):
        return experts(cfg, op, {"w_gate": w_gate, "w_up": w_up, "w_down": w_down}, x, expert, weight)

    return of_tensors


def biased_top_k(cfg, op, logits, bias, valid):
    """Chooses experts by logits plus bias; the bias does not change their weights.

    The gradient of the bias is E (load - mean load) of each expert, of which the optimizer takes the sign. These are whole numbers, so that
    their sum over ranks is exact, and 0 for an expert of mean load.
    """
    probs, expert, weight = op.top_k_by_bias(logits, ops.stop_gradient(bias))
    own = load(expert, valid, cfg.num_experts)  # of this rank's rows
    excess = own * cfg.num_experts - _reshape(_total(own, 0), (1,))
    return probs, expert, op.bias_gradient(weight, bias, ops.stop_gradient(excess), "rows choice, router, router -> rows choice")


def biased_top_k_of(cfg, op):
    """Returns `biased_top_k` as a function that takes only tensors, as MindSpore's partitioner needs it."""

    def of_tensors(logits, bias, valid):
        return biased_top_k(cfg, op, logits, bias, valid)

    return of_tensors


class BiasGradient(nn.Cell):
    """Returns `weight`. In the backward pass, `bias` gets the gradient `gradient`."""

    def __init__(self):
        super().__init__()
        self.zeros_like = ops.ZerosLike()

    def construct(self, weight, bias, gradient):
        return weight * 1  # under jit, MindSpore reads an input that is returned unchanged wrongly (docs/mindspore.md)

    def bprop(self, weight, bias, gradient, out, dout):
        return dout, gradient, self.zeros_like(gradient)


# Functions of ops in layers/op_table.py, on a rank's rows.


def load(expert, valid, num_experts):
    """expert_Rk, valid_R -> [E]: the number of assignments of valid rows to each expert."""
    each = ops.BroadcastTo(expert.shape)(rearrange(valid, "rows -> rows 1", {}))
    each, expert = rearrange(each, "rows choice -> (rows choice)", {}), rearrange(expert, "rows choice -> (rows choice)", {})
    return _segment_sum(each, expert, num_experts)


def statistics(num_experts):
    """Returns f(logits_RE, probs_RE, expert_Rk, valid_R) -> [2E + 2], the statistics without overflow. See stats_size."""

    def of_rows(logits, probs, expert, valid):
        top = ops.stop_gradient(_largest(logits, 1))
        lse = top + _log1p(_total_kept(_exp(logits - top), 1) - 1)  # not Log: see layers/loss.py
        lse = rearrange(lse, "rows 1 -> rows", {})
        z = _reshape(_total(lse * lse * valid, 0), (1,))
        assigned = ops.stop_gradient(load(expert, valid, num_experts))
        total_probs = _total(probs * rearrange(valid, "rows -> rows 1", {}), 0)
        return _concat((assigned, total_probs, z, _reshape(_total(valid, 0), (1,))))

    return of_rows


def losses_of_stats(cfg):
    """Returns f(stats [layers, 2E + 3]) -> balance [1], z [1], load [layers, E], overflow [1]. See losses."""
    E, k = cfg.num_experts, cfg.experts_per_token

    def of_stats(stats):
        summed = _reshape(_total_kept(stats, 0), (-1,))
        rows = _maximum(summed[2 * E + 1 : 2 * E + 2], 1.0)
        balance = E * _total_kept((summed[:E] / rows) * (summed[E : 2 * E] / rows), 0)
        share = stats[:, :E] / _maximum(stats[:, 2 * E + 1 : 2 * E + 2] * k, 1.0)
        return balance, summed[2 * E : 2 * E + 1] / rows, share, summed[2 * E + 2 :]

    return of_stats


def entropy_of_logits(logits, valid):
    """logits_RE, valid_R -> the entropy in nats, summed over the valid rows."""
    shifted = logits - _largest(logits, 1)
    each = _exp(shifted)
    sums = _total_kept(each, 1)
    entropy = _log1p(sums - 1) - _total_kept(each * shifted, 1) / sums  # not Log: see layers/loss.py
    return _total(entropy * rearrange(valid, "rows -> rows 1", {}), (0, 1))


def plan_of_shards(plan):
    """Returns f(received [shards, C]) -> slot [shards, C], source, group. It applies `plan` to the slots of all shards together."""

    def of_shards(received):
        slot, source, group = plan(rearrange(received, "shard slot -> (shard slot) 1", {}))
        return rearrange(slot, "(shard slot) -> shard slot", {"shard": received.shape[0]}), source, group

    return of_shards
