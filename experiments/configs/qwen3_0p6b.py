"""Pre-training of Qwen3-0.6B.

    python -m experiments.pretrain --config=experiments/configs/qwen3_0p6b.py --workdir=runs/qwen3_0p6b \
        --config.data.path=TEXT --config.data.tokenizer=HF_FOLDER

Hardware: 8 Ascend NPUs of 64 GB, tensor parallel over all.
Expected time and loss: not measured.
Needs layouts this version does not build yet; `--tp=1` asks for one device instead.
"""

from experiments.configs import common


def get_config():
    c = common.get_config()
    c.model = "qwen3-0.6b"
    c.model_args.compute_dtype = "bfloat16"
    c.train.steps = 10_000
    c.train.seq_len = 4096
    c.train.batch_size = 8
    c.optim.warmup_steps = 500
    c.parallel.tp = 8
    c.parallel.micro_batches = 8
    return c
