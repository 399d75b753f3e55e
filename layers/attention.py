"""Grouped-query attention: QK-norm (Qwen3) or q, k, v biases (Qwen2), rotary embedding, document mask or KV cache.

Dims: B batch, S query length, T key length, D model, N heads, K kv heads, H head dim, R = B * S rows. On a rank, B, S, N and K count its
shard.
"""

from mindspore import ops

from layers import lora
from layers.lora import adapted
from ops.int8 import is_int8
from ops.rearrange import rearrange
from parallel.specs import ParamSpec, normal, ones, zeros

cast = ops.Cast()
ADAPTED = {"q": "wq", "k": "wk", "v": "wv", "o": "wo"}

HEADS, ANGLES = "batch seq heads head_dim", "batch seq one half, batch seq one half"
# Ranks that share a row by heads run an all-to-all before attention: a rank then has some of the heads for all tokens of its span.
SPAN, KV_SPAN = "batch seq>span heads>span_heads head_dim", "batch seq>span kv_heads>span_kv_heads head_dim"
TO_SPAN = f"{SPAN}, {KV_SPAN}, {KV_SPAN}, batch keys, batch keys -> batch span>seq span_heads>heads head_dim"
DOCUMENTS_TO_SPAN = f"{SPAN}, {KV_SPAN}, {KV_SPAN}, batch documents -> batch span>seq span_heads>heads head_dim"
KV = "batch keys kv_heads head_dim"
OVER_CACHE = f"{HEADS}, {KV}, {KV}, batch seq, batch keys, batch seq, batch keys -> {HEADS}"
INTO_CACHE = f"{KV}, batch new_keys kv_heads head_dim, batch new_keys -> {KV}"
PAGES = "pages page_slots kv_heads head_dim"
INTO_PAGES = f"{PAGES}, tokens kv_heads head_dim, tokens -> {PAGES}"
OVER_PAGES = f"tokens heads head_dim, {PAGES}, {PAGES}, tokens row_pages, tokens -> tokens heads head_dim"
PACKED_OVER_PAGES = f"tokens heads head_dim, {PAGES}, {PAGES}, batch row_pages, tokens, tokens -> tokens heads head_dim"


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


def attention(cfg, op, p, x, rows, cache):
    """x_RD -> y_RD, cache.

    rows: see qwen3.model.rows_of. A token attends to the tokens of its own segment up to itself. cache: None in training; else the pair
    k_BTKH, v_BTKH: the new keys and values are written into the slots `order`, and a query attends to the slots up to its own. With a table
    in `rows` the cache is one of pages, and each row of the batch is one token, see qwen3.model.rows_over_pages. With rows["last"] y has
    only these rows.
    """
    q, k, v = project(cfg, op, p, x, rows)
    if cache is None:
        k, v = repeat_kv_heads(op, k), repeat_kv_heads(op, v)
        if op.by_lengths:
            o = op.attention_by_lengths(q, k, v, rows["documents"], DOCUMENTS_TO_SPAN)
        else:
            o = op.attention(q, k, v, rows["segments"], rows["order"], TO_SPAN)
    elif "slot" in rows:
        o, cache = over_pages(op, q, k, v, rows, cache)
    else:
        order = rows["order"]
        k, v = op.cache_write(cache[0], k, order, INTO_CACHE), op.cache_write(cache[1], v, order, INTO_CACHE)
        o = op.attention_over_cache(q, k, v, rows["segments"], rows["key_segments"], order, rows["slots"], OVER_CACHE)
        cache = (k, v)
    o = rearrange(o, "batch seq heads head_dim -> (batch seq) (heads head_dim)", {})
    y = op.matmul(o, p["wo"], "tokens heads, heads embed -> tokens>rows embed")
    return adapted(cfg, op, p, "wo", o, y, rows), cache


def over_pages(op, q, k, v, rows, cache):
    """Attention over pages of q [R, 1, N, H], after k, v [R, 1, K, H] are written into them -> o [R, 1, N, H], cache. With rows["last"]
    only of these queries: o [B, 1, N, H]."""
    q = rearrange(q, "tokens one heads head_dim -> (tokens one) heads head_dim", {})
    k = op.paged_write(cache[0], rearrange(k, "tokens one heads head_dim -> (tokens one) heads head_dim", {}), rows["slot"], INTO_PAGES)
    v = op.paged_write(cache[1], rearrange(v, "tokens one heads head_dim -> (tokens one) heads head_dim", {}), rows["slot"], INTO_PAGES)
    if "row" in rows:
        row, position = rows["row"], rows["position"]
        if "last" in rows:
            q, row, position = (ops.gather(x, rows["last"], 0) for x in (q, row, position))
        o = op.packed_attention(q, k, v, rows["table"], row, position, PACKED_OVER_PAGES)
    else:
        o = op.paged_attention(q, k, v, rows["table"], rows["length"], OVER_PAGES)
    return rearrange(o, "tokens heads head_dim -> tokens 1 heads head_dim", {}), (k, v)


