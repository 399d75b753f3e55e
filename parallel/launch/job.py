"""Starts, watches and ends the processes of a distributed job: one launcher on each node and one process for each rank. Linux only.

As with msrun, the processes connect through MindSpore's scheduler on node 0. Other than msrun, the launcher always waits for the job, and a
failure on any node ends the job on all nodes within seconds, with a message that says which rank failed first and how.
"""

import contextlib
import glob
import importlib.util
import os
import shlex
import signal
import socket
import sys
import time
from dataclasses import dataclass, replace

from parallel.launch.nodes import Nodes, bind
from parallel.launch.process import POLL_S, Cause, Process, end
from parallel.simulation import standin

SCHEDULER = "from mindspore.communication import init; init()"  # with MS_ROLE=MS_SCHED, init() returns when all workers have ended
LAUNCHER, MISTAKE = "the launcher", 2  # a cause's name; the exit status of a main whose flags or files are wrong
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Job:
    """The description of a job.

    target: a module or a .py file, followed by its arguments.
    nproc: the number of ranks on this node; the job has nproc * nnodes ranks.
    node_rank: the number of this node. Needed only with several nodes.
    master_addr, master_port: the address of node 0. The scheduler listens at master_port and, with several nodes, the launcher at
        master_port + 1. With one node the default is a free port of this machine.
    log_dir: the folder of rank_<r>.log and scheduler.log, which is made if missing. Default: a new folder in logs/.
    timeout_s: the time for all nodes to connect, and then for all ranks to connect.
    show_rank: the rank whose output goes to the terminal.
    save_s: the time for the ranks to save and end after a launcher got SIGTERM.
    grace_s: the time from SIGTERM to SIGKILL in other cases.
    simulate: the ranks are simulated NPUs. MindSpore compiles for them and computes nothing; they exchange files and no values.
    restarts: how often a job that fails is started again; see run.
    restart_nproc: the number of ranks on each node after a failure; default: nproc.
    Raises ValueError with the key, its value and the fix.
    """

    target: tuple
    nproc: int
    nnodes: int = 1
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    log_dir: str | None = None
    timeout_s: float = 600
    show_rank: int = 0
    save_s: float = 60
    grace_s: float = 3
    simulate: bool = False
    restarts: int = 0
    restart_nproc: int | None = None

    def __post_init__(self):
        for key in ("nproc", "nnodes", "timeout_s"):
            if getattr(self, key) is None:
                raise ValueError(f"--{key} is missing; give a number of 1 or more")
            if getattr(self, key) < 1:
                raise ValueError(f"--{key}={getattr(self, key)} must be 1 or more")
        if self.nnodes > 1:
            needed = {"node_rank": "this node's number from 0", "master_addr": "node 0's address", "master_port": "a free port on node 0"}
            for key, what in needed.items():
                if getattr(self, key) is None:
                    raise ValueError(f"--{key} is missing; --nnodes={self.nnodes} needs {what}")
        if self.simulate and self.nnodes > 1:
            raise ValueError(f"--simulate with --nnodes={self.nnodes}: a simulated job has one node; use --nproc for all of its ranks")
        if self.restarts < 0:
            raise ValueError(f"--restarts={self.restarts} must be 0 or more")
        if self.restart_nproc is not None and not (self.restarts and 1 <= self.restart_nproc <= self.nproc):
            raise ValueError(f"--restart_nproc={self.restart_nproc} needs --restarts, and must be from 1 to --nproc={self.nproc}")
        if self.node_rank is not None and not 0 <= self.node_rank < self.nnodes:
            raise ValueError(f"--node_rank={self.node_rank} must be from 0 to {self.nnodes - 1}, as --nnodes={self.nnodes}")
        last = 65535 if self.nnodes == 1 else 65534  # the launcher takes the next port
        if self.master_port is not None and not 1024 <= self.master_port <= last:
            raise ValueError(f"--master_port={self.master_port} must be from 1024 to {last}")

    @property
    def world(self):
        """The number of ranks of the job."""
        return self.nproc * self.nnodes

    @property
    def node(self):
        """The number of this node; 0 for a job on one node."""
        return self.node_rank or 0

    @property
    def ranks(self):
        """The ranks on this node."""
        return range(self.node * self.nproc, (self.node + 1) * self.nproc)


def run(job):
    """Runs a job to its end. Returns the exit status: 0, or that of the process that failed first; 128 + N for signal N.

    SIGINT, SIGTERM and SIGHUP to the launcher end the job with 128 + N. After SIGTERM the ranks have save_s seconds to save. Raises
    ValueError before any rank starts if the target does not exist, there are more ranks than devices, the address or port cannot be used,
    the log folder cannot be made, or other nodes do not connect in time.

    A job that fails, but for a user's mistake (exit status MISTAKE) or a signal to a launcher, is started again up to `restarts` times: its
    mains then go on from their newest checkpoints. The logs of these starts are in folders restart_<n> of the log folder.
    """
    code, stopped, log_dir = run_once(job)
    for number in range(1, job.restarts + 1):
        if code in (0, MISTAKE) or stopped:
            break
        print(f"restart    {number} of {job.restarts}, as the job ended with status {code}", flush=True)
        again = replace(job, log_dir=os.path.join(log_dir, f"restart_{number}"), nproc=job.restart_nproc or job.nproc, restart_nproc=None)
        code, stopped, _ = run_once(again)
    return code


