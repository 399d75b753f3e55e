"""Runs each run of a sweep, in a folder of its own: python -m experiments.sweep --config=FILE --workdir=DIR [--parallel_jobs=2]

FILE has sweep(add) beside get_config(), as experiments/sweep/sweeps.py shows. Arguments after `--` go to every run. After a stop or a crash
the same command continues the sweep: it skips finished runs and resumes the others from their last checkpoint. At the end DIR has table.md,
runs.csv and summary.csv, which gives mean and spread over seeds; --table writes them for the runs so far, and starts none.
"""

from absl import flags

from experiments import flags as command_line
from experiments import number_flags
from experiments.sweep import sweeps

FLAGS = flags.FLAGS
EXTRA = []  # the arguments after `--`, which are removed from sys.argv


def define_flags():
    flags.DEFINE_string("config", None, "a file with get_config() and sweep(add)")
    flags.DEFINE_string("workdir", None, "folder of the sweep, with one for each run")
    flags.DEFINE_enum("main", "experiments.pretrain", list(command_line.MAINS), "the module that each run executes")
    number_flags.integer("parallel_jobs", 1, "runs at a time, which share this machine's cores", 1, number_flags.MOST_PROCESSES)
    number_flags.integer("nproc", 1, "processes of each run, started by experiments.launch", 1, number_flags.MOST_PROCESSES)
    flags.DEFINE_list("metrics", ["final_loss", "eval_loss", "loss"], "columns of the tables: the last value of each in metrics.jsonl")
    flags.DEFINE_list("over", ["train.seed"], "config keys, such as seeds, over which the summary takes mean and spread")
    flags.DEFINE_boolean("list", False, "print the runs; start none")
    flags.DEFINE_boolean("table", False, "write the tables; start nothing")


def main(_):
    sweeps.check_given(FLAGS.config, FLAGS.workdir, "a file with sweep(add)", "a folder for the sweep")
    runs = sweeps.load(FLAGS.config)
    # Imported here, so that wrong flags are answered before MindSpore is imported, which takes seconds.
    from experiments.sweep import jobs as sweep_jobs
    from experiments.sweep import table as sweep_table

    sweep = sweep_jobs.Sweep(FLAGS.config, FLAGS.workdir, FLAGS.main, tuple(EXTRA), FLAGS.nproc)
    if FLAGS.list:
        for run in runs:
            print(f"{run.name}  {' '.join(sweep.command(run))}")
        return 0
    failed = [] if FLAGS.table else sweep_jobs.run_all(sweep, runs, FLAGS.parallel_jobs)
    print(sweep_table.write(FLAGS.workdir, runs, FLAGS.metrics, FLAGS.over))
    return 1 if failed else 0


if __name__ == "__main__":
    EXTRA.extend(command_line.taken_after_dashes())
    command_line.run(main, define_flags, is_rank=False)
