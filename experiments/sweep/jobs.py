"""Starts, watches and reports the processes of a sweep's unfinished runs."""

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
SAVE_S = 60.0  # time that runs have after SIGTERM to save and end
POLL_S = 0.2


class Sweep(NamedTuple):
    """A sweep's settings. config: the config file. workdir: the sweep's folder. main: the module that each run executes. arguments: extra
    arguments of each run. nproc: processes of each run."""

    config: str
    workdir: str
    main: str
    arguments: tuple
    nproc: int

    def folder(self, run):
        return os.path.join(self.workdir, run.name)

    def target(self, run):
        """Returns the run's command line without Python: [module, *arguments]."""
        keys = [f"--config.{key}={text(value)}" for key, value in run.overrides.items()]
        return [self.main, f"--config={self.config}", f"--workdir={self.folder(run)}", *keys, *self.arguments]

    def command(self, run):
        target = self.target(run)
        if self.nproc > 1:
            logs = os.path.join(self.workdir, LOGS, run.name)
            target = ["experiments.launch", f"--nproc={self.nproc}", f"--log_dir={logs}", "--", *target]
        return [sys.executable, "-m", *target]


def run_all(sweep, runs, parallel_jobs):
    """Runs all unfinished runs, parallel_jobs at a time. Returns the names of those that failed; the others run all the same.

    Raises ValueError, before any run starts, for a wrong config or layout of a run, for a run's folder that holds a run with another
    config, and where another sweep runs in the same workdir.
    """
    wanted = {run.name: _config(sweep, run) for run in runs}
    os.makedirs(os.path.join(sweep.workdir, LOGS), exist_ok=True)
    with open(os.path.join(sweep.workdir, LOCK), "a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--workdir={sweep.workdir}: another sweep is running there; wait for it, or give another folder") from None
        left = [run for run in runs if not _finished(sweep, run, wanted[run.name])]
        print(f"sweep      {len(runs)} runs, {len(runs) - len(left)} of them finished before; {parallel_jobs} at a time", flush=True)
        return _run(sweep, left, parallel_jobs)


def _config(sweep, run):
    """Returns the run's resolved config, in the form of its config.json."""
    try:
        return run_folder.to_dict(command_line.resolved(sweep.target(run), sweep.nproc))
    except ValueError as error:
        raise ValueError(f"run {run.name}: {error}") from error


def _finished(sweep, run, config):
    """Returns whether the run's folder holds its finished run. Raises ValueError where it holds a run with another config."""
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
                end([process], 0)  # ends any child process that it left
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
        print("stopped; the same command continues the sweep", flush=True)
        sys.exit(128 + stopped.number)
    return failed


def _environment(parallel_jobs):
    """Returns the environment of a run. Runs in parallel divide the cores by OMP_NUM_THREADS, unless the user has set it."""
    cores = len(os.sched_getaffinity(0))
    return {"OMP_NUM_THREADS": str(max(1, cores // parallel_jobs)), **os.environ} if parallel_jobs > 1 else dict(os.environ)


class _Signals:
    """Records SIGINT and SIGTERM, so that the process does not end at once. number: the first signal received, else 0."""

    def __init__(self):
        self.number = 0
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number, frame):
        self.number = self.number or number

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)
