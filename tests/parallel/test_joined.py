"""Ranks that srun, mpirun and msrun start: where each finds its place, and real jobs of two processes."""

import os
import subprocess
import sys

import numpy as np
import pytest

from parallel.launch import joined
from parallel.launch.joined import Place, place_of
from tests.processes import ROOT, _load

SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "2"}
NODES = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[03-04]"}
OPENMPI = {f"OMPI_COMM_WORLD_{name}": number for name, number in dict(SIZE="4", RANK="2", LOCAL_RANK="2", LOCAL_SIZE="4").items()}
HYDRA = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
OF_PARENT = joined.FIRST_PORT + os.getppid() % joined.PORTS
OURS = ("MS_ROLE", "MS_WORKER_NUM", "MS_NODE_ID", "MS_SCHED_HOST", "MS_SCHED_PORT", "RANK_SIZE", "RANK_ID", "DEVICE_ID", "MS_TOPO_TIMEOUT")


@pytest.mark.parametrize(
    "environ, place",
    [
        (SRUN, Place("srun", 4, 3, 1, "127.0.0.1", joined.FIRST_PORT + 77 * 31 + 2)),
        ({**SRUN, **NODES}, Place("srun", 4, 3, 1, "gpu03", joined.FIRST_PORT + 77 * 31 + 2)),
        ({**SRUN, **NODES, "MASTER_ADDR": "head", "MASTER_PORT": "8118"}, Place("srun", 4, 3, 1, "head", 8118)),
        (OPENMPI, Place("mpirun", 4, 2, 2, "127.0.0.1", OF_PARENT)),
        ({**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "9000"}, Place("mpirun", 4, 2, 2, "a", 9000)),
        (HYDRA, Place("mpirun", 2, 1, 1, "127.0.0.1", OF_PARENT)),
        ({**SRUN, **HYDRA}, Place("srun", 4, 3, 1, "127.0.0.1", joined.FIRST_PORT + 77 * 31 + 2)),  # srun --mpi=pmi2 sets both
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # inside salloc or sbatch, not started by srun
        ({**SRUN, "MS_WORKER_NUM": "8"}, None),  # a rank of experiments.launch, which srun started on each node
        ({**SRUN, "MS_ROLE": "MS_WORKER"}, None),
        ({**SRUN, "MS_SIMULATION_LEVEL": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "x", "PMI_SIZE": ""}, None),
        ({}, None),
    ],
)
def test_a_process_finds_its_place(environ, place):
    assert place_of(environ) == place


@pytest.mark.parametrize(
    "environ, words",
    [
        ({**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=PORT"),
        ({**OPENMPI, "MASTER_PORT": "99999"}, "MASTER_PORT='99999' must be a free port"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 processes, but SLURM_PROCID does not say which this one is"),
        ({**SRUN, **NODES, "SLURM_STEP_NODELIST": "[,"}, "is no list of nodes; set MASTER_ADDR"),
    ],
)
def test_what_gives_no_place_is_said(environ, words):
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        place_of(environ)


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("gpu[03-05,9],login", "gpu03"),
        ("rack1-node7", "rack1-node7"),
        ("a,b", "a"),
        ("n[1-2].cluster.net", "n1.cluster.net"),
        ("n[12,14-16]", "n12"),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes, host):
    assert joined.first_host(nodes) == host


def test_the_variables_of_a_rank_are_set_once():
    environ = dict(SRUN)
    joined.join(environ)
    assert {name: environ[name] for name in OURS} == {
        "MS_ROLE": "MS_WORKER",
        "MS_WORKER_NUM": "4",
        "MS_NODE_ID": "3",
        "MS_SCHED_HOST": "127.0.0.1",
        "MS_SCHED_PORT": str(joined.FIRST_PORT + 77 * 31 + 2),
        "RANK_SIZE": "4",
        "RANK_ID": "3",
        "DEVICE_ID": "1",
        "MS_TOPO_TIMEOUT": "600",
    }
    assert joined.STARTS_SCHEDULER not in environ
    again = dict(environ)
    joined.join(again)
    assert again == environ
    first = {**SRUN, "SLURM_PROCID": "0"}
    joined.join(first)
    assert first[joined.STARTS_SCHEDULER] == "1"
    alone = {"HOME": "x"}
    joined.join(alone)
    assert alone == {"HOME": "x"}


RANKS = {
    "srun": lambda rank, port: {**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
    "mpirun": lambda rank, port: {
        f"OMPI_COMM_WORLD_{name}": str(number) for name, number in dict(SIZE=2, RANK=rank, LOCAL_RANK=rank, LOCAL_SIZE=2).items()
    },
}


def a_free_port():
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def check_sums(folder):
    """Each of two ranks has the sum of what both gave."""
    ranks = [_load(f"{folder}/rank_{rank}.npz") for rank in range(2)]
    for rank in ranks:
        np.testing.assert_array_equal(rank["sum"], ranks[0]["own"] + ranks[1]["own"])


WORKER = "tests.parallel.joined_worker:main"
MAIN = "from tests import processes; import sys; processes.main(*sys.argv[1:])"


def environment(**more):
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOG_v": "3", "PATH": path, **more}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", RANKS)
def test_two_processes_of_another_launcher_are_one_job(launcher, tmp_path):
    command, port = [sys.executable, "-c", MAIN, WORKER, str(tmp_path), "120"], a_free_port()
    options = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environs = [environment(MASTER_PORT=str(port), **RANKS[launcher](rank, port)) for rank in range(2)]
    processes = [subprocess.Popen(command, env=environ, **options) for environ in environs]
    out = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], out
    check_sums(tmp_path)


@pytest.mark.slow
def test_msrun_starts_a_job(tmp_path):
    msrun = os.path.join(os.path.dirname(sys.executable), "msrun")
    options = ["--worker_num=2", "--local_worker_num=2", f"--master_port={a_free_port()}", "--join=True", f"--log_dir={tmp_path}/logs"]
    command = [msrun, *options, "python", "-m", "tests.processes", WORKER, str(tmp_path), "120"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    check_sums(tmp_path)
