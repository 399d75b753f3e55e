"""Attention of one query a row over a paged KV cache, for decoding. Source: Kwon et al. 2023.

attention(q_BNH, k [P, C, K, H], v [P, C, K, H], table_BM int32, length_B int32) -> o_BNH. A cache has P pages of C tokens. Token t of row b
is token t % C of page table[b, t // C], and the row's query sees its first length[b] tokens, 0 to M * C. The result of a row of length 0 is
0. Head n uses kv head n // (N / K). Entries of the table that a row does not need, and slots that it does not see, may have any value.
"""

import mindspore as ms
from mindspore import nn, ops

from ops import attention, iota
from ops.custom import kernel
from ops.signature import check

ARGUMENTS, GROUPED = "q B N H; k same P C K H; v same P C K H; table int32 B M; length int32 B", {"divides": ("K", "N")}


def reference(scale):
    """Returns attention with scores q k^T times scale. Softmax in float32, the result in the dtype of q. Each row's pages are copied."""
    require, attend = check("paged_attention", ARGUMENTS, **GROUPED), attention.reference(scale)
    gather, reshape, expand, tile, cast = ops.Gather(), ops.Reshape(), ops.ExpandDims(), ops.Tile(), ops.Cast()
    maximum, minimum, less, select, zeros_like = ops.Maximum(), ops.Minimum(), ops.Less(), ops.Select(), ops.ZerosLike()
    ones_like, count, broadcast = ops.OnesLike(), iota.reference(), ops.BroadcastTo

    def of_rows(cache, table, seen):
        """Returns the tokens of each row, [B, M * C, K, H], with zeros for those that it does not see."""
        P, C, K, H = cache.shape
        B, M = table.shape
        page = minimum(maximum(table, 0), P - 1)
        x = reshape(gather(cache, page, 0), (B, M * C, K, H))
        return select(broadcast(x.shape)(expand(expand(seen, 2), 3)), x, zeros_like(x))

    def paged_attention(q, k, v, table, length):
        require((q.shape, k.shape, v.shape, table.shape, length.shape), (q.dtype, k.dtype, v.dtype, table.dtype, length.dtype))
        T = table.shape[1] * k.shape[1]
        slot = tile(reshape(count(T), (1, T)), (q.shape[0], 1))
        seen = less(slot, expand(length, 1))
        last, one = expand(length, 1) - 1, ones_like(expand(length, 1))
        o = attend(expand(q, 1), of_rows(k, table, seen), of_rows(v, table, seen), one, ones_like(slot), last, slot)
        return cast(reshape(o, q.shape), q.dtype)

    return paged_attention


def cpu(scale):
    """Returns attention as a float32 C++ kernel, which reads the pages where they are. No gradient.

    Raises RuntimeError for a length above M * C and for a page that a row needs and that is not 0 to P - 1.
    """
    return Decoding(_with_scale(scale))


class Decoding(nn.Cell):
    """A kernel of attention over a cache. It has no gradient."""

    def __init__(self, attend):
        super().__init__()
        self.attend = attend

    def construct(self, q, k, v, table, length):
        return self.attend(q, k, v, table, length)

    def bprop(self, q, k, v, table, length, out, dout):
        raise RuntimeError("the paged_attention kernel is for decoding and has no gradient; use ops.paged_attention=reference")


def _with_scale(scale):
    attend, scale = kernel("paged_attention", "paged_attention", f"{ARGUMENTS}; scale 1", _q, _q, **GROUPED), ms.Tensor([scale], ms.float32)

    def paged_attention(q, k, v, table, length):
        return attend(q, k, v, table, length, scale)

    return paged_attention


def _q(q, k, v, table, length, scale):
    return q
