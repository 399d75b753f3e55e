"""Starts, watches and ends the processes of a distributed job: on each node a launcher, under it one process a rank. Linux only.

As with msrun, processes find each other through MindSpore's scheduler, on node 0. Here the launcher always waits for the job, a failure
anywhere ends all of it within seconds, on all nodes, and says which rank failed first and how.
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
from dataclasses import dataclass

from parallel.launch.nodes import Nodes, bind
from parallel.launch.process import POLL_S, Cause, Process, end

SCHEDULER = "from mindspore.communication import init; init()"  # with MS_ROLE=MS_SCHED it returns when all workers have gone
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Job:
    """What to start. target: a module or a .py file, and its arguments. nproc: ranks on this node; the job has nproc * nnodes.

    node_rank, master_addr, master_port: this node's number, and where node 0 listens: the scheduler at master_port and, with several
    nodes, the launchers at master_port + 1. One node needs none of them, and takes a free port.
    log_dir: of rank_<r>.log and scheduler.log, made where missing; default: a new folder in logs/.
    timeout_s: for all nodes to come, and then for all ranks to meet. show_rank: the rank whose output goes to the terminal.
    save_s: after SIGTERM to a launcher, for the ranks to save and end. grace_s: from SIGTERM to SIGKILL otherwise.
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
        if self.node_rank is not None and not 0 <= self.node_rank < self.nnodes:
            raise ValueError(f"--node_rank={self.node_rank} must be from 0 to {self.nnodes - 1}, as --nnodes={self.nnodes}")
        last = 65535 if self.nnodes == 1 else 65534  # the launchers take the next one
        if self.master_port is not None and not 1024 <= self.master_port <= last:
            raise ValueError(f"--master_port={self.master_port} must be from 1024 to {last}")

    @property
    def world(self):
        return self.nproc * self.nnodes

    @property
    def node(self):
        return self.node_rank or 0

    @property
    def ranks(self):
        """The ranks of this node."""
        return range(self.node * self.nproc, (self.node + 1) * self.nproc)


def run(job):
    """Runs a job to its end, and returns the exit status: 0, or the code of the process that failed first, 128 + N for signal N.

    SIGINT, SIGTERM and SIGHUP to the launcher end the job, with 128 + N; after SIGTERM ranks have time to save. Raises ValueError before
    anything is started: for a target that is not there, more ranks than devices, an address or port that cannot be used, a log folder that
    cannot be made, nodes that do not come.
    """
    command = command_of(job.target)
    check_devices(job.nproc)
    with _signals() as received, contextlib.ExitStack() as held:
        address = held.enter_context(_scheduler_address(job))
        nodes = held.enter_context(contextlib.closing(Nodes(job.node, job.nnodes, (address[0], address[1] + 1))))
        log_dir = make_log_dir(job.log_dir, job.node)
        if job.nnodes > 1:
            print(f"launch     node {job.node} of {job.nnodes}, waiting for the others", flush=True)
        same = {"--nnodes": job.nnodes, "--nproc": job.nproc, "the command": shlex.join(job.target)}
        nodes.join(same, job.timeout_s, lambda: bool(received))
        if received:
            return 128 + received[0]
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
        return _conclude(causes, staying, job.timeout_s if late else None)


def command_of(target):
    """The command line of a target. Raises ValueError where there is no such file or module."""
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
    """NPUs that this node's processes can use: as ASCEND_RT_VISIBLE_DEVICES lists, else the devices davinci0, davinci1, ... in `dev`."""
    listed = environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if listed is not None:
        return len([device for device in listed.split(",") if device.strip()])
    return len(glob.glob(os.path.join(dev, "davinci[0-9]*")))


def check_devices(nproc, dev="/dev", environ=os.environ):
    """Raises ValueError for more processes than NPUs. A node without NPUs runs on CPU, where any number goes."""
    devices = device_count(dev, environ)
    if devices and nproc > devices:
        raise ValueError(
            f"--nproc={nproc} is more than this node's {devices} NPUs; use --nproc={devices} and more nodes,"
            " or ASCEND_RT_VISIBLE_DEVICES= (empty) for a job on CPU"
        )


