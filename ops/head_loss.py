"""The output head and the terms of cross-entropy over its logits as one op.

The implementations of the registry are for a vocabulary that is not sharded. `chunked` is for any, and for any device: it computes some
columns of the logits at a time, and in the backward again, so that the logits never stand in memory whole.
"""

import mindspore as ms
from mindspore import nn, ops

from ops import cross_entropy, matmul
from ops.custom import kernel
from ops.signature import check

ARGUMENTS = "x R D; w same V D; ids int32 R"


def reference():
    """Returns measure_head(x_RD, w_VD, ids_R) -> (top, total, picked) [R, 1] of the logits z = x w^T, see ops/cross_entropy.py."""
    project, measure, require = matmul.reference(transpose_b=True), cross_entropy.reference(), check("head_loss", ARGUMENTS)

    def measure_head(x, w, ids):
        require((x.shape, w.shape, ids.shape), (x.dtype, w.dtype, ids.dtype))
        return measure(0, project(x, w), ids)

    return measure_head


def cpu():
    """Returns measure_head as a float32 C++ kernel. Its backward writes the gradient of the logits over the logits, to save memory."""
    pieces = _HeadLoss()

    def measure_head(x, w, ids):
        _, top, total, picked = pieces(x, w, ids)
        return top, total, picked

    return measure_head


class _HeadLoss(nn.Cell):
    """Returns (logits, top, total, picked). The logits are for the backward, which overwrites them; top is a constant for it."""

    def __init__(self):
        super().__init__()
        self.forward = kernel("head_loss", "head_loss", ARGUMENTS, _logits_and_columns, _four)
        self.backward = kernel("head_loss", "head_loss_grad", 7, _x_and_w, _two)
        self.zeros_like = ops.ZerosLike()

    def construct(self, x, w, ids):
        return self.forward(x, w, ids)

    def bprop(self, x, w, ids, out, dout):
        dx, dw = self.backward(x, w, ids, out[0], out[1], dout[2], dout[3])
        return dx, dw, self.zeros_like(ids)


def _logits_and_columns(x, w, ids):
    return (x[0], w[0]), (x[0], 1), (x[0], 1), (x[0], 1)


def _four(x, w, ids):
    return x, x, x, x


def _x_and_w(x, w, ids, z, top, dtotal, dpicked):
    return x, w


def _two(x, w, ids, z, top, dtotal, dpicked):
    return x, w


CHUNK_BYTES = 128 << 20  # of the float32 logits of a chunk, where the number of chunks is chosen here
COLUMNS = 128  # the columns of a chunk are a multiple of this, for the units of a device


