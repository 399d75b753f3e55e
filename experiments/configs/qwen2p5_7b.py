"""Pre-training of Qwen2.5-7B.

    python -m experiments.pretrain --config=experiments/configs/qwen2p5_7b.py --workdir=runs/qwen2p5_7b \
        --config.data.path=TEXT --config.data.tokenizer=HF_FOLDER

Hardware: 8 Ascend NPUs of 64 GB: 2 data ranks of 4 tensor ranks, the most that its 4 key-value heads allow.
Expected time and loss: not measured.
Needs layouts this version does not build yet; `--dp=1 --tp=1` asks for one device instead.
"""

from experiments.configs import common


def get_config():
    c = common.get_config()
    c.model = "qwen2.5-7b"
    c.model_args.compute_dtype = "bfloat16"
    c.train.steps = 10_000
    c.train.seq_len = 4096
    c.train.batch_size = 8
    c.optim.warmup_steps = 500
    c.parallel.dp = 2
    c.parallel.tp = 4
    c.parallel.micro_batches = 4
    return c
