"""Pipeline stages of the model: some of its layers, the embedding before the first and the head after the last.

A stage runs the functions of qwen3.model. Between stages travel x_RD and, in a mixture of experts, the router statistics of all layers so
far, from which the last stage computes the losses; their gradients come back the same way. Where a model only computes, to generate or to
score, each rank has one stage, and the last rank's results go to all.
"""

import mindspore as ms
import numpy as np
from mindspore import ops

from layers import moe
from parallel import collectives
from parallel.graph.jit import jit
from parallel.pipeline import schedule as pipeline
from qwen3 import model, run_layers
from qwen3.model import param_specs


def stage_specs(cfg, layers, first, last):
    """The specs of a stage, with the paths that they have in the whole model. layers: the range of its layers; first: with the embedding;
    last: with the head, which is the embedding's matrix again where they are tied. The embedding's adapters are the first's."""
    whole = param_specs(cfg)
    tree = {"embed": whole["embed"]} if first or (last and cfg.tie_embeddings) else {}
    if layers:
        tree["layers"] = {str(i): whole["layers"][i] for i in layers}
    for key in ("final_norm", "lm_head") if last else ():
        if key in whole:
            tree[key] = whole[key]
    if first and "lora" in whole:
        tree["lora"] = whole["lora"]
    return tree


