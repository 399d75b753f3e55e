"""Ranks that srun, mpirun or mpiexec started: each process finds its place in the environment, and becomes a rank of one job.

MindSpore's ranks meet at a scheduler, a process of its own. experiments.launch and msrun start one; here rank 0 does. A job on several
nodes needs the address of rank 0's node: srun's list of nodes has it; for mpirun it is MASTER_ADDR. MASTER_PORT is the scheduler's port;
by default it follows from the job's number, or from the process that started the ranks of this node.

Nothing here imports MindSpore.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass

STARTS_SCHEDULER = "QWEN3_STARTS_SCHEDULER"  # set in rank 0 by join(), read by start_scheduler()
FIRST_PORT, PORTS = 20000, 12000
# Ends with the ranks, as init() does in a scheduler, or some time after rank 0 has gone without them
SCHEDULER = """
import os, sys, threading, time
def watch(parent, grace_s):
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(grace_s)
    os._exit(1)
threading.Thread(target=watch, args=(int(sys.argv[1]), 30.0), daemon=True).start()
from mindspore.communication import init
init()
"""


@dataclass(frozen=True)
class Place:
    """A process among those that a launcher started together. launcher: its name. local_rank: the number on its node. host, port: of the
    scheduler, on rank 0's node."""

    launcher: str
    size: int
    rank: int
    local_rank: int
    host: str
    port: int


def join(environ=os.environ):
    """Sets in `environ` the variables of a rank, as experiments.launch and msrun do, in a process that another launcher started beside
    others. Changes nothing in any other process. Raises ValueError where the place cannot be found."""
    place = place_of(environ)
    if place is None:
        return
    environ.update(
        {
            "MS_ROLE": "MS_WORKER",
            "MS_WORKER_NUM": str(place.size),
            "MS_NODE_ID": str(place.rank),
            "MS_SCHED_HOST": place.host,
            "MS_SCHED_PORT": str(place.port),
            "RANK_SIZE": str(place.size),
            "RANK_ID": str(place.rank),
            "DEVICE_ID": str(place.local_rank),
        }
    )
    environ.setdefault("MS_TOPO_TIMEOUT", "600")
    if place.rank == 0:
        environ[STARTS_SCHEDULER] = "1"


def start_scheduler(environ=os.environ):
    """Starts the scheduler in the rank that join() chose for it. It ends when all ranks have ended."""
    if environ.pop(STARTS_SCHEDULER, None):
        env = {**environ, "MS_ROLE": "MS_SCHED"}
        command = [sys.executable, "-c", SCHEDULER, str(os.getpid())]
        subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)


def place_of(environ):
    """Returns the Place of this process; None in one that is alone, that a launcher of MindSpore started, or that simulates a rank."""
    if "MS_ROLE" in environ or "MS_WORKER_NUM" in environ or environ.get("MS_SIMULATION_LEVEL", "0") != "0":
        return None
    for found in (_of_srun, _of_openmpi, _of_hydra):
        place = found(environ)
        if place is not None and place.size > 1:
            return place
    return None


def _of_srun(environ):
    size = _number(environ, "SLURM_STEP_NUM_TASKS")
    if size is None:
        return None
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST", "")
    alone = environ.get("SLURM_STEP_NUM_NODES", "1") == "1"
    host = environ.get("MASTER_ADDR") or ("127.0.0.1" if alone else first_host(nodes))
    job = (_number(environ, "SLURM_JOB_ID") or 0) * 31 + (_number(environ, "SLURM_STEP_ID") or 0)
    ranks = _needed(environ, "srun", size, "SLURM_PROCID", "SLURM_LOCALID")
    return Place("srun", size, *ranks, host, _port(environ, job))


def _of_openmpi(environ):
    return _of_mpi(environ, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")


def _of_hydra(environ):
    """Of MPICH and Intel MPI."""
    return _of_mpi(environ, "PMI_SIZE", "MPI_LOCALNRANKS", "PMI_RANK", "MPI_LOCALRANKID")


def _of_mpi(environ, size_name, local_size_name, *rank_names):
    size = _number(environ, size_name)
    if size is None:
        return None
    ranks, host, port = _needed(environ, "mpirun", size, *rank_names), environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if _number(environ, local_size_name) != size and size > 1 and not (host and port):
        raise ValueError(
            f"mpirun started {size} processes on several nodes; give the address of rank 0's node and a free port on it:"
            " mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=PORT ..."
        )
    return Place("mpirun", size, *ranks, host or "127.0.0.1", _port(environ, os.getppid()))


def _needed(environ, launcher, size, *names):
    found = [_number(environ, name) for name in names]
    if size > 1 and None in found:
        missing = names[found.index(None)]
        raise ValueError(f"{launcher} started {size} processes, but {missing} does not say which this one is; start them again")
    return [number or 0 for number in found]


def _number(environ, name):
    text = environ.get(name, "")
    return int(text) if text.isdecimal() and len(text) < 19 else None


def _port(environ, number):
    text = environ.get("MASTER_PORT")
    if text is None:
        return FIRST_PORT + number % PORTS
    if not (text.isdecimal() and len(text) < 6 and 1024 <= int(text) <= 65535):
        raise ValueError(f"MASTER_PORT={text!r} must be a free port on rank 0's node, from 1024 to 65535")
    return int(text)


def first_host(nodes):
    """Returns the first name of a list of nodes as Slurm writes it, such as gpu[03-05,9],login or rack1-node7."""
    match = re.fullmatch(r"([^\[,]+)(?:\[([0-9]+)[^\]]*\]([^,]*))?(?:,.*)?", nodes)
    if not match:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes!r} is no list of nodes; set MASTER_ADDR to the address of rank 0's node")
    return match[1] + (match[2] or "") + (match[3] or "")
