"""Pre-training of Qwen3-0.6B.

    python -m experiments.pretrain --config=experiments/configs/qwen3_0p6b.py --workdir=runs/qwen3_0p6b \
        --config.data.path=TEXT --config.data.tokenizer=HF_FOLDER

Hardware: 8 Ascend NPUs of 64 GB, tensor parallel over all.
Expected time and loss: not measured.
Compiled for one of the 8 in simulation, not run on an NPU: docs/dryrun.md. `--tp=1 --seq_parallel=false` is for one device.
"""

from experiments.configs import common


def get_config():
    c = common.get_config()
    c.model = "qwen3-0.6b"
    c.model_args.compute_dtype = "bfloat16"
    c.train.steps = 10_000
    c.train.seq_len = 4096
    c.train.batch_size = 8
    c.train.layer_loop = "unroll"  # as it was compiled
    c.optim.warmup_steps = 500
    c.parallel.tp = 8
    c.parallel.seq_parallel = True
    c.parallel.micro_batches = 8
    return c
