"""Measures for each layer the norms of gradients and weights, and the relative size of the update. experiments/watch/probe.py measures
activations.

All values come from the state before and after a step, on the host. So the compiled step is not changed, and a step that is not watched
costs nothing. The gradient (summed over ranks and micro-batches, before clipping) is computed from the optimizer's first moment; for AdamW,
m' = b1 m + (1 - b1) g. Norms are those of global arrays: each rank adds the squares of the blocks that it would write into a checkpoint.
"""

from dataclasses import replace

import numpy as np

from experiments.train import optim_rules
from parallel import collectives
from parallel.checkpoint.arrays import pieces, wanted


class Monitor:
    """Runs the steps of a program, and watches every `every`-th of them.

    write(step, values) is called after a watched step. values, for each group of parameters: weight_norm/GROUP, after the step; and if
    AdamW trains the group, grad_norm/GROUP and update_ratio/GROUP, the norm of the change divided by the norm of the weights before it. A
    group is a layer, or a parameter outside of layers. probe(state, batch) -> further values, measured before the step.
    """

    def __init__(self, program, mesh, optim, every, write, probe=None):
        self.program, self.mesh, self.optim, self.every, self.write, self.probe = program, mesh, optim, every, write, probe
        held = program.held()
        names = [name for name in wanted(held) if name.startswith("params/")]
        self.groups = list(dict.fromkeys(map(group, names)))
        trained = [h for h in held if h.spec.trains and h.spec.optimizer == "adamw"]
        self.trained = {name: optim_rules.momentum(optim, _of_a_layer(h)) for h in trained for name in h.names}

    def step(self, state, batch, rate, at):
        """Runs Program.step, and watches it if it is due. All ranks must call it together."""
        if (at + 1) % self.every:
            return self.program.step(state, batch, rate, at)
        seen = self.probe(state, batch) if self.probe else {}
        before = self._blocks(state)  # copies, as the step may change arrays in place
        new, metrics = self.program.step(state, batch, rate, at)
        sums = self._squares(before, self._blocks(new))
        if np.isfinite(metrics["grad_norm"]):
            self.write(at + 1, {**self._values(sums, metrics), **seen})
        return new, metrics

    def _blocks(self, state):
        """Returns {(name, start): array}: this rank's blocks of the parameters and first moments."""
        held = [h for h in self.program.held(state) if not h.names[0].startswith("v/")]
        return {(piece.name, piece.start): piece.data for piece in pieces(self.mesh, held)}

    def _squares(self, before, after):
        """Returns [4, groups], sums of squares over all ranks: weights, gradients, updates, and old values of the updated weights."""
        sums, place = np.zeros((4, len(self.groups))), {name: i for i, name in enumerate(self.groups)}
        for (name, start), new in after.items():
            kind, old, i = name.partition("/")[0], before[name, start], place[group(name)]
            if kind == "params":
                sums[0, i] += _squared(new)
            if name in self.trained and kind == "params":
                sums[2, i] += _squared(new - old)
                sums[3, i] += _squared(old)
            elif name in self.trained:
                decay, gain = self.trained[name]
                sums[1, i] += _squared(new - np.float32(decay) * old) / gain**2
        return collectives.host_sum(self.mesh, tuple(self.mesh.sizes), sums.ravel()).reshape(sums.shape)

    def _values(self, sums, metrics):
        weights, moments, updates, updated = np.sqrt(sums.astype(np.float64))
        clip, out = self.optim.clip_norm, {}
        scale = min(clip / (metrics["grad_norm"] + 1e-6), 1.0) if clip else 1.0
        for i, name in enumerate(self.groups):
            out[f"weight_norm/{name}"] = float(weights[i])
            if updated[i] and not metrics.get("skipped"):
                out[f"grad_norm/{name}"] = float(moments[i] / scale)
                out[f"update_ratio/{name}"] = float(updates[i] / updated[i])
        return out


def group(name):
    """Returns the group of a parameter: params/layers.3.attention.wq -> layers.3, params/embed -> embed."""
    keys = name.partition("/")[2].split(".")
    return ".".join(keys[:2]) if keys[0] == "layers" else keys[0]


def _of_a_layer(held):
    """Returns the spec of one layer's array, without the dim of stacked layers."""
    return replace(held.spec, shape=held.spec.shape[1:], dims=held.spec.dims[1:], parts=()) if held.is_stacked else held.spec


def _squared(x):
    x = x.astype(np.float64).ravel()
    return float(x @ x)
