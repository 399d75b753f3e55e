"""Mixture of experts: softmax router in float32, top-k, dropless experts. Source: HF modeling_qwen3_moe; Fedus et al. 2021
(load balancing), Zoph et al. 2022 (z-loss), Wang et al. 2024 (balancing by a bias on the choice, without a loss)."""

from functools import partial

import mindspore as ms
from mindspore import nn, ops

from layers import lora
from ops.registry import pick
from parallel.spec import ParamSpec, normal, zeros

cast = ops.Cast()


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
    """Length of a layer's router statistics: load_E, probability_E, z, tokens, all sums over valid tokens; and the assignments that found
    no place in the buffers between expert parallel ranks, 0 unless moe_capacity_factor bounds them."""
    return 2 * cfg.num_experts + 3


def build(cfg, sharding, kernels):
    """moe(p, x_RD, valid_R) -> y_RD, stats [2E + 3] float32; see stats_size. kernels: see ops/registry.py."""
    concat = sharding.op(ops.Concat(0), "router_stats, one -> stats", kind="kernel", call=_joined)
    build_experts = partial(_experts if sharding.shards("experts") == 1 else _experts_elsewhere, cfg, kernels)
    route = _router(cfg, sharding, kernels)
    dims = "rows embed, rows choice, rows choice, experts embed expert_ffn, experts embed expert_ffn, experts expert_ffn embed"
    adapters, more_dims = lora.expert_weights(cfg)
    experts = sharding.region(build_experts, f"{dims}{more_dims} -> rows embed, one", dtype=(None, ms.float32))

    def moe(p, x, valid):
        expert, weight, stats = route(p, x, valid)
        y, overflow = experts(x, expert, weight, p["w_gate"], p["w_up"], p["w_down"], *adapters(p))
        return y, concat(stats, overflow)

    return moe


def _joined(concat, *xs):
    return concat(xs)


def _router(cfg, sharding, kernels):
    """route(p, x_RD, valid_R) -> expert_Rk int32, weight_Rk float32, stats [2E + 2]"""
    logits_of = _logits(cfg, sharding, kernels)
    choose = (_choose_biased if cfg.router_bias else _choose)(cfg, sharding, kernels)
    dims, sizes = "rows router, rows router, rows choice, rows -> router_stats", {"router_stats": 2 * cfg.num_experts + 2}
    statistics = sharding.op(_statistics(cfg), dims, kind="contraction", sizes=sizes, dtype=ms.float32)

    def route(p, x, valid):
        logits = logits_of(p, x)
        probs, expert, weight = choose(p, logits, valid)
        return expert, weight, statistics(logits, probs, expert, valid)

    return route


def _logits(cfg, sharding, kernels):
    """logits(p, x_RD) -> [R, E] float32"""
    matmul = sharding.op(pick(kernels, "matmul")(), "rows embed, embed router -> rows router", kind="contraction", call=_matmul_float32)
    more = lora.beside(cfg, sharding, kernels, "router", "router", cfg.hidden_size, into="router", float32=True)

    def logits(p, x):
        return more(p, x, matmul(x, p["router"]))

    return logits


def build_entropy(cfg, sharding, kernels):
    """entropy(p, x_RD, valid_R) -> the sum over the valid tokens of the whole batch of their router's entropy, in nats."""
    logits_of, total, largest = _logits(cfg, sharding, kernels), ops.ReduceSum(), ops.ReduceMax(keep_dims=True)
    exp, log1p, kept = ops.Exp(), ops.Log1p(), ops.ReduceSum(keep_dims=True)

    def of_logits(logits, valid):
        shifted = logits - largest(logits, 1)
        each = exp(shifted)
        sums = kept(each, 1)
        return total((log1p(sums - 1) - kept(each * shifted, 1) / sums) * ops.expand_dims(valid, 1), (0, 1))  # not Log: see layers/loss.py

    of_logits = sharding.op(of_logits, "rows router, rows ->", kind="contraction", dtype=ms.float32)

    def entropy(p, x, valid):
        return of_logits(logits_of(p, x), valid)

    return entropy


def _matmul_float32(matmul, x, w):
    return matmul(cast(x, ms.float32), cast(w, ms.float32))


def _choose(cfg, sharding, kernels):
    """choose(p, logits_RE, valid_R) -> probs_RE, expert_Rk, weight_Rk"""
    top_k = pick(kernels, "routing", "top_k")(cfg.experts_per_token, cfg.norm_topk_prob)
    dims, sizes = "rows router -> rows router, rows choice, rows choice", {"choice": cfg.experts_per_token}
    top_k = sharding.op(top_k, dims, kind="kernel", sizes=sizes, dtype=(None, ms.int32, None))

    def choose(p, logits, valid):
        return top_k(logits)

    return choose


