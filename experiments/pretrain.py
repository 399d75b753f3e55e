"""Pre-training: python -m experiments.pretrain --config=experiments/configs/tiny.py --workdir=runs/tiny

On many ranks: python -m experiments.launch --nproc=4 -- experiments.pretrain --config=... --workdir=... --dp=2 --tp=2
"""

from functools import partial

from experiments import flags as command_line
from experiments.train import command


def main(_):
    command.run_main(pretrain)


def pretrain(config, workdir):
    """Trains in the folder `workdir`, from the start or from its newest checkpoint. config: from experiments.flags.resolve."""
    command.refuse_others(config)
    if config.data.format:
        raise ValueError(f"data.format={config.data.format!r} is for experiments.finetune; pre-training reads text or a .bin/.idx pair")
    command.train_in(workdir, config)


if __name__ == "__main__":
    command_line.run(main, partial(command.define_flags, "experiments.pretrain"))
