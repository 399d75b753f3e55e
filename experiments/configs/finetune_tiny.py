"""Fine-tuning of a dense model of 0.9M parameters on made-up instructions (to reverse, add, sort and look up), small enough for a laptop.

    python -m experiments.finetune --config=experiments/configs/finetune_tiny.py --workdir=runs/sft

Hardware: one CPU process.
Expected time and loss: not measured in this form. Rows of 256 tokens and longer questions took 3 minutes for 600 steps on 2 cores, and
reversed and sorted 0.99 of held-out questions right.
"""

from experiments.configs import common


def get_config():
    c = common.get_config()
    c.model = "tiny"
    c.data.format = "messages"
    c.data.vocab_size = 320
    c.train.steps = 1000
    c.train.batch_size = 8
    c.train.seq_len = 128
    c.train.eval_every = 200
    c.optim.lr = 3e-3
    c.optim.warmup_steps = 50
    c.optim.weight_decay = 0.01
    return c
