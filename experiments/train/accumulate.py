"""Gradient accumulation: the running sum of the gradients of a step's micro-batches."""

from functools import partial

import mindspore as ms
from mindspore import ops
from mindspore.ops.auto_generate import InplaceCopy

from experiments.train import optim as optimizer
from parallel.graph.jit import in_device_memory, jit
from parallel.graph.source import function

EACH = ops.HyperMap()


class RunningSum:
    """A float32 sum of gradients, each multiplied by its micro-batch's share of the loss weight.

    `arrays` is a flat tuple of tensors with the shapes of the flat tuple `like`; start() sets them to 0. Inside a graph,
    add(share, arrays, flat gradients) adds a micro-batch; the caller of the graph passes the result of add to take().
    in_place: the same arrays are updated in every step. On Ascend a graph's results stay in memory until its next call but one, so new
    arrays would take more memory.
    """

    def __init__(self, like, in_place):
        self.like, self.in_place, self.arrays = like, in_place, None
        self.add = _add_in_place(len(like)) if in_place else _add
        self.clear = jit(_clear())

    def start(self):
        if not self.in_place:
            self.arrays = optimizer.zeros_like(self.like)
        elif self.arrays is None:
            self.arrays = in_device_memory(optimizer.zeros_like(self.like))
        else:
            self.clear(self.arrays, ms.Tensor(0, ms.int32))

    def take(self, added):
        if not self.in_place:
            self.arrays = added


def _sum(share, total, g):
    return total + share * ops.Cast()(g, ms.float32)


def _add(share, arrays, gradients):
    return EACH(partial(_sum, share), arrays, gradients)


def _add_in_place(count):
    """add() that updates the arrays in place, in the order of the backward: the last parameter first.

    In-place updates run in the order of the program, and a gradient stays in memory until its update has run.
    """
    copy = InplaceCopy()

    def into(share, total, g):
        return copy(total, _sum(share, total, g))

    lines = [f"done{i} = into(share, arrays[{i}], gradients[{i}])" for i in reversed(range(count))]
    done = "".join(f"done{i}, " for i in range(count))
    return function("add(share, arrays, gradients)", [*lines, f"return depend(share, ({done}))"], into=into, depend=ops.depend)


def cleared():
    """Returns f(x) -> float32 zeros, also where x is not finite. Of ops.ZerosLike a graph would keep a constant of full size."""
    greater, cast = ops.Greater(), ops.Cast()

    def zeros(x):
        return cast(greater(x, float("inf")), ms.float32)

    return zeros


def _clear():
    copy, zeros = InplaceCopy(), cleared()

    def into(total):
        return copy(total, zeros(total))

    def clear(arrays, token):
        return ops.depend(token, EACH(into, arrays))

    return clear