def make_log_dir(path, node):
    """Makes the folder of the logs; without a path, a new one in logs/. Returns its path; raises ValueError if it cannot be made."""
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
    """(ip, port) of the scheduler. On node 0 the port is held against others until the job ends."""
    host = job.master_addr or "127.0.0.1"
    try:
        ip = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise ValueError(f"--master_addr={host} has no address: {error.strerror}; give the name or IP address of node 0") from error
    if job.node:
        yield ip, job.master_port
        return
    # Bound but not listening, so that the scheduler can still take it; the UDP port of the same number keeps other launchers out.
    with bind(ip, job.master_port or 0, "--master_port") as tcp:
        port = tcp.getsockname()[1]
        with bind(ip, port, "--master_port", socket.SOCK_DGRAM):
            yield ip, port


@contextlib.contextmanager
def _signals():
    """A list to which the signals that are to end the job are added as they come."""
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
    print(f"logs       {os.path.join(log_dir, 'rank_<r>.log')}; {shown}", flush=True)


def threads_of(nproc):
    """OpenMP threads of each of nproc processes."""
    return max(1, len(os.sched_getaffinity(0)) // nproc)


def environment(job, address, rank=None):
    """The environment of a rank of this node, or of the scheduler, as msrun sets it, for MindSpore's dynamic cluster."""
    env = {
        **os.environ,
        "MS_ROLE": "MS_SCHED" if rank is None else "MS_WORKER",
        "MS_WORKER_NUM": str(job.world),
        "MS_SCHED_HOST": address[0],
        "MS_SCHED_PORT": str(address[1]),
        "MS_TOPO_TIMEOUT": str(int(job.timeout_s)),
        "RANK_SIZE": str(job.world),
        "RANK_ID": str(rank or 0),
        "PYTHONUNBUFFERED": "1",  # what was printed before a crash is in the log
        "PYTHONFAULTHANDLER": "1",  # where a rank crashed is, too
    }
    env.setdefault("OMP_NUM_THREADS", str(threads_of(job.nproc)))
    if rank is not None:
        env |= {"MS_NODE_ID": str(rank), "DEVICE_ID": str(rank - job.ranks[0])}
    return env


def _start(job, command, address, log_dir):
    """Starts the processes one by one, the scheduler first."""
    if job.node == 0:
        log = os.path.join(log_dir, "scheduler.log")
        yield Process("the scheduler", [sys.executable, "-c", SCHEDULER], environment(job, address), log, is_worker=False)
    for rank in job.ranks:
        log = os.path.join(log_dir, f"rank_{rank}.log")
        yield Process(f"rank {rank}", command, environment(job, address, rank), log, shown=rank == job.show_rank)


def _watch(processes, nodes, received):
    """Until the job is done or has failed, here or on another node. Returns the causes, as Nodes.verdict."""
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
            nodes.fail(Cause("the launcher", f"was stopped by {name}", 128 + received[0], time.monotonic(), -1))
        if not reported and not any(process.is_worker for process in running):
            nodes.succeed()
        time.sleep(POLL_S)
    return causes


def _let_save(processes, received, save_s):
    """SIGTERM to the ranks, and time: until all have ended, one has failed, another signal comes, or save_s are over. The scheduler, which
    they need to talk to each other, stays."""
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
    """Prints why a job failed; returns the exit status. timeout_s: the time for ranks to meet, where it has passed."""
    sys.stdout.flush()
    for cause in causes[:1]:
        print(f"error: {cause}", file=sys.stderr)
    if causes[1:]:
        print(f"(then failed: {'; '.join(f'{cause.who} {cause.how}' for cause in causes[1:])})", file=sys.stderr)
    if timeout_s and any("initialize distributed job cluster" in line for cause in causes for line in cause.lines):
        print(f"(not all ranks met within --timeout_s={timeout_s:g}; look in the logs for one that is late)", file=sys.stderr)
    for process in staying:
        print(f"error: {process.name} (process {process.popen.pid}) does not end on SIGKILL; see to it by hand", file=sys.stderr)
    return causes[0].code if causes else int(bool(staying))
