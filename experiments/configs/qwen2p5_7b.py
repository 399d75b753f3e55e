"""Pre-training of Qwen2.5-7B.

    python -m experiments.pretrain --config=experiments/configs/qwen2p5_7b.py --workdir=runs/qwen2p5_7b \
        --config.data.path=TEXT --config.data.tokenizer=HF_FOLDER

Hardware: 8 Ascend NPUs of 64 GB: 2 data ranks of 4 pipeline stages, a row at a time, optimizer state split over data ranks.
Expected time and loss: not measured.
Compiled for one of the 8 in simulation, not run on an NPU: docs/dryrun.md.
`--dp=1 --pp=1 --zero=0` is for one device.
"""

from experiments.configs import common


def get_config():
    c = common.get_config()
    c.model = "qwen2.5-7b"
    c.model_args.compute_dtype = "bfloat16"
    c.train.steps = 10_000
    c.train.seq_len = 4096
    c.train.batch_size = 64
    c.optim.warmup_steps = 500
    c.parallel.dp = 2
    c.parallel.pp = 4
    c.parallel.micro_batches = 32
    c.parallel.zero = 1
    return c
