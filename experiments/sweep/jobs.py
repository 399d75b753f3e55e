"""The processes of a sweep: which runs are left, each started, watched and reported."""

import fcntl
import os
import signal
import sys
import time
from typing import NamedTuple

from experiments import flags as command_line
from experiments.sweep.sweeps import text
from experiments.train import run_folder
from parallel.launch.process import Process, end

LOGS, LOCK = "logs", ".lock"
SAVE_S = 60.0  # after SIGTERM, for the runs to save and end
POLL_S = 0.2


class Sweep(NamedTuple):
    """config: the file. workdir: the sweep's folder. main: the module of each run; arguments: for each. nproc: processes of each."""

    config: str
    workdir: str
    main: str
    arguments: tuple
    nproc: int

    def folder(self, run):
        return os.path.join(self.workdir, run.name)

    def target(self, run):
        """The run as a command line without Python: [module, *arguments]."""
        keys = [f"--config.{key}={text(value)}" for key, value in run.overrides.items()]
        return [self.main, f"--config={self.config}", f"--workdir={self.folder(run)}", *keys, *self.arguments]

    def command(self, run):
        target = self.target(run)
        if self.nproc > 1:
            logs = os.path.join(self.workdir, LOGS, run.name)
            target = ["experiments.launch", f"--nproc={self.nproc}", f"--log_dir={logs}", "--", *target]
        return [sys.executable, "-m", *target]


def run_all(sweep, runs, parallel_jobs):
    """Makes the runs that are not finished, so many at a time. Returns the names of those that failed, which keep no other from running.

    Raises ValueError before anything starts: for a run whose config or layout is wrong, a folder that holds another sweep or another run
    under a name, or where a sweep runs now.
    """
    wanted = {run.name: _config(sweep, run) for run in runs}
    os.makedirs(os.path.join(sweep.workdir, LOGS), exist_ok=True)
    with open(os.path.join(sweep.workdir, LOCK), "a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--workdir={sweep.workdir}: a sweep runs there now; wait for it, or give another folder") from None
        left = [run for run in runs if not _finished(sweep, run, wanted[run.name])]
        print(f"sweep      {len(runs)} runs, {len(runs) - len(left)} of them finished before; {parallel_jobs} at a time", flush=True)
        return _run(sweep, left, parallel_jobs)


def _config(sweep, run):
    """The run's config, all of it, as its folder keeps it."""
    try:
        return run_folder.to_dict(command_line.resolved(sweep.target(run), sweep.nproc))
    except ValueError as error:
        raise ValueError(f"run {run.name}: {error}") from error


def _finished(sweep, run, config):
    """Whether the run's folder holds it, finished."""
    folder = sweep.folder(run)
    saved, done = run_folder.saved_config(folder), run_folder.finished_step(folder)
    if saved is not None and (changed := run_folder.differences(saved, config, run_folder.MAY_CHANGE)):
        raise ValueError(f"{folder} already holds a run with {changed[0]}; give the sweep another --workdir, or remove that folder")
    return done is not None and done >= config["train"]["steps"]


def _run(sweep, left, parallel_jobs):
    running, failed, env = {}, [], _environment(parallel_jobs)
    left, total, done = list(left), len(left), 0
    stopped = _Signals()
    try:
        while (left or running) and not stopped.number:
            while left and len(running) < parallel_jobs:
                run = left.pop(0)
                print(f"start      {run.name}", flush=True)
                log = os.path.join(sweep.workdir, LOGS, f"{run.name}.log")
                running[run.name] = Process(f"run {run.name}", sweep.command(run), env, log), time.monotonic()
            for name, (process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                done += 1
                end([process], 0)  # what it may have left behind
                took = f"{time.monotonic() - began:.0f} s"
                if process.code:
                    failed.append(name)
                    print(f"FAILED     {process.cause()}", flush=True)
                print(f"done       {done} of {total}: {name}, {'failed' if process.code else 'finished'} after {took}", flush=True)
            time.sleep(POLL_S)
    finally:
        end([process for process, _ in running.values()], SAVE_S)
        stopped.restore()
    if stopped.number:
        print("stopped; the same command goes on", flush=True)
        sys.exit(128 + stopped.number)
    return failed


def _environment(parallel_jobs):
    """Jobs that run side by side share the cores, unless the user has said how many threads there are to be."""
    cores = len(os.sched_getaffinity(0))
    return {"OMP_NUM_THREADS": str(max(1, cores // parallel_jobs)), **os.environ} if parallel_jobs > 1 else dict(os.environ)


class _Signals:
    """Notes SIGINT and SIGTERM instead of ending at once. number: of the first that came, 0 before."""

    def __init__(self):
        self.number = 0
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number, frame):
        self.number = self.number or number

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)
