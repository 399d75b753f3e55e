"""The documents of rows as cumulative lengths, for kernels that take lengths in place of a mask. Integers alone, without gradients.

A row of S tokens has the documents that `ends` [B, D] cuts it into: rising token numbers from 0 to S. Equal ones are documents without
tokens, and the tokens from the last end on are a document too.
"""

import itertools

import mindspore as ms
from mindspore import ops
from mindspore.ops.auto_generate import SearchSorted

from ops import iota
from ops.registry import LENGTHS

TOKENS = 1 << 20  # the most that MindSpore's flash attention takes in one call, says CANN's documentation of aclnnFlashAttentionVarLenScore

_numbers = itertools.count()


def ends(most):
    """Returns ends(segments_BS) -> int32 [B, most - 1]: where the documents of rows end, each a run of equal numbers. The last document
    takes the rest of the row. The caller promises that no row has more than `most` of them."""
    differs, cast, total, search = ops.NotEqual(), ops.Cast(), ops.CumSum(), SearchSorted(ms.int32, True)
    concat, tile, reshape, count = ops.Concat(1), ops.Tile(), ops.Reshape(), iota.reference()

    def ends(segments):
        B, S = segments.shape
        starts = cast(differs(segments, concat((segments[:, :1], segments[:, : S - 1]))), ms.int32)
        number = total(starts, 1)  # of each token's document, from 0
        return ops.stop_gradient(search(number, tile(reshape(count(most - 1), (1, most - 1)), (B, 1)), None))

    return ends


def segments():
    """Returns segments(ends_BD, S) -> int32 [B, S], for each token the number of documents that end before it."""
    search, count, tile, reshape = SearchSorted(ms.int32, True), iota.reference(), ops.Tile(), ops.Reshape()

    def segments(ends, S):
        return ops.stop_gradient(search(ends, tile(reshape(count(S), (1, S)), (ends.shape[0], 1)), None))

    return segments


def lengths():
    """Returns lengths(ends_BD, S) -> int64 [B * (D + 1)]: cumulative lengths of the documents of all rows, one row after another. Raises
    ValueError, while a graph is compiled, for more documents or tokens than MindSpore's kernel takes."""
    concat, cast, reshape, count = ops.Concat(1), ops.Cast(), ops.Reshape(), iota.reference()
    allowed = ops.constexpr(_check, name=f"check_lengths_{next(_numbers)}")

    def lengths(ends, S):
        B, D = ends.shape
        allowed(B, D + 1, S)
        each = concat((ends, ends[:, :1] * 0 + S))
        return ops.stop_gradient(cast(reshape(each + reshape(count(B) * S, (B, 1)), (B * (D + 1),)), ms.int64))

    return lengths


def _check(rows, documents, tokens):
    if rows * documents > LENGTHS:
        raise ValueError(
            f"attention: {rows} rows of up to {documents} documents, and MindSpore's kernel takes {LENGTHS} in a call; use"
            f" data.max_documents={LENGTHS // rows}, or micro-batches of fewer rows"
        )
    if rows * tokens > TOKENS:
        raise ValueError(
            f"attention: {rows} rows of {tokens} tokens, and MindSpore's kernel takes {TOKENS} in a call; use micro-batches of fewer rows"
        )
    return True


def of_statistics():
    """Returns (read, write) of what MindSpore's kernel says about the softmax of N heads in the layout TND.

    The kernel returns and takes float32 [T, N, 8], eight copies of each number. They lie document by document, in each head by head: of
    a document of s tokens from token t on, [N, s, 8] from place t * N * 8 on. MindSpore does not say so; CANN's sources and MindSpeed's
    ring attention (flatten_softmax) do.
    read(statistics_TN8, lengths_D) -> [T, N]; write(x_TN, lengths_D) -> [T, N, 8].
    """
    search, gather, concat, maximum, floor_div = SearchSorted(ms.int32, True), ops.Gather(), ops.Concat(0), ops.Maximum(), ops.FloorDiv()
    cast, expand, reshape, tile, count = ops.Cast(), ops.ExpandDims(), ops.Reshape(), ops.Tile(), iota.reference()

    def bounds(lengths, T):
        """Returns int32 [T, 1]: of each token, the first token of its document, and the document's length (at least 1)."""
        lengths = cast(lengths, ms.int32)
        document = search(lengths, count(T), None)
        first = gather(concat((lengths[:1] * 0, lengths)), document, 0)
        last = gather(concat((lengths, lengths[-1:])), document, 0)
        return expand(first, 1), maximum(expand(last - first, 1), 1)

    def read(statistics, lengths):
        T, N = statistics.shape[0], statistics.shape[1]
        first, size = bounds(lengths, T)
        place = first * N + expand(count(N), 0) * size + (expand(count(T), 1) - first)
        return reshape(gather(reshape(statistics, (T * N, 8))[:, 0], reshape(place, (T * N,)), 0), (T, N))

    def write(x, lengths):
        T, N = x.shape
        first, size = bounds(lengths, T)
        place = expand(count(T) * N, 1) + expand(count(N), 0) - first * N  # in the document
        head = floor_div(place, size)
        source = (first + place - head * size) * N + head
        return tile(reshape(gather(reshape(x, (T * N,)), reshape(source, (T * N,)), 0), (T, N, 1)), (1, 1, 8))

    return read, write
