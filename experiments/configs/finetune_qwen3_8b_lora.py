"""Fine-tuning of Qwen3-8B by adapters of rank 8 on all projections of every layer.

    python -m experiments.finetune --config=experiments/configs/finetune_qwen3_8b_lora.py --workdir=runs/lora_8b \
        --hf_dir=HF_FOLDER --config.data.path=CONVERSATIONS.jsonl

Hardware: 8 Ascend NPUs of 64 GB, tensor parallel over 8: frozen weights in bfloat16, 2 GB a NPU. Other sizes, up to 32B, by --hf_dir.
Expected time and loss: not measured. Not run on an NPU; the same code was run on CPU, on small models (docs/finetuning.md).
"""

from experiments.configs import finetune_qwen3_8b


def get_config():
    c = finetune_qwen3_8b.get_config()
    c.lora.rank = 8
    c.lora.alpha = 16.0
    c.optim.lr = 2e-4
    return c
