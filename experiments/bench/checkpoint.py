"""The checkpoint benchmark: times saving and restoring a state, in turns with plain copies of as many bytes, and how long a save blocks a
step."""

import itertools
import os
import shutil
import statistics
import tempfile
import time
from functools import partial

import mindspore as ms
import numpy as np

from parallel.checkpoint.arrays import pieces
from parallel.checkpoint.files import step_folder, sync_file
from parallel.checkpoint.read import Reader
from parallel.checkpoint.save import Saver, Settings
from parallel.mesh import ONE_DEVICE
from parallel.placement import Held, cut
from parallel.specs import ParamSpec, zeros

LAYER = ((1024, 2048), (1024, 1024), (1024, 1024), (2048, 1024), (1024, 3072), (1024, 3072), (3072, 1024), (1024,), (1024,))  # 0.6B's
EMBED = (32768, 1024)


def bench_checkpoint(state_gb, turns, folder):
    """Returns figures as a dict. state_gb: size of the state in 1e9 bytes, float32 arrays of the shapes in Qwen3-0.6B. folder: on the disk
    to measure; None: the system's temporary folder. Every write ends with fsync, also the copy; every file that is read was just
    written."""
    held = make_state(state_gb * 1e9)
    nbytes = sum(h.data.nbytes for h in held)
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as run:
        plain = os.path.join(run, "plain")
        with open(plain, "wb") as file:
            for h in held:
                file.write(h.data.asnumpy())
        sync_file(plain)
        os.mkdir(os.path.join(run, "checkpoints"))
        saver = Saver(run, 0, 1, "0", Settings(keep_last=1, asynchronous=False))
        behind = Saver(run, 0, 1, "1", Settings(keep_last=1))
        for turn in range(1, turns + 1):
            rows.append(
                {
                    "copy_s": timed(copy, plain),
                    "save_s": timed(saver.save, 2 * turn - 1, partial(pieces, ONE_DEVICE, held), {}),
                    "restore_s": timed(restore, step_folder(run, 2 * turn - 1), held),
                    "step_blocked_s": timed(behind.save, 2 * turn, partial(pieces, ONE_DEVICE, held), {}),
                    "save_behind_s": timed(behind.wait),
                }
            )
        names, files = len(held), len(Reader(step_folder(run, 2 * turns)).files)
    middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    speeds = {f"{what}_gb_per_s": nbytes / 1e9 / middle[f"{what}_s"] for what in ("copy", "save", "restore")}
    # Each ratio compares measurements of one turn, because the speed of the disk changes over time.
    ratios = {f"{what}_vs_copy": statistics.median(row["copy_s"] / row[f"{what}_s"] for row in rows) for what in ("save", "restore")}
    return {"what": "checkpoint", "cores": os.cpu_count(), "bytes": nbytes, "arrays": names, "files": files, **middle, **speeds, **ratios}


def make_state(nbytes):
    """Returns [Held] of random tensors with at least nbytes bytes: an embedding from 1e9 bytes on, and layers."""
    rng, held, size = np.random.default_rng(0), [], 0
    for shape in itertools.chain([EMBED] * (nbytes >= 1e9), itertools.cycle(LAYER)):
        if size >= nbytes:
            return held
        spec = ParamSpec(shape, ("rows", "columns")[: len(shape)], zeros())
        data = ms.Tensor(rng.standard_normal(shape, np.float32))
        held.append(Held((f"params/{len(held)}",), spec, ((),) * len(shape), data))
        size += data.nbytes


def timed(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def copy(path):
    shutil.copyfile(path, f"{path}.copy")
    sync_file(f"{path}.copy")
    os.remove(f"{path}.copy")


def restore(folder, held):
    reader = Reader(folder)
    for h in held:
        ms.Tensor(cut(ONE_DEVICE, h.spec, h.axes, lambda slices, name=h.names[0]: reader.read(name, slices)))
