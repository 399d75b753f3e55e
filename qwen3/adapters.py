"""Several LoRA adapters beside one base, of which each request of an engine has one or none.

    cfg, read, masks = side_by_side(cfg, read, {"poet": adapter, "coder": other})
    Engine(params, cfg, adapters=masks, ...).submit(Request(prompt, adapter=2))   # the second one

The adapters become one, whose rank is the sum of their ranks: their A matrices stand side by side, and their B matrices, times their
scales, one below the other. A row with adapter i has 1 in the columns of x A that belong to i, and 0 in the others, so the other adapters
add zeros. A weight that an adapter does not adapt has zeros in its columns. So rows of all adapters share one batch and one graph, at the
cost of two thin products a weight, as wide as all ranks together.
"""

import numpy as np

from qwen3.config import Lora

ALLOWED = ("q", "k", "v", "o", "gate", "up", "down", "router")  # targets whose product is of rows, which a mask can tell apart


def side_by_side(cfg, read, adapters):
    """Returns (cfg with the adapters, read(path, slices) of its parameters, masks [1 + number of adapters, rank] float32; row 0 is that of
    the base alone).

    read: of the base. adapters: {name: qwen3.peft.Adapter}, which open for this base. Raises ValueError for an adapter of the embedding or
    of experts.
    """
    for name, adapter in adapters.items():
        if wrong := [target for target in adapter.lora.targets if target not in ALLOWED]:
            raise ValueError(
                f"the adapter {name} has targets {', '.join(wrong)}, which requests cannot choose between; merge it into its base with"
                " `python -m experiments.convert merge-lora` and serve the result by itself"
            )
    ranks = [adapter.lora.rank for adapter in adapters.values()]
    ends, total = np.cumsum(ranks), sum(ranks)
    masks = np.zeros((1 + len(ranks), total), np.float32)
    for i, (end, rank) in enumerate(zip(ends, ranks)):
        masks[1 + i, end - rank : end] = 1
    targets = tuple(target for target in ALLOWED if any(target in adapter.lora.targets for adapter in adapters.values()))
    joined = cfg.replace(lora=Lora(total, float(total), targets))  # a scale of 1, as B has those of the adapters

    def read_joined(path, slices):
        if ".lora." not in f".{path}":
            return read(path, slices)
        return np.concatenate([of_one(adapter, path, slices) for adapter in adapters.values()], _rank_dim(path))

    def of_one(adapter, path, slices):
        dim, rank = _rank_dim(path), adapter.lora.rank
        assert (slices[dim].start, slices[dim].stop) == (0, total), "the rank is not sharded"
        own = tuple(slice(0, rank) if i == dim else s for i, s in enumerate(slices))
        if not adapts(adapter, path):
            return np.zeros([s.stop - s.start for s in own], np.float32)
        values = adapter.read(path, own)
        return values * np.float32(adapter.lora.scale) if dim == 0 else values

    return joined, read_joined, masks


def _rank_dim(path):
    """The dim of the rank in A [in, rank] and B [rank, out]."""
    return 1 if path.endswith(".a") else 0


TARGET_OF = {"wq": "q", "wk": "k", "wv": "v", "wo": "o", "w_gate": "gate", "w_up": "up", "w_down": "down", "router": "router"}


def adapts(adapter, path):
    """Whether an adapter has the parameter `path` of a joined one, such as "layers.0.attention.lora.wq.a"."""
    return TARGET_OF[path.rsplit(".", 2)[1]] in adapter.lora.targets
