"""Checkpoints between real processes; see test_checkpoint.py. In each of them:"""

import json
import time
from functools import partial

import numpy as np

from experiments.data.loader import rank_rows
from experiments.train import program as train_program
from parallel import collectives
from parallel.checkpoint.arrays import pieces
from parallel.checkpoint.files import CheckpointError, step_folder, steps
from parallel.checkpoint.read import Reader
from parallel.checkpoint.save import Saver, Settings
from parallel.placement import whole
from parallel.trees import tree_leaves, tree_map
from tests.experiments.test_train import make_batch
from tests.parallel.layouts import LR, MODELS, ROWS, run_config, sharding_of
from tests.tiny import random_params


class Run:
    """A model in a layout, with a saver."""

    def __init__(self, model, options, rank, run):
        self.cfg, self.sharding = MODELS[model], sharding_of(MODELS[model], options, rank)
        self.mesh = self.sharding.mesh
        self.micro = options.get("micro", 1)
        self.program = train_program.build_program(self.cfg, run_config(options), self.sharding)
        self.saver = Saver(run, rank, self.mesh.world, "abcdef", Settings(), self.sums)

    def sums(self, numbers):
        return collectives.host_sum(self.mesh, tuple(self.mesh.sizes), numbers).tolist()

    def step(self, state, at):
        mine = rank_rows(ROWS, self.mesh.index(("dp",)), self.mesh.dp, self.micro)
        batch = {key: value[mine] for key, value in make_batch(at, rows=ROWS, vocab=self.cfg.vocab_size).items()}
        return self.program.step(state, batch, LR, at)

    def save(self, at, state):
        self.saver.save(at, partial(pieces, self.mesh, self.program.held(state)), {"norm": state["norm"].asnumpy().tolist()})

    def restore(self, folder):
        reader = Reader(folder)
        return self.program.restore(reader.read, reader.meta["norm"])

    def whole(self, state):
        """{name: the global array}, on all ranks; not of stacked layers."""
        mine = {h.names: h.data for h in self.program.held(state)}
        return {
            h.names[0]: whole(self.mesh, h.spec, h.axes, mine.get(h.names), holder=h.holders[0] if h.holders else None)
            for h in self.program.held()
        }


def main(model, layouts, run):
    """Two steps in a layout, a save while the third is taken, the third again from what was saved, here and in other layouts; and a save
    that fails on one rank."""
    rank, _ = collectives.start()
    first, *others = (Run(model, options, rank, run) for options in json.loads(layouts))
    state, out = first.program.init(tree_map(lambda w: w.asnumpy(), random_params(first.cfg))), {}
    for at in range(2):
        state, _ = first.step(state, at)
    want = first.whole(state)
    first.save(2, state)
    state, metrics = first.step(state, 2)  # in place, while the save is under way
    assert first.saver.wait()
    folder = step_folder(run, 2)
    reader = Reader(folder)
    out["saved"] = all(np.array_equal(reader.read(name), want[name]) for name in reader.names) and reader.names == sorted(want)
    again, same = first.step(first.restore(folder), 2)
    out["next state"] = all(np.array_equal(a.asnumpy(), b.asnumpy()) for a, b in zip(tree_leaves(state), tree_leaves(again), strict=True))
    elsewhere = [other.step(other.restore(folder), 2)[1] for other in others]
    for i, found in enumerate((metrics, same, *elsewhere)):
        out[f"objective {i}"], out[f"grad_norm {i}"] = found["objective"], found["grad_norm"]
    out["said"], out["steps"] = _failing(first, state, rank), steps(run)
    began = time.perf_counter()
    for _ in range(50):
        first.sums([0.0, 0.0])
    print("agreement, ms", (time.perf_counter() - began) / 50 * 1e3, flush=True)
    return out


def _failing(first, state, rank):
    """What each rank is told when rank 1 cannot write."""
    if rank == 1:

        def broken(*args):
            raise OSError(28, "No space left on device", "made up")

        first.saver._write = broken
    first.save(3, state)
    try:
        first.saver.wait()
    except CheckpointError as error:
        return str(error)
    return "nothing"
