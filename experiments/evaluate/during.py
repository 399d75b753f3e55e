"""Tasks that a training run scores while it trains, on its own weights and in its own layout: train.eval_tasks.

They are those of experiments/evaluate/tasks.py, scored by log-likelihood at the steps at which the held-out rows are evaluated.
"""

import os

from experiments.evaluate import scoring, tasks
from experiments.train.state import uses_scan
from layers import lora
from parallel.graph.jit import jit
from qwen3 import model


def read(text):
    """Returns the Tasks of train.eval_tasks, files separated by commas. Raises ValueError for a file that is missing or wrong, and for two
    of one name."""
    found = {}
    for name in filter(None, (part.strip() for part in text.split(","))):
        path = os.path.expanduser(name)
        if not os.path.isfile(path):
            raise ValueError(f"train.eval_tasks: {name} does not exist; give files of tasks, as experiments/evaluate/tasks.py describes")
        task = tasks.read(path)
        if task.name in found:
            raise ValueError(f"train.eval_tasks: two files are named {task.name}; their metrics would have one name")
        found[task.name] = task
    return list(found.values())


def build(cfg, config, sharding, kernels, program, tokenizer):
    """Returns scored(state) -> {"task_NAME_METRIC": value} of all tasks; None without tasks. All ranks call it, and get the same values."""
    found = read(config.train.eval_tasks)
    if not found:
        return None
    if tokenizer is None:
        raise ValueError("train.eval_tasks needs a tokenizer, as tasks are texts; give one with --config.data.tokenizer")
    cfg = lora.without_dropout(cfg).replace(moe_capacity_factor=None)
    score = jit(model.build(cfg, sharding, uses_scan(cfg, config.train.layer_loop), kernels, loss_chunks=config.train.loss_chunks).score)
    length = min(config.train.seq_len, cfg.max_position)

    def scored(state):
        scorer = scoring.Scorer(
            program.tree(state), cfg, tokenizer, score, sharding, kernels, config.train.batch_size, length, tokenizer.eos_id
        )
        return {f"task_{task.name}_{metric}": value for task in found for metric, value in tasks.run(scorer, task)[0].items()}

    return scored
