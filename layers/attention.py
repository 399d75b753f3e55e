"""Grouped-query attention: QK-norm (Qwen3) or q, k, v biases (Qwen2), rotary embedding, document mask or KV cache."""

from functools import partial

import mindspore as ms
from mindspore import ops

from layers import linear, lora
from ops.attention import largest_logits
from ops.registry import pick
from parallel import ring
from parallel.spec import ParamSpec, normal, ones, zeros

cast = ops.Cast()


ADAPTED = {"q": "wq", "k": "wk", "v": "wv", "o": "wo"}


def specs(cfg):
    D, N, K, H = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    q, kv, init = N * H, K * H, normal(cfg.initializer_range)
    p = {
        "wq": ParamSpec((D, q), ("embed", "heads"), init, parts=(None, N)),
        "wk": ParamSpec((D, kv), ("embed", "kv"), init, parts=(None, K)),
        "wv": ParamSpec((D, kv), ("embed", "kv"), init, parts=(None, K)),
        "wo": ParamSpec((q, D), ("heads", "embed"), init, parts=(N, None)),
    }
    if cfg.qk_norm:
        p["q_norm"] = p["k_norm"] = ParamSpec((H,), ("head_dim",), ones())
    if cfg.qkv_bias:
        p["bq"] = ParamSpec((q,), ("heads",), zeros(), parts=(N,))
        p["bk"] = p["bv"] = ParamSpec((kv,), ("kv",), zeros(), parts=(K,))
    return lora.specs(cfg, p, ADAPTED)


def build(cfg, sharding, kernels):
    """attention(p, x_RD, cos, sin, segments_BT, order_BT) -> y_RD, of the T tokens that queries see, and the same over a cache:
    cached(p, x_RD, cos, sin, ones_BS, positions_BS, k_BTKH, v_BTKH, key_ones_BT, slots_BT) -> y_RD, k_BTKH, v_BTKH, writing the slots
    `positions` of each row.
    """
    project, write = _projection(cfg, sharding, kernels), _cache_write(sharding, kernels)
    attend, repeat = _attend(cfg, sharding, kernels), _repeat(sharding)
    kv, at = "batch keys kv_heads head_dim", "batch seq, batch keys, batch seq, batch keys"
    dims = f"batch seq heads head_dim, {kv}, {kv}, {at} -> batch seq heads head_dim"
    attend_cache = sharding.op(pick(kernels, "attention")(cfg.head_dim**-0.5), dims, kind="kernel")
    out, reshape = linear.row(sharding, kernels, "heads"), ops.Reshape()
    more_out = lora.beside(cfg, sharding, kernels, "o", "wo", cfg.num_heads * cfg.head_dim, inner="heads")

    def merge(p, o):
        B, S, N, H = o.shape
        o = reshape(o, (B * S, N * H))
        return more_out(p, o, out(o, p["wo"]))

    def attention(p, x, cos, sin, segments, order):
        q, k, v = project(p, x, cos, sin)
        return merge(p, attend(q, repeat(k), repeat(v), segments, order))

    def cached(p, x, cos, sin, ones, positions, k_cache, v_cache, key_ones, slots):
        q, k, v = project(p, x, cos, sin)
        k_cache, v_cache = write(k_cache, k, positions), write(v_cache, v, positions)
        return merge(p, attend_cache(q, k_cache, v_cache, ones, key_ones, positions, slots)), k_cache, v_cache

    return attention, cached


def build_largest_logit(cfg, sharding, kernels):
    """largest(p, x_RD, cos, sin, segment_BS, segments_BT, order_BS, orders_BT) -> the largest scaled logit of attention's softmax, of the
    whole batch and all heads, between tokens that see each other, none of them padding; see ops/attention.py."""
    project = _projection(cfg, sharding, kernels)
    dims = "batch seq heads head_dim, batch seq>keys kv_heads head_dim, batch seq, batch keys, batch seq, batch keys -> batch seq heads"
    of_queries = sharding.op(largest_logits(cfg.head_dim**-0.5), dims, kind="kernel", dtype=ms.float32)
    most = sharding.op(ops.ReduceMax(), "batch seq heads ->", kind="reduction", reduce="max")

    def largest(p, x, cos, sin, segment, segments, order, orders):
        q, k, _ = project(p, x, cos, sin)
        return most(of_queries(q, k, segment, segments, order, orders), (0, 1, 2))

    return largest


def build_decode(cfg, kernels):
    """decode(norm_D, p, x_BD, cos, sin, positions_B1, k_BTKH, v_BTKH) -> x + attention(norm(x)), k_BTKH, v_BTKH, as one op on one device:
    what rms, `cached` and the residual sum do for one token a row."""
    op = pick(kernels, "decode_attention")(cfg.rms_norm_eps, cfg.head_dim**-0.5)

    def decode(norm, p, x, cos, sin, positions, k, v):
        wq, wk, wv, wo = cast(p["wq"], x.dtype), cast(p["wk"], x.dtype), cast(p["wv"], x.dtype), cast(p["wo"], x.dtype)
        norm, q_norm, k_norm = cast(norm, x.dtype), cast(p["q_norm"], x.dtype), cast(p["k_norm"], x.dtype)
        return op(x, norm, wq, wk, wv, wo, q_norm, k_norm, cos, sin, positions, k, v)

    return decode


