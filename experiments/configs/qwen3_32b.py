"""Pre-training of Qwen3-32B.

    python -m experiments.pretrain --config=experiments/configs/qwen3_32b.py --workdir=runs/qwen3_32b \
        --config.data.path=TEXT --config.data.tokenizer=HF_FOLDER

Hardware: 16 Ascend NPUs of 64 GB: 4 tensor ranks by 4 pipeline stages, whose layers are recomputed.
Expected time and loss: not measured.
Compiled for ranks of the 16 in simulation, not run on an NPU: docs/dryrun.md. `--tp=1 --pp=1 --seq_parallel=false` is for one device.
"""

from experiments.configs import common


def get_config():
    c = common.get_config()
    c.model = "qwen3-32b"
    c.model_args.compute_dtype = "bfloat16"
    c.train.steps = 10_000
    c.train.seq_len = 4096
    c.train.batch_size = 4
    c.train.recompute = "full"
    c.optim.lr = 1.5e-4
    c.optim.warmup_steps = 500
    c.parallel.tp = 4
    c.parallel.pp = 4
    c.parallel.micro_batches = 4
    c.parallel.seq_parallel = True
    return c
