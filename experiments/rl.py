"""Reinforcement learning on rewards, by GRPO, DAPO, Dr. GRPO or GSPO, of all weights or of LoRA adapters:

    python -m experiments.rl --config=experiments/configs/rl_tiny.py --workdir=runs/rl [--hf_dir=DIR]

--hf_dir: a Hugging Face folder or a run, which gives the model's sizes, initial weights and tokenizer; it is the reference model too. The
prompts are set by data.path, the reward by rl.reward; see docs/posttraining.md. For many ranks, see experiments.pretrain.
"""

from functools import partial

from experiments import flags as command_line
from experiments.data import prompts
from experiments.posttrain.settings import RL_LOSSES
from experiments.train import command


def main(_):
    command.run_main(rl)


def rl(config, workdir):
    """Trains in the folder `workdir`, from the start or from its newest checkpoint. config: from experiments.flags.resolve."""
    command.refuse_others(config, "experiments.rl")
    if not config.rl.loss:
        raise ValueError(f"rl.loss is empty; use one of {', '.join(RL_LOSSES)}")
    if config.data.format not in prompts.FORMATS:
        raise ValueError(f"data.format={config.data.format!r} has no prompts alone; use data.format=prompts")
    command.train_in(workdir, config)


if __name__ == "__main__":
    command_line.run(main, partial(command.define_flags, "experiments.rl"))
