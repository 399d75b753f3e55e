"""Starts a main on several processes and waits: python -m experiments.launch --nproc=4 -- experiments.pretrain --config=FILE --tp=2

After `--` comes a module or a .py file, with its arguments. --nproc is the number of processes on THIS node. On each of several nodes:

    python -m experiments.launch --nproc=8 --nnodes=2 --node_rank=0 --master_addr=HOST --master_port=8118 -- experiments.pretrain ...
"""

import os

from absl import flags

from experiments import flags as command_line
from experiments import job_flags, number_flags
from parallel.launch import job as launch

FLAGS = flags.FLAGS
job_flags.define()
LOGS = "folder for rank_<r>.log and scheduler.log, which are overwritten; made if missing; default: a new folder in logs/"
flags.DEFINE_string("log_dir", None, LOGS, allow_override=True)  # replaces a flag of absl's logging, which is not used here
SAVE = "seconds after SIGTERM for the ranks to save a checkpoint and end; a second signal ends them at once"
number_flags.real("save_s", 60, SAVE, 0, number_flags.MOST_S)
SIMULATE = "simulate the NPUs on this machine: the main runs from its flags to its files, compiled for Ascend, and nothing is computed"
flags.DEFINE_boolean("simulate", False, SIMULATE)
RESTARTS = "how often a job that fails is started again, from its newest checkpoint; not after a mistake in flags or files"
number_flags.integer("restarts", 0, RESTARTS, 0, 1000)
RESTART = "processes on each node after a failure, if fewer; with --dp=-1 for the main, the data ranks are those that are left"
number_flags.integer("restart_nproc", None, RESTART, 1, number_flags.MOST_PROCESSES)
OPTIONS = (*job_flags.NAMES, "log_dir", "save_s", "simulate", "restarts", "restart_nproc")
STARTS_JOBS = "experiments.accept"  # starts a job for each of its stages, so that one that crashes does not end the others
TARGET = []  # the command after `--`


def main(_):
    if not TARGET:
        raise ValueError("nothing to start; give it after `--`, such as: --nproc=2 -- experiments.pretrain --config=FILE --dp=2")
    job = launch.Job(tuple(TARGET), **{name: FLAGS[name].value for name in OPTIONS})
    command = launch.command_of(job.target)
    if TARGET[0] == STARTS_JOBS:
        become(command)
    command_line.check_layout(TARGET, job.world)
    return launch.run(job)


def become(command):
    """Replaces this process by a main that starts its jobs itself; it gets the flags that describe them."""
    for name in ("log_dir", "simulate", "restarts", "restart_nproc"):
        if FLAGS[name].present:
            raise ValueError(
                f"--{name} has no use with {STARTS_JOBS}, which has a log for each stage, simulates and goes on by itself; leave it out"
            )
    given = [f"--{name}={FLAGS[name].value}" for name in job_flags.NAMES if FLAGS[name].value is not None]
    os.execv(command[0], [*command, *given])


if __name__ == "__main__":
    TARGET.extend(command_line.taken_after_dashes())
    command_line.run(main, is_rank=False)
