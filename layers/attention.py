"""Grouped-query attention: QK-norm (Qwen3) or q, k, v biases (Qwen2), rotary embedding, document mask or KV cache."""

from mindspore import ops

from layers import linear
from ops import attention as attention_op
from ops import iota, rms_norm
from parallel.spec import ParamSpec, normal, ones, zeros


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
    return p


def build(cfg, sharding, rotate):
    """attention(p, x_RD, cos, sin, mask_B1ST) -> y_RD, and the same over a cache:
    cached(p, x_RD, cos, sin, mask_B1ST, k_BKTH, v_BKTH, at_BS) -> y_RD, k_BKTH, v_BKTH, writing slot at_BS of each row.
    """
    project, write = _projection(cfg, sharding, rotate), _cache_write(sharding)
    kv = "batch kv_heads keys head_dim"
    dims = f"batch heads seq head_dim, {kv}, {kv}, batch one seq keys -> batch heads seq head_dim"
    attend = sharding.op(attention_op.reference(cfg.head_dim**-0.5), dims, kind="kernel")
    swap = sharding.op(ops.Transpose(), "batch heads seq head_dim -> batch seq heads head_dim", kind="kernel")
    out, reshape = linear.row(sharding, "heads"), ops.Reshape()

    def merge(p, o):
        B, N, S, H = o.shape
        return out(reshape(swap(o, (0, 2, 1, 3)), (B * S, N * H)), p["wo"])

    def attention(p, x, cos, sin, mask):
        q, k, v = project(p, x, cos, sin)
        return merge(p, attend(q, k, v, mask))

    def cached(p, x, cos, sin, mask, k_cache, v_cache, at):
        q, k, v = project(p, x, cos, sin)
        k_cache, v_cache = write(k_cache, k, at), write(v_cache, v, at)
        return merge(p, attend(q, k_cache, v_cache, mask)), k_cache, v_cache

    return attention, cached


def _projection(cfg, sharding, rotate):
    """project(p, x_RD, cos, sin) -> q_BNSH, k_BKSH, v_BKSH"""
    to_qkv = linear.columns(sharding, "heads", "kv", "kv")
    bias_q, bias_kv = linear.bias(sharding, "heads"), linear.bias(sharding, "kv")
    dims = "batch seq heads head_dim, head_dim -> batch seq heads head_dim"
    norm = sharding.op(rms_norm.reference(cfg.rms_norm_eps), dims, kind="kernel")
    swap = sharding.op(ops.Transpose(), "batch seq heads head_dim -> batch heads seq head_dim", kind="kernel")
    reshape, head_dim = ops.Reshape(), cfg.head_dim

    def split(x, cos):
        return reshape(x, (cos.shape[0], cos.shape[1], -1, head_dim))

    def plain(p, x):
        return to_qkv(x, p["wq"], p["wk"], p["wv"])

    def biased(p, x):
        q, k, v = to_qkv(x, p["wq"], p["wk"], p["wv"])
        return bias_q(q, p["bq"]), bias_kv(k, p["bk"]), bias_kv(v, p["bv"])

    def same(p, q, k):
        return q, k

    def normed(p, q, k):
        return norm(q, p["q_norm"]), norm(k, p["k_norm"])

    linears = biased if cfg.qkv_bias else plain
    qk_norm = normed if cfg.qk_norm else same

    def project(p, x, cos, sin):
        q, k, v = linears(p, x)
        q, k, v = split(q, cos), split(k, cos), split(v, cos)
        q, k = qk_norm(p, q, k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return swap(q, (0, 2, 1, 3)), swap(k, (0, 2, 1, 3)), swap(v, (0, 2, 1, 3))

    return project


def _cache_write(sharding):
    """write(cache_BKTH, new_BKSH, at_BS) -> cache_BKTH with new[:, :, s] at slot at[:, s]; a slot past the end is dropped."""
    onehot_matmul, equal, cast, expand = ops.BatchMatMul(), ops.Equal(), ops.Cast(), ops.ExpandDims()
    total, count = ops.ReduceSum(keep_dims=True), iota.reference()

    def write(cache, new, at):
        B, K, T, H = cache.shape
        slot = count(T)
        hit = cast(equal(expand(expand(slot, 0), 2), expand(at, 1)), cache.dtype)  # [B, T, S]
        kept = 1 - total(hit, 2)
        wide = ops.BroadcastTo((B, K, T, new.shape[2]))(expand(hit, 1))
        return cache * expand(kept, 1) + onehot_matmul(wide, cast(new, cache.dtype))

    return sharding.op(
        write,
        "batch kv_heads keys head_dim, batch kv_heads new_keys head_dim, batch new_keys -> batch kv_heads keys head_dim",
        kind="kernel",
    )
