"""Causal grouped-query attention with document masks. Source: Vaswani et al. 2017; Ainslie et al. 2023."""

import mindspore as ms
from mindspore import ops

from ops import iota

MASKED = -1e9  # added to a score; exp of it is 0 in float32


def reference(scale):
    """q_BNSH, k_BKTH, v_BKTH, mask_B1ST (0 or MASKED, float32) -> o_BNSH in q's dtype; softmax in float32."""
    scores, mix = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()
    softmax, reshape, cast = ops.Softmax(-1), ops.Reshape(), ops.Cast()

    def attention(q, k, v, mask):
        B, N, S, H = q.shape
        K, T = k.shape[1], k.shape[2]
        grouped = reshape(q * scale, (B, K, (N // K) * S, H))  # the queries of a kv head, one below the other
        s = cast(scores(grouped, k), ms.float32)
        p = softmax(reshape(s, (B, N, S, T)) + mask)
        o = mix(reshape(cast(p, q.dtype), (B, K, (N // K) * S, T)), v)
        return reshape(o, (B, N, S, H))

    return attention


def document_mask():
    """segment_ids_BS of the queries, the same as BT of the keys, S == T -> mask_B1ST: a token sees the earlier ones of its own segment,
    and itself."""
    greater, different = ops.Greater(), ops.NotEqual()
    expand, cast, maximum, count = ops.ExpandDims(), ops.Cast(), ops.Maximum(), iota.reference()

    def mask(segment_ids, key_segment_ids):
        at = count(segment_ids.shape[1])
        future = cast(greater(expand(at, 0), expand(at, 1)), ms.float32)
        other = cast(different(expand(key_segment_ids, 1), expand(segment_ids, 2)), ms.float32)
        return expand(maximum(expand(future, 0), other), 1) * MASKED

    return mask


def cache_mask():
    """positions_BS of the queries, k_BKTH -> mask_B1ST over a cache whose slot t holds position t."""
    greater, expand, cast, count = ops.Greater(), ops.ExpandDims(), ops.Cast(), iota.reference()

    def mask(positions, k):
        slot = expand(expand(count(k.shape[2]), 0), 0)
        return expand(cast(greater(slot, expand(positions, 2)), ms.float32) * MASKED, 1)

    return mask