def project(cfg, op, p, x, rows):
    """x_RD -> q_BSNH, k_BSKH, v_BSKH, after QK-norm and the rotary embedding."""
    cos, sin = rows["cos"], rows["sin"]
    B, H = cos.shape[0], cfg.head_dim
    q, k, v = op.matmuls(
        x,
        (p["wq"], p["wk"], p["wv"]),
        ("rows>tokens embed", "embed heads -> tokens heads", "embed kv -> tokens kv_heads", "embed kv -> tokens kv_heads"),
    )
    q, k, v = adapted(cfg, op, p, "wq", x, q, rows), adapted(cfg, op, p, "wk", x, k, rows), adapted(cfg, op, p, "wv", x, v, rows)
    if cfg.qkv_bias:
        q = op.add_bias(q, p["bq"], "tokens heads, heads -> tokens heads")
        k = op.add_bias(k, p["bk"], "tokens kv_heads, kv -> tokens kv_heads")
        v = op.add_bias(v, p["bv"], "tokens kv_heads, kv -> tokens kv_heads")
    q = rearrange(q, "(batch seq) (heads head_dim) -> batch seq heads head_dim", {"batch": B, "head_dim": H})
    k = rearrange(k, "(batch seq) (heads head_dim) -> batch seq heads head_dim", {"batch": B, "head_dim": H})
    v = rearrange(v, "(batch seq) (heads head_dim) -> batch seq heads head_dim", {"batch": B, "head_dim": H})
    if cfg.qk_norm:
        q = op.norm_rope(q, p["q_norm"], cos, sin, f"{HEADS}, head_dim, {ANGLES} -> {HEADS}")
        k = op.norm_rope(k, p["k_norm"], cos, sin, f"{HEADS}, head_dim, {ANGLES} -> {HEADS}")
    else:
        q = op.rope(q, cos, sin, f"{HEADS}, {ANGLES} -> {HEADS}")
        k = op.rope(k, cos, sin, f"{HEADS}, {ANGLES} -> {HEADS}")
    return q, k, v


def repeat_kv_heads(op, x):
    """Repeats each kv head of x [B, S, K, H] until every rank of the all-to-all around attention gets at least one."""
    if op.ranks_a_head == 1:
        return x
    B, S, K, H = x.shape
    copies = -(-op.ranks_a_head // K)
    x = ops.BroadcastTo((B, S, K, copies, H))(rearrange(x, "batch seq heads head_dim -> batch seq heads 1 head_dim", {}))
    return rearrange(x, "batch seq heads copies head_dim -> batch seq (heads copies) head_dim", {})


def largest_logit(cfg, op, p, x, rows):
    """x_RD -> the largest scaled attention logit before the softmax, over the global batch and all heads, without masked logits."""
    q, k, _ = project(cfg, op, p, x, rows)
    dims = "batch seq heads head_dim, batch seq>keys kv_heads head_dim, batch seq, batch keys, batch seq, batch keys -> batch seq heads"
    own = op.move(rows["order"], "batch keys -> batch keys>seq")
    of_queries = op.largest_logits(q, k, rows["own_segments"], rows["segments"], own, rows["order"], dims)
    return op.largest_of_all(of_queries, "batch seq heads ->")


def decode(op, norm, p, x, rows, cache):
    """x_BD -> x + attention(norm(x)), cache. One fused op, for one token per row on one device. norm: the weights [D] of the norm."""
    wq, wk, wv, wo = p["wq"], p["wk"], p["wv"], p["wo"]
    norm, q_norm, k_norm = cast(norm, x.dtype), cast(p["q_norm"], x.dtype), cast(p["k_norm"], x.dtype)
    cos, sin, order, table, k, v = rows["cos"], rows["sin"], rows["order"], rows["table"], cache[0], cache[1]
    if is_int8(wq):
        scales = wq["scale"], wk["scale"], wv["scale"], wo["scale"]
        wq, wk, wv, wo = wq["int8"], wk["int8"], wv["int8"], wo["int8"]
        x, k, v = op.decode_attention_int8(x, norm, wq, wk, wv, wo, q_norm, k_norm, cos, sin, order, table, k, v, *scales)
    else:
        wq, wk, wv, wo = cast(wq, x.dtype), cast(wk, x.dtype), cast(wv, x.dtype), cast(wo, x.dtype)
        x, k, v = op.decode_attention(x, norm, wq, wk, wv, wo, q_norm, k_norm, cos, sin, order, table, k, v)
    return x, (k, v)
