"""Causal grouped-query attention between tokens of one segment. Source: Vaswani et al. 2017; Ainslie et al. 2023; Dao 2023 for `cpu`.

attention(q_BSNH, k_BTKH, v_BTKH, segment_BS, key_segment_BT, order_BS, key_order_BT) -> o_BSNH; segments and orders are int32. A query
sees the keys of its own segment whose order is not above its own; one that sees no key gets 0. Head n reads kv head n // (N / K).
"""

import mindspore as ms
from mindspore import nn, ops

from ops.custom import kernel

MASKED = -1e9  # added to a score: exp of it is 0 in float32


def reference(scale):
    """The attention above, with scores of q k times scale; softmax in float32, the result in q's dtype."""
    scores, mix = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()
    softmax, reshape, cast, swap, expand = ops.Softmax(-1), ops.Reshape(), ops.Cast(), ops.Transpose(), ops.ExpandDims()
    hides, hidden_keys = _hidden(), ops.ReduceSum()

    def attention(q, k, v, segment, key_segment, order, key_order):
        B, S, N, H = q.shape
        T, K = k.shape[1], k.shape[2]
        hidden = hides(segment, key_segment, order, key_order)
        grouped = reshape(swap(q * scale, (0, 2, 1, 3)), (B, K, (N // K) * S, H))  # the queries of a kv head, one below the other
        s = cast(scores(grouped, swap(k, (0, 2, 1, 3))), ms.float32)
        p = softmax(reshape(s, (B, N, S, T)) + expand(hidden * MASKED, 1))
        o = mix(reshape(cast(p, q.dtype), (B, K, (N // K) * S, T)), swap(v, (0, 2, 1, 3)))
        sees = cast(hidden_keys(hidden, 2) < T, q.dtype)
        return swap(reshape(o, (B, N, S, H)), (0, 2, 1, 3)) * expand(expand(sees, 2), 3)

    return attention


def _hidden():
    """hidden_BST: 1 where a query does not see a key, 0 where it does; float32."""
    greater, different, maximum = ops.Greater(), ops.NotEqual(), ops.Maximum()
    expand, cast = ops.ExpandDims(), ops.Cast()

    def hidden(segment, key_segment, order, key_order):
        later = cast(greater(expand(key_order, 1), expand(order, 2)), ms.float32)
        other = cast(different(expand(key_segment, 1), expand(segment, 2)), ms.float32)
        return ops.stop_gradient(maximum(later, other))

    return hidden


def cpu(scale):
    """The same in memory linear in S and T, forward and backward; float32."""
    attend = cpu_with_lse(scale)

    def attention(q, k, v, segment, key_segment, order, key_order):
        return attend(q, k, v, segment, key_segment, order, key_order)[0]

    return attention


def cpu_with_lse(scale):
    """The same -> (o_BSNH, lse_BSN), the logarithm of a query's sum of exp(score), and MASKED where it sees no key. Parts of one row of
    keys join by it: their o add up with the weights softmax(lse)."""
    return _Attention(scale)


class _Attention(nn.Cell):
    def __init__(self, scale):
        super().__init__()
        self.scale = ms.Tensor([scale], ms.float32)
        self.forward = kernel("attention", "attention", 8, _forward_shapes, _forward_dtypes)
        self.backward = kernel("attention_grad", "attention_grad", 12, _backward_shapes, _backward_dtypes)
        self.zeros_like = ops.ZerosLike()

    def construct(self, q, k, v, segment, key_segment, order, key_order):
        return self.forward(q, k, v, segment, key_segment, order, key_order, self.scale)

    def bprop(self, q, k, v, segment, key_segment, order, key_order, out, dout):
        dq, dk, dv = self.backward(q, k, v, segment, key_segment, order, key_order, self.scale, out[0], out[1], dout[0], dout[1])
        zeros, key_zeros = self.zeros_like(segment), self.zeros_like(key_segment)
        return dq, dk, dv, zeros, key_zeros, zeros, key_zeros


def _forward_shapes(q, k, v, segment, key_segment, order, key_order, scale):
    if len(q) != 4 or len(k) != 4 or (q[0], q[3]) != (k[0], k[3]) or q[2] % k[2]:
        raise ValueError(f"attention: q {q} must be [B, S, N, H], k {k} [B, T, K, H], and K divide N")
    if v != k:
        raise ValueError(f"attention: v {v} must have k's shape, {k}")
    for name, got, needed in (
        ("segment", segment, q[:2]),
        ("key_segment", key_segment, k[:2]),
        ("order", order, q[:2]),
        ("key_order", key_order, k[:2]),
    ):
        if got != needed:
            raise ValueError(f"attention: {name} {got} must be {needed}, with q {q} and k {k}")
    return q, q[:3]


def _forward_dtypes(q, k, v, segment, key_segment, order, key_order, scale):
    return q, q


def _backward_shapes(q, k, v, segment, key_segment, order, key_order, scale, o, lse, do, dlse):
    return q, k, v


def _backward_dtypes(q, k, v, segment, key_segment, order, key_order, scale, o, lse, do, dlse):
    return q, k, v
