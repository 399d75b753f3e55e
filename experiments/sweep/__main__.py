"""Runs each run of a sweep, in a folder of its own: python -m experiments.sweep --config=FILE --workdir=DIR [--parallel_jobs=2]

FILE has sweep(add) beside get_config(); experiments/sweep/sweeps.py says how. What follows `--` goes to every run. Stopped or killed, it goes on
with the same command: finished runs are left alone, others go on from their last checkpoint. At the end DIR has table.md, runs.csv and
summary.csv, the latter with mean and spread over seeds; --table makes them of what is there, and starts nothing.
"""

import os

from absl import flags

from experiments import flags as command_line
from experiments.sweep import jobs as sweep_jobs
from experiments.sweep import sweeps
from experiments.sweep import table as sweep_table

FLAGS = flags.FLAGS
EXTRA = []  # what follows `--`, taken out of the command line


def define_flags():
    flags.DEFINE_string("config", None, "a file with get_config() and sweep(add)")
    flags.DEFINE_string("workdir", None, "folder of the sweep, with one for each run")
    flags.DEFINE_enum("main", "experiments.pretrain", list(command_line.MAINS), "what each run is")
    flags.DEFINE_integer("parallel_jobs", 1, "runs at a time, which share this machine's cores", lower_bound=1)
    flags.DEFINE_integer("nproc", 1, "processes of each run, started by experiments.launch", lower_bound=1)
    flags.DEFINE_list("metrics", ["eval_loss", "loss"], "columns of the tables: the last value of each in metrics.jsonl")
    flags.DEFINE_list("over", ["train.seed"], "keys that the summary takes mean and spread over")
    flags.DEFINE_boolean("list", False, "print the runs; start none")
    flags.DEFINE_boolean("table", False, "write the tables; start nothing")


def main(_):
    for name in ("config", "workdir"):
        if not FLAGS[name].value:
            raise ValueError(f"--{name} is missing; give {'a file with sweep(add)' if name == 'config' else 'a folder for the sweep'}")
    if not os.path.isfile(FLAGS.config):
        raise ValueError(f"--config={FLAGS.config} is not a file")
    sweep = sweep_jobs.Sweep(FLAGS.config, FLAGS.workdir, FLAGS.main, tuple(EXTRA), FLAGS.nproc)
    runs = sweeps.load(FLAGS.config)
    if FLAGS.list:
        for run in runs:
            print(f"{run.name}  {' '.join(sweep.command(run))}")
        return 0
    failed = [] if FLAGS.table else sweep_jobs.run_all(sweep, runs, FLAGS.parallel_jobs)
    print(sweep_table.write(FLAGS.workdir, runs, FLAGS.metrics, FLAGS.over))
    return 1 if failed else 0


if __name__ == "__main__":
    EXTRA.extend(command_line.taken_after_dashes())
    command_line.run(main, define_flags)
