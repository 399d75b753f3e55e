"""Pre-training: python -m experiments.pretrain --config=experiments/configs/tiny.py --workdir=runs/tiny

On many ranks: python -m experiments.launch --nproc=4 -- experiments.pretrain --config=... --workdir=... --dp=2 --tp=2
"""

from functools import partial

from experiments import flags as command_line
from experiments.train import run as training


def main(_):
    training.run_main(pretrain)


def pretrain(config, workdir):
    """Trains in the folder `workdir`, from the start or from its newest checkpoint. config: from experiments.flags.resolve."""
    if config.data.format:
        raise ValueError(f"data.format={config.data.format!r} is for experiments.finetune; pre-training reads text or a .bin/.idx pair")
    training.train_in(workdir, config)


if __name__ == "__main__":
    command_line.run(main, partial(training.define_flags, "experiments.pretrain"))
