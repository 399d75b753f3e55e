"""The arrays of a checkpoint: chooses the blocks that each rank writes, and compares a checkpoint with a model.

Arrays are named params/<path>, m/<path>, v/<path> and ema/<path> by the paths of the model's specs. Layers are not stacked and nothing is
padded, so a checkpoint does not depend on the layout that saved it. store.py writes the files, read.py reads them, and save.py saves during
training.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from parallel.checkpoint.files import CheckpointError
from parallel.checkpoint.store import Piece, chunk_shape
from parallel.placement import local_shape, region

COPIES = 4  # threads that copy arrays: one thread is slow at touching new memory


def pieces(mesh, held, copy=True):
    """Returns the Pieces that this rank writes, on the host. Of the ranks with copies of a shard, one writes it; see is_writer.

    held: a list of Held. copy: copies the data, since steps change arrays in place. Without it the Pieces are valid until the next step.
    """
    out = []
    for mine, h in zip(is_writer(mesh, held), held):
        block = region(mesh, h.spec, h.axes)
        if not mine or any(s.start == s.stop for s in block):  # a shard of padding alone has no elements
            continue
        host = h.data.asnumpy() if hasattr(h.data, "asnumpy") else h.data
        host = host[tuple(slice(0, s.stop - s.start) for s in block)]
        start, local, shape = tuple(s.start for s in block), local_shape(mesh, h.spec, h.axes), h.spec.shape
        if h.is_stacked:
            start, local, shape = start[1:], local[1:], shape[1:]
        chunk = chunk_shape(local, host.itemsize)
        out += [Piece(name, shape, chunk, start, w) for name, w in zip(h.names, host if h.is_stacked else [host], strict=True)]
    if not copy:
        return out
    with ThreadPoolExecutor(COPIES) as pool:
        return [piece._replace(data=data) for piece, data in zip(out, pool.map(np.copy, [piece.data for piece in out]))]


def is_writer(mesh, held):
    """Returns for each of `held` whether this rank writes it.

    The shards are assigned from the largest on, each to the rank, among those with a copy, that has the fewest elements so far. All ranks
    compute the same assignment, without communication.
    """
    sizes = [math.prod(local_shape(mesh, h.spec, h.axes)) for h in held]
    out, written = [False] * len(held), {}
    here, stage = mesh.index(("pp",)), mesh.atoms(("pp",))
    for i in sorted(range(len(held)), key=lambda i: (-sizes[i], i)):
        if held[i].holders and held[i].holders[0] != here:
            continue
        used = {*(stage if held[i].holders else ()), *(atom for atoms in held[i].axes for atom in atoms)}
        replicas = tuple(atom for atom in mesh.sizes if atom not in used)
        loads = written.setdefault(replicas, [0] * mesh.size(replicas))
        least = loads.index(min(loads))
        loads[least] += sizes[i]
        out[i] = mesh.index(replicas) == least
    return out


def wanted(held):
    """Returns {name: global shape} of the arrays of a list of Held."""
    return {name: tuple(h.spec.shape[1:] if h.is_stacked else h.spec.shape) for h in held for name in h.names}


def match(reader, shapes, partial=False, kinds=("params", "m", "v", "ema")):
    """Returns (the set of names in `shapes` that the checkpoint has in that shape, one line of text that lists everything else).

    shapes: {name: shape} of the model. kinds: the first part of the names of arrays in the checkpoint to compare. Raises CheckpointError if
    no array matches and, without `partial`, if any does not match.
    """
    have = {name: reader.shape(name) for name in reader.names if name.split("/")[0] in kinds}
    found = {name for name, shape in shapes.items() if have.get(name) == shape}
    missing = [name for name in shapes if name not in have]
    other = [f"{name} {list(have[name])} instead of {list(s)}" for name, s in shapes.items() if name in have and have[name] != s]
    extra = [name for name in have if name not in shapes]
    lists = {"missing": missing, "of another shape": other, "unknown": extra}
    text = "; ".join(f"{len(names)} {what}: {', '.join(names)}" for what, names in lists.items() if names)
    if text and not partial:
        raise CheckpointError(
            f"{reader.folder} is of another model: arrays {text}. Give the model's own config, or --partial to load what matches"
        )
    if not found:
        raise CheckpointError(f"{reader.folder} has none of the model's arrays; give a checkpoint of this model")
    return found, text