def _attend(cfg, sharding, kernels):
    """attend(q_BSNH, k_BSKH, v_BSKH, segments_BT, order_BT) -> o_BSNH. Where a row is split over ranks, they exchange heads for tokens, so
    that each has whole spans of rows for some heads, and send keys round between spans."""
    scale, spans = cfg.head_dim**-0.5, sharding.shards("span")
    kv = "batch seq>span kv_heads>span_kv_heads head_dim"
    dims = f"batch seq>span heads>span_heads head_dim, {kv}, {kv}, batch keys, batch keys -> batch span>seq span_heads>heads head_dim"
    if spans > 1:
        parts = pick(kernels, "attention", "parts")(scale)
        return sharding.op(ring.attention(sharding, parts, "span"), dims, kind="kernel", around=("span", (1, 2)))
    attend = pick(kernels, "attention")(scale, in_order=True)

    def of_rows(q, k, v, segments, order):
        return attend(q, k, v, segments, segments, order, order)

    return sharding.op(of_rows, dims, kind="kernel")


def _repeat(sharding):
    """k or v [B, S, K, H] -> with every head as often as the ranks that exchange heads need one."""
    mesh, rules, reshape, expand = sharding.mesh, sharding.rules, ops.Reshape(), ops.ExpandDims()
    ranks = mesh.size(rules["span_heads"]) // mesh.size(rules["heads"])
    if ranks == 1:
        return _same

    def repeat(x):
        B, S, K, H = x.shape
        n = -(-ranks // K)
        return reshape(ops.BroadcastTo((B, S, K, n, H))(expand(x, 3)), (B, S, K * n, H))

    return repeat


def _same(x):
    return x


def _projection(cfg, sharding, kernels):
    """project(p, x_RD, cos, sin) -> q_BSNH, k_BSKH, v_BSKH"""
    to_qkv = linear.columns(sharding, kernels, "heads", "kv", "kv")
    bias_q, bias_kv = linear.bias(sharding, "heads"), linear.bias(sharding, "kv")
    x, angle = "batch seq heads head_dim", "batch seq one half"
    turn = sharding.op(pick(kernels, "rope")(), f"{x}, {angle}, {angle} -> {x}", kind="kernel")
    norm_turn = pick(kernels, "rope", "norm")(cfg.rms_norm_eps)
    norm_turn = sharding.op(norm_turn, f"{x}, head_dim, {angle}, {angle} -> {x}", kind="kernel", call=_norm_turn)
    reshape, head_dim = ops.Reshape(), cfg.head_dim

    def split(x, cos):
        return reshape(x, (cos.shape[0], cos.shape[1], -1, head_dim))

    beside, D = partial(lora.beside, cfg, sharding, kernels), cfg.hidden_size
    more_q, more_k, more_v = (beside(name, ADAPTED[name], D, into=dim) for name, dim in (("q", "heads"), ("k", "kv"), ("v", "kv")))

    def plain(p, x):
        q, k, v = to_qkv(x, p["wq"], p["wk"], p["wv"])
        return more_q(p, x, q), more_k(p, x, k), more_v(p, x, v)

    def biased(p, x):
        q, k, v = plain(p, x)
        return bias_q(q, p["bq"]), bias_kv(k, p["bk"]), bias_kv(v, p["bv"])

    def turned(p, q, k, cos, sin):
        return turn(q, cos, sin), turn(k, cos, sin)

    def normed_and_turned(p, q, k, cos, sin):
        return norm_turn(q, p["q_norm"], cos, sin), norm_turn(k, p["k_norm"], cos, sin)

    linears = biased if cfg.qkv_bias else plain
    rotate = normed_and_turned if cfg.qk_norm else turned

    def project(p, x, cos, sin):
        q, k, v = linears(p, x)
        q, k = rotate(p, split(q, cos), split(k, cos), cos, sin)
        return q, k, split(v, cos)

    return project


def _norm_turn(norm_turn, x, w, cos, sin):
    return norm_turn(x, cast(w, x.dtype), cos, sin)


def _cache_write(sharding, kernels):
    """write(cache_BTKH, new_BSKH, at_BS) -> cache_BTKH with new[:, s] at slot at[:, s]; a slot past the end is dropped."""
    kv = "kv_heads head_dim"
    return sharding.op(
        pick(kernels, "cache_write")(), f"batch keys {kv}, batch new_keys {kv}, batch new_keys -> batch keys {kv}", kind="kernel"
    )
