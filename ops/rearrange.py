"""Reshapes and transposes by name: einops' rearrange for MindSpore tensors.

einops cannot run inside a graph. It parses the pattern while the graph compiles, and the graph holds Reshape and Transpose alone: the
fewest that give the result, three at most, and none where nothing changes.
"""

import functools
import math
import numbers

import einops
import numpy as np
from einops.parsing import ParsedExpression
from mindspore import ops


def rearrange(x, pattern, **sizes):
    """x with its dims split, merged and moved by einops' pattern, for example

        rearrange(x, "(batch seq) (heads head_dim) -> batch seq heads head_dim", batch=2, head_dim=8)

    It works eagerly, in graphs, in gradients and in a hand-written backward. x's shape and the sizes must be known while a graph compiles.
    On CPU a graph cannot reshape or transpose bfloat16. An axis cannot be named x or pattern. EinopsError, with the pattern, the sizes and
    the shape, if they do not fit. Source: einops, Rogozhnikov 2022."""
    return _compiled(pattern, x.shape, sizes)(x)


def steps(pattern, shape, sizes):
    """(before, order, after): a reshape to `before`, a transpose by `order`, a reshape to `after`. A step that is not needed is None."""
    left, right, lengths, result = _parse(pattern, shape, sizes)
    axes_left, axes_right = [axis for dim in left for axis in dim], [axis for dim in right for axis in dim]
    if axes_left == axes_right or 0 in shape:  # no element moves
        return None, None, None if result == shape else result

    # The transpose can move x's own dims, or give the result's own dims, or move the longest blocks of axes that stay together.
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
    """The axes of each of x's dims and of each of the result's, [[name]]; each axis' length, {name: int}; the result's shape.
    Axes of length 1 are left out of the lists, for they move no element."""
    given = f'rearrange by "{pattern}" with sizes ({", ".join(f"{k}={v}" for k, v in sizes.items())}) of a tensor of shape {shape}'
    for name, size in sizes.items():
        if not isinstance(size, numbers.Integral):  # MindSpore gives a tensor of 0 for a tensor that is not known while a graph compiles
            raise einops.EinopsError(f"{given}: {name} must be an int, not {type(size).__name__}")
    try:
        x = np.broadcast_to(np.empty(()), shape)  # neither it nor einops' reshapes and transposes of it take memory
        result = einops.rearrange(x, pattern, **sizes).shape  # every mistake is found here
        if "..." in pattern:
            rest = len(shape) - len(ParsedExpression(pattern.split("->")[0]).composition) + 1
            pattern = pattern.replace("...", " ".join(f"dim_{i}_of_the_ellipsis" for i in range(rest)))
        left, right = pattern.split("->")
        dims_left, dims_right = ParsedExpression(left).composition, ParsedExpression(right).composition
        axes = [axis for dim in dims_left for axis in dim]
        lengths = dict(zip(axes, einops.rearrange(x, f"{left} -> {' '.join(axes)}", **sizes).shape))
    except (einops.EinopsError, ValueError, ArithmeticError) as error:  # Python and numpy find what einops does not, as a size of 0
        raise einops.EinopsError(f"{given}: {str(error).strip()}") from error
    left, right = ([[axis for axis in dim if lengths[axis] > 1] for dim in dims] for dims in (dims_left, dims_right))
    return left, right, lengths, result


def _order(dims, target):
    """The order in which a transpose puts `dims` so that their axes follow one another as in `target`; None if it had to split a dim.
    Dims of length 1 come where the target has its own, if that gives all of the target's dims, and first otherwise."""
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
    """The axes of `left` in the longest runs that are runs of `right` too, [[name]]."""
    blocks = [[left[0]]]
    for before, axis in zip(left, left[1:]):
        if right.index(axis) == right.index(before) + 1:
            blocks[-1].append(axis)
        else:
            blocks.append([axis])
    return blocks


@functools.lru_cache(maxsize=4096)
def _function(pattern, shape, sizes):
    """f(x) that takes the steps; sizes as pairs. It has one argument, as a graph needs of a function that it gets while it compiles."""
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
