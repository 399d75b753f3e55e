"""The starting point of every record of the speedrun: a dense model of 2 layers, AdamW with a cosine schedule, on the fixed corpus.

    python -m experiments.speedrun run experiments/speedrun/records/00_baseline

Hardware: one core. Expected time and loss: docs/speedrun.md has the board.
"""

from experiments.configs import common


def get_config():
    c = common.get_config()
    c.model = "tiny"
    c.model_args.num_layers = 2
    c.model_args.hidden_size = 96
    c.model_args.num_heads = 3
    c.model_args.num_kv_heads = 3
    c.model_args.ffn_size = 256
    c.train.steps = 280
    c.train.batch_size = 8
    c.train.seq_len = 128
    c.train.eval_every = 40
    c.train.eval_rows = 0
    c.train.log_every = 50
    c.train.sample_tokens = 0
    c.train.save_hf = False
    c.checkpoint.every = 0
    c.checkpoint.on_exit = False
    c.optim.lr = 3e-3
    c.optim.warmup_steps = 30
    return c
