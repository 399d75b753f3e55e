"""DPO of a dense model of 0.9M parameters on made-up preferences, of capital letters over small ones, small enough for a laptop.

    python -m experiments.prefer --config=experiments/configs/prefer_tiny.py --workdir=runs/dpo [--hf_dir=runs/sft]

Hardware: one CPU process.
Expected time and loss: not measured.
"""

from experiments.configs import common


def get_config():
    c = common.get_config()
    c.model = "tiny"
    c.prefer.loss = "dpo"
    c.data.format = "pairs"
    c.data.vocab_size = 320
    c.train.steps = 100
    c.train.batch_size = 8
    c.train.seq_len = 256
    c.train.eval_every = 25
    c.train.sample_tokens = 0
    c.optim.lr = 1e-4
    c.optim.warmup_steps = 10
    c.optim.weight_decay = 0.0
    return c
