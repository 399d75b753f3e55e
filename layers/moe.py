"""Mixture of experts: softmax router in float32, top-k, dropless experts. Source: HF modeling_qwen3_moe; Fedus et al. 2021
(load balancing), Zoph et al. 2022 (z-loss), Wang et al. 2024 (balancing by a bias on the choice, without a loss)."""

import mindspore as ms
from mindspore import nn, ops

from ops import grouped_matmul, routing, swiglu
from parallel.spec import ParamSpec, normal, zeros

cast = ops.Cast()


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
    return p


def stats_size(cfg):
    """Length of a layer's router statistics: load_E, probability_E, z, tokens; all sums over valid tokens."""
    return 2 * cfg.num_experts + 2


def build(cfg, sharding):
    """moe(p, x_RD, valid_R) -> y_RD, stats [2E + 2] float32; see stats_size."""
    route, experts = _router(cfg, sharding), _experts(cfg, sharding)

    def moe(p, x, valid):
        expert, weight, stats = route(p, x, valid)
        return experts(p, x, expert, weight), stats

    return moe


def _router(cfg, sharding):
    """route(p, x_RD, valid_R) -> expert_Tk int32, weight_Tk float32, stats"""
    matmul = sharding.op(ops.MatMul(), "rows>tokens embed, embed router -> tokens router", kind="contraction", call=_matmul_float32)
    softmax = sharding.op(ops.Softmax(-1), "tokens router", kind="elementwise")
    top = sharding.op(ops.TopK(), "tokens router -> tokens choice, tokens choice", kind="kernel", call=_top(cfg.experts_per_token))
    pick = sharding.op(ops.GatherD(), "tokens router, tokens choice -> tokens choice", kind="kernel", call=_pick)
    choose = _choose_biased(pick, top) if cfg.router_bias else _choose(pick, top)
    normalise = sharding.op(_normalise(), "tokens choice", kind="elementwise") if cfg.norm_topk_prob else _same
    statistics = sharding.op(_statistics(cfg), "tokens router, tokens router, tokens choice, tokens -> stats", kind="contraction")

    def route(p, x, valid):
        logits = matmul(x, p["router"])
        probs = softmax(logits)
        expert, weight = choose(p, probs, valid)
        return expert, normalise(weight), statistics(logits, probs, expert, valid)

    return route


def _matmul_float32(matmul, x, w):
    return matmul(cast(x, ms.float32), cast(w, ms.float32))


def _top(k):
    def top(topk, x):
        return topk(x, k)

    return top


def _pick(gather, x, index):
    return gather(x, 1, index)


def _same(weight):
    return weight


def _normalise():
    total = ops.ReduceSum(keep_dims=True)

    def normalise(weight):
        return weight / total(weight, 1)

    return normalise


def _choose(pick, top):
    def choose(p, probs, valid):
        _, expert = top(ops.stop_gradient(probs))
        return expert, pick(probs, expert)

    return choose


def _choose_biased(pick, top):
    """The bias changes which experts are chosen, not their weights; its gradient is each expert's load above the mean."""
    excess, bias_gradient = _excess_load(), _BiasGradient()

    def choose(p, probs, valid):
        _, expert = top(ops.stop_gradient(probs + p["router_bias"]))
        return expert, bias_gradient(pick(probs, expert), p["router_bias"], ops.stop_gradient(excess(probs, expert, valid)))

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


def _excess_load():
    count, mean, maximum = _load(), ops.ReduceMean(keep_dims=True), ops.Maximum()

    def excess(probs, expert, valid):
        load = count(expert, valid, probs.shape[1])
        return (load - mean(load, 0)) / maximum(mean(load, 0), 1e-9)  # 0 where nothing is loaded

    return excess


