"""Where each parameter, its gradient and its optimizer state lie in a layout: shapes and places of the parts, and the way to whole arrays.

A part is a block of the global array. The last part of a padded dim may be short of real elements, or have none: what is missing is zeros,
which exist in this rank's memory alone.
"""

import math
from dataclasses import dataclass
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

PIECE_BYTES = 64 << 20  # of a global array that is gathered, at a time


@dataclass(frozen=True)
class Placed:
    """A parameter in a layout; each of the three is, for every dim, the atoms it is split over.

    used: as the model's ops take it. stored: between steps; less than `used` from ZeRO stage 3 on. state: its optimizer state and summed
    gradient; less from stage 1 on. partial: the data axes' atoms over which its gradient has to be summed. zero_dim: the dim that ZeRO
    splits over them, None where no dim can be. holders: the places along pp whose ranks have it; empty for all.
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
    """What a rank holds of an array, or of the arrays of stacked layers.

    names: one, or of stacked layers one a layer. spec, axes: as of Placed. data: the tensor, None where only sizes count.
    holders: the places along pp whose ranks have it, of which the first writes it; empty for all.
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
    """A tree of Placed for a tree of specs. Raises ValueError for a parameter that the layout cannot split."""
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
    """The first dim whose part divides among the data ranks; neither a padded one nor that of stacked layers."""
    for i, dim in enumerate(spec.dims):
        if dim not in PADDED and dim != "layers" and local_shape(mesh, spec, used)[i] % mesh.size(atoms) == 0:
            return i
    return None


def stacked(placed, count):
    """The placement of `count` such parameters, one a layer, stacked on a new first dim."""
    spec = placed.spec
    parts = (None, *(spec.parts or (None,) * len(spec.shape)))
    spec = ParamSpec((count, *spec.shape), ("layers", *spec.dims), spec.init, spec.optimizer, parts)
    used, stored, state = (((), *axes) for axes in (placed.used, placed.stored, placed.state))
    return Placed(placed.path, spec, used, stored, state, placed.partial, None if placed.zero_dim is None else placed.zero_dim + 1)


def local_shape(mesh, spec, axes):
    """The shape of a rank's part."""
    return tuple(-(-n // mesh.size(atoms)) for n, atoms in zip(spec.shape, axes))


def region(mesh, spec, axes):
    """The slices of the global array that are this rank's real elements; empty ones for a part of padding."""
    out = []
    for n, size, atoms in zip(spec.shape, local_shape(mesh, spec, axes), axes):
        start = mesh.index(atoms) * size
        out.append(slice(min(start, n), min(start + size, n)))
    return tuple(out)


def cut(mesh, spec, axes, read):
    """This rank's part as a numpy array. read(slices) -> those elements of the global array."""
    found = read(region(mesh, spec, axes))
    missing = [(0, n - m) for n, m in zip(local_shape(mesh, spec, axes), found.shape)]
    return np.pad(found, missing) if any(after for _, after in missing) else np.ascontiguousarray(found)


def whole(mesh, spec, axes, x, keep=True, holder=None):
    """The global array as numpy where `keep` is true, else None. All ranks must call it. holder: the place along pp whose ranks' parts
    count, where not all have them; x may be None elsewhere.

    It is gathered some rows of each part at a time, so that besides the arrays that are kept a rank holds about PIECE_BYTES. An array of
    one part is the tensor's own memory, not a copy.
    """
    ranks = math.prod(mesh.size(atoms) for atoms in axes)
    if ranks == 1 and holder is None:
        return x.asnumpy() if keep else None
    out, shape = None, local_shape(mesh, spec, axes)
    rows = max(1, PIECE_BYTES * shape[0] // ((4 * math.prod(shape) if x is None else x.nbytes) * ranks))
    for first in range(0, shape[0], rows):
        if x is None:
            piece = ms.ops.zeros((min(rows, shape[0] - first), *shape[1:]), ms.float32)
        else:
            piece = x[first : first + rows].contiguous()
        if holder is not None:
            piece = _from(mesh, holder)(piece)
        for i, atoms in enumerate(axes):
            for atom in reversed(atoms):  # the innermost parts are neighbours
                piece = _gather(mesh, atom, i)(piece)
        if keep:
            piece = piece.asnumpy()
            out = np.empty(spec.shape, piece.dtype) if out is None else out
            _put(out, rearrange(piece, "(part row) ... -> part row ...", part=mesh.size(axes[0])), shape[0], first)
    return out


def _put(out, pieces, size, first):
    """Some rows of each part of dim 0 into their places, without padding. pieces: [parts, rows, ...]; size: of a part; first: its row."""
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


def nbytes(mesh, placed, axes_name, itemsize=4):
    """Bytes of this rank's part; axes_name: used, stored or state."""
    return itemsize * math.prod(local_shape(mesh, placed.spec, getattr(placed, axes_name)))


def reader(tree):
    """read(path, slices) over a tree of global arrays, as cut() wants it for each path."""
    leaves = dict(tree_paths(tree))

    def read(path, slices):
        leaf = leaves[path]
        return (leaf.asnumpy() if hasattr(leaf, "asnumpy") else np.asarray(leaf))[slices]

    return read


def load(mesh, placed, read, axes="stored"):
    """A tree of tensors with memory of their own, the parts of a tree of Placed that `axes` names, stored or state, from
    read(path, slices), one part after another."""
    return tree_map(lambda p: ms.Tensor(cut(mesh, p.spec, getattr(p, axes), partial(read, p.path))), placed)


@dataclass(frozen=True)
class Spread:
    """A parameter that lies in parts on all ranks, with the shape, dtype and asnumpy() of an array, as hf.save takes it.

    tensor: this rank's stored part, None where it is float32 and of another pipeline stage; layer: None, or which of those that are stacked
    in it.
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
        return ms.float32 if self.tensor is None else self.tensor.dtype

    def asnumpy(self, everywhere=False):
        """The global array on rank 0, or on every rank; elsewhere None. All ranks must call it, of one Spread after another."""
        part = self.tensor if self.layer is None else self.tensor[self.layer].contiguous()
        holder = self.placed.holders[0] if self.placed.holders else None
        return whole(self.mesh, self.placed.spec, self.placed.stored, part, everywhere or self.mesh.rank == 0, holder)
