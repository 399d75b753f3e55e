"""Pre-training of a mixture of 8 experts of 2.6M parameters, small enough for a laptop.

    python -m experiments.pretrain --config=experiments/configs/tiny_moe.py --workdir=runs/tiny_moe

Hardware: one CPU process.
Expected time and loss: about 2 minutes of training on 2 cores; 2.61 nats a token held out, on Python's own library.
"""

from experiments.configs import common


def get_config():
    c = common.get_config()
    c.model = "tiny-moe"
    c.train.steps = 300
    c.train.batch_size = 16
    c.train.seq_len = 256
    c.train.eval_every = 50
    c.train.sample_tokens = 128
    c.optim.lr = 3e-3
    c.optim.warmup_steps = 50
    return c