def _choose_biased(cfg, sharding, kernels):
    dims, sizes = "rows router, router, rows -> rows router, rows choice, rows choice", {"choice": cfg.experts_per_token}
    choose = sharding.region(partial(_with_bias, cfg, kernels), dims, sizes=sizes, dtype=(None, ms.int32, None))

    def choose_biased(p, logits, valid):
        return choose(logits, p["router_bias"], valid)

    return choose_biased


def _with_bias(cfg, kernels, sharding):
    """The bias changes which experts are chosen, not their weights; its gradient is each expert's load above the mean."""
    top_k, excess = pick(kernels, "routing", "top_k")(cfg.experts_per_token, cfg.norm_topk_prob, biased=True), _excess_load(cfg, sharding)
    bias_gradient = sharding.op(_BiasGradient(), "rows choice, router, router -> rows choice", kind="kernel")

    def choose(logits, bias, valid):
        probs, expert, weight = top_k(logits, ops.stop_gradient(bias))
        return probs, expert, bias_gradient(weight, bias, ops.stop_gradient(excess(probs, expert, valid)))

    return choose


class _BiasGradient(nn.Cell):
    """Identity on the first argument; the gradient of the second is the third."""

    def __init__(self):
        super().__init__()
        self.zeros_like = ops.ZerosLike()

    def construct(self, weight, bias, gradient):
        return weight * 1  # an unchanged input is read wrongly in jit (docs/mindspore.md)

    def bprop(self, weight, bias, gradient, out, dout):
        return dout, gradient, self.zeros_like(gradient)


def _excess_load(cfg, sharding):
    """excess(probs_RE, expert_Rk, valid_R) -> [E], this rank's part of (load - mean load) / mean load; 0 where nothing is loaded."""
    count, mean, maximum = _load(), ops.ReduceMean(keep_dims=True), ops.Maximum()
    total = sharding.op(ops.ReduceSum(keep_dims=True), "rows -> one", kind="reduction")
    per_expert = cfg.experts_per_token / cfg.num_experts

    def excess(probs, expert, valid):
        load = count(expert, valid, probs.shape[1])
        return (load - mean(load, 0)) / maximum(total(valid, 0) * per_expert, 1e-9)

    return excess


def _load():
    segment_sum, reshape, expand = ops.UnsortedSegmentSum(), ops.Reshape(), ops.ExpandDims()

    def load(expert, valid, num_experts):
        each = reshape(ops.BroadcastTo(expert.shape)(expand(valid, 1)), (-1,))
        return segment_sum(each, reshape(expert, (-1,)), num_experts)

    return load


def _statistics(cfg):
    count, total, concat = _load(), ops.ReduceSum(), ops.Concat(0)
    log1p, exp, expand, reshape = ops.Log1p(), ops.Exp(), ops.ExpandDims(), ops.Reshape()
    largest, total_kept = ops.ReduceMax(keep_dims=True), ops.ReduceSum(keep_dims=True)

    def statistics(logits, probs, expert, valid):
        top = ops.stop_gradient(largest(logits, 1))
        lse = reshape(top + log1p(total_kept(exp(logits - top), 1) - 1), (-1,))  # not Log: see layers/loss.py
        z = reshape(total(lse * lse * valid, 0), (1,))
        load = ops.stop_gradient(count(expert, valid, cfg.num_experts))
        return concat((load, total(probs * expand(valid, 1), 0), z, reshape(total(valid, 0), (1,))))

    return statistics


def losses(cfg, sharding):
    """losses(stats [layers, 2E + 3]) -> load-balancing loss over all layers (unscaled), z-loss, load [layers, E] as shares, overflow."""
    E, total, maximum, reshape = cfg.num_experts, ops.ReduceSum(keep_dims=True), ops.Maximum(), ops.Reshape()

    def of_stats(stats):
        summed = reshape(total(stats, 0), (-1,))
        rows = maximum(summed[2 * E + 1 : 2 * E + 2], 1.0)
        balance = E * total((summed[:E] / rows) * (summed[E : 2 * E] / rows), 0)
        share = stats[:, :E] / maximum(stats[:, 2 * E + 1 : 2 * E + 2] * cfg.experts_per_token, 1.0)
        return balance, summed[2 * E : 2 * E + 1] / rows, share, summed[2 * E + 2 :]

    of_stats = sharding.op(of_stats, "layers stats -> one, one, layers router, one", kind="kernel", sizes={"router": E})

    def scalars(stats):
        balance, z, share, overflow = of_stats(stats)
        return reshape(balance, ()), reshape(z, ()), share, reshape(overflow, ())

    return scalars


