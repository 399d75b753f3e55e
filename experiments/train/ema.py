"""An exponential moving average of the weights that train: after each step, average = decay x average + (1 - decay) x weights.

It starts as the first weights, is kept in float32 and sharded like the parameters, and is one more tree of the state, "ema". An evaluation
of `averaged(state)` is of the average. Source: Polyak and Juditsky 1992; Tarvainen and Valpola 2017.
"""

import mindspore as ms
import numpy as np
from mindspore import ops
from mindspore.ops.auto_generate import InplaceCopy

from parallel.graph.jit import jit
from parallel.trees import tree_leaves, tree_map, unflatten

EACH = ops.HyperMap()


def first(params):
    """Returns the average at the start: a copy of a tree of tensors."""
    return tree_map(lambda w: ms.Tensor(np.array(w.asnumpy())), params)


def averaged(state):
    """Returns the state with the average in the place of the weights, to evaluate or to save."""
    return {**state, "params": state["ema"]}


def with_average(step, decay, in_place):
    """Returns step(state, batch, lr, step from 0) -> (state, metrics) of a Program, which also moves state["ema"]. in_place: the arrays of
    the average are overwritten, where they are in device memory."""
    blend = build_blend(decay, in_place)

    def averaging_step(state, *arguments):
        average = state["ema"]
        state, metrics = step(state, *arguments)
        new = blend(tuple(tree_leaves(average)), tuple(tree_leaves(state["params"])))
        return {**state, "ema": average if in_place else unflatten(average, list(new))}, metrics

    return averaging_step


def build_blend(decay, in_place):
    """Returns blend(flat averages, flat weights) -> the new averages; in place, a token."""
    copy = InplaceCopy() if in_place else None

    def one(average, weight):
        return decay * average + (1 - decay) * ops.cast(weight, ms.float32)

    def into(average, weight):
        return copy(average, one(average, weight))

    def blend(averages, weights):
        if in_place:
            return ops.depend(ops.zeros((1,), ms.float32), EACH(into, averages, weights))
        return EACH(one, averages, weights)

    return jit(blend)
