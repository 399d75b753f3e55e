"""Refuses a run whose numbers alone tell that this machine's memory cannot hold it, such as a batch of 10^9 rows, before it starts."""

import mindspore as ms

from experiments.train.optim_rules import MOMENTS
from parallel import host_memory
from parallel.placement import nbytes, place
from parallel.trees import tree_leaves
from qwen3.model import param_specs

TOKEN_BYTES = 20  # of a token in a batch: five arrays of 4 bytes, see experiments/data/packing.py


def check(config, cfg, sharding):
    """Raises ValueError for a run on CPU of which one rank needs more than the machine has. On other devices their own memory counts."""
    if ms.get_context("device_target") == "CPU":
        host_memory.check(least(config, cfg, sharding), "lower the largest of them, or use a machine with more memory")


def least(config, cfg, sharding):
    """Returns {what it is: bytes} of the largest things that one rank needs at the same time, each at its least."""
    mesh, train, parallel = sharding.mesh, config.train, config.parallel
    placed = tree_leaves(place(sharding, param_specs(cfg)))
    trained = [p for p in placed if p.spec.trains]
    copies = 1 + len(MOMENTS[config.optim.name])  # the gradients, and the optimizer's arrays
    state = sum(nbytes(mesh, p, "stored") for p in placed) + copies * sum(nbytes(mesh, p, "state") for p in trained)
    state += sum(nbytes(mesh, p, "stored") for p in trained) * (config.train.ema_decay > 0)
    tokens = train.batch_size // mesh.dp * train.seq_len
    slice_ = tokens // parallel.micro_batches // (mesh.cp * mesh.tp)
    text = f"train.batch_size={train.batch_size} rows of train.seq_len={train.seq_len} tokens"
    cache = 8 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * train.sample_tokens
    return {
        f"parameters, gradients and optimizer state of model={config.model}": state // mesh.pp,
        f"{text}, and the input of a layer": tokens * TOKEN_BYTES + 4 * slice_ * cfg.hidden_size,
        f"the cache of train.sample_tokens={train.sample_tokens}": cache,
    }
