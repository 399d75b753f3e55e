"""Computations on whole matrices of which each rank has a shard, such as the orthogonalisation of Muon's steps.

A rank holds several matrices where layers are stacked or a parameter has an expert dim. Then the ranks exchange shards for whole matrices,
so that each matrix is computed by one rank of the group, which needs no more memory than the shards do. A single matrix is all-gathered.
"""

import math
from typing import NamedTuple

from mindspore import ops

from parallel import collectives


class Move(NamedTuple):
    """A step towards whole matrices, by the ranks along `atom`, over which `dim` is split.

    AlltoAll: they exchange shards of `count` matrices, filled up to `padded`, for whole ones. AllGather: they gather the only matrix.
    elements: of a rank's array before an exchange, or after a gather.
    """

    kind: str
    atom: str
    dim: int
    count: int
    padded: int
    elements: int


def moves(mesh, shape, axes):
    """Returns the Moves for a shard [..., a, b] of this shape. axes: for each dim of the array the atoms that it is split over."""
    count, sizes, out = math.prod(shape[:-2]), list(shape[-2:]), []
    for dim in (1, 2):
        for atom in reversed(axes[dim - 3]):  # the shards of the innermost atom are neighbours
            n = mesh.size((atom,))
            if n == 1:
                continue
            kind, padded = ("AllGather", 1) if count == 1 else ("AlltoAll", -(-count // n) * n)
            elements = padded * math.prod(sizes) * (n if count == 1 else 1)
            out.append(Move(kind, atom, dim, count, padded, elements))
            sizes[dim - 1] *= n
            count = 1 if count == 1 else padded // n
    return out


def on_whole(mesh, shape, axes, fn):
    """Returns f(x) -> this rank's shard of fn(whole matrices), for a shard x [..., a, b] of this shape, for use in a graph.

    axes: as for moves(). fn: [n, A, B] -> an array of that shape; it treats each matrix alone, and maps zeros to finite values.
    """
    for move in reversed(moves(mesh, shape, axes)):
        fn = _around(*_both_ways(mesh, move), fn)
    reshape = ops.Reshape()

    def on_shard(x):
        return reshape(fn(reshape(x, (-1, shape[-2], shape[-1]))), shape)

    return on_shard


def _around(there, back, fn):
    def f(x):
        return back(fn(there(x)))

    return f


def _both_ways(mesh, move):
    """Returns (f towards whole matrices, f back to the shards) of a Move."""
    if move.kind == "AllGather":
        return collectives.all_gather(mesh, (move.atom,), move.dim), collectives.split(mesh, (move.atom,), move.dim)
    there, back = (collectives.all_to_all(mesh, (move.atom,), *dims) for dims in ((0, move.dim), (move.dim, 0)))
    missing, concat, zeros_like = move.padded - move.count, ops.Concat(0), ops.ZerosLike()

    def filled(x):
        return there(concat((x,) + (zeros_like(x[:1]),) * missing))

    def cut(x):
        return back(x)[: move.count]

    return (filled, cut) if missing else (there, back)
