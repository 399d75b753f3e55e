"""Checkpoints in any layout: which rank writes what of a state, and whether a checkpoint is of a model.

Arrays are named params/<path>, m/<path> and v/<path>, in the tree of the model's specs, a layer's each for itself, whole and unpadded: what
is saved says nothing of the layout it was saved from. The files are checkpoint_store.py's, reading them checkpoint_read.py's, and saving
while training goes on checkpoint_save.py's.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from parallel.checkpoint.files import CheckpointError
from parallel.checkpoint.store import Piece, chunk_shape
from parallel.placement import local_shape, region

COPIES = 4  # at a time: new memory is slow to touch for one thread


def pieces(mesh, held, copy=True):
    """The Pieces that this rank writes, on the host: of each block that several ranks hold, one of them, shared out by size.

    copy: in memory of their own, as steps change arrays in place; else for as long as nothing does.
    """
    out = []
    for mine, h in zip(is_writer(mesh, held), held):
        block = region(mesh, h.spec, h.axes)
        if not mine or any(s.start == s.stop for s in block):  # the latter are ranks that hold padding alone
            continue
        host = h.data.asnumpy() if hasattr(h.data, "asnumpy") else h.data
        host = host[tuple(slice(0, s.stop - s.start) for s in block)]
        start, part, shape = tuple(s.start for s in block), local_shape(mesh, h.spec, h.axes), h.spec.shape
        if h.is_stacked:
            start, part, shape = start[1:], part[1:], shape[1:]
        chunk = chunk_shape(part, host.itemsize)
        out += [Piece(name, shape, chunk, start, w) for name, w in zip(h.names, host if h.is_stacked else [host], strict=True)]
    if not copy:
        return out
    with ThreadPoolExecutor(COPIES) as pool:
        return [piece._replace(data=data) for piece, data in zip(out, pool.map(np.copy, [piece.data for piece in out]))]


def is_writer(mesh, held):
    """For each of `held` whether this rank writes it. All ranks find the same, each for itself: the largest first, to whom has least."""
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
    """{name: shape} of the arrays."""
    return {name: tuple(h.spec.shape[1:] if h.is_stacked else h.spec.shape) for h in held for name in h.names}


def match(reader, shapes, partial=False, kinds=("params", "m", "v")):
    """The names among {name: shape} that a checkpoint has, in that shape, and a text of one line for all that does not match.

    kinds: of the checkpoint's arrays, those that count. Without `partial` what does not match is a CheckpointError that lists it.
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
