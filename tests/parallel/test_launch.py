"""The launcher's own work, on plain Python targets: what is checked, who is blamed, and that nothing is left behind."""

import glob
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid

import pytest

from parallel.launch import job as launch
from parallel.launch import process as launch_process
from parallel.launch.nodes import Nodes, bind
from parallel.launch.process import Cause

RUN = """
import json, sys
from parallel.launch import job as launch
launch.SCHEDULER = sys.argv[1]  # nothing here meets, and MindSpore takes seconds to import
try:
    sys.exit(launch.run(launch.Job(**json.loads(sys.argv[2]))))
except ValueError as error:
    sys.exit(f"error: {error}")
"""
SLEEP = "import time; time.sleep(1000)"
TARGET = """
import atexit, ctypes, os, signal, subprocess, sys, time
rank, what = int(os.environ["RANK_ID"]), sys.argv[1]
print("hello from", rank)
if what == "report":
    names = "MS_ROLE MS_WORKER_NUM MS_SCHED_HOST MS_NODE_ID RANK_ID RANK_SIZE DEVICE_ID MS_TOPO_TIMEOUT OMP_NUM_THREADS"
    sys.exit(print(*(os.environ[name] for name in names.split())))
if what == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(1000)"])
if what == "save":
    signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1.5), print("saved", flush=True), os._exit(0)))
if what == "long":
    for i in range(100_000):
        print("line", i)
    sys.exit(0)
if rank == 1 and what == "slow":  # to exit, as MindSpore is
    atexit.register(time.sleep, 0.7)
    open("failed", "w").close()
if rank == 0 and what == "slow":
    while not os.path.exists("failed"):
        time.sleep(0.01)
    time.sleep(0.3)
    raise RuntimeError("my peer has gone")
if what.startswith("fails"):  # "fails N STATUS": each of the first N starts of rank 0 ends so
    _, times, status = what.split()
    if rank == 0:
        with open("starts", "a") as file:
            print(os.environ["RANK_SIZE"], file=file)
        if len(open("starts").read().split()) <= int(times):
            sys.exit(int(status)) if int(status) else os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(0)
if rank == 1 and what in ("raise", "slow"):
    raise RuntimeError("planned")
if rank == 1 and what == "exit":
    sys.exit(7)
if rank == 1 and what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if rank == 1 and what == "segv":
    ctypes.string_at(0)
print("ready")
time.sleep(1000)
"""


