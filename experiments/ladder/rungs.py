"""The rungs of a ladder: one dial, the depth, gives the sizes of a model and the length of its run."""

import runpy
from typing import NamedTuple


class Ladder(NamedTuple):
    """What all rungs share. depths: of the rungs, in increasing order; the last one is predicted from the others.

    width_per_depth: the width is this times the depth. head_dim: of each head; there are width / head_dim heads, and as many kv heads.
    tokens_per_parameter: the tokens of a run over the parameters in its layers. rows: of a step. All rungs have optim.lr, and
    muP carries it from the width of the first rung to the others.
    """

    depths: tuple
    width_per_depth: int = 32
    head_dim: int = 16
    tokens_per_parameter: float = 20.0
    rows: int = 8


MIN_RUNGS = 4  # three fit a curve of three constants, and the last one judges it


def load(path):
    """Returns the Ladder of a config file. Raises ValueError for a file without one, and for a ladder that cannot be built."""
    ladder = runpy.run_path(path).get("LADDER")
    if not isinstance(ladder, Ladder):
        raise ValueError(f"--config={path} has no LADDER; write LADDER = Ladder(depths=(1, 2, 3, 4)) beside get_config()")
    depths = ladder.depths
    if len(depths) < MIN_RUNGS or any(type(d) is not int or d < 1 for d in depths) or list(depths) != sorted(set(depths)):
        raise ValueError(
            f"LADDER: depths={depths} must be {MIN_RUNGS} or more whole numbers above 0, in increasing order; use (1, 2, 3, 4)"
        )
    if ladder.head_dim < 2 or ladder.head_dim % 2 or ladder.width_per_depth < 1 or ladder.width_per_depth % ladder.head_dim:
        raise ValueError(
            f"LADDER: width_per_depth={ladder.width_per_depth} must be a multiple of head_dim={ladder.head_dim}, which is even"
        )
    if ladder.tokens_per_parameter <= 0 or ladder.rows < 1:
        raise ValueError(f"LADDER: tokens_per_parameter={ladder.tokens_per_parameter} and rows={ladder.rows} must be above 0")
    return ladder


def overrides(ladder, depth):
    """Returns {config key: value} of the rung of a depth, without train.steps."""
    width = ladder.width_per_depth * depth
    heads = width // ladder.head_dim
    model = dict(num_layers=depth, hidden_size=width, num_heads=heads, num_kv_heads=heads, head_dim=ladder.head_dim, ffn_size=3 * width)
    train = {"train.batch_size": ladder.rows, "train.mup_base_width": ladder.width_per_depth * ladder.depths[0]}
    return {**{f"model_args.{key}": value for key, value in model.items()}, **train}


def parameters(cfg):
    """Returns the number of parameters in a model's layers; the embedding does not count."""
    from parallel.specs import count
    from qwen3.model import param_specs  # here, because it imports MindSpore, which takes seconds, and config files import this file

    return count(param_specs(cfg)["layers"])


def steps(ladder, cfg, seq_len):
    """Returns the steps of a rung: tokens_per_parameter times the parameters in the layers, in steps of rows * seq_len tokens."""
    return max(1, round(ladder.tokens_per_parameter * parameters(cfg) / (ladder.rows * seq_len)))
