"""Collectives for JSON values on the host: gather() and the broadcast shared().

The bytes of the JSON travel as float32, which every backend can sum (parallel/collectives.py)."""

import json

import numpy as np
from einops import rearrange

from parallel import collectives

PIECE = 1 << 20  # bytes of JSON in one collective; as float32 they take four times as many


def gather(mesh, value):
    """Returns the JSON values of all ranks, in the order of ranks, on every rank. All ranks must call it."""
    if mesh.world == 1:
        return [value]
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = np.zeros((mesh.world, 2))  # two digits to the base PIECE, as float32 is exact only below 2**24
    size[mesh.rank] = divmod(len(mine), PIECE)
    sizes = rearrange(_sum(mesh, size.ravel()), "(rank digit) -> rank digit", digit=2)
    ends = np.cumsum(sizes.astype(np.int64) @ [PIECE, 1])
    start, out = int(ends[mesh.rank]) - len(mine), []
    for first in range(0, int(ends[-1]), PIECE):
        piece = np.zeros(min(PIECE, int(ends[-1]) - first), np.float32)
        low, high = (min(max(at - first, 0), len(piece)) for at in (start, start + len(mine)))
        piece[low:high] = mine[first + low - start : first + high - start]
        out.append(_sum(mesh, piece).astype(np.uint8))
    of_ranks = np.split(np.concatenate(out), ends[:-1])
    return [json.loads(data.tobytes()) for data in of_ranks]


def shared(mesh, value):
    """Returns rank 0's JSON value on all ranks. All ranks must call it."""
    return gather(mesh, value if mesh.rank == 0 else None)[0]


def _sum(mesh, numbers):
    return collectives.host_sum(mesh, tuple(mesh.sizes), numbers)
