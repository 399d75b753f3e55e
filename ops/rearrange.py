"""Reshapes and transposes by name: einops' rearrange for MindSpore tensors.

einops cannot run inside a graph, so it parses the pattern while the graph is compiled. The graph has only Reshape and Transpose ops: the
fewest that give the result, at most three, and none if nothing changes.
"""

import functools
import math
import numbers

import einops
import numpy as np
from einops.parsing import ParsedExpression
from mindspore import ops


def rearrange(x, pattern, sizes):
    """Returns x with its dims split, merged and reordered by a pattern of einops, for example

        rearrange(x, "(batch seq) (heads head_dim) -> batch seq heads head_dim", {"batch": 2, "head_dim": 8})

    sizes: {axis: length}, empty where the pattern alone says it. They are no keyword arguments as in einops, with which MindSpore crashes
    in a function that a graph's forward and its hand-written backward both call (docs/mindspore.md).

    It works eagerly, in graphs, in gradients and in a hand-written backward. The shape of x and the sizes must be known while a graph is
    compiled. On CPU a graph cannot reshape or transpose bfloat16. Raises EinopsError, with the pattern, the sizes and the shape, if these
    do not fit. Source: einops, Rogozhnikov 2022.
    """
    return _compiled(pattern, x.shape, sizes)(x)


def steps(pattern, shape, sizes):
    """Returns (before, order, after): reshape to `before`, transpose by `order`, reshape to `after`. A step that is not needed is None."""
    left, right, lengths, result = _parse(pattern, shape, sizes)
    axes_left, axes_right = [axis for dim in left for axis in dim], [axis for dim in right for axis in dim]
    if axes_left == axes_right or 0 in shape:  # no element moves
        return None, None, None if result == shape else result

    # The transpose can act on the dims of x, or give the dims of the result, or act on the longest blocks of axes that stay together.
    choices = []
    order = _order(left, right)
    if order:
        choices.append((left, order))
    back = _order(right, left)
    if back:
        choices.append(([right[i] for i in back], [back.index(i) for i in range(len(back))]))
    blocks = _blocks(axes_left, axes_right)
    choices.append((blocks, _order(blocks, right)))

    plans = []
    for dims, order in choices:
        before = tuple(math.prod(lengths[axis] for axis in dim) for dim in dims)
        after = tuple(before[i] for i in order)
        plans.append((None if before == shape else before, tuple(order), None if after == result else result))
    return min(plans, key=lambda plan: (-plan.count(None), len(plan[1])))  # the fewest steps, then the fewest dims to transpose


def _parse(pattern, shape, sizes):
    """Returns (the axes of each dim of x, those of each dim of the result, {axis: length}, the shape of the result).

    Axes are lists of names for each dim. Axes of length 1 are left out of them, since they move no element.
    """
    given = f'rearrange by "{pattern}" with sizes ({", ".join(f"{k}={v}" for k, v in sizes.items())}) of a tensor of shape {shape}'
    for name, size in sizes.items():
        if not isinstance(size, numbers.Integral):  # MindSpore passes a tensor of 0 for a value that is not known while a graph is compiled
            raise einops.EinopsError(f"{given}: {name} must be an int, not {type(size).__name__}")
    try:
        x = np.broadcast_to(np.empty(()), shape)  # an array that takes no memory, nor do its reshapes and transposes
        result = einops.rearrange(x, pattern, **sizes).shape  # finds every mistake in the pattern
        if "..." in pattern:
            rest = len(shape) - len(ParsedExpression(pattern.split("->")[0]).composition) + 1
            pattern = pattern.replace("...", " ".join(f"dim_{i}_of_the_ellipsis" for i in range(rest)))
        left, right = pattern.split("->")
        dims_left, dims_right = ParsedExpression(left).composition, ParsedExpression(right).composition
        axes = [axis for dim in dims_left for axis in dim]
        lengths = dict(zip(axes, einops.rearrange(x, f"{left} -> {' '.join(axes)}", **sizes).shape))
    except (einops.EinopsError, ValueError, ArithmeticError) as error:  # numpy raises for a size of 0
        raise einops.EinopsError(f"{given}: {str(error).strip()}") from error
    left, right = ([[axis for axis in dim if lengths[axis] > 1] for dim in dims] for dims in (dims_left, dims_right))
    return left, right, lengths, result


def _order(dims, target):
    """Returns the order of `dims` in which their axes follow one another as in `target`; None if a dim would have to be split.

    Dims of length 1 get the positions of those of the target if this gives all dims of the target; otherwise they come first.
    """
    axes = [axis for dim in target for axis in dim]
    ones = [i for i, dim in enumerate(dims) if not dim]
    order = sorted((i for i, dim in enumerate(dims) if dim), key=lambda i: axes.index(dims[i][0]))
    moved = [dims[i] for i in order]
    if [axis for dim in moved for axis in dim] != axes:
        return None
    if moved != [dim for dim in target if dim] or len(dims) != len(target):
        return ones + order
    for i, dim in enumerate(target):
        if not dim:
            order.insert(i, ones.pop(0))
    return order


def _blocks(left, right):
    """Groups the axes of `left` into the longest runs that are also runs of `right`. Returns a list of lists of names."""
    blocks = [[left[0]]]
    for before, axis in zip(left, left[1:]):
        if right.index(axis) == right.index(before) + 1:
            blocks[-1].append(axis)
        else:
            blocks.append([axis])
    return blocks


@functools.lru_cache(maxsize=4096)
def _function(pattern, shape, sizes):
    """Returns f(x), which runs the steps. sizes: pairs. A function that is made while a graph is compiled may not take *args."""
    before, order, after = steps(pattern, shape, dict(sizes))
    reshape, transpose = ops.Reshape(), ops.Transpose()

    def move(x):
        if before is not None:
            x = reshape(x, before)
        if order is not None:
            x = transpose(x, order)
        if after is not None:
            x = reshape(x, after)
        return x

    return move


def _plan(pattern, shape, sizes):
    return _function(pattern, shape, tuple(sorted(sizes.items())))


_compiled = ops.constexpr(_plan, name="rearrange_plan")