def _load():
    segment_sum, reshape, expand = ops.UnsortedSegmentSum(), ops.Reshape(), ops.ExpandDims()

    def load(expert, valid, num_experts):
        each = reshape(ops.BroadcastTo(expert.shape)(expand(valid, 1)), (-1,))
        return segment_sum(each, reshape(expert, (-1,)), num_experts)

    return load


def _statistics(cfg):
    count, total, concat = _load(), ops.ReduceSum(), ops.Concat(0)
    log, exp, expand, reshape = ops.Log(), ops.Exp(), ops.ExpandDims(), ops.Reshape()
    largest, total_kept = ops.ReduceMax(keep_dims=True), ops.ReduceSum(keep_dims=True)

    def statistics(logits, probs, expert, valid):
        top = ops.stop_gradient(largest(logits, 1))
        lse = reshape(top + log(total_kept(exp(logits - top), 1)), (-1,))
        z = reshape(total(lse * lse * valid, 0), (1,))
        load = ops.stop_gradient(count(expert, valid, cfg.num_experts))
        return concat((load, total(probs * expand(valid, 1), 0), z, reshape(total(valid, 0), (1,))))

    return statistics


def losses(cfg):
    """losses(stats [layers, 2E + 2]) -> load-balancing loss over all layers (unscaled), z-loss, load [layers, E] as shares."""
    E, total, maximum = cfg.num_experts, ops.ReduceSum(), ops.Maximum()

    def of_stats(stats):
        summed = total(stats, 0)
        rows = maximum(summed[2 * E + 1], 1.0)
        balance = E * total((summed[:E] / rows) * (summed[E : 2 * E] / rows), 0)
        share = stats[:, :E] / maximum(stats[:, 2 * E + 1 :] * cfg.experts_per_token, 1.0)
        return balance, summed[2 * E] / rows, share

    return of_stats


def _experts(cfg, sharding):
    """experts(p, x_RD, expert_Tk, weight_Tk) -> y_RD"""
    E = cfg.num_experts
    dims = "tokens choice -> assignments, slots, blocks, router"
    make_plan = sharding.op(routing.plan(E, cfg.moe_block_size), dims, kind="kernel")
    dispatch = sharding.op(_dispatch(), "rows>tokens embed, slots, blocks -> blocks block_rows embed", kind="kernel")
    dims = "blocks block_rows embed, assignments, tokens choice -> tokens>rows embed"
    combine = sharding.op(_combine(), dims, kind="kernel")
    expand = sharding.op(
        grouped_matmul.reference(),
        "blocks block_rows embed, experts embed expert_ffn, blocks -> blocks block_rows expert_ffn",
        kind="kernel",
    )
    reduce = sharding.op(
        grouped_matmul.reference(),
        "blocks block_rows expert_ffn, experts expert_ffn embed, blocks -> blocks block_rows embed",
        kind="contraction",
    )
    act = sharding.op(swiglu.reference(), "blocks block_rows expert_ffn", kind="elementwise")

    def experts(p, x, expert, weight):
        slot, source, group, _ = make_plan(expert)
        xs = dispatch(x, source, group)
        y = reduce(act(expand(xs, p["w_gate"], group), expand(xs, p["w_up"], group)), p["w_down"], group)
        return combine(y, slot, weight)

    return experts


def _dispatch():
    gather, concat, reshape, zeros_like = ops.Gather(), ops.Concat(0), ops.Reshape(), ops.ZerosLike()

    def dispatch(x, source, group):
        padded = concat((x, zeros_like(x[:1])))
        return reshape(gather(padded, source, 0), (group.shape[0], -1, x.shape[1]))

    return dispatch


def _combine():
    gather, reshape, total, expand = ops.Gather(), ops.Reshape(), ops.ReduceSum(), ops.ExpandDims()

    def combine(y, slot, weight):
        chosen = reshape(gather(reshape(y, (-1, y.shape[2])), slot, 0), (weight.shape[0], weight.shape[1], -1))
        return cast(total(chosen * expand(cast(weight, y.dtype), 2), 1), y.dtype)

    return combine
