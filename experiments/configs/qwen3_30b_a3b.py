"""Pre-training of Qwen3-30B-A3B, 128 experts of which 8 are active.

    python -m experiments.pretrain --config=experiments/configs/qwen3_30b_a3b.py --workdir=runs/qwen3_30b_a3b \
        --config.data.path=TEXT --config.data.tokenizer=HF_FOLDER

Hardware: 16 Ascend NPUs of 64 GB: 4 tensor ranks, which also hold 4 groups of experts, by 4 pipeline stages.
Expected time and loss: not measured.
Compiled for ranks of the 16 in simulation, not run on an NPU: docs/dryrun.md. `--tp=1 --pp=1 --ep=1 --seq_parallel=false` is for one
device.
"""

from experiments.configs import common


def get_config():
    c = common.get_config()
    c.model = "qwen3-30b-a3b"
    c.model_args.compute_dtype = "bfloat16"
    c.train.steps = 10_000
    c.train.seq_len = 4096
    c.train.batch_size = 4
    c.optim.warmup_steps = 500
    c.parallel.tp = 4
    c.parallel.pp = 4
    c.parallel.ep = 4
    c.parallel.micro_batches = 4
    c.parallel.seq_parallel = True
    return c
