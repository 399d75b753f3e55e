"""Pre-training of Qwen3-235B-A22B, 128 experts of which 8 are active.

    python -m experiments.pretrain --config=experiments/configs/qwen3_235b_a22b.py --workdir=runs/qwen3_235b_a22b \
        --config.data.path=TEXT --config.data.tokenizer=HF_FOLDER

Hardware: 128 Ascend NPUs of 64 GB: 4 data ranks by 4 tensor ranks, which hold 16 groups of experts, by 8 pipeline stages.
Expected time and loss: not measured.
Neither run nor compiled yet. `--dp=1 --tp=1 --pp=1 --ep=1 --zero=0 --seq_parallel=false` is for one device.
"""

from experiments.configs import common


def get_config():
    c = common.get_config()
    c.model = "qwen3-235b-a22b"
    c.model_args.compute_dtype = "bfloat16"
    c.train.steps = 10_000
    c.train.seq_len = 4096
    c.train.batch_size = 64
    c.optim.lr = 1.5e-4
    c.optim.warmup_steps = 500
    c.parallel.dp = 4
    c.parallel.tp = 4
    c.parallel.pp = 8
    c.parallel.ep = 16
    c.parallel.micro_batches = 16
    c.parallel.zero = 1
    c.parallel.seq_parallel = True
    return c
