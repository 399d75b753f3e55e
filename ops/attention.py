"""Causal grouped-query attention between tokens of one segment. Source: Vaswani et al. 2017; Ainslie et al. 2023; Dao 2023 for `cpu`.

attention(q_BSNH, k_BTKH, v_BTKH, segment_BS, key_segment_BT, order_BS, key_order_BT) -> o_BSNH; segments and orders are int32. A query
attends to ("sees") the keys of its own segment whose order is not above its own. The result of a query that sees no key is 0. Head n uses
kv head n // (N / K).

in_order, an argument of each factory: the caller promises that S equals T and that both orders are 0, 1, ... in every row. Kernels then
skip later keys.
"""

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore.ops.auto_generate import FlashAttentionScore
from mindspore.ops.operations._grad_ops import FlashAttentionScoreGrad

from ops import documents, iota
from ops.custom import kernel
from ops.signature import check

MASKED = -1e9  # added to a score: exp of it is 0 in float32
INTS = "segment int32 B S; key_segment int32 B T; order int32 B S; key_order int32 B T"
ARGUMENTS, GROUPED = f"q B S N H; k same B T K H; v same B T K H; {INTS}", {"divides": ("K", "N")}
PACKED = "q B S N H; k same B S K H; v same B S K H; ends int32 B D"
CROSSING = "q B S N H; k same B T K H; v same B T K H; meets int32 B 2"
HALF = ("bfloat16", "float16")  # the dtypes of MindSpore's kernel
SCORES = 1 << 23  # scores that largest_logits computes at a time: 32 MiB
FAR = 2**31 - 1  # the number by which MindSpore's kernel means all earlier, or all later, tokens


