"""The stages `step` and `checkpoint`: whole training steps against the references on CPU, and checkpoints there and back."""

import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import mindspore as ms
import numpy as np

from experiments.accept import tiny
from experiments.accept.kernels import compute_on_cpu
from experiments.accept.outcome import Failed, NotHere
from experiments.accept.ranks import TOLERANCES, compared
from ops import registry
from ops.ascendc import build as ascendc
from parallel import collectives
from parallel.checkpoint.arrays import pieces
from parallel.checkpoint.files import FOLDER, CheckpointError, step_folder, steps
from parallel.checkpoint.read import Reader
from parallel.checkpoint.save import Saver, Settings

ROWS, STEPS = 4, 3
# In bfloat16 each product is rounded to 8 bits, and an expert may be chosen otherwise; so these tell only what is plainly wrong. They are
# an estimate: no device has run this.
HALF = {"loss": 2e-2, "norm": 0.1, "gradient": 0.15, "parameter": 2e-2}
ROUNDS = 6  # of a process that saves and is killed


def step_checks(job):
    """On CPU the compiled kernels and the emulated ones; on Ascend MindSpore's and ours, in float32 and bfloat16."""
    target = ms.get_context("device_target")
    kinds = {"kernels": {}, "our Ascend kernels": _all_of("ascendc")}
    if target != "CPU":
        kinds = {"references": _all_of("reference"), **kinds}
    dtypes = ("float32",) if target == "CPU" else ("float32", "bfloat16")
    models = ("dense",) if job.quick else tuple(tiny.MODELS)
    kinds = {"kernels": kinds["kernels"]} if job.quick else kinds
    return {
        f"{model}: {kind}, {dtype}": partial(_step, job, model, tuple(ops.items()), dtype, target)
        for model in models
        for kind, ops in kinds.items()
        for dtype in dtypes
    }


def _all_of(implementation):
    """Returns {op: implementation} for all ops that have it."""
    return {op: implementation for op in registry.OPS if implementation == "reference" or op in ascendc.families()}


def _step(job, model, ops, dtype, target):
    if target == "Ascend" and "ascendc" in dict(ops).values() and (lacks := ascendc.not_installed()):
        raise NotHere(lacks)
    cfg = tiny.MODELS[model].replace(compute_dtype=dtype)
    try:
        run = tiny.Run(cfg, {}, ROWS, ops=ops)
    except ValueError as error:
        raise NotHere(str(error)) from None
    return compared(_references(job.scratch, model, target), run.trained(STEPS), TOLERANCES[target] if dtype == "float32" else HALF)


@functools.cache
def _references(scratch, model, target):
    """Returns what the references compute on CPU in float32: in this process, or on another device in a process for it."""
    if target == "CPU":
        return _computed(model)
    path = os.path.join(scratch, f"{model}.npz")
    compute_on_cpu("experiments.accept.training", model, path)
    with np.load(path, allow_pickle=False) as found:
        return dict(found)


def _computed(model):
    return tiny.Run(tiny.MODELS[model], {}, ROWS, ops=tuple(_all_of("reference").items())).trained(STEPS)


def checkpoint_checks(job):
    n = job.world
    others = {"one rank": None} if n == 1 else {tiny.title(each): each for each in _layouts(n)[1:]}
    checks = {"save": partial(_saves, job), "go on in the same layout": partial(_goes_on, job)}
    checks |= {f"read in {name}": partial(_reads, job, each) for name, each in others.items()}
    return {**checks, "a damaged file is noticed": partial(_damage, job), "a process that is killed while it saves": partial(_kills, job)}


