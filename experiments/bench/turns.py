"""The loop of a contestant's process, which experiments/bench/peers.py controls. It needs only Python's own library.

The process reads a job, one line of JSON on standard input, prepares, and answers with facts about the preparation. Then it takes turns:
for {"steps": n} it runs n steps, and answers with the result of each and its peak memory. It ends when its input ends, or when the process
that started it ends.
"""

import ctypes
import json
import os
import signal
import sys
import time

PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>


def serve(jobs):
    """Serves one job. jobs: {name: f(job) -> (facts, step)}, where step() returns a dict of numbers. Their prints go to standard error."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a stopped process does not notice that its input has ended
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    facts, step = jobs[job["what"]](job)
    _send(out, facts)
    for line in sys.stdin:
        _send(out, {"steps": [step() for _ in range(json.loads(line)["steps"])], "peak_mem_gib": peak_mem_gib()})


def _send(out, answer):
    out.write(json.dumps(answer) + "\n")
    out.flush()


def peak_mem_gib():
    """Returns the peak memory of this process. getrusage is not used, because it starts from the memory of the parent process."""
    return _status_gib("VmHWM")


def held_mem_gib():
    """Returns the current memory of this process in GiB."""
    return _status_gib("VmRSS")


def _status_gib(key):
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) / 2**20 for line in file if line.startswith(key))


def mem_mib():
    """Returns the current memory of this process in MiB."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) / 2**10 for line in file if line.startswith("VmRSS"))


def timed(call, *args):
    """Calls a function. Returns (seconds, its result)."""
    start = time.perf_counter()
    result = call(*args)
    return time.perf_counter() - start, result


def warmed_up(step, count):
    """Runs `count` training steps, step() -> loss. Returns the last loss, and the compile time: the total time minus `count` times the
    fastest."""
    times, loss = zip(*(timed(step) for _ in range(count)))
    return {"loss": loss[-1], "compile_time_s": sum(times) - count * min(times)}


CLOCKS = {"s": time.perf_counter, "cpu_s": time.process_time}


def measured(name, call, *args):
    """Calls a function. Returns ({NAME_s: wall seconds, NAME_cpu_s: CPU seconds of this process}, its result)."""
    start = {unit: clock() for unit, clock in CLOCKS.items()}
    result = call(*args)
    return {f"{name}_{unit}": clock() - start[unit] for unit, clock in CLOCKS.items()}, result


class Clock:
    """Seconds since it was made, of the wall ("s") or of CPU time of this process ("cpu_s"). Waiting costs none: it is added."""

    def __init__(self, unit):
        self._read = CLOCKS[unit]
        self._zero = self._read()

    def now(self):
        return self._read() - self._zero

    def wait_until(self, moment):
        self._zero -= max(0.0, moment - self.now())
