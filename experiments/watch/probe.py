"""Measures the model before a step: activations, attention logits and router of each layer, and the loss of each source of data.

It runs a separate forward pass (qwen3/probe.py) over the step's batch, with the weights before the step and without dropout, in the
micro-batches and pipeline stages of the layout. It is compiled at the first watched step, and the training step does not contain it.
"""

from functools import partial
from itertools import islice

import mindspore as ms
import numpy as np
from einops import rearrange

from experiments.train.batch import split_batch, tensors, tokens_of_rank
from experiments.train.pipeline import EVAL_GROUP
from experiments.train.state import uses_scan
from layers import lora
from parallel import collectives
from parallel.graph.jit import jit
from parallel.pipeline import schedule as pipeline
from parallel.pipeline.run import Executor
from parallel.trees import tree_map, tree_paths, unflatten
from qwen3.model import choose_kernels
from qwen3.probe import SEEN, build_probe, names
from qwen3.stages import carried_shapes, stage_specs


class Probe:
    """probe(state, batch) -> {name: value}, for the global batch. batch: this data rank's rows. All ranks must call it together.

    activation_norm/layers.3: the root mean square of the residual stream after the layer, over all tokens except padding.
    attention_logit_max/layers.3: the largest scaled attention logit before the softmax, without masked logits.
    router_entropy/layers.3: the mean over tokens, in nats.
    loss/NAME: the mean loss over the targets of the source NAME, for each source in the batch; only if `sources` is given.
    sources: None, or a function -> (names, ids): the names of all sources, and the number of the source of each row in the last batch.
    """

    def __init__(self, cfg, config, sharding, program, sources=None):
        self.cfg, self.config, self.sharding, self.mesh = lora.without_dropout(cfg), config, sharding, sharding.mesh
        self.program, self.sources, self.stages = program, sources, {}

    def __call__(self, state, batch):
        if not self.stages:
            self._build()
        batch, found = tokens_of_rank(self.sharding, batch), _Found(self.cfg)
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
        """Returns this rank's stored shards of a stage's parameters."""
        spread = self.program.spread(state)
        if self.scan:
            return tree_map(lambda leaf: leaf.tensor, {**spread, "layers": spread["layers"][0]})
        held = {path: leaf.tensor for path, leaf in tree_paths(spread)}
        specs = stage_specs(self.cfg, self.layers[stage], stage == 0, stage == self.last)
        return unflatten(specs, [held[path] for path, _ in tree_paths(specs)])

    def _run(self, params, group, found):
        """Runs the forward pass of some micro-batches through all stages."""
        self.rows, batches = group[0]["tokens"].size, [tensors(micro_batch) for micro_batch in group]
        forward = partial(self._forward, params, batches)
        if not self.compiled:  # all ranks compile first: on CPU a receive times out if the rank before it compiles for long
            for stage in self.stages:
                forward(_Found(self.cfg), pipeline.Forward(0, stage), (ms.ops.zeros(*self._carried()),))
            self.compiled = True
        lists = pipeline.forward_only(self.mesh.pp, len(group), self.config.parallel.virtual_stages)
        self.executor.run(lists[self.mesh.index(("pp",))], partial(forward, found))
        collectives.host_sum(self.mesh, ("pp",), [0])  # a barrier: no rank is more than one group ahead

    def _forward(self, params, batches, found, action, carried):
        stage, given = action.stage, names(self.layers[action.stage], action.stage == self.last, bool(self.sources))
        if not given:
            return ()
        out = self.stages[stage](params[stage], carried[0] if stage else None, batches[action.micro])
        out = dict(zip(given, out))
        found.take(self.layers[stage], {name: x.asnumpy() for name, x in out.items() if name != "x"})
        return (out["x"],) if "x" in out else ()

    def _carried(self):
        """Returns (shape, dtype) of the tensor that a stage sends to the next one."""
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
        if found.rows:  # only ranks with the last stage have them
            np.add.at(sums.T, rows, np.concatenate(found.rows, 1).T)
        nats, weights = collectives.host_sum(self.mesh, ("pp", "dp"), sums.ravel()).reshape(sums.shape)
        return {f"loss/{name}": float(n / w) for name, n, w in zip(known, nats, weights) if w}


class _Found:
    """Sums of the statistics of some micro-batches, from the stages of this rank."""

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
        """Returns the statistics SEEN of all layers as one vector; zeros for the layers of other ranks."""
        self.sums[:, SEEN.index("logit_max")] = np.where(np.isfinite(self.top), self.top, 0)
        return self.sums.ravel()
