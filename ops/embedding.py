"""Token embedding: takes rows of a matrix by id. The gradient is dense."""

import mindspore as ms
from mindspore import nn, ops

from ops import int8
from ops.custom import kernel
from ops.signature import check

ARGUMENTS = "w V D; ids int32 R"
INT8 = "w int8 V D; ids int32 R; scale float32 V G"
GROUPS = {"divides": ("G", "D")}


def reference():
    """Returns take(w_VD, ids_R int32) -> float32 [R, D]. The ids have to be in [0, V)."""
    gather, cast, require = ops.Gather(), ops.Cast(), check("embedding", ARGUMENTS)

    def take(w, ids):
        require((w.shape, ids.shape), (w.dtype, ids.dtype))
        return gather(cast(w, ms.float32), ids, 0)  # cast first, so that the gradients of a token are summed in float32

    return take


def reference_part():
    """Returns take_part(first, w_VD, ids_R) -> float32 [R, D], for a shard of the vocabulary.

    w has the rows of the ids in [first, first + V). Other ids give zeros. first: an int or an int32 scalar.
    """
    greater_equal, less, logical_and, expand = ops.GreaterEqual(), ops.Less(), ops.LogicalAnd(), ops.ExpandDims()
    take, cast, require = reference(), ops.Cast(), check("embedding", ARGUMENTS)

    def take_part(first, w, ids):
        require((w.shape, ids.shape), (w.dtype, ids.dtype))
        at = ids - first
        mine = cast(logical_and(greater_equal(at, 0), less(at, w.shape[0])), ms.int32)
        return take(w, at * mine) * expand(cast(mine, ms.float32), 1)

    return take_part


def cpu():
    """Returns take as a C++ kernel for float32 w. The gradient is summed in the order of the ids.

    An id outside [0, V) raises RuntimeError (return value 3) when the result is first read.
    """
    return _Take("embedding")


def cpu_part():
    """Returns take_part as a C++ kernel for float32 w."""
    take = _Take("embedding_part")

    def take_part(first, w, ids):
        return take(w, ids - first)

    return take_part


def reference_int8():
    """Returns take(w int8 [V, D], ids_R int32, scale float32 [V, G]) -> float32 [R, D], rows of a table in 8 bits (ops/int8.py)."""
    gather, wide, require = ops.Gather(), int8.widen(), check("embedding", INT8, **GROUPS)

    def take(w, ids, scale):
        require((w.shape, ids.shape, scale.shape), (w.dtype, ids.dtype, scale.dtype))
        scale = gather(scale, ids, 0)
        return wide(gather(w, ids, 0), scale, scale)

    return take


def reference_int8_part():
    """Returns take_part(first, w int8 [V, D], ids_R, scale float32 [V, G]) -> float32 [R, D], for a shard of the vocabulary; see
    reference_part. Ids of other shards give zeros."""
    greater_equal, less, logical_and, expand = ops.GreaterEqual(), ops.Less(), ops.LogicalAnd(), ops.ExpandDims()
    take, cast = reference_int8(), ops.Cast()

    def take_part(first, w, ids, scale):
        at = ids - first
        mine = cast(logical_and(greater_equal(at, 0), less(at, w.shape[0])), ms.int32)
        return take(w, at * mine, scale) * expand(cast(mine, ms.float32), 1)

    return take_part


def cpu_int8():
    """Returns take as `reference_int8` does, as a C++ kernel without gradient. An id outside [0, V) raises RuntimeError, as in cpu()."""
    return _TakeInt8("embedding_int8")


def cpu_int8_part():
    """Returns take_part as `reference_int8_part` does, as a C++ kernel without gradient."""
    take = _TakeInt8("embedding_int8_part")

    def take_part(first, w, ids, scale):
        return take(w, ids - first, scale)

    return take_part


class _TakeInt8(nn.Cell):
    def __init__(self, name):
        super().__init__()
        self.forward = kernel("embedding", name, INT8, _rows_int8, _third, **GROUPS)

    def construct(self, w, ids, scale):
        return self.forward(w, ids, scale)

    def bprop(self, w, ids, scale, out, dout):
        raise RuntimeError("the embedding kernel for a table in 8 bits has no gradient; use ops.embedding=reference")


class _Take(nn.Cell):
    def __init__(self, name):
        super().__init__()
        self.forward = kernel("embedding", name, ARGUMENTS, _rows, _first)
        self.backward = kernel("embedding", "embedding_grad", 3, _like_w, _first_of_three)
        self.zeros_like = ops.ZerosLike()

    def construct(self, w, ids):
        return self.forward(w, ids)

    def bprop(self, w, ids, out, dout):
        return self.backward(w, ids, dout), self.zeros_like(ids)


def _rows(w, ids):
    return ids[0], w[1]


def _rows_int8(w, ids, scale):
    return ids[0], w[1]


def _third(w, ids, scale):
    return scale


def _first(w, ids):
    return w


def _like_w(w, ids, dy):
    return w


def _first_of_three(w, ids, dy):
    return w
