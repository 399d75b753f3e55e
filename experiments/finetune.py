"""Supervised fine-tuning on conversations, of all weights or by LoRA:

    python -m experiments.finetune --config=experiments/configs/finetune_tiny.py --workdir=runs/sft [--hf_dir=DIR]

--hf_dir: a Hugging Face folder, or a run, whose model, weights and tokenizer it starts from. Data: data.format, data.path; see
docs/finetuning.md. On many ranks as experiments.pretrain.
"""

from functools import partial

from experiments import flags as command_line
from experiments.train import run as training


def main(_):
    training.run_main(finetune)


def finetune(config, workdir):
    """A whole run, or the rest of one, in the folder `workdir`; config as experiments.flags.resolve gives it."""
    if not (config.data.format or config.data.conversations):
        raise ValueError("data.format='' names no format of conversations; use alpaca, sharegpt or messages, or data.conversations=true")
    training.train_in(workdir, config)


if __name__ == "__main__":
    command_line.run(main, partial(training.define_flags, "experiments.finetune"))