class Launched:
    """A launcher in a process of its own, and what came of it. `mark` is in the environment of all that it starts."""

    def __init__(self, command, cwd=None, **environ):
        self.mark = uuid.uuid4().hex
        env = {**os.environ, "PYTHONPATH": os.getcwd(), "TEST_MARK": self.mark, **environ}
        self.popen = subprocess.Popen(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def finish(self, timeout_s=60):
        self.out, self.err = self.popen.communicate(timeout=timeout_s)
        self.code = self.popen.returncode
        return self

    def processes(self):
        """Command lines of this launcher and of all that came from it and still run."""
        found = []
        for path in glob.glob("/proc/[0-9]*/environ"):
            try:
                with open(path, "rb") as environ, open(path.replace("environ", "cmdline"), "rb") as line:
                    if self.mark.encode() in environ.read():
                        found.append(line.read().replace(b"\0", b" ").decode())
            except OSError:  # it has ended
                pass
        return found


def wait_for(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def text(path):
    return path.read_text() if path.exists() else ""


@pytest.fixture
def start(tmp_path):
    """start(what, nproc=2, **job) launches TARGET in tmp_path, with logs in tmp_path/logs."""
    (tmp_path / "target.py").write_text(TARGET)
    launched = []

    def start(what, scheduler=SLEEP, environ=(), **job):
        job = {"target": ["target.py", what], "nproc": 2, "log_dir": "logs", "save_s": 1, "grace_s": 1, **job}
        launched.append(Launched([sys.executable, "-c", RUN, scheduler, json.dumps(job)], tmp_path, **dict(environ)))
        return launched[-1]

    yield start
    for one in launched:
        one.popen.kill()


def test_ranks_get_the_variables_of_msrun_and_logs_of_their_own(start, tmp_path):
    job = start("report", nproc=3, environ={"OMP_NUM_THREADS": "5"}.items()).finish()
    assert job.code == 0, job.err
    for rank in range(3):
        lines = text(tmp_path / f"logs/rank_{rank}.log").splitlines()
        assert lines == [f"hello from {rank}", f"MS_WORKER 3 127.0.0.1 {rank} {rank} 3 {rank} 600 5"]
    assert "hello from 0" in job.out and "hello from 1" not in job.out
    assert job.processes() == []


def test_ranks_of_a_second_node_go_on_counting_and_devices_start_again():
    job = launch.Job(("t.py",), nproc=4, nnodes=2, node_rank=1, master_addr="10.0.0.1", master_port=8118)
    env = launch.environment(job, ("10.0.0.1", 8118), rank=5)
    assert list(job.ranks) == [4, 5, 6, 7] and (env["MS_NODE_ID"], env["DEVICE_ID"], env["RANK_SIZE"]) == ("5", "1", "8")


def test_threads_are_shared_out_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = [launch.environment(launch.Job(("t.py",), nproc), ("127.0.0.1", 1), 0)["OMP_NUM_THREADS"] for nproc in (1, 3, 16)]
    assert threads == ["8", "2", "1"]


def test_all_of_a_long_output_reaches_the_terminal(start, tmp_path):
    job = start("long").finish()
    assert job.code == 0 and job.out.endswith(text(tmp_path / "logs/rank_0.log")) and "line 99999\n" in job.out


def test_a_job_goes_on_when_its_terminal_has_gone(start, tmp_path):
    job = start("long")
    while "hello" not in job.popen.stdout.readline():
        pass
    job.popen.stdout.close()
    assert job.popen.wait(30) == 0
    assert "line 99999" in text(tmp_path / "logs/rank_0.log")


HOW = {
    "raise": (1, "ended with exit code 1", "RuntimeError: planned"),
    "exit": (7, "ended with exit code 7", "hello from 1"),
    "kill": (137, "was killed by SIGKILL", "hello from 1"),
    "segv": (139, "was killed by SIGSEGV", "target.py"),
}


@pytest.mark.parametrize("what", HOW)
def test_a_rank_that_fails_ends_the_job_within_seconds_and_is_shown(start, tmp_path, what):
    code, how, line = HOW[what]
    job = start(what)
    wait_for(lambda: "ready" in text(tmp_path / "logs/rank_0.log"))
    began = time.monotonic()
    job.finish()
    assert time.monotonic() - began < 5
    assert job.code == code and "error: rank 1 (process " in job.err and how in job.err and line in job.err, job.err
    assert job.processes() == []


def test_the_first_cause_is_named_though_its_process_ends_last(start):
    job = start("slow").finish()
    assert job.code == 1
    assert job.err.startswith("error: rank 1") and "RuntimeError: planned" in job.err and "(then failed: rank 0" in job.err, job.err


def test_a_scheduler_that_fails_ends_the_job(start):
    job = start("sleep", scheduler="raise SystemExit('no scheduler today')").finish()
    assert job.code == 1 and "error: the scheduler (process" in job.err and "no scheduler today" in job.err
    assert job.processes() == []


def test_a_job_that_fails_is_started_again_as_often_as_asked(start, tmp_path):
    job = start("fails 2 7", restarts=3).finish()
    assert job.code == 0 and job.out.count("restart ") == 2 and "restart    2 of 3, as the job ended with status 7" in job.out, job.err
    assert text(tmp_path / "starts").split() == ["2"] * 3 and job.processes() == []
    assert [text(tmp_path / "logs" / place / "rank_0.log") for place in ("", "restart_1", "restart_2")] == ["hello from 0\n"] * 3
    (tmp_path / "starts").unlink()
    job = start("fails 9 0", restarts=1, restart_nproc=1).finish()  # killed
    assert job.code == 128 + signal.SIGKILL and text(tmp_path / "starts").split() == ["2", "1"]


def test_a_mistake_or_a_signal_is_no_reason_to_start_again(start, tmp_path):
    job = start("fails 9 2", restarts=3).finish()
    assert job.code == 2 and text(tmp_path / "starts").split() == ["2"]
    job = start("sleep", restarts=3)
    wait_for(lambda: "ready" in text(tmp_path / "logs/rank_1.log"))
    job.popen.send_signal(signal.SIGTERM)
    assert job.finish().code == 128 + signal.SIGTERM and "restart" not in job.out


@pytest.mark.parametrize("number, what", [(signal.SIGINT, "sleep"), (signal.SIGTERM, "sleep"), (signal.SIGTERM, "stubborn")])
def test_a_signal_to_the_launcher_ends_everything(start, tmp_path, number, what):
    job = start(what)
    wait_for(lambda: all("ready" in text(tmp_path / f"logs/rank_{rank}.log") for rank in (0, 1)))
    assert len(job.processes()) == (6 if what == "stubborn" else 4)
    began = time.monotonic()
    job.popen.send_signal(number)
    job.finish()
    assert time.monotonic() - began < 4 and job.code == 128 + number
    assert f"was stopped by {signal.Signals(number).name}" in job.err and job.processes() == []


def test_after_sigterm_ranks_have_time_to_save_unless_another_signal_comes(start, tmp_path):
    job = start("save", save_s=20)
    wait_for(lambda: all("ready" in text(tmp_path / f"logs/rank_{rank}.log") for rank in (0, 1)))
    job.popen.terminate()
    assert job.finish().code == 143 and "was stopped by SIGTERM" in job.err
    assert all("saved" in text(tmp_path / f"logs/rank_{rank}.log") for rank in (0, 1)) and job.processes() == []
    job = start("stubborn", save_s=1000, log_dir="again")
    wait_for(lambda: all("ready" in text(tmp_path / f"again/rank_{rank}.log") for rank in (0, 1)))
    job.popen.terminate()
    time.sleep(0.3)
    job.popen.terminate()
    assert job.finish().code == 143 and job.processes() == []


def test_processes_die_with_a_launcher_that_is_killed(start, tmp_path):
    job = start("sleep")
    wait_for(lambda: "ready" in text(tmp_path / "logs/rank_1.log"))
    job.popen.kill()
    wait_for(lambda: job.processes() == [], 5)


BAD = [
    ({"nproc": None}, "--nproc is missing"),
    ({"nproc": 0}, "--nproc=0 must be 1 or more"),
    ({"nnodes": 0}, "--nnodes=0 must be 1 or more"),
    ({"timeout_s": 0}, "--timeout_s=0 must be 1 or more"),
    ({"node_rank": 1}, "--node_rank=1 must be from 0 to 0, as --nnodes=1"),
    ({"nnodes": 2}, "--node_rank is missing; --nnodes=2 needs this node's number from 0"),
    ({"nnodes": 2, "node_rank": 0}, "--master_addr is missing; --nnodes=2 needs node 0's address"),
    ({"nnodes": 2, "node_rank": 0, "master_addr": "127.0.0.1"}, "--master_port is missing; --nnodes=2 needs a free port on node 0"),
    ({"nnodes": 2, "node_rank": 2, "master_addr": "127.0.0.1", "master_port": 8118}, "--node_rank=2 must be from 0 to 1, as --nnodes=2"),
    ({"master_port": 80}, "--master_port=80 must be from 1024 to 65535"),
    ({"nnodes": 2, "node_rank": 0, "master_addr": "127.0.0.1", "master_port": 65535}, "--master_port=65535 must be from 1024 to 65534"),
    ({"target": ("no/such.py",)}, "no/such.py is not a file"),
    ({"target": ("experiments.pretrian",)}, "there is no module 'experiments.pretrian'"),
    ({"target": ("no_such_package.main",)}, "there is no module 'no_such_package.main'"),
    ({"restarts": -1}, "--restarts=-1 must be 0 or more"),
    ({"restart_nproc": 1}, "--restart_nproc=1 needs --restarts"),
    ({"restarts": 1, "restart_nproc": 3}, "--restart_nproc=3 needs --restarts, and must be from 1 to --nproc=2"),
    ({"master_addr": "no-such-host.invalid"}, "--master_addr=no-such-host.invalid has no address"),
    ({"master_addr": "192.0.2.1"}, "--master_addr=192.0.2.1 is not an address of this node, which is node 0"),
    ({"log_dir": "setup.cfg/logs"}, "--log_dir=setup.cfg/logs cannot be made: Not a directory"),
]


@pytest.mark.parametrize("job, message", BAD, ids=[message.split(";")[0][:40] for _, message in BAD])
def test_a_mistake_is_told_before_anything_is_started(monkeypatch, job, message):
    monkeypatch.setattr(launch, "_start", None)
    with pytest.raises(ValueError) as error:
        launch.run(launch.Job(**{"target": ("experiments.launch",), "nproc": 2, **job}))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("kind", ["a server", "another launcher", "a server at the launchers' port"])
def test_a_port_in_use_is_told_before_anything_is_started(monkeypatch, tmp_path, kind):
    monkeypatch.setattr(launch, "_start", None)
    with socket.socket() if kind.startswith("a server") else socket.socket(type=socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        if kind.startswith("a server"):
            taken.listen()
        port = taken.getsockname()[1]
        job = launch.Job(("experiments.launch",), 2, master_port=port, log_dir=str(tmp_path))
        if kind.endswith("port"):
            job = launch.Job(("experiments.launch",), 2, 2, 0, "127.0.0.1", port - 1, log_dir=str(tmp_path))
        with pytest.raises(ValueError, match=f"{port} is in use on 127.0.0.1; use another"):
            launch.run(job)


def test_a_port_whose_last_job_has_just_ended_is_free():
    with bind("127.0.0.1", 0, "") as server:
        server.listen()
        address = server.getsockname()
        with socket.create_connection(address) as client:
            server.accept()[0].close()  # the side that closes first keeps the port in TIME_WAIT
            client.recv(1)
    bind(*address, "").close()


def test_processes_are_at_most_the_npus(tmp_path):
    for name in ("davinci0", "davinci1", "davinci_manager"):
        (tmp_path / name).touch()
    assert launch.device_count(tmp_path, {}) == 2 and launch.device_count(tmp_path / "none", {}) == 0
    assert launch.device_count(tmp_path, {"ASCEND_RT_VISIBLE_DEVICES": "1"}) == 1
    launch.check_devices(2, tmp_path, {})
    launch.check_devices(9, tmp_path / "none", {})
    launch.check_devices(9, tmp_path, {"ASCEND_RT_VISIBLE_DEVICES": ""})
    with pytest.raises(ValueError, match="--nproc=3 is more than this node's 2 NPUs; use --nproc=2 and more nodes"):
        launch.check_devices(3, tmp_path, {})


def test_each_job_without_a_log_folder_gets_a_new_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = launch.make_log_dir(None, 0)
    assert path.startswith("logs/launch-") and os.path.isdir(path)


def test_last_lines_hold_the_whole_traceback_and_one_state_of_a_progress_bar(tmp_path):
    log = tmp_path / "log"
    log.write_text("".join(f"line {i}\n" for i in range(100)))
    assert launch_process.last_lines(log) == tuple(f"line {i}" for i in range(80, 100))
    log.write_text("0%\r50%\r100%\n" + "Traceback (most recent call last):\n" + "  deep\n" * 40 + "ValueError: \xff\n")
    lines = launch_process.last_lines(log)
    assert lines[0].startswith("Traceback") and lines[-1] == "ValueError: \xff" and len(lines) == 42
    log.write_text("0%\r50%\r100%\nend")
    assert launch_process.last_lines(log) == ("100%", "end")
    log.write_text("")
    assert launch_process.last_lines(log) == ()


def test_of_failures_that_came_together_a_kill_or_a_traceback_is_the_cause():
    kill, traced, abort, code = (Cause(str(i), "", 1, 5.0 + i / 100, i) for i in range(4))
    assert launch_process.first([code, abort, traced, kill]) is kill
    assert launch_process.first([code, abort, traced]) is traced
    assert launch_process.first([Cause("early", "", 1, 4.0, 9), kill]).who == "early"


def free_port():
    """A port that is free, and whose next one is."""
    while True:
        with bind("127.0.0.1", 0, "") as one:
            port = one.getsockname()[1]
            try:
                bind("127.0.0.1", port + 1, "").close()
                return port
            except (ValueError, OverflowError):
                pass


def two_nodes(start, what, **job):
    job = {"nproc": 1, "nnodes": 2, "master_addr": "127.0.0.1", "master_port": free_port(), **job}
    return [start(what, node_rank=rank, **job) for rank in (0, 1)]


def test_a_rank_that_fails_on_another_node_ends_the_job_on_both_and_is_shown_on_both(start):
    for job in two_nodes(start, "raise"):
        job.finish()
        assert job.code == 1 and "error: rank 1 (process" in job.err and "on node 1 ended with" in job.err, job.err
        assert "RuntimeError: planned" in job.err and job.processes() == []


@pytest.mark.parametrize("lost", [0, 1])
def test_a_node_whose_launcher_is_killed_ends_the_job_of_the_other(start, tmp_path, lost):
    jobs = two_nodes(start, "sleep")
    wait_for(lambda: all("ready" in text(tmp_path / f"logs/rank_{rank}.log") for rank in (0, 1)))
    jobs[lost].popen.kill()
    job = jobs[1 - lost].finish()
    assert job.code == 1 and f"error: node {lost} has lost its launcher" in job.err and job.processes() == []
    wait_for(lambda: jobs[lost].processes() == [], 5)


def test_a_signal_to_one_launcher_ends_the_job_on_all_nodes(start, tmp_path):
    jobs = two_nodes(start, "sleep")
    wait_for(lambda: all("ready" in text(tmp_path / f"logs/rank_{rank}.log") for rank in (0, 1)))
    jobs[1].popen.send_signal(signal.SIGINT)
    for job in jobs:
        assert job.finish().code == 130 and "the launcher on node 1 was stopped by SIGINT" in job.err and job.processes() == []


def test_a_node_that_never_comes_is_an_error(start):
    port = free_port()
    common = {"nnodes": 2, "master_addr": "127.0.0.1", "timeout_s": 1}
    jobs = [start("sleep", node_rank=0, master_port=port, **common), start("sleep", node_rank=1, master_port=free_port(), **common)]
    first, second = (job.finish() for job in jobs)
    assert "1 of --nnodes=2 did not connect within --timeout_s=1; start the same command there with --node_rank=1" in first.err
    assert "node 0 has not answered at 127.0.0.1:" in second.err and "within --timeout_s=1" in second.err


def test_a_node_with_another_command_is_refused_and_told_why(start):
    port = free_port()
    common = {"nproc": 1, "nnodes": 2, "master_addr": "127.0.0.1", "master_port": port, "timeout_s": 20}
    first, other = start("raise", node_rank=0, **common), start("sleep", node_rank=1, **common)
    assert "the command is 'target.py sleep' here and 'target.py raise' on node 0" in other.finish().err
    start("raise", node_rank=1, **common).finish()  # the right one is still welcome
    first.finish()
    assert first.code == 1 and "RuntimeError: planned" in first.err and "refused    node 1" in first.out


def test_what_is_not_a_launcher_cannot_disturb_the_meeting():
    with bind("127.0.0.1", 0, "") as free:
        address = free.getsockname()
    nodes = Nodes(0, 2, address)
    says = (b"GET / HTTP/1.1\r\n\r\n", b"\xff\xff\n", b"[]\n", b'{"job": 3}\n', b'{"node_rank": [1], "job": []}\n', b"")
    strangers = [socket.create_connection(address) for _ in says]
    for stranger, message in zip(strangers, says):
        stranger.sendall(message)
    with pytest.raises(ValueError, match="did not connect within --timeout_s=1"):
        nodes.join({"--nproc": 1}, 1, lambda: False)
    for stranger in strangers:
        stranger.close()
    nodes.close()
