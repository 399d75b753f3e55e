"""One process of a job: started in a session of its own, its output in a file, and how it ended. Linux only."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

POLL_S = 0.05
RECENT_S = 60  # a traceback in the log is what ended a process if it came at most so long before the end
TOGETHER_S = 0.1  # signs of failure that lie closer cannot be told apart by their time
LAST_LINES, TRACEBACK_LINES = 20, 60
TRACEBACK = re.compile(rb"^Traceback \(most recent call last\):", re.MULTILINE)
CHATTER = re.compile(rb"^\[INFO\] DISTRIBUTED\([^\n]*\n", re.MULTILINE)  # MindSpore's own, whatever GLOG_v says; the file has it
PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Cause:
    """Why a job ends. code: the launcher's exit status. sign_s: when its first sign was seen, on this node's monotonic clock.

    order: of causes whose signs came together, the lowest is named.
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
    """The cause whose sign came first."""
    earliest = min(cause.sign_s for cause in causes)
    return min((c for c in causes if c.sign_s - earliest < TOGETHER_S), key=lambda c: (c.order, c.sign_s))


class Process:
    """A running command. name: as messages call it. log: the file of its output, which is also passed on to the terminal if `shown`."""

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
        """Passes on new output. Returns the exit code, the negative of a signal's number, or None while the process runs."""
        if self.code is None:
            # WNOWAIT leaves a zombie, which keeps the process group's number from being given to another
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
            except OSError:  # the terminal or the pipe has gone; the file has everything, and the job goes on
                self.shown = False
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def cause(self):
        """How the process ended, as the Cause of the job's end. Only for one that ended, and not with 0."""
        traced = self.traceback_s is not None and self.exit_s - self.traceback_s < RECENT_S
        sign_s = self.traceback_s if traced else self.exit_s
        if self.code > 0:
            how, code = f"ended with exit code {self.code}", self.code
            order = 1 if traced else 3
        else:
            how, code = f"was killed by {_signal_name(-self.code)}", 128 - self.code
            order = 2 if -self.code == signal.SIGABRT else 0  # C++ code that lost its peer aborts
        if not self.is_worker:
            order = 4
        return Cause(f"{self.name} (process {self.popen.pid})", how, code, sign_s, order, self.log, last_lines(self.log))

    def send(self, number):
        """A signal to the process and to all that it started in its process group."""
        try:
            os.killpg(self.popen.pid, number)
        except (ProcessLookupError, PermissionError):  # the group is empty, or has other users' processes only
            pass

    def close(self, timeout_s=10):
        """Takes the exit status of a process that got SIGKILL. Returns False if it does not end within timeout_s."""
        try:
            self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        self._read()
        self._reader.close()
        return True


def end(processes, grace_s):
    """Ends processes and what they started: SIGTERM, and SIGKILL for those that still run grace_s later. Returns those that stay."""
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
    """The last lines of a log, more of them where they end in a traceback; of a progress bar its last state only."""
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
    """In the new process: SIGKILL when the launcher dies, however it dies."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it died before the call
        os._exit(1)