def carried_shapes(cfg, sharding, layers, rows):
    """[(shape, dtype)] of a rank's part of what a stage with these layers takes from the one before: x_RD, and where there are any the
    router statistics so far. rows: a data rank's batch size times sequence length."""
    x = (rows // (sharding.shards("rows") // sharding.shards("tokens")), cfg.hidden_size), getattr(ms, cfg.compute_dtype)
    before = _moe_layers(cfg, range(layers.start))
    return [x, ((before, moe.stats_size(cfg)), ms.float32)] if before else [x]


def _moe_layers(cfg, layers):
    return sum(cfg.is_moe_layer(i) for i in layers)


def stage(cfg, op, layers, first, last, stack, params, carried, batch):
    """Runs the layers with the numbers `layers`; the first stage also the embedding before them, the last one the loss after them.

    Returns what the next stage takes, or from the last stage (loss, metrics). For use in a graph.
    params: of stage_specs' structure. carried: x_RD and, where there are any, the router statistics so far, as carried_shapes says; empty
    for the first stage. stack: see run_layers.stack_stats.
    """
    carried = through_layers(cfg, op, layers, first, stack, params, carried, batch)
    if not last:
        return carried
    return model.loss_of_states(cfg, op, params, carried[0], carried[1] if cfg.moe_layers else None, batch)


def through_layers(cfg, op, layers, first, stack, params, carried, batch):
    """`stage` without the loss: returns x_RD and the router statistics so far, in a tuple."""
    x = model.embed(cfg, op, params, batch["tokens"]) if first else carried[0]
    stats, here = carried[1:], ()
    if layers:
        noise = batch["noise"] if op.noises else None
        rows = model.rows_of(cfg, op, batch["positions"], batch["segment_ids"], noise)
        for i in layers:
            x, found = op.run[i](params["layers"][str(i)], x, rows)
            if cfg.is_moe_layer(i):
                here += (found,)
    if here:
        here = stack(*here)
        stats = (op.concat(stats[0], here, "layers_before stats, layers stats -> layers_so_far stats") if stats else here,)
    return (x, *stats)


def build_stage(cfg, sharding, kernels, layers, first, last, recompute="none"):
    """Returns `stage` as f(params, carried, batch), in a layout."""
    op = model.build(cfg, sharding, False, kernels, recompute).op
    layers, stack = tuple(layers), run_layers.stack_stats(sharding, _moe_layers(cfg, layers))

    def of_layers(params, carried, batch):
        return stage(cfg, op, layers, first, last, stack, params, carried, batch)

    return of_layers


def own_layers(cfg, mesh):
    """The range of this rank's layers where a model only computes: one stage a rank, as even as can be."""
    return pipeline.stage_ranges(cfg.num_layers, mesh.pp)[mesh.index(pipeline.AXES)]


def own_specs(cfg, mesh):
    """The specs of what this rank has of a model that only computes: param_specs' own without a pipeline."""
    if mesh.pp == 1:
        return param_specs(cfg)
    at = mesh.index(pipeline.AXES)
    return stage_specs(cfg, own_layers(cfg, mesh), at == 0, at == mesh.pp - 1)


class Relay:
    """A compiled stage of each rank, one after another: f(arguments) -> the last stage's results, on all ranks of a pipeline, which call it
    with the same arguments.

    run(carried, arguments) -> a tuple of tensors: what is carried on, or the results. arrive(arguments), results(arguments): [(shape,
    dtype)] of what comes from the stage before, and of the results. idle(arguments) -> of their shapes, for a call that changes nothing.
    """

    def __init__(self, mesh, run, arrive, results, idle):
        self.mesh, self.run, self.arrive, self.results, self.idle = mesh, run, arrive, results, idle
        self.at, self.last, self.compiled = mesh.index(pipeline.AXES), mesh.pp - 1, set()
        self.to_all = collectives.broadcast(mesh, pipeline.AXES, self.last)

    def __call__(self, arguments):
        arrive, results = self.arrive(arguments), self.results(arguments)
        key, arrive = str((arrive, results)), arrive if self.at else []
        if key not in self.compiled:  # all at once: on CPU a receive gives up where the rank before compiles for long
            self.run(tuple(ops.zeros(*each) for each in arrive), self.idle(arguments))
            self.compiled.add(key)
        out = self.run(tuple(collectives.receive(self.mesh, self.at - 1, *each) for each in arrive), arguments)
        if self.at < self.last:
            for x in out:
                collectives.send(self.mesh, self.at + 1, x)
            out = [ops.zeros(*each) for each in results]
        return tuple(self.to_all(x) for x in out)


def build_score(cfg, sharding, kernels):
    """score(params, tokens, targets, positions, segment_ids), all [B, S] -> (nats, gap), as qwen3.model's. params: of own_specs."""
    layers, at, last = tuple(own_layers(cfg, sharding.mesh)), sharding.mesh.index(pipeline.AXES), sharding.mesh.pp - 1
    op, stack = model.build(cfg, sharding, False, kernels).op, run_layers.stack_stats(sharding, _moe_layers(cfg, layers))

    def run(params, carried, batch):
        carried = through_layers(cfg, op, layers, at == 0, stack, params, carried, batch)
        return model.nats_and_gap(cfg, op, params, carried[0], batch["targets"]) if at == last else carried

    stage = _compiled(run, at == 0)

    def of_stage(carried, given):
        return stage(given["params"], carried, given["batch"])

    def arrive(given):
        return carried_shapes(cfg, sharding, layers, given["batch"]["tokens"].size)

    def results(given):
        return [((given["batch"]["tokens"].size, 1), ms.float32)] * 2

    relay = Relay(sharding.mesh, of_stage, arrive, results, lambda given: given)

    def score(params, tokens, targets, positions, segment_ids):
        batch = {"tokens": tokens, "targets": targets, "positions": positions, "segment_ids": segment_ids}
        return tuple(x.reshape(tokens.shape) for x in relay({"params": params, "batch": batch}))

    return score


def build_extend(cfg, sharding, kernels):
    """extend(params, cache, tokens_BS, positions_BS, last_B) -> (logits_BV, cache), as qwen3.generate.extended. params: of own_specs;
    cache: of this rank's layers, of which there must be one."""
    layers, at, last = tuple(own_layers(cfg, sharding.mesh)), sharding.mesh.index(pipeline.AXES), sharding.mesh.pp - 1
    op, in_place = model.build(cfg, sharding, False, kernels).op, kernels.cache_write == "cpu"

    def run(params, carried, batch):
        x = carried[0] if at else model.embed(cfg, op, params, batch["tokens"])
        own = ()
        for i in layers:
            own += (params["layers"][str(i)],)
        x, cache = model.layers_over_cache(cfg, op, own, layers, x, batch["cache"], batch["positions"])
        out = model.full_logits(cfg, op, params, model.last_rows(op, x, batch["last"])) if at == last else x
        return out if in_place else (out, cache)  # a graph copies what it returns

    stage, kept = _compiled(run, at == 0), None

    def of_stage(carried, given):
        nonlocal kept
        arrays = {key: ms.Tensor(given[key]) for key in ("tokens", "positions", "last")}
        out = stage(given["params"], carried, {**arrays, "cache": given["cache"]})
        out, kept = (out, given["cache"]) if in_place else out
        return (out,)

    def arrive(given):
        return [((given["tokens"].size, cfg.hidden_size), getattr(ms, cfg.compute_dtype))]

    def results(given):
        return [((len(given["tokens"]), cfg.vocab_size), ms.float32)]

    def idle(given):
        return {**given, "positions": np.full_like(given["positions"], given["cache"][0][0].shape[1])}  # beyond the cache: dropped

    relay = Relay(sharding.mesh, of_stage, arrive, results, idle)

    def extend(params, cache, tokens, positions, last):
        (logits,) = relay({"params": params, "cache": cache, "tokens": tokens, "positions": positions, "last": last})
        return logits, kept

    return extend


def _compiled(stage, first):
    """stage(params, carried, batch), compiled; the first stage is carried nothing, and a graph takes no empty tuple."""

    def from_nothing(params, batch):
        return stage(params, (), batch)

    compiled = jit(from_nothing if first else stage)
    return (lambda params, carried, batch: compiled(params, batch)) if first else compiled
