"""What ranks tell each other on the host beside arrays: a value of one on all of them, or the values of all on each.

As JSON, in bytes, which travel as float32: that is what every backend can sum (parallel/collectives.py)."""

import json

import numpy as np
from einops import rearrange

from parallel import collectives

PIECE = 1 << 20  # bytes at a time, four times that as float32


def gather(mesh, value):
    """The JSON values of all ranks, in their order, on every rank. All ranks call it."""
    if mesh.world == 1:
        return [value]
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = np.zeros((mesh.world, 2))  # in two digits, as float32 is exact below 2**24
    size[mesh.rank] = divmod(len(mine), PIECE)
    sizes = rearrange(_sum(mesh, size.ravel()), "(rank digit) -> rank digit", digit=2)
    ends = np.cumsum(sizes.astype(np.int64) @ [PIECE, 1])
    start, out = int(ends[mesh.rank]) - len(mine), []
    for first in range(0, int(ends[-1]), PIECE):
        piece = np.zeros(min(PIECE, int(ends[-1]) - first), np.float32)
        low, high = (min(max(at - first, 0), len(piece)) for at in (start, start + len(mine)))
        piece[low:high] = mine[first + low - start : first + high - start]
        out.append(_sum(mesh, piece).astype(np.uint8))
    parts = np.split(np.concatenate(out), ends[:-1])
    return [json.loads(part.tobytes()) for part in parts]


def shared(mesh, value):
    """Rank 0's JSON value on all ranks. All ranks call it."""
    return gather(mesh, value if mesh.rank == 0 else None)[0]


def _sum(mesh, numbers):
    return collectives.host_sum(mesh, tuple(mesh.sizes), numbers)
