"""A ladder of four models on Python's own library, small enough for a laptop.

    python -m experiments.ladder --config=experiments/configs/ladder_tiny.py --workdir=runs/ladder

Hardware: one CPU process.
Expected time and loss: 11 minutes on 2 cores under heavy other load; 2.78 nats a token held out, for the last rung.
"""

from experiments.configs import common
from experiments.ladder.rungs import Ladder

LADDER = Ladder(depths=(2, 3, 4, 5), width_per_depth=16, head_dim=16, tokens_per_parameter=3, rows=8)


def get_config():
    c = common.get_config()
    c.model = "tiny"
    c.data.max_bytes = 4_000_000
    c.train.seq_len = 64
    c.train.sample_tokens = 0
    c.train.eval_every = 0
    c.train.eval_rows = 512
    c.train.log_every = 50
    c.optim.lr = 1e-2
    c.optim.warmup_ratio = 0.1
    c.optim.weight_decay = 0.0
    return c