def reference(scale, in_order=False):
    """Returns attention with scores q k^T times scale. Softmax in float32, the result in the dtype of q."""
    require = check("attention", ARGUMENTS, **GROUPED)
    scores, mix = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()
    softmax, reshape, cast, swap, expand = ops.Softmax(-1), ops.Reshape(), ops.Cast(), ops.Transpose(), ops.ExpandDims()
    hides, hidden_keys = _hidden(), ops.ReduceSum()

    def attention(q, k, v, segment, key_segment, order, key_order):
        require(*_given(q, k, v, segment, key_segment, order, key_order))
        B, S, N, H = q.shape
        T, K = k.shape[1], k.shape[2]
        hidden = hides(segment, key_segment, order, key_order)
        grouped = reshape(swap(q * scale, (0, 2, 1, 3)), (B, K, (N // K) * S, H))  # [B, K, G * S, H]
        s = cast(scores(grouped, swap(k, (0, 2, 1, 3))), ms.float32)
        p = softmax(reshape(s, (B, N, S, T)) + expand(hidden * MASKED, 1))
        o = mix(reshape(cast(p, q.dtype), (B, K, (N // K) * S, T)), swap(v, (0, 2, 1, 3)))
        sees = cast(hidden_keys(hidden, 2) < T, q.dtype)
        return swap(reshape(o, (B, N, S, H)), (0, 2, 1, 3)) * expand(expand(sees, 2), 3)

    return attention


def reference_packed(scale):
    """Returns attention(q_BSNH, k_BSKH, v_BSKH, ends_BD int32) -> o_BSNH within the documents of packed rows, in order.

    ends: the cumulative lengths of a row's documents, rising, from 0 to S. Equal ones are documents without tokens, and the tokens from the
    last end on are a document too. So a row of fewer documents is filled up with S.
    """
    return packed(reference(scale, in_order=True))


def packed(attend):
    """Returns attention as reference_packed does by `attend`, attention to rows in order. Segments and orders take B * S integers each."""
    require, segments_of = check("attention", PACKED, **GROUPED), documents.segments()
    count, tile, reshape = iota.reference(), ops.Tile(), ops.Reshape()

    def attention(q, k, v, ends):
        require((q.shape, k.shape, v.shape, ends.shape), (q.dtype, k.dtype, v.dtype, ends.dtype))
        B, S = q.shape[:2]
        segment, order = segments_of(ends, S), tile(reshape(count(S), (1, S)), (B, 1))
        return attend(q, k, v, segment, segment, order, order)

    return attention


def reference_parts(scale):
    """Returns (forward, backward) of attention to some of the keys, from which parallel/context/ring.py computes attention to all keys.

    forward(the arguments of attention) -> (o_BSNH, lse_BSN), see cpu_with_lse. backward(the arguments of attention, o_BSNH and lse_BSN of
    attention to all keys, do, dlse) -> (dq, dk, dv) for these keys. Computes in float32; results have the dtypes of the operands.
    """
    require, hides, sizes = check("attention", ARGUMENTS, **GROUPED), _hidden(), ops.ReduceSum()
    product, with_keys, of_keys = ops.BatchMatMul(), ops.BatchMatMul(transpose_b=True), ops.BatchMatMul(transpose_a=True)
    exp, log1p, most, total = ops.Exp(), ops.Log1p(), ops.ReduceMax(keep_dims=True), ops.ReduceSum(keep_dims=True)
    cast, expand, tile, swap, reshape = ops.Cast(), ops.ExpandDims(), ops.Tile(), ops.Transpose(), ops.Reshape()

    def grouped(x, K):  # [B, S, N, H] -> float32 [B, K, G * S, H], the queries of the G heads of a kv head
        B, S, N, H = x.shape
        return reshape(swap(cast(x, ms.float32), (0, 2, 1, 3)), (B, K, (N // K) * S, H))

    def ungrouped(x, like):
        B, S, N, H = like.shape
        return swap(reshape(x, (B, N, S, H)), (0, 2, 1, 3))

    def scores(q, k, hidden):
        """Returns the scores [B, K, G * S, T], and `hidden` in this shape."""
        hidden = tile(expand(hidden, 1), (1, 1, q.shape[2] // k.shape[2], 1))
        return with_keys(grouped(q, k.shape[2]) * scale, grouped(k, k.shape[2])) + hidden * MASKED, hidden

    def forward(q, k, v, segment, key_segment, order, key_order):
        require(*_given(q, k, v, segment, key_segment, order, key_order))
        hidden = hides(segment, key_segment, order, key_order)
        s, _ = scores(q, k, hidden)
        top = most(s, 3)
        p = exp(s - top)
        each = total(p, 3)
        sees = expand(cast(sizes(hidden, 2) < k.shape[1], ms.float32), 2)  # [B, S, 1]
        o = ungrouped(product(p / each, grouped(v, v.shape[2])), q) * expand(sees, 3)
        lse = ungrouped(top + log1p(each - 1), expand(q[:, :, :, 0], 3))  # not Log: see layers/loss.py
        return cast(o, q.dtype), reshape(lse, lse.shape[:3]) * sees + MASKED * (1 - sees)

    def backward(q, k, v, segment, key_segment, order, key_order, o, lse, do, dlse):
        K, hidden = k.shape[2], hides(segment, key_segment, order, key_order)
        s, hidden = scores(q, k, hidden)
        p = exp(s - grouped(expand(lse, 3), K)) * (1 - hidden)
        do = grouped(do, K)
        delta = total(do * grouped(o, K), 3) - grouped(expand(dlse, 3), K)
        ds = p * (with_keys(do, grouped(v, K)) - delta) * scale
        dq, dk, dv = product(ds, grouped(k, K)), of_keys(ds, grouped(q, K)), of_keys(p, do)
        return cast(ungrouped(dq, q), q.dtype), cast(ungrouped(dk, k), k.dtype), cast(ungrouped(dv, v), v.dtype)

    return forward, backward


def reference_spans(scale):
    """Returns (documents, crossing), each (forward, backward), from which parallel/context/ring.py computes attention to documents that are
    given by their lengths. None has a tensor of S * T elements, except in the reference.

    documents: attention within the documents of packed rows, in order, as reference_packed does.
        forward(q_BSNH, k_BSKH, v_BSKH, ends_BD) -> (o_BSNH, lse_BSN)
    crossing: the first queries of a row, as many as meets[:, 0], attend to the last keys of it, as many as meets[:, 1], to all of them,
        whatever the order. The other queries see no key. These are the queries and keys of the one document that lies across two places.
        forward(q_BSNH, k_BTKH, v_BTKH, meets_B2 int32) -> (o_BSNH, lse_BSN)
    backward(the arguments of forward, o_BSNH and lse_BSN of attention to all keys, do, dlse) -> (dq, dk, dv). See reference_parts.
    """
    return spans(*reference_parts(scale))


def spans(forward, backward):
    """Returns (documents, crossing) as reference_spans does, by attention to some of the keys, see reference_parts."""
    segments_of, count, tile, reshape, cast = documents.segments(), iota.reference(), ops.Tile(), ops.Reshape(), ops.Cast()
    less = ops.Less()

    def places(B, S):
        return tile(reshape(count(S), (1, S)), (B, 1))

    def sides(meets, S, T):
        """Returns the segments of queries and of keys: 1 for those that meet, 0 and 2 for the others."""
        B = meets.shape[0]
        return cast(less(places(B, S), meets[:, :1]), ms.int32), 1 + cast(less(places(B, T), T - meets[:, 1:]), ms.int32)

    def of_documents(q, k, v, ends):
        segment, place = segments_of(ends, q.shape[1]), places(q.shape[0], q.shape[1])
        return forward(q, k, v, segment, segment, place, place)

    def of_documents_back(q, k, v, ends, o, lse, do, dlse):
        segment, place = segments_of(ends, q.shape[1]), places(q.shape[0], q.shape[1])
        return backward(q, k, v, segment, segment, place, place, o, lse, do, dlse)

    def crossing(q, k, v, meets):
        segment, key_segment = sides(meets, q.shape[1], k.shape[1])
        return forward(q, k, v, segment, key_segment, segment * 0, key_segment * 0)

    def crossing_back(q, k, v, meets, o, lse, do, dlse):
        segment, key_segment = sides(meets, q.shape[1], k.shape[1])
        return backward(q, k, v, segment, key_segment, segment * 0, key_segment * 0, o, lse, do, dlse)

    return (of_documents, of_documents_back), (crossing, crossing_back)


def _given(q, k, v, segment, key_segment, order, key_order):
    """Returns the shapes and dtypes of the arguments."""
    shapes = q.shape, k.shape, v.shape, segment.shape, key_segment.shape, order.shape, key_order.shape
    return shapes, (q.dtype, k.dtype, v.dtype, segment.dtype, key_segment.dtype, order.dtype, key_order.dtype)


def _hidden():
    """Returns a function of segments and orders -> float32 hidden_BST, 1 where a query does not see a key, else 0."""
    greater, different, maximum = ops.Greater(), ops.NotEqual(), ops.Maximum()
    expand, cast = ops.ExpandDims(), ops.Cast()

    def hidden(segment, key_segment, order, key_order):
        later = cast(greater(expand(key_order, 1), expand(order, 2)), ms.float32)
        other = cast(different(expand(key_segment, 1), expand(segment, 2)), ms.float32)
        return ops.stop_gradient(maximum(later, other))

    return hidden


def largest_logits(scale, block=None):
    """Returns largest(q_BSNH, k_BTKH, segment_BS, key_segment_BT, order_BS, key_order_BT) -> float32 [B, S, N], the largest logits.

    It is the maximum of q k^T times scale over the keys that a query sees, and MASKED for padding (segment 0). It is for monitoring and has
    no gradient. block: the number of keys that are taken at a time; by default so many that there are SCORES scores.
    """
    scores, most, hides, greater = ops.BatchMatMul(transpose_b=True), ops.ReduceMax(), _hidden(), ops.Greater()
    cast, expand, swap, reshape = ops.Cast(), ops.ExpandDims(), ops.Transpose(), ops.Reshape()
    maximum, concat, tile = ops.Maximum(), ops.Concat(1), ops.Tile()

    def given(B, S, N):
        return block

    def of_size(B, S, N):
        return max(SCORES // (B * S * N), 16)

    limit = given if block else of_size

    def of_block(q, k, segment, key_segment, order, key_order):
        """q [B, K, G * S, H], k [B, K, t, H] -> the largest logits [B, N, S] for these keys."""
        B, S = segment.shape
        hidden = maximum(hides(segment, key_segment, order, key_order), 1 - cast(greater(expand(segment, 2), 0), ms.float32))
        s = reshape(scores(q, k), (B, -1, S, k.shape[2]))
        return most(s + tile(expand(hidden * MASKED, 1), (1, s.shape[1], 1, 1)), 3)  # tiled: see parallel/context/ring.py

    def cut(x, size):
        """Splits [B, T, ...] into [blocks, B, size, ...], padded with zeros."""
        missing = -x.shape[1] % size
        x = concat((x, ops.zeros((x.shape[0], missing, *x.shape[2:]), x.dtype))) if missing else x
        x = reshape(x, (x.shape[0], x.shape[1] // size, size, *x.shape[2:]))
        return swap(x, (1, 0, 2, 3, 4) if len(x.shape) == 5 else (1, 0, 2))

    def largest(q, k, segment, key_segment, order, key_order):
        B, S, N, H = q.shape
        K, size = k.shape[2], min(limit(B, S, N), k.shape[1])
        q = reshape(swap(cast(q, ms.float32) * scale, (0, 2, 1, 3)), (B, K, (N // K) * S, H))
        k = swap(cut(cast(k, ms.float32), size), (0, 1, 3, 2, 4))
        key_segment, key_order = cut(key_segment, size), cut(key_order, size)
        if k.shape[0] == 1:
            return swap(of_block(q, k[0], segment, key_segment[0], order, key_order[0]), (0, 2, 1))
        i, top = ms.Tensor(0, ms.int32), ops.zeros((B, N, S), ms.float32) + MASKED
        while i < k.shape[0]:  # a graph with every block unrolled would take long to compile
            top = maximum(top, of_block(q, k[i], segment, key_segment[i], order, key_order[i]))
            i = i + 1
        return swap(top, (0, 2, 1))

    return largest


def vendor(scale, in_order=False):
    """Returns attention by MindSpore's flash attention, in bfloat16 or float16, with a mask of B * S * T bytes.

    MindSpore does not document the result for a query that sees no key. Such a query gets all keys here, and its result is multiplied by 0.
    """
    mask, cast, expand = vendor_mask(in_order), ops.Cast(), ops.ExpandDims()
    require, after = check("attention", ARGUMENTS, HALF, **GROUPED), 0 if in_order else FAR

    def attention(q, k, v, segment, key_segment, order, key_order):
        require(*_given(q, k, v, segment, key_segment, order, key_order))
        attend = FlashAttentionScore(q.shape[2], 1.0, scale, FAR, after, 0, "BSND", 0)
        hidden, sees = mask(segment, key_segment, order, key_order)
        o = attend(q, k, v, None, None, None, hidden)[3]
        return o if in_order else o * expand(expand(cast(sees, q.dtype), 2), 3)

    return attention


def vendor_mask(in_order=False):
    """Returns mask(segment, key_segment, order, key_order) -> (hidden [B, 1, S, T], sees_BS), both bool.

    hidden: true where a query does not see a key. sees: true for a query that sees a key; for the others nothing is hidden. With in_order
    every query sees a key, and `sees` is None.
    """
    greater, different, either, both = ops.Greater(), ops.NotEqual(), ops.LogicalOr(), ops.LogicalAnd()
    expand, every, opposite = ops.ExpandDims(), ops.ReduceAll(), ops.LogicalNot()

    def hides(segment, key_segment, order, key_order):
        later = greater(expand(key_order, 1), expand(order, 2))
        return either(later, different(expand(key_segment, 1), expand(segment, 2)))

    def mask(segment, key_segment, order, key_order):
        hidden = hides(segment, key_segment, order, key_order)
        sees = opposite(every(hidden, 2))
        return expand(both(hidden, expand(sees, 2)), 1), sees

    def mask_in_order(segment, key_segment, order, key_order):
        return expand(hides(segment, key_segment, order, key_order), 1), None

    return mask_in_order if in_order else mask


def vendor_packed(scale):
    """Returns attention as reference_packed does, by MindSpore's flash attention in the layout TND: its memory is linear in S.

    All rows are one axis of tokens, cut by cumulative lengths, whose values travel to the host in each call. Documents without tokens,
    which fill up a row's ends, are given as such: MindSpore's docstring asks for documents of at least one key, while CANN's documentation
    of aclnnFlashAttentionVarLenScore and its sources allow empty ones.
    """
    require, lengths, later = check("attention", PACKED, HALF, **GROUPED), documents.lengths(), _later()
    reshape = ops.Reshape()

    def attention(q, k, v, ends):
        require((q.shape, k.shape, v.shape, ends.shape), (q.dtype, k.dtype, v.dtype, ends.dtype))
        B, S, N, H = q.shape
        K, cumulative = k.shape[2], lengths(ends, S)
        attend = FlashAttentionScore(N, 1.0, scale, FAR, 0, 0, "TND", 3)
        q, k, v = reshape(q, (B * S, N, H)), reshape(k, (B * S, K, H)), reshape(v, (B * S, K, H))
        o = attend(q, k, v, None, None, None, later, None, cumulative, cumulative)[3]
        return reshape(o, (B, S, N, H))

    return attention


def _later():
    """Returns the mask that MindSpore's kernel takes for causal attention of any length: bool [2048, 2048], true above the diagonal."""
    return ms.Tensor(np.triu(np.ones((2048, 2048), bool), 1))


def vendor_spans(scale):
    """Returns (documents, crossing) as reference_spans does, by MindSpore's flash attention and its gradient in the layout TND.

    dlse is taken to be 0. In `crossing` the keys get a token of zeros before and after them, so that no document is without keys: queries
    that see no key get the last one, and what it gives them is multiplied by 0.
    """
    lengths, (run, back), (run_all, back_all) = documents.lengths(), _in_documents(scale, True), _in_documents(scale, False)
    require, require_crossing = check("attention", PACKED, HALF, **GROUPED), check("attention", CROSSING, HALF, **GROUPED)
    reshape, cast, expand, concat, count = ops.Reshape(), ops.Cast(), ops.ExpandDims(), ops.Concat(1), iota.reference()
    less, zeros_like = ops.Less(), ops.ZerosLike()

    def of_documents(q, k, v, ends):
        require((q.shape, k.shape, v.shape, ends.shape), (q.dtype, k.dtype, v.dtype, ends.dtype))
        cumulative = lengths(ends, q.shape[1])
        return run(q, k, v, cumulative, cumulative)

    def of_documents_back(q, k, v, ends, o, lse, do, dlse):
        cumulative = lengths(ends, q.shape[1])
        return back(q, k, v, cumulative, cumulative, o, lse, do)

    def parts(meets, S, T):
        """Returns the cumulative lengths of queries and keys in three parts, the second of which meet, and float32 [B, S, 1], 1 for the
        queries that meet keys."""
        some = meets[:, :1]
        sees = cast(less(reshape(count(S), (1, S)), some), ms.float32)
        return lengths(concat((some * 0, some)), S), lengths(concat((1 + T - meets[:, 1:], some * 0 + T + 1)), T + 2), expand(sees, 2)

    def between_zeros(x):
        none = zeros_like(x[:, :1])
        return concat((none, x, none))

    def crossing(q, k, v, meets):
        require_crossing((q.shape, k.shape, v.shape, meets.shape), (q.dtype, k.dtype, v.dtype, meets.dtype))
        q_lengths, k_lengths, sees = parts(meets, q.shape[1], k.shape[1])
        o, lse = run_all(q, between_zeros(k), between_zeros(v), q_lengths, k_lengths)
        return o * cast(expand(sees, 3), q.dtype), lse * sees + MASKED * (1 - sees)

    def crossing_back(q, k, v, meets, o, lse, do, dlse):
        T = k.shape[1]
        q_lengths, k_lengths, sees = parts(meets, q.shape[1], T)
        do, lse = cast(do, q.dtype) * cast(expand(sees, 3), q.dtype), lse * sees
        dq, dk, dv = back_all(q, between_zeros(k), between_zeros(v), q_lengths, k_lengths, o, lse, do)
        return dq, dk[:, 1 : T + 1], dv[:, 1 : T + 1]

    return (of_documents, of_documents_back), (crossing, crossing_back)


def _in_documents(scale, causal):
    """Returns (forward, backward) of attention of the queries of each document to its keys, in the layout TND, for vendor_spans.

    forward(q_BSNH, k_BTKH, v_BTKH, cumulative lengths of queries, of keys) -> (o_BSNH, lse_BSN float32).
    backward(the arguments of forward, o, lse, do) -> (dq, dk, dv), where o and lse may be of attention to more keys.
    """
    mask, after, mode, (read, write) = _later() if causal else None, 0 if causal else FAR, 3 if causal else 0, documents.of_statistics()
    log1p, reshape, cast = ops.Log1p(), ops.Reshape(), ops.Cast()

    def flat(x):
        B, S, N, H = x.shape
        return reshape(x, (B * S, N, H))

    def forward(q, k, v, q_lengths, k_lengths):
        B, S, N, H = q.shape
        attend = FlashAttentionScore(N, 1.0, scale, FAR, after, 0, "TND", mode)
        top, total, _, o = attend(flat(q), flat(k), flat(v), None, None, None, mask, None, q_lengths, k_lengths)
        lse = read(top, q_lengths) + log1p(read(total, q_lengths) - 1)  # not Log: see layers/loss.py
        return reshape(o, (B, S, N, H)), reshape(lse, (B, S, N))

    def backward(q, k, v, q_lengths, k_lengths, o, lse, do):
        N = q.shape[2]
        top = write(reshape(lse, (-1, N)), q_lengths)  # exp(score - lse) / 1 are the probabilities among all keys
        gradient = FlashAttentionScoreGrad(N, 1.0, scale, FAR, after, 0, "TND", mode)
        do, o = cast(flat(do), q.dtype), cast(flat(o), q.dtype)
        q_, k_, v_, one = flat(q), flat(k), flat(v), top * 0 + 1
        found = gradient(q_, k_, v_, do, None, None, None, mask, top, one, None, o, None, q_lengths, k_lengths)
        return reshape(found[0], q.shape), reshape(found[1], k.shape), reshape(found[2], v.shape)

    return forward, backward


def vendor_missing(use):
    if use.spans > 1 and not use.documents:
        return f"needs documents by their lengths (data.max_documents) for the ring of {use.spans} ranks that parallel.cp makes"
    if use.dtype not in HALF:
        return f"computes in {' or '.join(HALF)}, and the model in {use.dtype}"
    if use.head_dim is None or use.head_dim % 16 or use.head_dim > 512:
        return f"needs a head_dim that is a multiple of 16, up to 512, and this is {use.head_dim}"
    return ""


def cpu(scale, in_order=False):
    """Returns attention as a float32 C++ kernel. Its memory is linear in S and T, in the forward and the backward."""
    attend = cpu_with_lse(scale)

    def attention(q, k, v, segment, key_segment, order, key_order):
        return attend(q, k, v, segment, key_segment, order, key_order)[0]

    return attention


def cpu_with_lse(scale):
    """Returns attention as `cpu` does, with the results (o_BSNH, lse_BSN).

    lse is the log-sum-exp of the scores of a query, and MASKED if it sees no key. The results for disjoint sets of keys are combined by it:
    the sum of their o, weighted by softmax(lse) over the sets.
    """
    return _Attention(scale)


def cpu_packed(scale):
    """Returns attention as reference_packed does, by the kernels of `cpu`. Its memory is linear in S."""
    return packed(cpu(scale, in_order=True))


def cpu_parts(scale):
    """Returns (forward, backward) as reference_parts does, by the kernels of `cpu`."""
    attend = _Attention(scale)
    forward, backward, scale = attend.forward, attend.backward, attend.scale

    def of_part(q, k, v, segment, key_segment, order, key_order):
        return forward(q, k, v, segment, key_segment, order, key_order, scale)

    def gradients(q, k, v, segment, key_segment, order, key_order, o, lse, do, dlse):
        return backward(q, k, v, segment, key_segment, order, key_order, scale, o, lse, do, dlse)

    return of_part, gradients


def cpu_spans(scale):
    """Returns (documents, crossing) as reference_spans does, by the kernels of `cpu`."""
    return spans(*cpu_parts(scale))


class _Attention(nn.Cell):
    def __init__(self, scale):
        super().__init__()
        self.scale = ms.Tensor([scale], ms.float32)
        self.forward = kernel("attention", "attention", f"{ARGUMENTS}; scale 1", _forward_shapes, _forward_dtypes, **GROUPED)
        self.backward = kernel("attention_grad", "attention_grad", 12, _backward_shapes, _backward_dtypes)
        self.zeros_like = ops.ZerosLike()

    def construct(self, q, k, v, segment, key_segment, order, key_order):
        return self.forward(q, k, v, segment, key_segment, order, key_order, self.scale)

    def bprop(self, q, k, v, segment, key_segment, order, key_order, out, dout):
        dq, dk, dv = self.backward(q, k, v, segment, key_segment, order, key_order, self.scale, out[0], out[1], dout[0], dout[1])
        zeros, key_zeros = self.zeros_like(segment), self.zeros_like(key_segment)
        return dq, dk, dv, zeros, key_zeros, zeros, key_zeros


def _forward_shapes(q, k, v, segment, key_segment, order, key_order, scale):
    return q, q[:3]


def _forward_dtypes(q, k, v, segment, key_segment, order, key_order, scale):
    return q, q


def _backward_shapes(q, k, v, segment, key_segment, order, key_order, scale, o, lse, do, dlse):
    return q, k, v


def _backward_dtypes(q, k, v, segment, key_segment, order, key_order, scale, o, lse, do, dlse):
    return q, k, v
