"""Attention over a paged KV cache: of one query a row, for decoding, and of many queries of several rows, for reading prompts.

A cache has P pages of C tokens. Token t of row b is token t % C of page table[b, t // C]. Head n uses kv head n // (N / K).

attention(q_BNH, k [P, C, K, H], v [P, C, K, H], table_BM int32, length_B int32) -> o_BNH. A row's query sees its first length[b] tokens, 0
to M * C. The result of a row of length 0 is 0.

packed(q_RNH, k, v, table_BM, row_R int32, position_R int32) -> o_RNH. Query r is of row row[r] and sees the tokens 0 to position[r] of it.
The result of a query of no row, with a negative number as its row or position, is 0. Queries may come in any order; those of a row, next
to each other by their positions, share the work.

Entries of the table that a row does not need, and slots that it does not see, may have any value. Source: Kwon et al. 2023.
"""

import mindspore as ms
from mindspore import nn, ops

from ops import attention, iota
from ops.custom import kernel
from ops.signature import check

ARGUMENTS, GROUPED = "q B N H; k same P C K H; v same P C K H; table int32 B M; length int32 B", {"divides": ("K", "N")}
PACKED = "q R N H; k same P C K H; v same P C K H; table int32 B M; row int32 R; position int32 R"


def reference(scale):
    """Returns attention with scores q k^T times scale. Softmax in float32, the result in the dtype of q. Each row's pages are copied."""
    require, attend, of_rows = check("paged_attention", ARGUMENTS, **GROUPED), attention.reference(scale), _of_rows()
    reshape, expand, tile, cast = ops.Reshape(), ops.ExpandDims(), ops.Tile(), ops.Cast()
    less, ones_like, count = ops.Less(), ops.OnesLike(), iota.reference()

    def paged_attention(q, k, v, table, length):
        require((q.shape, k.shape, v.shape, table.shape, length.shape), (q.dtype, k.dtype, v.dtype, table.dtype, length.dtype))
        T = table.shape[1] * k.shape[1]
        slot = tile(reshape(count(T), (1, T)), (q.shape[0], 1))
        seen = less(slot, expand(length, 1))
        last, one = expand(length, 1) - 1, ones_like(expand(length, 1))
        o = attend(expand(q, 1), of_rows(k, table, seen), of_rows(v, table, seen), one, ones_like(slot), last, slot)
        return cast(reshape(o, q.shape), q.dtype)

    return paged_attention


def reference_packed(scale):
    """Returns packed attention. It copies the pages of all rows, and scores every query with the keys of every row."""
    require, attend, of_rows = check("paged_attention", PACKED, **GROUPED), attention.reference(scale), _of_rows()
    reshape, expand, tile, cast, less, equal = ops.Reshape(), ops.ExpandDims(), ops.Tile(), ops.Cast(), ops.Less(), ops.Equal()
    maximum, minimum, most, count = ops.Maximum(), ops.Minimum(), ops.ReduceMax(), iota.reference()
    gather, broadcast, select, zeros_like, enough = ops.Gather(), ops.BroadcastTo, ops.Select(), ops.ZerosLike(), ops.GreaterEqual()

    def packed_attention(q, k, v, table, row, position):
        shapes = q.shape, k.shape, v.shape, table.shape, row.shape, position.shape
        require(shapes, (q.dtype, k.dtype, v.dtype, table.dtype, row.dtype, position.dtype))
        (B, M), (R, N, H), C = table.shape, q.shape, k.shape[1]
        row = row + minimum(position, 0) * (B + 1)  # that of no token is negative
        own = cast(equal(expand(count(B), 1), expand(row, 0)), ms.float32)  # [B, R]
        length = cast(most(own * expand(cast(position + 1, ms.float32), 0), 1), ms.int32)
        slot = tile(reshape(count(M * C), (1, M * C)), (B, 1))
        seen = less(slot, expand(length, 1))
        # each row apart, so that a number that is not finite stays in its row
        queries, at = broadcast((B, R, N, H))(expand(q, 0)), broadcast((B, R))(expand(maximum(position, 0), 0))
        of_query, of_key = broadcast((B, R))(expand(row, 0)), broadcast((B, M * C))(expand(count(B), 1))
        o = attend(queries, of_rows(k, table, seen), of_rows(v, table, seen), of_query, of_key, at, slot)
        o = gather(reshape(o, (B * R, N, H)), maximum(row, 0) * R + count(R), 0)
        return cast(select(broadcast((R, N, H))(reshape(enough(row, 0), (R, 1, 1))), o, zeros_like(o)), q.dtype)

    return packed_attention


def _of_rows():
    """Returns a function of (cache, table_BM, seen [B, M * C] bool) -> the tokens of each row [B, M * C, K, H], zeros for those unseen."""
    gather, reshape, expand, maximum, minimum = ops.Gather(), ops.Reshape(), ops.ExpandDims(), ops.Maximum(), ops.Minimum()
    select, zeros_like, broadcast = ops.Select(), ops.ZerosLike(), ops.BroadcastTo

    def of_rows(cache, table, seen):
        P, C, K, H = cache.shape
        B, M = table.shape
        page = minimum(maximum(table, 0), P - 1)
        x = reshape(gather(cache, page, 0), (B, M * C, K, H))
        return select(broadcast(x.shape)(expand(expand(seen, 2), 3)), x, zeros_like(x))

    return of_rows


def cpu(scale):
    """Returns attention as a float32 C++ kernel, which reads the pages where they are. No gradient.

    Raises RuntimeError for a length above M * C and for a page that a row needs and that is not 0 to P - 1.
    """
    attend, scale = kernel("paged_attention", "paged_attention", f"{ARGUMENTS}; scale 1", _q, _q, **GROUPED), ms.Tensor([scale], ms.float32)

    def paged_attention(q, k, v, table, length):
        return attend(q, k, v, table, length, scale)

    return Decoding(paged_attention)


def cpu_packed(scale):
    """Returns packed attention as a float32 C++ kernel, which reads the pages where they are. No gradient.

    A query's result has the same bits whatever queries are beside it. Raises RuntimeError for a row, position or page out of range.
    """
    return Reading(scale)


class Decoding(nn.Cell):
    """A kernel of attention over a cache. It has no gradient."""

    def __init__(self, attend):
        super().__init__()
        self.attend = attend

    def construct(self, q, k, v, table, length):
        return self.attend(q, k, v, table, length)

    def bprop(self, q, k, v, table, length, out, dout):
        raise RuntimeError("the paged_attention kernel is for decoding and has no gradient; use ops.paged_attention=reference")


class Reading(nn.Cell):
    """The C++ kernel of packed attention. It has no gradient."""

    def __init__(self, scale):
        super().__init__()
        self.attend = kernel("paged_attention", "paged_attention_packed", f"{PACKED}; scale 1", _packed_q, _packed_q, **GROUPED)
        self.scale = ms.Tensor([scale], ms.float32)

    def construct(self, q, k, v, table, row, position):
        return self.attend(q, k, v, table, row, position, self.scale)

    def bprop(self, q, k, v, table, row, position, out, dout):
        raise RuntimeError("the paged_attention kernel of prompts has no gradient; use ops.paged_attention=reference")


def _q(q, k, v, table, length, scale):
    return q


def _packed_q(q, k, v, table, row, position, scale):
    return q
