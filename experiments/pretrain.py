"""Pre-training: python -m experiments.pretrain --config=experiments/configs/tiny.py --workdir=runs/tiny

On many ranks: python -m experiments.launch --nproc=4 -- experiments.pretrain --config=... --workdir=... --dp=2 --tp=2
"""

from absl import flags

from experiments import flags as command_line
from experiments import layout_table
from experiments.training import train_in

FLAGS = flags.FLAGS


def define_flags():
    command_line.define(command_line.MAINS["experiments.pretrain"])
    flags.DEFINE_boolean("print_layout", False, "print where every parameter lies in the layout, and what it costs; train nothing")


def main(_):
    if FLAGS.print_layout:
        print(layout_table.describe(command_line.resolve(FLAGS, world=0)))
    else:
        pretrain(command_line.resolve(FLAGS), FLAGS.workdir)


def pretrain(config, workdir):
    """A whole run, or the rest of one, in the folder `workdir`; config as experiments.flags.resolve gives it."""
    if config.data.format:
        raise ValueError(f"data.format={config.data.format!r} is for experiments.finetune; pre-training reads text or a .bin/.idx pair")
    train_in(workdir, config)


if __name__ == "__main__":
    command_line.run(main, define_flags)
