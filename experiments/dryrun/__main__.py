"""A layout tried without its NPUs: the real step compiled for chosen ranks, and what each would hold and send.

    python -m experiments.dryrun --config=experiments/configs/qwen3_32b.py --world_size=16 --tp=8 --micro_batches=1 --zero=3 --seq_parallel

Axes that are not given are 1, and dp what is left of the ranks; with none given, the layout is the config's. docs/dryrun.md says how to
read it. Exit status 1: it does not fit, or the compiled step is not what the layout says.
"""

import json
import sys

from absl import flags

from experiments import flags as command_line
from experiments.dryrun import jobs as dryrun_jobs
from experiments.dryrun import plot as dryrun_plot
from experiments.dryrun import search as dryrun_search
from parallel.mesh import AXES

FLAGS = flags.FLAGS


def define_flags():
    command_line.define("experiments/configs/qwen3_32b.py")
    flags.DEFINE_integer("world_size", None, "ranks of the job; default: as many as the layout asks for", lower_bound=1)
    flags.DEFINE_list("ranks", ["0"], "whose programs are compiled, each in a process of its own")
    flags.DEFINE_list("layers", [], "two depths to compile, from which a straight line gives the whole model's figures; none: all layers")
    flags.DEFINE_enum("step", "train", ["train", "generate"], "what is compiled: a training step, or a prompt and a token after it")
    flags.DEFINE_float("hbm_gb", 58.0, "device memory that a job may take, in GiB", lower_bound=0.1)
    flags.DEFINE_integer("jobs", 1, "processes at a time; one of a deep model takes some GB of this machine's memory", lower_bound=1)
    flags.DEFINE_string("json", None, "file for all figures")
    flags.DEFINE_string("plot", None, "file for a plot of memory over time, .svg or .png")
    flags.DEFINE_boolean("search", False, "rank the layouts of --world_size by formulas, and compile none, or --compile of them")
    flags.DEFINE_integer("compile", 0, "how many of the layouts that --search prints are compiled too, the first ones", lower_bound=0)
    flags.DEFINE_integer("top", 10, "how many layouts --search prints", lower_bound=1)


def main(_):
    if FLAGS.search:
        lines, found = dryrun_search.search(_one_rank(), FLAGS.world_size, FLAGS.hbm_gb, FLAGS.top)
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
        dryrun_plot.plot(reports, FLAGS.hbm_gb, FLAGS.plot)
    if not all(report["fits"] and not report["problems"] for report in reports):
        sys.exit(1)


def _compiled(config, lowerings):
    return dryrun_jobs.compiled(config, lowerings, FLAGS.step, _numbers("ranks"), _numbers("layers"), FLAGS.hbm_gb, FLAGS.jobs)


def _fill_axes():
    """Where axes are given for a number of ranks, the others are 1, and dp is what is left. For generation what a layout has for training
    alone is left out, and weights are as released files have them."""
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
    """Which are compiled: with --lowering=shard, which trains nowhere yet, also the manual one, to hold it against."""
    asked, FLAGS["lowering"].value = FLAGS.lowering, None if FLAGS.lowering == "shard" else FLAGS.lowering
    return ("manual", "shard") if asked == "shard" else ("manual",)


def _one_rank():
    """The config without its layout, for the search to lay out."""
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
    command_line.run(main, define_flags)
