"""Placement of parameters, gradients and optimizer state in a layout: shapes and offsets of shards, loading and gathering them.

A shard is a block of the global array. The last shards of a padded dim (the vocabulary) have fewer real elements, or none; they are filled
up with zeros, which exist only in the rank's memory.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple

import mindspore as ms
import numpy as np
from einops import rearrange

from parallel import collectives
from parallel.lowering import partitioner as shard
from parallel.mesh import Mesh
from parallel.sharding import PADDED
from parallel.specs import ParamSpec
from parallel.trees import tree_map, tree_paths, unflatten

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
PIECE_BYTES = 64 << 20  # bytes of a global array that are gathered at a time


@dataclass(frozen=True)
class Placed:
    """A parameter in a layout. used, stored and state are, for each dim, the atoms it is split over.

    used: the shards that the ops of the model take.
    stored: the shards that are kept between steps. ZeRO stage 3 splits them further than `used`.
    state: the shards of the optimizer state and of the summed gradient. ZeRO splits them further from stage 1 on.
    partial: the atoms of the data axes over which the gradient has to be summed.
    zero_dim: the dim that ZeRO splits over `partial`; None where no dim divides.
    holders: the indices along pp of the stages that have the parameter; empty if all have it.
    """

    path: str
    spec: ParamSpec
    used: tuple
    stored: tuple
    state: tuple
    partial: tuple
    zero_dim: int | None
    holders: tuple = ()


class Held(NamedTuple):
    """This rank's shard of an array, or of the arrays of stacked layers.

    names: of the array, or of each stacked layer's array. spec: its ParamSpec. axes: for each dim the atoms it is split over. data: the
    tensor, or None where only sizes are needed. holders: the indices along pp of the stages that have it, of which the first writes it to
    checkpoints; empty if all have it.
    """

    names: tuple
    spec: object
    axes: tuple
    data: object
    holders: tuple = ()

    @property
    def is_stacked(self):
        return self.spec.dims[:1] == ("layers",)


def place(sharding, specs):
    """Returns a tree of Placed for a tree of specs. Raises ValueError for a parameter that does not divide in the layout."""
    return unflatten(specs, [_place(sharding, path, spec) for path, spec in tree_paths(specs)])


def _place(sharding, path, spec):
    used, mesh = sharding.placement(spec, path), sharding.mesh
    own = {atom for atoms in used for atom in atoms}
    partial_ = tuple(atom for atom in sharding.data_atoms if atom not in own)
    if sharding.zero and sharding.lowering == "shard":
        stored = shard.stored(mesh, local_shape(mesh, spec, used), used)
        return Placed(path, spec, used, stored, stored, partial_, None)
    dim = _zero_dim(mesh, spec, used, partial_) if sharding.zero and partial_ else None
    split = used if dim is None else (*used[:dim], used[dim] + partial_, *used[dim + 1 :])
    return Placed(path, spec, used, split if sharding.zero == 3 else used, split, partial_, dim)


def _zero_dim(mesh, spec, used, atoms):
    """Returns the first dim whose shard divides among the data parallel ranks, or None. Padded dims and stacked layers are left out."""
    for i, dim in enumerate(spec.dims):
        if dim not in PADDED and dim != "layers" and local_shape(mesh, spec, used)[i] % mesh.size(atoms) == 0:
            return i
    return None


def stacked(placed, count):
    """Returns the placement of `count` parameters like this one, of one layer each, stacked along a new first dim."""
    spec = placed.spec
    parts = (None, *(spec.parts or (None,) * len(spec.shape)))
    spec = replace(spec, shape=(count, *spec.shape), dims=("layers", *spec.dims), parts=parts)
    used, stored, state = (((), *axes) for axes in (placed.used, placed.stored, placed.state))
    return Placed(placed.path, spec, used, stored, state, placed.partial, None if placed.zero_dim is None else placed.zero_dim + 1)


def local_shape(mesh, spec, axes):
    """Returns the shape of a rank's shard, padding included."""
    return tuple(-(-n // mesh.size(atoms)) for n, atoms in zip(spec.shape, axes))


def region(mesh, spec, axes):
    """Returns the slices of the global array that this rank's shard covers, without padding; empty slices for a shard of padding."""
    out = []
    for n, size, atoms in zip(spec.shape, local_shape(mesh, spec, axes), axes):
        start = mesh.index(atoms) * size
        out.append(slice(min(start, n), min(start + size, n)))
    return tuple(out)


def cut(mesh, spec, axes, read):
    """Returns this rank's shard, padding included, as a numpy array. read(slices) returns those elements of the global array."""
    found = read(region(mesh, spec, axes))
    missing = [(0, n - m) for n, m in zip(local_shape(mesh, spec, axes), found.shape)]
    return np.pad(found, missing) if any(after for _, after in missing) else np.ascontiguousarray(found)


def whole(mesh, spec, axes, x, keep=True, holder=None):
    """Gathers the global array of which x is this rank's shard. All ranks must call it.

    Returns a numpy array where `keep` is true, else None. holder: the index along pp of the stage that has the array, if not all have it;
    x may be None on other stages. Some rows of each shard are gathered at a time, which needs about PIECE_BYTES of extra memory. If the
    array is not split, the result shares memory with x.
    """
    ranks = math.prod(mesh.size(atoms) for atoms in axes)
    if ranks == 1 and holder is None:
        return x.asnumpy() if keep else None
    out, shape = None, local_shape(mesh, spec, axes)
    rows = max(1, PIECE_BYTES * shape[0] // ((4 * math.prod(shape) if x is None else x.nbytes) * ranks))
    for first in range(0, shape[0], rows):
        if x is None:
            piece = ms.ops.zeros((min(rows, shape[0] - first), *shape[1:]), getattr(ms, spec.dtype))
        else:
            piece = x[first : first + rows].contiguous()
        if holder is not None:
            piece = _from(mesh, holder)(piece)
        for i, atoms in enumerate(axes):
            for atom in reversed(atoms):  # the shards of the innermost atom are neighbours
                piece = _gather(mesh, atom, i)(piece)
        if keep:
            piece = piece.asnumpy()
            out = np.empty(spec.shape, piece.dtype) if out is None else out
            _put(out, rearrange(piece, "(part row) ... -> part row ...", part=mesh.size(axes[0])), shape[0], first)
    return out


def _put(out, pieces, size, first):
    """Copies some rows of each shard of dim 0 into the global array `out`, without padding.

    pieces: [shards, rows, ...]. size: the rows of a shard. first: the index, within a shard, of the first of these rows.
    """
    for i, piece in enumerate(pieces):
        start = i * size + first
        rows = max(0, min(len(piece), len(out) - start))
        out[start : start + rows] = piece[(slice(0, rows), *(slice(0, n) for n in out.shape[1:]))]


@lru_cache(maxsize=64)
def _gather(mesh, atom, dim):
    return collectives.all_gather(mesh, (atom,), dim)


@lru_cache(maxsize=64)
def _from(mesh, holder):
    return collectives.broadcast(mesh, ("pp",), holder)


def nbytes(mesh, placed, axes_name):
    """Returns the bytes of this rank's shard in a training run. axes_name: used, stored or state."""
    return ITEMSIZE[placed.spec.dtype] * math.prod(local_shape(mesh, placed.spec, getattr(placed, axes_name)))


def reader(tree):
    """Returns read(path, slices) -> those elements of the global array at `path`, for load()."""
    leaves = dict(tree_paths(tree))

    def read(path, slices):
        leaf = leaves[path]
        return (leaf.asnumpy() if hasattr(leaf, "asnumpy") else np.asarray(leaf))[slices]

    return read


def load(mesh, placed, read, axes="stored"):
    """Returns a tree of tensors, this rank's shards of a tree of Placed, with their own memory.

    read(path, slices): returns elements of the global array; called for one shard after another. axes: "stored" or "state".
    """
    return tree_map(lambda p: ms.Tensor(cut(mesh, p.spec, getattr(p, axes), partial(read, p.path))), placed)


@dataclass(frozen=True)
class Spread:
    """A sharded parameter with the shape, dtype and asnumpy() of an array, for hf.save.

    tensor: this rank's stored shard; None for a parameter of another pipeline stage, which has the dtype of its spec. layer: the index of
    the parameter in `tensor` where layers are stacked, else None.
    """

    mesh: Mesh
    placed: Placed
    tensor: ms.Tensor
    layer: int | None = None

    @property
    def shape(self):
        return self.placed.spec.shape

    @property
    def dtype(self):
        return getattr(ms, self.placed.spec.dtype) if self.tensor is None else self.tensor.dtype

    def asnumpy(self, everywhere=False):
        """Returns the global array on rank 0, or on all ranks; else None. All ranks call it, in one order of parameters."""
        part = self.tensor if self.layer is None else self.tensor[self.layer].contiguous()
        holder = self.placed.holders[0] if self.placed.holders else None
        return whole(self.mesh, self.placed.spec, self.placed.stored, part, everywhere or self.mesh.rank == 0, holder)
