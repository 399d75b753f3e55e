"""Supervised fine-tuning on conversations, of all weights or by LoRA:

    python -m experiments.finetune --config=experiments/configs/finetune_tiny.py --workdir=runs/sft [--hf_dir=DIR]

--hf_dir: a Hugging Face folder, or a run, whose model, weights and tokenizer it starts from. Data: data.format, data.path; see
docs/finetuning.md. On many ranks as experiments.pretrain.
"""

from absl import flags

from experiments import flags as command_line
from experiments import layout_table
from experiments.training import train_in

FLAGS = flags.FLAGS


def define_flags():
    command_line.define(command_line.MAINS["experiments.finetune"])
    flags.DEFINE_boolean("print_layout", False, "print where every parameter lies in the layout, and what it costs; train nothing")


def main(_):
    if FLAGS.print_layout:
        print(layout_table.describe(command_line.resolve(FLAGS, world=0)))
    else:
        finetune(command_line.resolve(FLAGS), FLAGS.workdir)


def finetune(config, workdir):
    """A whole run, or the rest of one, in the folder `workdir`; config as experiments.flags.resolve gives it."""
    if not (config.data.format or config.data.conversations):
        raise ValueError("data.format='' names no format of conversations; use alpaca, sharegpt or messages, or data.conversations=true")
    train_in(workdir, config)


if __name__ == "__main__":
    command_line.run(main, define_flags)
