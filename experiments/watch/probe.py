"""What a step finds before it: of each layer its activations, attention logits and router, and the loss by source of data.

A forward of its own (qwen3/probe.py) over the step's batch, with the weights before the step and without dropout, of the micro-batches and
pipeline stages of the layout. It is compiled when the first watched step comes, and what trains knows nothing of it.
"""

from functools import partial
from itertools import islice

import mindspore as ms
import numpy as np
from einops import rearrange

from experiments.train.batch import split_batch, tensors
from experiments.train.pipeline import EVAL_GROUP
from experiments.train.state import uses_scan
from layers import lora
from parallel import collectives
from parallel.context import split as context
from parallel.graph.jit import jit
from parallel.pipeline import schedule as pipeline
from parallel.pipeline.run import Executor
from parallel.trees import tree_map, tree_paths, unflatten
from qwen3.model import choose_kernels
from qwen3.probe import SEEN, build_probe, names
from qwen3.stages import carried_shapes, stage_specs


class Probe:
    """probe(state, batch) -> {name: value} of a global batch, of which `batch` has this data rank's rows; all ranks call it together.

    activation_norm/layers.3: the root of the mean square of what the layer adds to the stream and passes on, over all tokens but padding;
    attention_logit_max/layers.3: the largest scaled logit before the softmax, between tokens that see each other; router_entropy/layers.3:
    the mean over tokens, in nats. sources: None, or a function -> (names, ids): of the sources of data, and for each row of the last batch
    which one it is of; then also loss/NAME, the mean over the targets of those that the batch has.
    """

    def __init__(self, cfg, config, sharding, program, sources=None):
        self.cfg, self.config, self.sharding, self.mesh = lora.without_dropout(cfg), config, sharding, sharding.mesh
        self.program, self.sources, self.stages = program, sources, {}

    def __call__(self, state, batch):
        if not self.stages:
            self._build()
        batch, found = context.cut(self.mesh, batch), _Found(self.cfg)
        slices = iter(split_batch(batch, self.config.parallel.micro_batches))
        params = {stage: self._params(state, stage) for stage in self.stages}
        while group := list(islice(slices, EVAL_GROUP * len(self.layers))):
            self._run(params, group, found)
        return {**self._of_layers(found), **self._of_sources(found)}

    def _build(self):
        cfg, mesh, parallel = self.cfg, self.mesh, self.config.parallel
        self.scan = mesh.pp == 1 and uses_scan(cfg, self.config.train.layer_loop)
        self.layers = pipeline.stage_ranges(cfg.num_layers, mesh.pp, parallel.virtual_stages, tuple(parallel.stage_layers))
        self.last, kernels = len(self.layers) - 1, choose_kernels(self.config.ops, cfg, self.sharding)
        self.executor = Executor(len(self.layers), self._send, self._receive)
        for stage in range(mesh.index(("pp",)), len(self.layers), mesh.pp):
            ends = stage == 0, stage == self.last
            run = build_probe(cfg, self.sharding, kernels, self.layers[stage], *ends, scan=self.scan, by_row=bool(self.sources))
            self.stages[stage] = jit(run)
        self.compiled = mesh.pp == 1

    def _params(self, state, stage):
        """The stored parts of a stage's parameters."""
        spread = self.program.spread(state)
        if self.scan:
            return tree_map(lambda leaf: leaf.tensor, {**spread, "layers": spread["layers"][0]})
        held = {path: leaf.tensor for path, leaf in tree_paths(spread)}
        specs = stage_specs(self.cfg, self.layers[stage], stage == 0, stage == self.last)
        return unflatten(specs, [held[path] for path, _ in tree_paths(specs)])

    def _run(self, params, group, found):
        """The forward of some micro-batches through all stages."""
        self.rows, batches = group[0]["tokens"].size, [tensors(part) for part in group]
        forward = partial(self._forward, params, batches)
        if not self.compiled:  # all at once: on CPU a receive gives up where the rank before compiles for long
            for stage in self.stages:
                forward(_Found(self.cfg), pipeline.Forward(0, stage), (ms.ops.zeros(*self._carried()),))
            self.compiled = True
        lists = pipeline.forward_only(self.mesh.pp, len(group), self.config.parallel.virtual_stages)
        self.executor.run(lists[self.mesh.index(("pp",))], partial(forward, found))
        collectives.host_sum(self.mesh, ("pp",), [0])  # no rank is more than a group ahead

    def _forward(self, params, batches, found, action, carried):
        stage, given = action.stage, names(self.layers[action.stage], action.stage == self.last, bool(self.sources))
        if not given:
            return ()
        out = self.stages[stage](params[stage], carried[0] if stage else None, batches[action.micro])
        out = dict(zip(given, out))
        found.take(self.layers[stage], {name: x.asnumpy() for name, x in out.items() if name != "x"})
        return (out["x"],) if "x" in out else ()

    def _carried(self):
        """(shape, dtype) of what goes from a stage to the next."""
        return carried_shapes(self.cfg, self.sharding, range(0), self.rows)[0]

    def _send(self, message, rank):
        collectives.send(self.mesh, rank, message[0])

    def _receive(self, action, rank):
        return (collectives.receive(self.mesh, rank, *self._carried()),)

    def _of_layers(self, found):
        cfg, out = self.cfg, {}
        sums = rearrange(collectives.host_sum(self.mesh, ("pp",), found.layers()), "(layer number) -> layer number", number=len(SEEN))
        for i, layer in enumerate(sums.astype(np.float64)):
            squares, entropy, tokens, top = layer
            out[f"activation_norm/layers.{i}"] = float(np.sqrt(squares / max(tokens * cfg.hidden_size, 1)))
            out[f"attention_logit_max/layers.{i}"] = float(top)
            if cfg.is_moe_layer(i):
                out[f"router_entropy/layers.{i}"] = float(entropy / max(tokens, 1))
        return out

    def _of_sources(self, found):
        if not self.sources:
            return {}
        known, rows = self.sources()
        sums = np.zeros((2, len(known)))
        if found.rows:  # of the last stage
            np.add.at(sums.T, rows, np.concatenate(found.rows, 1).T)
        nats, weights = collectives.host_sum(self.mesh, ("pp", "dp"), sums.ravel()).reshape(sums.shape)
        return {f"loss/{name}": float(n / w) for name, n, w in zip(known, nats, weights) if w}


class _Found:
    """The numbers of some micro-batches, of the stages of this rank."""

    def __init__(self, cfg):
        self.sums, self.top, self.rows = np.zeros((cfg.num_layers, len(SEEN))), np.full(cfg.num_layers, -np.inf), []

    def take(self, layers, found):
        if "seen" in found:
            at = slice(layers.start, layers.stop)
            self.sums[at] += found["seen"]
            self.top[at] = np.maximum(self.top[at], found["seen"][:, SEEN.index("logit_max")])
        if "nats" in found:
            self.rows.append(np.stack([found["nats"], found["weights"]]))

    def layers(self):
        """[layers * SEEN], zeros for those of other ranks."""
        self.sums[:, SEEN.index("logit_max")] = np.where(np.isfinite(self.top), self.top, 0)
        return self.sums.ravel()
