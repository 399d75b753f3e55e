"""Runs the contestants of a benchmark. Each is a process. They take turns on the same cores, and are stopped between their turns.

Ours is experiments/bench/ours.py. The peers are scripts in experiments/bench/peer_models, which import nothing of ours; they run in an
interpreter that has their packages.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

from experiments.bench.peer_list import PEERS
from parallel.specs import init_params
from parallel.trees import tree_paths
from qwen3 import hf
from qwen3.model import param_specs

ROOT = Path(__file__).parents[2]
UNTIMED = 1  # steps at the start of each turn, in which the caches fill


def contest(job, ours, options, rounds, steps, between=None, untimed=UNTIMED):
    """Runs `rounds` rounds, each with `steps` timed steps of each contestant. Returns ({name: (facts, rounds of steps, peak memory in
    GiB)}, load of others).

    job: the job of all contestants. ours: {name: additions to the job}. options: peer, names in PEERS, and peer_python, an interpreter for
    peers whose package this one does not have. between: called once per round, while all contestants are stopped. untimed: steps
    before the timed ones of each turn. Load of others: the mean share of processor time that other processes used during the turns; if it
    is high, the times are not reliable. Raises ValueError for a peer whose package neither interpreter has.
    """
    commands = {name: ([sys.executable, "-m", "experiments.bench.ours"], extra) for name, extra in ours.items()}
    commands.update({name: (command(name, options.peer_python), PEERS[name][2]) for name in options.peer})
    job = {"threads": len(os.sched_getaffinity(0)), **job}
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(Contestant(name, *start, job)) for name, start in commands.items()]
        for at in range(rounds):
            if between is not None:
                between()
            for contestant in running[:: -1 if at % 2 else 1]:  # alternate the order, so that no contestant always follows the same other
                contestant.turn(steps, untimed)
        others = statistics.mean(share for contestant in running for share in contestant.others)
        return {c.name: (c.facts, c.rounds, c.peak_mem_gib) for c in running}, others


def command(peer, peer_python):
    """Returns the command that starts a peer. Raises ValueError if its package is missing."""
    package, script, _ = PEERS[peer]
    find = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    for python in filter(None, (sys.executable, peer_python)):
        if subprocess.run([python, "-c", find]).returncode == 0:
            return [python, str(ROOT / "experiments" / "bench" / "peer_models" / script)]
    raise ValueError(f"--peer={peer} needs {package}, and {peer_python or sys.executable} does not have it; use --peer_python=INTERPRETER")


class Contestant:
    """A process that runs experiments.bench.turns.serve. The constructor waits until it is ready. Outside of its turns it is stopped."""

    def __init__(self, name, command, extra, job):
        self.name, self.rounds, self.others = name, [], []
        self.errors = tempfile.TemporaryFile("w+")
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": job["folder"]}  # a new folder, so that it compiles in every run, as ours does
        if "threads" in job:
            env["OMP_NUM_THREADS"] = str(job["threads"])
        env.pop("OMP_WAIT_POLICY", None)  # experiments/__init__.py sets it for us; a peer keeps its own default
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, cwd=ROOT, env=env
        )
        try:
            self.facts = self._ask({**job, **extra})
            self.process.send_signal(signal.SIGSTOP)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self):
        return self

    def turn(self, steps, untimed=UNTIMED):
        self.process.send_signal(signal.SIGCONT)
        before = self._used()
        answer = self._ask({"steps": untimed + steps})
        busy, own = (after - start for after, start in zip(self._used(), before))
        self.process.send_signal(signal.SIGSTOP)
        self.others.append(max(0.0, 1 - own / busy) if busy else 0.0)
        self.rounds.append(answer["steps"][untimed:])
        self.peak_mem_gib = answer["peak_mem_gib"]

    def _ask(self, question):
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self.errors.seek(0)
            raise RuntimeError(f"{self.name} ended early:\n{self.errors.read()[-3000:]}") from None

    def _used(self):
        """Returns the processor time since the start, in 1/100 s, of all processes and of this contestant."""
        with open("/proc/stat", encoding="utf-8") as file:
            user, nice, system, idle, wait, irq, softirq, *_ = map(int, file.readline().split()[1:])
        with open(f"/proc/{self.process.pid}/stat", encoding="utf-8") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return user + nice + system + irq + softirq, int(fields[11]) + int(fields[12])

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()


def median(rounds, of):
    """Returns the median of of(step) over all steps of all rounds."""
    return statistics.median(of(step) for steps in rounds for step in steps)


def ratio(rounds, other, of):
    """Returns the median over rounds of (other's median of(step) / our median of(step)): above 1 if ours is smaller."""
    return statistics.median(median([b], of) / median([a], of) for a, b in zip(rounds, other))


def write_weights(cfg, folder):
    """Writes the initial weights for all contestants: model/, a Hugging Face folder, and params.npz, by our paths. Returns entries of the
    job."""
    params = init_params(param_specs(cfg), 0)
    hf.save(os.path.join(folder, "model"), cfg, params)
    np.savez(os.path.join(folder, "params.npz"), **dict(tree_paths(params)))
    return {"folder": folder, "model": asdict(cfg)}


def named(contestant, figures):
    """Returns the figures with the contestant's name before their names; ours have no prefix."""
    return figures if contestant == "ours" else {f"{contestant}_{name}": value for name, value in figures.items()}
