"""Context parallel: splits the tokens of a row over the cp ranks. On the host, without MindSpore.

cp = ring x ulysses: `ring` is the number of ranks of an attention ring, and `ulysses` the number of neighbours that exchange heads for
tokens. A row is split into 2 x ring chunks, and group i of neighbours gets chunks i and 2 ring - 1 - i ("zig-zag"): in causal attention
early tokens attend to few keys and late tokens to many, so this gives all ranks equal work. For example, with ring=2 the groups get chunks
(0, 3) and (1, 2). The neighbours of a group split its tokens in order, so with ring=1 the row keeps its order.
Sources: Liu et al. 2023 (ring attention), Jacobs et al. 2023 (Ulysses), Zhu 2024 (zig-zag).
"""

import math

import numpy as np
from einops import rearrange


def multiple(mesh):
    """Returns the number that divides the length of every padded row."""
    ring = mesh.size(("cp-ul",))
    return ring * math.lcm(2, mesh.ulysses) if ring > 1 else mesh.ulysses


def padded(mesh, length):
    """Returns the length of a row with padding, over all cp ranks."""
    return -(-length // multiple(mesh)) * multiple(mesh)


def order(length, ring):
    """Returns int32 [length], the position in the row of each token, for the tokens of all ranks concatenated by rank."""
    places = np.arange(length, dtype=np.int32)
    if ring == 1:
        return places
    early, late = rearrange(places, "(half chunk token) -> half chunk token", half=2, chunk=ring)
    return rearrange([early, late[::-1]], "half chunk token -> (chunk half token)")


def check_documents(mesh, most, batch):
    """Raises ValueError if a row of a batch {name: numpy [rows, S]} has more documents than `most`; 0 is any number. A document is a run of
    tokens with one segment id; the padding at the end of a row is one too."""
    if not most:
        return
    ids = batch["segment_ids"]
    counts = 1 + (ids[:, 1:] != ids[:, :-1]).sum(1)
    if padded(mesh, ids.shape[1]) > ids.shape[1]:
        counts = counts + (ids[:, -1] != 0)
    if (counts > most).any():
        row = int(counts.argmax())
        raise ValueError(
            f"data.max_documents: row {row} of a rank's batch has {counts[row]} documents, with padding, and attention was compiled for up"
            f" to {most} a row; use data.max_documents={counts[row]} or more, which needs micro-batches of few rows; or"
            " data.max_documents=0, which masks documents instead, in more memory"
        )


def cut(mesh, batch):
    """Returns this rank's tokens of a batch {name: numpy [rows, S]} as {name: [rows, padded S / cp]}.

    Padding is zeros: segment 0 and loss weight 0.
    """
    if mesh.cp == 1:
        return batch
    length = batch["tokens"].shape[1]
    total = padded(mesh, length)
    mine = np.split(order(total, mesh.size(("cp-ul",))), mesh.cp)[mesh.index(("cp",))]
    return {key: np.pad(value, ((0, 0), (0, total - length)))[:, mine] for key, value in batch.items()}
