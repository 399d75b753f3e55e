"""The command line of the mains that train.

Nothing here imports MindSpore before the flags and the config are checked: the import takes seconds, and a wrong flag is answered at once.
"""

from absl import flags

from experiments import flags as command_line
from experiments.data import preferences, prompts

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # --help lists them under the main that calls define_flags()


def define_flags(name):
    """Defines the flags of a main that trains. name: a key of command_line.MAINS."""
    command_line.define(command_line.MAINS[name])
    flags.DEFINE_boolean("print_layout", False, "print how the layout shards every parameter, and its memory and traffic; do not train")


def run_main(train_one):
    """Calls train_one(config, workdir) with the values of the flags, or prints the layout for --print_layout."""
    config = command_line.resolve(FLAGS, world=0 if FLAGS.print_layout else None)
    if FLAGS.print_layout:
        from experiments.layout import table

        print(table.describe(config))
    else:
        train_one(config, FLAGS.workdir)


def refuse_others(config, main=""):
    """Raises ValueError for a config of another main than `main`: experiments.prefer, experiments.rl, or "" for training on next tokens."""
    of_format = {**dict.fromkeys(preferences.FORMATS, "experiments.prefer"), **dict.fromkeys(prompts.FORMATS, "experiments.rl")}
    for key, value, owner in (
        ("prefer.loss", config.prefer.loss, "experiments.prefer" if config.prefer.loss else ""),
        ("rl.loss", config.rl.loss, "experiments.rl" if config.rl.loss else ""),
        ("data.format", config.data.format, of_format.get(config.data.format, "")),
    ):
        if owner and owner != main:
            raise ValueError(f"{key}={value} is for {owner}; leave it out, or use that main")


def train_in(workdir, config):
    """Trains in the folder `workdir`, from the start or from its newest checkpoint. config: from experiments.flags.resolve."""
    from experiments.train import run

    run.train_in(workdir, config)
