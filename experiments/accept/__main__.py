"""Acceptance kit: python -m experiments.accept --out=FOLDER tries everything on this machine, and writes one report to attach to an issue.

    python -m experiments.accept --out=runs/accept                                       # one process: a laptop, or one NPU
    python -m experiments.launch --nproc=8 -- experiments.accept --out=runs/accept       # eight NPUs, or processes of one CPU
    python -m experiments.accept --stages=ops,layouts --out=runs/accept                  # these stages alone

Each stage ends in `pass`, `fail` or `not possible here`, and none stops the others. FOLDER gets report.html, report.json and the logs. The
exit status is 0 if nothing failed, else 1.
"""

import os

from absl import flags

from experiments import flags as command_line
from experiments import job_flags, number_flags
from experiments.accept import stages

FLAGS = flags.FLAGS


def define_flags():
    job_flags.define(nproc=1)
    flags.DEFINE_string("out", None, "folder of the report; made if missing")
    flags.DEFINE_list("stages", [], f"the stages to run: {', '.join(stages.STAGES)}; default: all")
    flags.DEFINE_boolean("list", False, "print the stages, and start nothing")
    flags.DEFINE_boolean("quick", False, "a short form: fewer checks, smaller sizes, minutes instead of an hour")
    flags.DEFINE_string("hf_dir", None, "a Hugging Face folder of a released model, for the stage hf")
    flags.DEFINE_string("goldens", None, "file of --write_goldens, made on another machine, that judges the model of --hf_dir here")
    flags.DEFINE_string("write_goldens", None, "file to which the stage hf writes the numbers that it computes here")
    number_flags.real(
        "limit_s", None, "seconds after which a check is ended and has failed; default: each stage's own", 1, number_flags.MOST_S
    )


def main(_):
    if FLAGS.list:
        print("\n".join(f"{stage.name:12} {stage.title}" for stage in stages.STAGES.values()))
        return 0
    if not FLAGS.out:
        raise ValueError("--out is missing; give a folder for the report, such as --out=runs/accept")
    for name in ("hf_dir", "goldens"):
        if FLAGS[name].value and not os.path.exists(os.path.expanduser(FLAGS[name].value)):
            raise FileNotFoundError(f"--{name}={FLAGS[name].value} does not exist")
    if (FLAGS.goldens or FLAGS.write_goldens) and not FLAGS.hf_dir:
        raise ValueError(f"--{'goldens' if FLAGS.goldens else 'write_goldens'} is of a model; give --hf_dir=FOLDER too")
    from experiments.accept import supervise  # once the flags are checked

    return supervise.run(stages.chosen(FLAGS.stages), FLAGS)


if __name__ == "__main__":
    command_line.run(main, define_flags, is_rank=False)