def _experts(cfg, kernels, sharding):
    """experts(x_RD, expert_Rk, weight_Rk, w_gate, w_up, w_down) -> y_RD, overflow [1], with every expert on this rank."""
    feed_forward, no_overflow = _feed_forward(cfg, sharding, kernels), ms.Tensor([0.0], ms.float32)
    permute = pick(kernels, "routing", "permute")(cfg.num_experts, _block_limit(cfg, kernels))
    dims = "rows>expert_rows embed, rows>expert_rows choice -> blocks block_rows embed, assignments, blocks"
    permute = sharding.op(permute, dims, kind="kernel")
    dims = "blocks block_rows embed, assignments, rows>expert_rows choice -> expert_rows>rows embed"
    combine = sharding.op(pick(kernels, "routing", "combine")(), dims, kind="contraction")

    def experts(x, expert, weight, w_gate, w_up, w_down, *adapters):
        rows, slot, group = permute(x, expert)
        return combine(feed_forward(rows, group, w_gate, w_up, w_down, adapters), slot, weight), no_overflow

    return experts


def _experts_elsewhere(cfg, kernels, sharding):
    """The same where experts are split over ranks: tokens are sent to them, as many slots to each rank, and their results back."""
    feed_forward, shards = _feed_forward(cfg, sharding, kernels), sharding.shards("experts")
    send_plan = pick(kernels, "routing", "send_plan")(cfg.num_experts, shards, cfg.moe_capacity_factor)
    dims = "rows>expert_rows choice -> assignments, to_shard sent, to_shard>shard sent>received, expert_rows choice"
    send_plan = sharding.op(send_plan, dims, kind="kernel")
    total, reshape = sharding.op(ops.ReduceSum(), "expert_rows choice ->", kind="reduction"), ops.Reshape()
    take = pick(kernels, "routing", "take")
    send = sharding.op(take(), "rows>expert_rows embed, to_shard sent -> to_shard>shard sent>received embed", kind="kernel")
    plan = pick(kernels, "routing", "plan")(cfg.num_experts // shards, _block_limit(cfg, kernels), empty=True)
    plan = sharding.op(_plan_received(plan), "shard received -> shard received, blocks block_rows, blocks", kind="kernel")
    dispatch = sharding.op(take(), "shard received embed, blocks block_rows -> blocks block_rows embed", kind="kernel")
    dims = "blocks block_rows embed, shard received -> shard>to_shard received>sent embed"
    send_back = sharding.op(take(), dims, kind="kernel")
    dims = "to_shard sent embed, assignments, rows>expert_rows choice -> expert_rows>rows embed"
    combine = sharding.op(pick(kernels, "routing", "combine")(), dims, kind="contraction")

    def experts(x, expert, weight, w_gate, w_up, w_down, *adapters):
        place, source, received, lost = send_plan(expert)
        sent = send(x, source)
        slot, source, group = plan(received)
        y = feed_forward(dispatch(sent, source), group, w_gate, w_up, w_down, adapters)
        return combine(send_back(y, slot), place, weight), ops.stop_gradient(reshape(total(lost, (0, 1)), (1,)))  # a count

    return experts


def _block_limit(cfg, kernels):
    return pick(kernels, "grouped_matmul", "block")(cfg.moe_block_size)


def _plan_received(plan):
    """The plan of received_sC, whose slots have its shape."""
    reshape = ops.Reshape()

    def plan_received(received):
        slot, source, group = plan(reshape(received, (-1, 1)))
        return reshape(slot, received.shape), source, group

    return plan_received


def _feed_forward(cfg, sharding, kernels):
    """feed_forward(x [blocks, b, D], group [blocks], w_gate, w_up, w_down, adapters) -> [blocks, b, D], partial sums where expert_ffn is
    split. adapters: the tuple of lora.expert_weights."""
    matmul, act = pick(kernels, "grouped_matmul"), pick(kernels, "swiglu")()
    into = "blocks block_rows embed, experts embed expert_ffn, blocks -> blocks block_rows part_ffn"
    expand = sharding.op(matmul(), into, kind="kernel")
    out_of = "blocks block_rows part_ffn, experts expert_ffn embed, blocks -> blocks block_rows embed"
    reduce = sharding.op(matmul(), out_of, kind="kernel")
    act = sharding.op(act, "blocks block_rows part_ffn", kind="elementwise")

    more = lora.experts(cfg, sharding, kernels)
    more_gate, more_up, more_down = more["w_gate"], more["w_up"], more["w_down"]

    def feed_forward(x, group, w_gate, w_up, w_down, adapters):
        gate, up = more_gate(x, group, expand(x, w_gate, group), adapters), more_up(x, group, expand(x, w_up, group), adapters)
        h = act(gate, up)
        return more_down(h, group, reduce(h, w_down, group), adapters)

    return feed_forward
