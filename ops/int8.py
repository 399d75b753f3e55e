"""Weights in 8 bits: a matrix as int8 numbers, with a float32 scale for each group of neighbours along its input dim.

Such a matrix takes the place of an array in a tree of parameters: {"int8": [O, I], "scale": [O, G]}, for experts [E, O, I] and [E, O, G].
The output dim O comes first, as in Hugging Face's files, whatever the order of the float matrix, so that the numbers of a sum lie side by
side. The element [o, i] stands for int8[o, i] * scale[o, i // (I / G)].

`quantize` and `dequantize` are for numpy arrays, `widen` for tensors.
"""

import mindspore as ms
import numpy as np
from mindspore import ops

GROUP = 128  # inputs that share a scale, where that divides
LARGEST = 127  # of the numbers: -128 is not used, so that they are symmetric
BLOCK_ELEMENTS = 1 << 22  # elements that are quantised at a time, which bounds the memory of temporary arrays


def group_of(inputs, group=GROUP):
    """Returns the number of inputs that share a scale: the largest divisor of `inputs` up to `group`; where that is less than a quarter of
    `group`, as for a prime, all inputs share one."""
    found = max(n for n in range(1, min(inputs, group) + 1) if inputs % n == 0)
    return found if 4 * found >= group else inputs


def quantize(w, group=GROUP):
    """Float array [..., O, I] -> (int8 [..., O, I], scale float32 [..., O, G]), where each group has I / G = group_of(I, group) inputs.

    Symmetric rounding to the nearest: scale = max|w| / 127 over the group, and int8 = round(w / scale). So |w - int8 * scale| is at most
    scale / 2 = max|w| / 254, apart from float32's own rounding; a group of zeros has scale 0. The values have to be finite.
    """
    shape, each = w.shape, group_of(w.shape[-1], group)
    rows = int(np.prod(shape[:-1], dtype=np.int64)) * (shape[-1] // each)
    numbers, scales = np.empty((rows, each), np.int8), np.empty((rows, 1), np.float32)
    flat, step = np.ascontiguousarray(w).reshape(rows, each), max(1, BLOCK_ELEMENTS // each)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        x = flat[part].astype(np.float32)
        scales[part] = np.abs(x).max(1, keepdims=True) / LARGEST
        np.divide(x, scales[part], out=x, where=scales[part] > 0)
        numbers[part] = np.clip(np.rint(x, out=x), -LARGEST, LARGEST, out=x)
    return numbers.reshape(shape), scales.reshape(*shape[:-1], -1)


def dequantize(numbers, scale):
    """(int8 [..., O, I], scale float32 [..., O, G]) -> float32 [..., O, I]"""
    grouped = numbers.reshape(*scale.shape, -1)
    return (grouped * scale[..., None]).astype(np.float32).reshape(numbers.shape)


def is_int8(w):
    """Whether an entry of a tree of parameters is a matrix in 8 bits."""
    return isinstance(w, dict)


def widen():
    """Returns wide(int8 [..., I], scale float32 [..., G], x) -> int8 * scale as [..., I], in the dtype of the tensor x."""
    cast, reshape, expand = ops.Cast(), ops.Reshape(), ops.ExpandDims()

    def wide(numbers, scale, x):
        grouped = reshape(cast(numbers, ms.float32), scale.shape + (-1,))
        return cast(reshape(grouped * expand(scale, -1), numbers.shape), x.dtype)

    return wide