def chunk_bounds(count, rows, columns):
    """Returns the pairs (first column, first column of the next chunk) of the chunks of a matrix of logits.

    count: the number of chunks; 0: as few as keep the logits of a chunk within CHUNK_BYTES. There may be fewer chunks than `count`.
    """
    wanted = count or -(-4 * rows * columns // CHUNK_BYTES)
    unit = COLUMNS if columns >= COLUMNS * wanted else 1
    size = -(-columns // (wanted * unit)) * unit
    return tuple((first, min(first + size, columns)) for first in range(0, columns, size))


def chunked(count, project, measure, vocab_size, last):
    """Returns make(first) -> measure_head(x_RD, w_VD, ids_R), as of reference(), for a shard of the vocabulary that starts at id `first`.

    count: see chunk_bounds. project(x, w): x w^T. measure: of ops/cross_entropy.py. vocab_size: rows of w at and after this id are padding,
    whose logits are -inf. last: the id at which the last shard starts, see cross_entropy.without_logits_of_padding. w may have another
    dtype than x: it is cast to that of x, a chunk at a time.
    """

    def make(first):
        return _Chunked(count, project, measure, vocab_size, first, last)

    return make


class _Chunked(nn.Cell):
    """Between forward and backward only the operands and the three columns are kept.

    Each chunk waits for the one before it by ops.depend, because MindSpore would otherwise compute the logits of all chunks first. The
    backward waits for the cotangent, because the compiler would otherwise keep the logits of the forward.
    """

    def __init__(self, count, project, measure, vocab_size, first, last):
        super().__init__()
        self.measure, self.first, self.masked = measure, first, cross_entropy.without_logits_of_padding(vocab_size, last)
        self.on_cpu = ms.get_context("device_target") == "CPU"

        def product(x, w):  # since a primitive itself cannot be differentiated
            return project(x, w)

        def bounds(rows, columns):
            return chunk_bounds(count, rows, columns)

        self.bounds = ops.constexpr(bounds, name=f"chunk_bounds_{count}")
        self.project = product
        self.vjp = ops.GradOperation(get_all=True, sens_param=True)
        self.exp, self.maximum, self.select, self.cast = ops.Exp(), ops.Maximum(), ops.Select(), ops.Cast()
        self.greater, self.zeros_like, self.concat = ops.Greater(), ops.ZerosLike(), ops.Concat(0)
        self.of_logits = cross_entropy.gradient()

    def construct(self, x, w, ids):
        bounds, w = self.bounds(x.shape[0], w.shape[0]), self.sliceable(x, w)
        start, stop = bounds[0]
        top, total, picked = self.of_chunk(x, w[start:stop], ids, start)
        for i in range(1, len(bounds)):
            start, stop = bounds[i]
            chunk_top, chunk_total, chunk_picked = self.of_chunk(ops.depend(x, total), w[start:stop], ids, start)
            highest = self.maximum(top, chunk_top)
            shift = self.select(self.greater(highest, float("-inf")), highest, self.zeros_like(highest))  # -inf - -inf is NaN
            total = total * self.exp(top - shift) + chunk_total * self.exp(chunk_top - shift)
            top, picked = highest, picked + chunk_picked
        return top, total, picked

    def sliceable(self, x, w):
        """Returns w, or w in the dtype of x on CPU, where a graph cannot slice bfloat16."""
        return self.cast(w, x.dtype) if self.on_cpu else w

    def of_chunk(self, x, w, ids, start):
        """Returns (top, total, picked) of the logits of some rows of the table, of which `start` is the first."""
        return self.measure(self.first + start, self.logits(x, self.cast(w, x.dtype), start), ids)

    def logits(self, x, w, start):
        return self.masked(self.cast(self.project(x, w), ms.float32), self.first, start)

    def bprop(self, x, w, ids, out, dout):
        top, dtotal, dpicked = out[0], dout[1], dout[2]
        top = self.select(self.greater(top, float("-inf")), top, self.zeros_like(top))
        bounds = self.bounds(x.shape[0], w.shape[0])
        dtype, w, x = w.dtype, self.sliceable(x, ops.depend(w, dtotal)), ops.depend(x, dtotal)
        start, stop = bounds[0]
        dx, dw = self.gradient(x, w[start:stop], ids, start, top, dtotal, dpicked)
        dx, pieces = self.cast(dx, ms.float32), (dw,)
        for i in range(1, len(bounds)):
            start, stop = bounds[i]
            more, dw = self.gradient(ops.depend(x, dx), w[start:stop], ids, start, top, dtotal, dpicked)
            dx = dx + self.cast(more, ms.float32)
            pieces += (dw,)
        return self.cast(dx, x.dtype), self.cast(self.concat(pieces), dtype), self.zeros_like(ids)

    def gradient(self, x, w, ids, start, top, dtotal, dpicked):
        """Returns the gradients (dx, dw) of a chunk, in the dtype of x."""
        w = self.cast(w, x.dtype)
        dz = self.of_logits(self.logits(x, w, start), ids - (self.first + start), top, dtotal, dpicked)
        return self.vjp(self.project)(x, w, self.cast(dz, x.dtype))