def run_once(job):
    """Runs a job to its end, without restarts. Returns (exit status, whether a signal to a launcher ended it, the folder of its logs)."""
    command = command_of(job.target)
    if not job.simulate:
        check_devices(job.nproc)
    elif reason := standin.unavailable():
        raise ValueError(f"--simulate: {reason}")
    with _signals() as received, contextlib.ExitStack() as held:
        address = held.enter_context(_scheduler_address(job))
        nodes = held.enter_context(contextlib.closing(Nodes(job.node, job.nnodes, (address[0], address[1] + 1))))
        log_dir = make_log_dir(job.log_dir, job.node)
        if job.nnodes > 1:
            print(f"launch     node {job.node} of {job.nnodes}, waiting for the others", flush=True)
        same = {"--nnodes": job.nnodes, "--nproc": job.nproc, "the command": shlex.join(job.target)}
        nodes.join(same, job.timeout_s, lambda: bool(received))
        if received:
            return 128 + received[0], True, log_dir
        _announce(job, address, log_dir)
        processes, started_s = [], time.monotonic()
        try:
            for process in _start(job, command, address, log_dir):
                processes.append(process)
            causes = _watch(processes, nodes, received)
            late = time.monotonic() - started_s > job.timeout_s
            if any(cause.code == 128 + signal.SIGTERM and not cause.log for cause in causes[:1]):
                _let_save(processes, received, job.save_s)
        finally:
            staying = end(processes, job.grace_s)
        stopped = any(LAUNCHER in cause.who for cause in causes[:1])
        return _conclude(causes, staying, job.timeout_s if late else None), stopped, log_dir


def command_of(target):
    """Returns the command line of a target. Raises ValueError if there is no such file or module."""
    name, *args = target
    if name.endswith(".py"):
        if not os.path.isfile(name):
            raise ValueError(f"{name} is not a file; give a module, such as experiments.pretrain, or a .py file")
        return [sys.executable, name, *args]
    try:
        found = importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # no such package, or not a name
        found = False
    if not found:
        raise ValueError(f"there is no module {name!r}; give one, such as experiments.pretrain, or a .py file")
    return [sys.executable, "-m", name, *args]


def device_count(dev="/dev", environ=os.environ):
    """Returns the number of NPUs: those in ASCEND_RT_VISIBLE_DEVICES if it is set, else the devices davinci0, davinci1, ... in `dev`."""
    listed = environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if listed is not None:
        return len([device for device in listed.split(",") if device.strip()])
    return len(glob.glob(os.path.join(dev, "davinci[0-9]*")))


def check_devices(nproc, dev="/dev", environ=os.environ):
    """Raises ValueError for more processes than NPUs. A node without NPUs runs any number of processes on CPU."""
    devices = device_count(dev, environ)
    if devices and nproc > devices:
        raise ValueError(
            f"--nproc={nproc} is more than this node's {devices} NPUs; use --nproc={devices} and more nodes,"
            " or ASCEND_RT_VISIBLE_DEVICES= (empty) for a job on CPU"
        )


def make_log_dir(path, node):
    """Makes the folder of the logs, by default a new one in logs/. Returns its path. Raises ValueError if it cannot be made."""
    name = path or f"logs/launch-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-node{node}"
    try:
        os.makedirs(name, exist_ok=True)
        if not os.access(name, os.W_OK | os.X_OK):
            raise PermissionError(0, "it cannot be written to")
    except OSError as error:
        raise ValueError(f"--log_dir={name} cannot be made: {error.strerror}; give another folder") from error
    return name


@contextlib.contextmanager
def _scheduler_address(job):
    """Yields (ip, port) of the scheduler. On node 0 the port is reserved until the job ends."""
    host = job.master_addr or "127.0.0.1"
    try:
        ip = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise ValueError(f"--master_addr={host} has no address: {error.strerror}; give the name or IP address of node 0") from error
    if job.node:
        yield ip, job.master_port
        return
    # The TCP port is bound but does not listen, so that the scheduler can use it. The UDP port of this number keeps other launchers out.
    with bind(ip, job.master_port or 0, "--master_port") as tcp:
        port = tcp.getsockname()[1]
        with bind(ip, port, "--master_port", socket.SOCK_DGRAM):
            yield ip, port


