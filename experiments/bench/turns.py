"""The contestants' side of a benchmark: a process that works when experiments/bench/peers.py asks it to. Needs nothing but Python.

It reads one job, a line of JSON on standard input, answers with what it found while it got ready, and then takes turns: for {"steps": n} it
answers with what each of n steps gave, and with its peak memory. It ends when its input does, or with the process that started it.
"""

import ctypes
import json
import os
import signal
import sys
import time

PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def serve(jobs):
    """jobs: by name, f(job) -> (facts, step); step() gives a dict of numbers. What they print goes to standard error."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # as a stopped process does not see that its input has ended
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
    """The most memory that this process has had. Not getrusage's: that starts from what the process that started this one had."""
    return _status_gib("VmHWM")


def held_mem_gib():
    """The memory that this process has now."""
    return _status_gib("VmRSS")


def _status_gib(key):
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) / 2**20 for line in file if line.startswith(key))


def mem_mib():
    """The memory that this process has now."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) / 2**10 for line in file if line.startswith("VmRSS"))


def timed(call, *args):
    """(seconds, what the call returned)"""
    start = time.perf_counter()
    result = call(*args)
    return time.perf_counter() - start, result


def warmed_up(step, count):
    """Facts of the first `count` training steps, step() -> loss: the last loss, and what the first ones took above the fastest."""
    times, loss = zip(*(timed(step) for _ in range(count)))
    return {"loss": loss[-1], "compile_time_s": sum(times) - count * min(times)}
