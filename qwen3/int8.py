"""A model's matrices in 8 bits (ops/int8.py): which they are, their specs, and their values, quantised while they are read.

    specs = int8_specs(param_specs(cfg))
    params = load(mesh, place(sharding, specs), Quantised(read, param_specs(cfg)).read, "used")

These matrices are the projections of attention, the feed-forward layers, the experts, the embedding and the head. Norms, biases, routers
and adapters keep their floats.
"""

from dataclasses import replace

import mindspore as ms
import numpy as np

from ops.int8 import GROUP, group_of, quantize
from parallel.placement import reader
from parallel.specs import ParamSpec
from parallel.trees import tree_paths, unflatten
from qwen3.model import param_specs

TABLES = ("embed", "lm_head")  # stored output first, as in 8 bits
MATRICES = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")  # stored input first


def int8_specs(specs, group=GROUP, reader=None):
    """Returns a tree of ParamSpecs in which each matrix is the pair {"int8": ..., "scale": ...} of specs, output dim first. group: the most
    inputs that share a scale. reader: None, or a qwen3.hf.Reader whose files may have the matrices in 8 bits or less already."""
    return unflatten(specs, [_pair(path, spec, group, reader) for path, spec in tree_paths(specs)])


def _pair(path, spec, group, reader):
    name = path.rsplit(".", 1)[-1]
    if name not in (*TABLES, *MATRICES):
        return spec
    shape, dims, parts = spec.shape, spec.dims, spec.parts or (None,) * len(spec.shape)
    if name in MATRICES:
        shape, dims, parts = _turned(shape), _turned(dims), _turned(parts)
    groups = shape[-1] // (_kept_group(reader, path) or group_of(shape[-1], group))
    numbers = ParamSpec(shape, dims, ("zeros",), "none", parts, "int8")
    return {"int8": numbers, "scale": replace(numbers, shape=(*shape[:-1], groups), parts=(*parts[:-1], None), dtype="float32")}


def quantised(cfg, params, group=GROUP):
    """Returns the tree of tensors in which the matrices of `params` are in 8 bits. params: float arrays or tensors, in the tree of
    param_specs(cfg)."""
    specs = param_specs(cfg)
    wanted, read = int8_specs(specs, group), Quantised(reader(params), specs, group).read
    return unflatten(wanted, [ms.Tensor(read(path, tuple(slice(0, n) for n in spec.shape))) for path, spec in tree_paths(wanted)])


def _turned(items):
    """Swaps the last two of a tuple."""
    return (*items[:-2], items[-1], items[-2])


def _kept_group(reader, path):
    """Returns how many inputs share a scale in the files of a reader, if these have the matrix in 8 bits or less; else None."""
    return reader.int8_group(path) if reader else None


class Quantised:
    """Reads the values of int8_specs. read_float(path, slices) -> the elements of a parameter in floats. specs: the tree of float specs.
    group, reader: as for int8_specs. Numbers that the files of `reader` have are kept, so they stand for the same floats.

    A matrix is read once for its numbers and its scales, if these are asked for one after the other, as parallel.placement.load does. So
    memory holds one float matrix at a time. Each rank may read its shard: its groups are those of the whole matrix.
    """

    def __init__(self, read_float, specs, group=GROUP, reader=None):
        self._read, self._reader, self._group, self._shapes = (
            read_float,
            reader,
            group,
            {path: spec.shape for path, spec in tree_paths(specs)},
        )
        self._kept = None  # the last matrix: what was read of it, and its scales

    def read(self, path, slices):
        """Returns the elements that `slices` select of a parameter, such as "embed.scale" or "final_norm", as a numpy array. slices: one
        with a start and a stop for each dim."""
        matrix, _, kind = path.rpartition(".")
        if kind not in ("int8", "scale"):
            return self._read(path, slices)
        turned, shape = matrix.rsplit(".", 1)[-1] in MATRICES, self._shapes[matrix]
        kept = _kept_group(self._reader, matrix)
        each = kept or group_of(shape[-2] if turned else shape[-1], self._group)
        if kind == "scale":
            slices = (*slices[:-1], slice(slices[-1].start * each, slices[-1].stop * each))
        key = matrix, tuple((s.start, s.stop) for s in slices)
        if kind == "scale" and self._kept and self._kept[0] == key:
            return self._kept[1]
        if kept:
            numbers, scale = self._reader.read_int8(matrix, slices)
        else:
            floats = self._read(matrix, _turned(slices) if turned else slices)
            numbers, scale = quantize(np.swapaxes(floats, -1, -2) if turned else floats, each)
        self._kept = key, scale
        return numbers if kind == "int8" else scale
