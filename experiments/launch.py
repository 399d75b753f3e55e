"""Starts a main on several processes and waits: python -m experiments.launch --nproc=4 -- experiments.pretrain --config=FILE --tp=2

After `--` comes a module or a .py file, with its arguments. --nproc is the number of processes on THIS node. On each of several nodes:

    python -m experiments.launch --nproc=8 --nnodes=2 --node_rank=0 --master_addr=HOST --master_port=8118 -- experiments.pretrain ...
"""

from absl import flags

from experiments import flags as command_line
from experiments import number_flags
from parallel.launch import job as launch
from parallel.mesh import MOST_RANKS

FLAGS = flags.FLAGS
PROCESSES = "processes on this node, one per device (msrun's local_worker_num); the job has nproc * nnodes ranks"
number_flags.integer("nproc", None, PROCESSES, 1, number_flags.MOST_PROCESSES)
number_flags.integer("nnodes", 1, "number of nodes; start a launcher on each (msrun's worker_num / local_worker_num)", 1, MOST_RANKS)
number_flags.integer("node_rank", None, "this node's number, from 0; needed with several nodes", 0, MOST_RANKS - 1)
flags.DEFINE_string("master_addr", None, "name or IP address of node 0; needed with several nodes")
PORT = "port of the scheduler on node 0; needed with several nodes; the port after it is used too"
number_flags.integer("master_port", None, PORT, 1024, 65535)
LOGS = "folder for rank_<r>.log and scheduler.log, which are overwritten; made if missing; default: a new folder in logs/"
flags.DEFINE_string("log_dir", None, LOGS, allow_override=True)  # replaces a flag of absl's logging, which is not used here
TIMEOUT = "seconds in which all nodes must start and all ranks connect (msrun's cluster_time_out)"
number_flags.real("timeout_s", 600, TIMEOUT, 1, number_flags.MOST_S)
SAVE = "seconds after SIGTERM for the ranks to save a checkpoint and end; a second signal ends them at once"
number_flags.real("save_s", 60, SAVE, 0, number_flags.MOST_S)
SIMULATE = "simulate the NPUs on this machine: the main runs from its flags to its files, compiled for Ascend, and nothing is computed"
flags.DEFINE_boolean("simulate", False, SIMULATE)
OPTIONS = ("nproc", "nnodes", "node_rank", "master_addr", "master_port", "log_dir", "timeout_s", "save_s", "simulate")
TARGET = []  # the command after `--`


def main(_):
    if not TARGET:
        raise ValueError("nothing to start; give it after `--`, such as: --nproc=2 -- experiments.pretrain --config=FILE --dp=2")
    job = launch.Job(tuple(TARGET), **{name: FLAGS[name].value for name in OPTIONS})
    launch.command_of(job.target)
    command_line.check_layout(TARGET, job.world)
    return launch.run(job)


if __name__ == "__main__":
    TARGET.extend(command_line.taken_after_dashes())
    command_line.run(main)
