"""Training on preferences, by DPO, IPO, KTO or SimPO, of all weights or of LoRA adapters:

    python -m experiments.prefer --config=experiments/configs/prefer_tiny.py --workdir=runs/dpo [--hf_dir=DIR]

--hf_dir: a Hugging Face folder or a run, which gives the model's sizes, initial weights and tokenizer; it is the reference model too. The
loss is prefer.loss, and the data are set by data.format and data.path; see docs/posttraining.md. For many ranks, see experiments.pretrain.
"""

from functools import partial

from experiments import flags as command_line
from experiments.data import preferences
from experiments.posttrain.settings import LOSSES
from experiments.train import command


def main(_):
    command.run_main(prefer)


def prefer(config, workdir):
    """Trains in the folder `workdir`, from the start or from its newest checkpoint. config: from experiments.flags.resolve."""
    command.refuse_others(config, "experiments.prefer")
    loss, form = config.prefer.loss, config.data.format
    if not loss:
        raise ValueError(f"prefer.loss is empty; use one of {', '.join(LOSSES)}")
    if form not in preferences.FORMATS:
        raise ValueError(f"data.format={form!r} is no format of preferences; use {' or '.join(preferences.FORMATS)}")
    if form == "unpaired" and loss != "kto":
        raise ValueError(
            f"data.format=unpaired has single answers, and prefer.loss={loss} compares pairs; use prefer.loss=kto, or data.format=pairs"
        )
    command.train_in(workdir, config)


if __name__ == "__main__":
    command_line.run(main, partial(command.define_flags, "experiments.prefer"))