@contextlib.contextmanager
def _signals():
    """Yields a list to which each signal that ends the job is appended when it arrives."""
    received, before = [], {}
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            before[number] = signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _announce(job, address, log_dir):
    cores, threads = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS") or threads_of(job.nproc)
    ranks = f"ranks {job.ranks[0]} to {job.ranks[-1]}" if job.nproc > 1 else f"rank {job.ranks[0]}"
    where = f" on node {job.node}" if job.nnodes > 1 else ""
    print(f"launch     {ranks} of {job.world}{where}; cores: {cores}, threads a rank: {threads}; scheduler at {address[0]}:{address[1]}")
    shown = f"rank {job.show_rank}'s output follows" if job.show_rank in job.ranks else f"rank {job.show_rank} shows on its own node"
    if job.simulate:
        print("simulated  NPUs: the program is compiled for Ascend and nothing is computed, so losses and weights mean nothing")
    print(f"logs       {os.path.join(log_dir, 'rank_<r>.log')}; {shown}", flush=True)


def threads_of(nproc):
    """Returns the number of OpenMP threads of each of nproc processes."""
    return max(1, len(os.sched_getaffinity(0)) // nproc)


def environment(job, address, rank=None):
    """Returns the environment of a rank, or of the scheduler if rank is None, as msrun sets it for MindSpore's dynamic cluster."""
    as_log = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}  # the log has what was printed before a crash, and the place of the crash
    if job.simulate:
        return {**os.environ, **standin.environment(job.world, rank), **as_log, "OMP_NUM_THREADS": "1"}
    env = {
        **os.environ,
        **as_log,
        "MS_ROLE": "MS_SCHED" if rank is None else "MS_WORKER",
        "MS_WORKER_NUM": str(job.world),
        "MS_SCHED_HOST": address[0],
        "MS_SCHED_PORT": str(address[1]),
        "MS_TOPO_TIMEOUT": str(int(job.timeout_s)),
        "RANK_SIZE": str(job.world),
        "RANK_ID": str(rank or 0),
    }
    env.setdefault("OMP_NUM_THREADS", str(threads_of(job.nproc)))
    if rank is not None:
        env |= {"MS_NODE_ID": str(rank), "DEVICE_ID": str(rank - job.ranks[0])}
    return env


def _start(job, command, address, log_dir):
    """Starts the processes one by one, the scheduler first; simulated ranks need none."""
    if job.node == 0 and not job.simulate:
        log = os.path.join(log_dir, "scheduler.log")
        yield Process("the scheduler", [sys.executable, "-c", SCHEDULER], environment(job, address), log, is_worker=False)
    for rank in job.ranks:
        log = os.path.join(log_dir, f"rank_{rank}.log")
        yield Process(f"rank {rank}", command, environment(job, address, rank), log, shown=rank == job.show_rank)


def _watch(processes, nodes, received):
    """Waits until the job has succeeded or failed, on this or another node. Returns the causes, as Nodes.verdict does."""
    reported = set()
    while (causes := nodes.verdict()) is None:
        running = [process for process in processes if process.poll() is None]
        for process in processes:
            if process.code and process.name not in reported:
                reported.add(process.name)
                nodes.fail(process.cause())
        if received and "launcher" not in reported:
            reported.add("launcher")
            name = signal.Signals(received[0]).name
            nodes.fail(Cause(LAUNCHER, f"was stopped by {name}", 128 + received[0], time.monotonic(), -1))
        if not reported and not any(process.is_worker for process in running):
            nodes.succeed()
        time.sleep(POLL_S)
    return causes


def _let_save(processes, received, save_s):
    """Sends SIGTERM to the ranks and waits until all have ended, one has failed, another signal arrives or save_s seconds have passed.

    The scheduler keeps running, since the ranks need it to communicate.
    """
    workers, signals, deadline = [process for process in processes if process.is_worker], len(received), time.monotonic() + save_s
    for process in workers:
        if process.poll() is None:
            process.send(signal.SIGTERM)
    while time.monotonic() < deadline and len(received) <= signals:
        codes = [process.poll() for process in workers]
        if None not in codes or any(code not in (None, 0, -signal.SIGTERM) for code in codes):
            return
        time.sleep(POLL_S)


def _conclude(causes, staying, timeout_s):
    """Prints why a job failed and returns the exit status. timeout_s: the time for ranks to connect if it has passed, else None."""
    sys.stdout.flush()
    for cause in causes[:1]:
        print(f"error: {cause}", file=sys.stderr)
    if causes[1:]:
        print(f"(then failed: {'; '.join(f'{cause.who} {cause.how}' for cause in causes[1:])})", file=sys.stderr)
    if timeout_s and any("initialize distributed job cluster" in line for cause in causes for line in cause.lines):
        print(f"(not all ranks connected within --timeout_s={timeout_s:g}; look in the logs for one that is late)", file=sys.stderr)
    for process in staying:
        print(f"error: {process.name} (process {process.popen.pid}) does not end on SIGKILL; end it by hand", file=sys.stderr)
    return causes[0].code if causes else int(bool(staying))
