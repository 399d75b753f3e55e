"""Context parallel: which tokens of a row each rank has. On the host, without MindSpore.

The cp ranks are rings of `ring` ranks, times `ulysses` neighbours that exchange heads for tokens in attention. A row is cut into 2 x ring
chunks; the i-th neighbours together have chunks i and 2 ring - 1 - i, since in causal attention early chunks see little and late ones
much ("zig-zag"), and share them out in order. So with ulysses alone a row stays in its order. Sources: Liu et al. 2023 (ring attention),
Jacobs et al. 2023 (Ulysses), Zhu 2024 (zig-zag).
"""

import math

import numpy as np
from einops import rearrange


def multiple(mesh):
    """What the number of tokens of a row has to be a multiple of; shorter ones are padded."""
    ring = mesh.size(("cp-ul",))
    return ring * math.lcm(2, mesh.ulysses) if ring > 1 else mesh.ulysses


def padded(mesh, length):
    """The tokens of a row on all ranks together, with padding."""
    return -(-length // multiple(mesh)) * multiple(mesh)


def order(length, ring):
    """[length] int32: the place in its row of each token, as the ranks have them, one rank after the other."""
    places = np.arange(length, dtype=np.int32)
    if ring == 1:
        return places
    early, late = rearrange(places, "(half chunk token) -> half chunk token", half=2, chunk=ring)
    return rearrange([early, late[::-1]], "half chunk token -> (chunk half token)")


def cut(mesh, batch):
    """This rank's tokens of a batch {name: numpy [rows, S]}: [rows, S / cp], after padding of segment 0 and no loss weight."""
    if mesh.cp == 1:
        return batch
    length = batch["tokens"].shape[1]
    whole = padded(mesh, length)
    mine = np.split(order(whole, mesh.size(("cp-ul",))), mesh.cp)[mesh.index(("cp",))]
    return {key: np.pad(value, ((0, 0), (0, whole - length)))[:, mine] for key, value in batch.items()}
