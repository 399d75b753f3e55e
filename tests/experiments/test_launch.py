"""The launcher's command line, and jobs of real MindSpore process groups."""

import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from tests.parallel.test_launch import Launched, free_port, text, wait_for

GROUP = """
import os, sys, time
import mindspore as ms
from mindspore import ops
from mindspore.communication import get_group_size, get_rank, init
init()
rank, reduce, ones = get_rank(), ops.AllReduce(), ms.ops.ones(3, ms.float32)
total = reduce(ones * (rank + 1)).asnumpy().tolist()
print("rank", rank, "of", get_group_size(), "sum", total, flush=True)
if sys.argv[1] == "done":
    sys.exit(0)
if rank == 1:
    while not os.path.exists("go"):
        time.sleep(0.05)
    if sys.argv[1] == "raise":
        raise RuntimeError("planned")
    time.sleep(1000)
print("waiting", flush=True)
reduce(ones).asnumpy()
"""


@pytest.fixture
def start(tmp_path):
    """start(*arguments) runs experiments.launch in tmp_path, where group.py is GROUP."""
    (tmp_path / "group.py").write_text(GROUP)
    launched = []

    def start(*arguments):
        launched.append(Launched([sys.executable, "-m", "experiments.launch", *arguments], tmp_path))
        return launched[-1]

    yield start
    for one in launched:
        one.popen.kill()


BAD = [
    (["--nproc=2"], "nothing to start; give it after `--`, such as: --nproc=2 -- experiments.pretrain"),
    (["--nproc=2", "--"], "nothing to start"),
    (["--", "group.py"], "--nproc is missing; give a number of 1 or more"),
    (["--nproc=2", "group.py"], "unexpected argument 'group.py'"),
    (["--nproc=two", "--", "group.py"], "flag --nproc=two"),
    (["--nprocs=2", "--", "group.py"], "Unknown command line flag 'nprocs'. Did you mean: nproc"),
    (["--nproc=2", "--", "grup.py"], "grup.py is not a file"),
    (["--nproc=2", "--", "experiments.pretrian"], "there is no module 'experiments.pretrian'"),
    (["--nproc=2", "--nnodes=2", "--", "group.py"], "--node_rank is missing"),
]


@pytest.mark.extended(but=("arguments0*", "arguments5*"))
@pytest.mark.parametrize("arguments, message", BAD)
def test_a_mistake_gets_one_line_and_status_2_in_under_two_seconds(start, arguments, message):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    job = start(*arguments).finish()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2  # of a core, which a busy machine may not give at once
    assert job.code == 2 and job.err.startswith("error: " + message) and "Traceback" not in job.err, job.err


def test_a_layout_that_does_not_fit_is_told_before_anything_is_started(tmp_path):
    check = (
        "import runpy, sys; from experiments import flags\n"
        "def check(argv, world): raise ValueError(f'{argv} on {world} ranks')\n"
        "flags.check_layout = check\n"
        "sys.argv = ['launch', '--nproc=2', '--nnodes=2', '--node_rank=1', '--master_addr=127.0.0.1', '--master_port=8118',\n"
        "            '--', 'experiments.pretrain', '--tp=3']\n"
        "runpy.run_module('experiments.launch', run_name='__main__')\n"
    )
    job = Launched([sys.executable, "-c", check], tmp_path).finish()
    assert job.code == 2 and job.err.startswith("error: ['experiments.pretrain', '--tp=3'] on 4 ranks"), job.err
    assert not job.out and os.listdir(tmp_path) == []


def test_the_launcher_does_not_import_mindspore():
    subprocess.run([sys.executable, "-c", "import sys, experiments.launch; sys.exit('mindspore' in sys.modules)"], check=True, timeout=30)


def test_help_says_what_nproc_counts(start):
    job = start("--help").finish()
    assert "--nproc: processes on this node" in job.out and "nproc * nnodes" in " ".join(job.out.split())


@pytest.mark.extended
def test_two_launchers_form_one_job(start, tmp_path):
    port = free_port()
    common = ("--nproc=1", "--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={port}", "--log_dir=logs")
    jobs = [start(*common, f"--node_rank={rank}", "--", "group.py", "done") for rank in (1, 0)]
    for job in jobs:
        assert job.finish().code == 0, job.err
        assert job.processes() == []
    for rank in (0, 1):
        assert f"rank {rank} of 2 sum [3.0, 3.0, 3.0]" in text(tmp_path / f"logs/rank_{rank}.log")
    assert "rank 0 of 2 sum" in jobs[1].out and "rank 1 of 2 sum" not in jobs[0].out + jobs[1].out


@pytest.mark.parametrize("what", ["kill", pytest.param("raise", marks=pytest.mark.slow)])
def test_a_rank_that_fails_ends_peers_that_wait_for_it_in_a_collective(start, tmp_path, what):
    job = start("--nproc=2", "--log_dir=logs", "--", "group.py", what)
    wait_for(lambda: "waiting" in text(tmp_path / "logs/rank_0.log") and "sum" in text(tmp_path / "logs/rank_1.log"), 60)
    began = time.monotonic()
    (tmp_path / "go").touch()
    if what == "kill":
        os.kill(rank_1(job), signal.SIGKILL)
    job.finish()
    assert time.monotonic() - began < 8  # MindSpore takes two seconds to leave after an exception; a peer alone would wait for 30
    assert job.code == (137 if what == "kill" else 1) and "error: rank 1 (process " in job.err, job.err
    assert ("was killed by SIGKILL" if what == "kill" else "RuntimeError: planned") in job.err
    assert job.processes() == []


def rank_1(job):
    """The process number of rank 1."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                variables = file.read().split(b"\0")
        except OSError:  # it has ended, or is another user's
            continue
        if b"TEST_MARK=" + job.mark.encode() in variables and b"MS_NODE_ID=1" in variables:
            return int(pid)
    raise AssertionError("rank 1 does not run")
