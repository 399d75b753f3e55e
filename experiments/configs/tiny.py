"""Pre-training of a dense model of 0.9M parameters, small enough for a laptop.

    python -m experiments.pretrain --config=experiments/configs/tiny.py --workdir=runs/tiny

Hardware: one CPU process.
Expected time and loss: about 2 minutes of training on 2 cores; 2.42 nats a token held out, on Python's own library.
"""

from experiments.configs import common


def get_config():
    c = common.get_config()
    c.model = "tiny"
    c.train.steps = 400
    c.train.batch_size = 16
    c.train.seq_len = 256
    c.train.eval_every = 50
    c.train.sample_tokens = 128
    c.optim.lr = 3e-3
    c.optim.warmup_steps = 50
    return c
