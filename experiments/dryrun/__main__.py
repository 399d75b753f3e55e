"""Tries a layout without NPUs: compiles the real step for some ranks, and reports the memory and the communication of each.

    python -m experiments.dryrun --config=experiments/configs/qwen3_32b.py --world_size=16 --tp=8 --micro_batches=1 --zero=3 --seq_parallel

If some axes are given, the others are 1, and dp takes the remaining ranks. If none is given, the layout is that of the config.
docs/dryrun.md explains the report. Exit status 1: the layout does not fit, or the compiled step differs from it.
"""

import json
import sys

from absl import flags

from experiments import flags as command_line
from experiments import number_flags
from parallel.mesh import AXES, MOST_RANKS

FLAGS = flags.FLAGS


def define_flags():
    command_line.define("experiments/configs/qwen3_32b.py")
    number_flags.integer("world_size", None, "ranks of the job; default: as many as the layout asks for", 1, MOST_RANKS)
    flags.DEFINE_list("ranks", ["0"], "ranks whose programs are compiled, each in its own process")
    flags.DEFINE_list("layers", [], "two depths to compile, from which the figures of all layers are extrapolated; default: compile all")
    flags.DEFINE_enum("step", "train", ["train", "generate"], "what to compile: a training step, or reading a prompt and one more token")
    number_flags.real("hbm_gb", 58.0, "device memory that a job may use, in GiB", 0.1, 1e6)
    jobs = "processes at a time; each takes some GB of this machine's memory if the model is deep"
    number_flags.integer("jobs", 1, jobs, 1, number_flags.MOST_PROCESSES)
    flags.DEFINE_string("json", None, "file to which all figures are written")
    flags.DEFINE_string("plot", None, "file for a plot of memory over time, .svg or .png")
    flags.DEFINE_boolean("search", False, "rank the layouts of --world_size by formulas, and compile the first --compile of them")
    number_flags.integer("compile", 0, "number of layouts of --search to compile too, the fastest first", 0)
    number_flags.integer("top", 10, "how many layouts --search prints", 1)


def main(_):
    if FLAGS.search:
        config = _one_rank()
        from experiments.dryrun import search as dryrun_search  # once the flags are checked: it imports MindSpore, which takes seconds

        lines, found = dryrun_search.search(config, FLAGS.world_size, FLAGS.hbm_gb, FLAGS.top)
        print("\n".join(lines), flush=True)
        done = [_compiled(config, ("manual",)) for config in found[: FLAGS.compile]]
    else:
        _fill_axes()
        lowerings = _lowerings()
        done = [_compiled(command_line.resolve(FLAGS, world=FLAGS.world_size or 0), lowerings)]
    reports = [report for each in done for report in each["ranks"]]
    if FLAGS.json:
        with open(FLAGS.json, "w", encoding="utf-8") as file:
            json.dump(done if FLAGS.search else done[0], file)
    if FLAGS.plot and reports:
        from experiments.dryrun import plot as dryrun_plot

        dryrun_plot.plot(reports, FLAGS.hbm_gb, FLAGS.plot)
    if not all(report["fits"] and not report["problems"] for report in reports):
        sys.exit(1)


def _compiled(config, lowerings):
    ranks, layers = _numbers("ranks"), _numbers("layers")
    from experiments.dryrun import jobs as dryrun_jobs  # see main

    return dryrun_jobs.compiled(config, lowerings, FLAGS.step, ranks, layers, FLAGS.hbm_gb, FLAGS.jobs)


def _fill_axes():
    """Fills in the axes that are not given: 1, and dp takes the remaining ranks. For generation it also turns off the layout's settings for
    training, and sets the weights to bfloat16, the dtype of released models."""
    given = [axis for axis in AXES if FLAGS[axis].value is not None]
    if FLAGS.world_size and given:
        for axis in AXES:
            if axis not in given:
                FLAGS[axis].value = -1 if axis == "dp" else 1
    if FLAGS.step == "generate":
        for name, value in (("micro_batches", 1), ("zero", 0), ("seq_parallel", False)):
            FLAGS[name].value = value
        FLAGS.config.model_args.param_dtype = "bfloat16"


def _lowerings():
    """Returns the lowerings to compile. --lowering=shard also compiles the manual one, for comparison."""
    asked, FLAGS["lowering"].value = FLAGS.lowering, None if FLAGS.lowering == "shard" else FLAGS.lowering
    return ("manual", "shard") if asked == "shard" else ("manual",)


def _one_rank():
    """Returns the config for one rank, from which the search makes layouts."""
    if not FLAGS.world_size:
        raise ValueError("--search needs the number of ranks; use --world_size=8")
    for name in (*AXES, "micro_batches"):
        FLAGS[name].value = 1
    FLAGS["seq_parallel"].value = False
    return command_line.resolve(FLAGS, world=1)


def _numbers(name):
    try:
        return [int(text) for text in FLAGS[name].value]
    except ValueError:
        raise ValueError(f"--{name}={','.join(FLAGS[name].value)} must be whole numbers, such as --{name}=0,15") from None


if __name__ == "__main__":
    command_line.run(main, define_flags, is_rank=False)
