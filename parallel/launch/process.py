"""A process of a job: runs a command in its own session, writes its output to a file and finds the cause of its end. Linux only."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

POLL_S = 0.05
RECENT_S = 60  # a traceback in the log is the cause of the end if it is at most so old
TOGETHER_S = 0.1  # signs of failure closer than this may be seen in either order
LAST_LINES, TRACEBACK_LINES = 20, 60
TRACEBACK = re.compile(rb"^Traceback \(most recent call last\):", re.MULTILINE)
CHATTER = re.compile(
    rb"^\[INFO\] DISTRIBUTED\([^\n]*\n", re.MULTILINE
)  # log lines of MindSpore that GLOG_v does not suppress; the file keeps them
PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Cause:
    """Why a job ended.

    who: the process. how: how it ended. code: the exit status of the launcher. sign_s: when the first sign of it was seen, on the monotonic
    clock of this node. order: of causes whose signs are less than TOGETHER_S apart, the lowest order counts as the first. log, lines: the
    log file and its last lines.
    """

    who: str
    how: str
    code: int
    sign_s: float
    order: int
    log: str = ""
    lines: tuple = ()

    def __str__(self):
        where = f"; its last lines, of {self.log}:" if self.lines else f"; {self.log} is empty" if self.log else ""
        return "\n    ".join([f"{self.who} {self.how}{where}", *self.lines])


def first(causes):
    """Returns the cause with the earliest sign."""
    earliest = min(cause.sign_s for cause in causes)
    return min((c for c in causes if c.sign_s - earliest < TOGETHER_S), key=lambda c: (c.order, c.sign_s))


class Process:
    """A running command. name: its name in messages. log: the file of its output. shown: whether the output also goes to the terminal."""

    def __init__(self, name, command, env, log, shown=False, is_worker=True):
        self.name, self.log, self.shown, self.is_worker = name, log, shown, is_worker
        self.code, self.exit_s, self.traceback_s, self._line = None, None, None, b""
        launcher = os.getpid()
        with open(log, "wb") as file:
            self.popen = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: _die_with(launcher),
            )
        self._reader = open(log, "rb")

    def poll(self):
        """Shows new output. Returns None while the process runs, then the exit code, or -N for signal N."""
        if self.code is None:
            # WNOWAIT leaves a zombie, so that the number of the process group is not used again
            end = os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if end is not None:
                self.code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
                self.exit_s = time.monotonic()
        self._read()
        return self.code

    def _read(self):
        new = self._reader.read()
        if not new:
            return
        if TRACEBACK.search(self._line + new):
            self.traceback_s = time.monotonic()
        self._line = (b"\n" + new).rpartition(b"\n")[2][-100:]
        if self.shown:
            try:
                sys.stdout.buffer.write(CHATTER.sub(b"", new))
                sys.stdout.buffer.flush()
            except OSError:  # the terminal or pipe was closed; the file has all output, so the job goes on
                self.shown = False
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def cause(self):
        """Returns the Cause of the end of a process with a code other than 0."""
        traced = self.traceback_s is not None and self.exit_s - self.traceback_s < RECENT_S
        sign_s = self.traceback_s if traced else self.exit_s
        if self.code > 0:
            how, code = f"ended with exit code {self.code}", self.code
            order = 1 if traced else 3
        else:
            how, code = f"was killed by {_signal_name(-self.code)}", 128 - self.code
            order = 2 if -self.code == signal.SIGABRT else 0  # C++ code aborts when its peer is lost
        if not self.is_worker:
            order = 4
        return Cause(f"{self.name} (process {self.popen.pid})", how, code, sign_s, order, self.log, last_lines(self.log))

    def send(self, number):
        """Sends a signal to all processes of the process group."""
        try:
            os.killpg(self.popen.pid, number)
        except (ProcessLookupError, PermissionError):  # the group is empty, or has only processes of other users
            pass

    def close(self, timeout_s=10):
        """Waits for a process that got SIGKILL. Returns False if it does not end within timeout_s."""
        try:
            self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        self._read()
        self._reader.close()
        return True


def end(processes, grace_s):
    """Ends processes and their process groups: SIGTERM, then SIGKILL after at most grace_s. Returns the processes that still run."""
    for process in processes:
        if process.poll() is None:
            process.send(signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while any([process.poll() is None for process in processes]) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    for process in processes:
        process.send(signal.SIGKILL)
    return [process for process in processes if not process.close()]


def last_lines(path):
    """Returns the last lines of a log, from the last traceback on if that is longer. Of a progress bar it takes the last state."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 65536))
        text = file.read().decode(errors="replace")
    lines = [line.rstrip().rpartition("\r")[2][:500] for line in text.split("\n")]
    lines = [line for line in lines if line][-TRACEBACK_LINES:]
    tracebacks = [len(lines) - i for i, line in enumerate(lines) if line.startswith(("Traceback (most recent", "Fatal Python error"))]
    return tuple(lines[-max([LAST_LINES, *tracebacks[-1:]]) :])


def _signal_name(number):
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return name + (", which the kernel also sends where memory has run out" if number == signal.SIGKILL else "")


def _die_with(launcher):
    """Runs in the new process: the kernel sends it SIGKILL when the launcher ends for any reason."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # the launcher ended before the call
        os._exit(1)
