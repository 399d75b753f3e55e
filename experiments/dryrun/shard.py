"""The training step of a dry run with --lowering=shard: the trainer's own (experiments/train/partitioned.py)."""

from experiments.dryrun.steps import name_of
from experiments.layout.check import check_partitioned
from experiments.train import partitioned
from experiments.train.batch import blank
from parallel.placement import place
from parallel.trees import tree_paths
from qwen3.model import choose_kernels, param_specs

TRAIN_STEPS = 2


def check(config, cfg, step):
    """Raises ValueError, naming the key, for a config that --lowering=shard cannot compile."""
    if config.parallel.pp > 1:
        raise ValueError(
            f"parallel.pp={config.parallel.pp} with parallel.lowering=shard: a dry run does not know the messages of MindSpore's pipeline;"
            " use --lowering=manual, or simulate a run with experiments.launch --simulate"
        )
    check_partitioned(config, cfg)
    if step != "train":
        raise ValueError(f"--step={step} with parallel.lowering=shard: it compiles training steps; use --lowering=manual")


def train_step(config, cfg, sharding):
    """Compiles and runs two steps. Returns {params, optimizer: {path: [local shape, dtype]}}, without gradients, which stay in the
    graph."""
    kernels = choose_kernels(config.ops, cfg, sharding)
    placed = place(sharding, param_specs(cfg))
    arrays = partitioned.Arrays(sharding, placed, placed, config)
    step, state = partitioned.build_step(cfg, config, sharding, kernels, arrays), arrays.state(0.0)
    for at in range(TRAIN_STEPS):
        state, _ = step(state, blank(config.train.batch_size, config.train.seq_len), 1e-3, at)
    held = {"params": [w for _, w in tree_paths(arrays.tree)], "optimizer": [w for flat in arrays.moments.values() for w in flat]}
    return {kind: {w.name: [list(w.shape), name_of(w.dtype)] for w in tensors} for kind, tensors in held.items()}