def _layouts(n):
    """Returns the layout that saves, and others that read."""
    if n == 1:
        return [{}]
    each = [{"dp": n, "zero": 1}, {"tp": 2, "dp": n // 2}, {"pp": 2, "dp": n // 2, "micro_batches": 2}, {"dp": n, "zero": 3}]
    return each if n % 2 == 0 else [each[0], each[3]]


@functools.cache
def _saving(rank, world):
    return tiny.Run(tiny.DENSE, _layouts(world)[0], 4 * world, rank, world)


def _run_folder(job):
    """Returns the folder of the run that is saved, which all nodes share."""
    folder = os.path.join(job.scratch, "run")
    os.makedirs(os.path.join(folder, FOLDER), exist_ok=True)
    return folder


def _agreed(run, numbers):
    return collectives.host_sum(run.mesh, tuple(run.mesh.sizes), numbers).tolist() if run.mesh.world > 1 else list(numbers)


@functools.cache
def _saved(job_rank, world, folder):
    """Trains two steps, and saves while the third is taken. Returns (the global arrays that are to be saved, those after the third step,
    that step's metrics)."""
    run = _saving(job_rank, world)
    state = run.begin()
    for at in range(2):
        state, _ = run.step(state, at)
    want = run.whole(state)
    start_anew(run, folder)
    saver = Saver(folder, run.mesh.rank, world, "abcdef", Settings(), partial(_agreed, run))
    saver.save(2, partial(pieces, run.mesh, run.program.held(state)), {"norm": float(state["norm"].asnumpy())})
    state, metrics = run.step(state, 2)  # in place, while the save is under way
    if not saver.wait():
        raise Failed("the checkpoint could not be saved")
    return want, run.whole(state), metrics


def start_anew(run, folder):
    """Removes what an earlier process has saved there; no rank saves before that."""
    if run.mesh.rank == 0:
        shutil.rmtree(os.path.join(folder, FOLDER))
        os.makedirs(os.path.join(folder, FOLDER))
    _agreed(run, [0.0])


def _saves(job):
    folder = _run_folder(job)
    want, _, _ = _saved(job.rank, job.world, folder)
    reader = Reader(step_folder(folder, 2))
    return {"arrays": len(want), "bytes": reader.nbytes, "different bytes": _same(want, {name: reader.read(name) for name in reader.names})}


def _same(want, found):
    """Returns 0; raises Failed if two dicts of arrays are not equal bit for bit."""
    if sorted(want) != sorted(found):
        raise Failed(f"the arrays are not those that were saved: {sorted(set(want) ^ set(found))[:4]}")
    wrong = [name for name, array in want.items() if array.tobytes() != found[name].tobytes() or array.shape != found[name].shape]
    if wrong:
        raise Failed(f"{len(wrong)} of {len(want)} arrays are not bit for bit those that were saved: {', '.join(wrong[:4])}")
    return 0


def _restored(run, folder):
    reader = Reader(step_folder(folder, 2))
    return run.program.restore(reader.read, reader.meta["norm"])


def _goes_on(job):
    """The third step from the checkpoint is, bit for bit, the third step of the run that saved it."""
    folder, run = _run_folder(job), _saving(job.rank, job.world)
    _, after, metrics = _saved(job.rank, job.world, folder)
    state, again = run.step(_restored(run, folder), 2)
    _same(after, run.whole(state))
    if again["objective"] != metrics["objective"]:
        raise Failed(f"the loss is {again['objective']!r} and was {metrics['objective']!r}")
    return {"arrays": len(after), "loss": again["objective"], "different bytes": 0}


def _reads(job, parallel):
    if parallel is None:
        raise NotHere("the job has one rank, so there is no other layout; start the kit with experiments.launch --nproc=N")
    folder = _run_folder(job)
    want, _, _ = _saved(job.rank, job.world, folder)
    try:
        run = tiny.Run(tiny.DENSE, parallel, 4 * job.world, job.rank, job.world)
    except ValueError as error:
        raise NotHere(f"the layout does not fit: {error}") from None
    return {"arrays": len(want), "different bytes": _same(want, run.whole(_restored(run, folder)))}


def _damage(job):
    """Flips a byte of the largest file of a copy: reading it has to say so. Rank 0 does it."""
    folder = _run_folder(job)
    _saved(job.rank, job.world, folder)
    if job.rank:
        return {}
    copy = os.path.join(job.scratch, "damaged")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(step_folder(folder, 2), copy)
    reader = Reader(copy)
    path = max((os.path.join(copy, name) for name in reader.files), key=os.path.getsize)
    flip(path, os.path.getsize(path) // 2)
    found = _errors(copy)
    if not found:
        raise Failed("a byte of the copy was flipped, and reading it said nothing")
    return {"said": found[0][-160:]}


def flip(path, place):
    """Inverts a byte of a file."""
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 0xFF]))


def _errors(folder):
    try:
        return Reader(folder).verify()
    except CheckpointError as error:
        return [str(error)]


def _kills(job):
    """Kills a process that saves one checkpoint after another. What has a checkpoint's name afterwards has to be whole. Rank 0 does it."""
    if job.rank:
        return {}
    draws, last, rounds = random.Random(0), 0, 2 if job.quick else ROUNDS
    root = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            command = [sys.executable, "-m", "experiments.accept.save_forever", folder]
            process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root})
            try:
                _wait_for_a_checkpoint(process, folder, last)
                time.sleep(draws.uniform(0, 0.3))
            finally:
                process.send_signal(signal.SIGKILL)
                process.wait()
            for step in steps(folder):
                if wrong := _errors(step_folder(folder, step)):
                    raise Failed(f"after kill {number + 1}, the checkpoint of step {step} is not whole: {wrong[0]}")
            last = steps(folder)[-1]
    return {"kills": rounds, "checkpoints saved": last, "not whole": 0}


def _wait_for_a_checkpoint(process, folder, last, limit_s=120):
    end = time.monotonic() + limit_s
    while (steps(folder) or [0])[-1] <= last:
        if process.poll() is not None or time.monotonic() > end:
            raise Failed(f"the process that saves has ended with status {process.poll()} before it saved a checkpoint")
        time.sleep(0.02)


def main(model, path):
    """Writes what the references compute on CPU to a file."""
    ms.set_device("CPU")
    np.savez(path, **_computed(model))


if __name__ == "__main__":
    main(*sys.argv[1:])
