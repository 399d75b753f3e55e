"""Fine-tuning of all weights of Qwen3-8B.

    python -m experiments.finetune --config=experiments/configs/finetune_qwen3_8b.py --workdir=runs/sft_8b \
        --hf_dir=HF_FOLDER --config.data.path=CONVERSATIONS.jsonl

Hardware: 8 Ascend NPUs of 64 GB, tensor parallel over 8, weights and state in float32: 16 GB a NPU before activations.
Expected time and loss: not measured. Not run on an NPU; the same code was run on CPU, on small models (docs/finetuning.md).
"""

from experiments.configs import common


def get_config():
    c = common.get_config()
    c.model = "qwen3-8b"
    c.model_args.compute_dtype = "bfloat16"
    c.data.format = "messages"
    c.train.steps = 2000
    c.train.seq_len = 4096
    c.train.batch_size = 32
    c.train.layer_loop = "unroll"  # as it was compiled
    c.train.sample_tokens = 0
    c.train.exact_match_rows = 0
    c.optim.lr = 1e-5
    c.optim.warmup_steps = 60
    c.optim.weight_decay = 0.0
    c.parallel.tp = 8
    c.parallel.seq_parallel = True
    c.parallel.micro_batches = 32
    return c
