"""The flags that say how many processes a job has and how its nodes meet, for experiments.launch and experiments.accept."""

from absl import flags

from experiments import number_flags
from parallel.mesh import MOST_RANKS

NAMES = ("nproc", "nnodes", "node_rank", "master_addr", "master_port", "timeout_s")
flags.disclaim_key_flags()  # --help lists them under the main that calls define()


def define(nproc=None):
    """Registers the flags. nproc: the default of --nproc."""
    processes = "processes on this node, one per device (msrun's local_worker_num); the job has nproc * nnodes ranks"
    number_flags.integer("nproc", nproc, processes, 1, number_flags.MOST_PROCESSES)
    number_flags.integer("nnodes", 1, "number of nodes; start a launcher on each (msrun's worker_num / local_worker_num)", 1, MOST_RANKS)
    number_flags.integer("node_rank", None, "this node's number, from 0; needed with several nodes", 0, MOST_RANKS - 1)
    flags.DEFINE_string("master_addr", None, "name or IP address of node 0; needed with several nodes")
    port = "port of the scheduler on node 0; needed with several nodes; the port after it is used too"
    number_flags.integer("master_port", None, port, 1024, 65535)
    timeout = "seconds in which all nodes must start and all ranks connect (msrun's cluster_time_out)"
    number_flags.real("timeout_s", 600, timeout, 1, number_flags.MOST_S)
