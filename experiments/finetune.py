"""Supervised fine-tuning on conversations, of all weights or of LoRA adapters:

    python -m experiments.finetune --config=experiments/configs/finetune_tiny.py --workdir=runs/sft [--hf_dir=DIR]

--hf_dir: a Hugging Face folder or a run, which gives the model's sizes, initial weights and tokenizer. The data are set by data.format and
data.path; see docs/finetuning.md. For many ranks, see experiments.pretrain.
"""

from functools import partial

from experiments import flags as command_line
from experiments.train import command


def main(_):
    command.run_main(finetune)


def finetune(config, workdir):
    """Trains in the folder `workdir`, from the start or from its newest checkpoint. config: from experiments.flags.resolve."""
    command.refuse_others(config)
    if not (config.data.format or config.data.conversations):
        raise ValueError("data.format='' is no format of conversations; use alpaca, sharegpt or messages, or data.conversations=true")
    command.train_in(workdir, config)


if __name__ == "__main__":
    command_line.run(main, partial(command.define_flags, "experiments.finetune"))
