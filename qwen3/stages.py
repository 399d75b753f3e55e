"""Pipeline stages of the model. A stage has some of the layers; the first stage also has the embedding, and the last one the head.

A stage runs the functions of qwen3.model. It sends x_RD to the next stage and, in a mixture of experts, the router statistics of all layers
so far, from which the last stage computes the losses. Their gradients travel back. For inference (generation and scoring) each rank has one
stage, and the last rank broadcasts its results.
"""

import mindspore as ms
import numpy as np
from mindspore import ops

from layers import moe
from ops.rearrange import rearrange
from parallel import collectives
from parallel.graph.jit import jit
from parallel.pipeline import schedule as pipeline
from qwen3 import model, run_layers
from qwen3.cache import writes_in_place
from qwen3.model import param_specs

ARRAYS = ("table", "tokens", "positions", "row", "last", "adapters")  # the arrays of a step of inference, see qwen3.generate.extended_pages


def stage_specs(cfg, layers, first, last):
    """Returns the specs of a stage, at the same paths as in param_specs, except that `layers` is {number: specs}.

    layers: the range of the stage's layers. first: it has the embedding and the embedding's adapter. last: it has the head; if the head is
    tied, it also has the embedding.
    """
    model_specs = param_specs(cfg)
    tree = {"embed": model_specs["embed"]} if first or (last and cfg.tie_embeddings) else {}
    if layers:
        tree["layers"] = {str(i): model_specs["layers"][i] for i in layers}
    for key in ("final_norm", "lm_head") if last else ():
        if key in model_specs:
            tree[key] = model_specs[key]
    if first and "lora" in model_specs:
        tree["lora"] = model_specs["lora"]
    return tree


def carried_shapes(cfg, sharding, layers, rows):
    """Returns [(shape, dtype)] of what a rank of a stage receives from the stage before: its shard of x_RD and, if earlier stages have MoE
    layers, their router statistics. layers: the range of the stage's layers. rows: a data rank's batch size times sequence length."""
    x = (rows // (sharding.shards("rows") // sharding.shards("tokens")), cfg.hidden_size), getattr(ms, cfg.compute_dtype)
    before = _moe_layers(cfg, range(layers.start))
    return [x, ((before, moe.stats_size(cfg)), ms.float32)] if before else [x]


def _moe_layers(cfg, layers):
    return sum(cfg.is_moe_layer(i) for i in layers)


def stage(cfg, op, layers, first, last, stack, params, carried, batch):
    """Runs the layers with the numbers `layers`; the first stage also runs the embedding before them, and the last one the loss after them.

    Returns the tensors for the next stage; the last stage returns (loss, metrics). For use in a graph.
    params: the tree of stage_specs. carried: the tensors from the stage before, see carried_shapes; () for the first stage. stack: see
    run_layers.stack_stats.
    """
    carried = through_layers(cfg, op, layers, first, stack, params, carried, batch)
    if not last:
        return carried
    return model.loss_of_states(cfg, op, params, carried[0], carried[1] if cfg.moe_layers else None, batch)


def through_layers(cfg, op, layers, first, stack, params, carried, batch):
    """Runs `stage` without the loss. Returns a tuple of x_RD and, if there are MoE layers so far, their router statistics."""
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


def build_stage(cfg, sharding, kernels, layers, first, last, recompute="none", loss_chunks=1):
    """Returns f(params, carried, batch), which runs `stage` in a layout."""
    op = model.build(cfg, sharding, False, kernels, recompute, loss_chunks).op
    layers, stack = tuple(layers), run_layers.stack_stats(sharding, _moe_layers(cfg, layers))

    def of_layers(params, carried, batch):
        return stage(cfg, op, layers, first, last, stack, params, carried, batch)

    return of_layers


def own_layers(cfg, mesh):
    """Returns the range of this rank's layers for inference: each rank has one stage, of as equal a size as possible."""
    return pipeline.stage_ranges(cfg.num_layers, mesh.pp)[mesh.index(pipeline.AXES)]


def own_specs(cfg, mesh):
    """Returns the specs of this rank's stage for inference; without a pipeline, param_specs(cfg)."""
    if mesh.pp == 1:
        return param_specs(cfg)
    at = mesh.index(pipeline.AXES)
    return stage_specs(cfg, own_layers(cfg, mesh), at == 0, at == mesh.pp - 1)


class Relay:
    """Runs the stages of a pipeline one after another for inference: relay(arguments) -> the results of the last stage, on every rank.

    All ranks of a pipeline must call it with the same arguments.
    run(carried, arguments) -> a tuple of tensors, for the next stage or, from the last stage, the results: the rank's compiled stage.
    arrive(arguments), results(arguments) -> [(shape, dtype)] of the tensors from the stage before, and of the results.
    idle(arguments) -> arguments of the same shapes with which `run` changes no state.
    """

    def __init__(self, mesh, run, arrive, results, idle):
        self.mesh, self.run, self.arrive, self.results, self.idle = mesh, run, arrive, results, idle
        self.at, self.last, self.compiled = mesh.index(pipeline.AXES), mesh.pp - 1, set()
        self.to_all = collectives.broadcast(mesh, pipeline.AXES, self.last)

    def __call__(self, arguments):
        arrive, results = self.arrive(arguments), self.results(arguments)
        absent = [name for name, value in arguments.items() if value is None]
        key, arrive = str((arrive, results, absent)), arrive if self.at else []
        if key not in self.compiled:  # all ranks compile first: on CPU a receive times out if the rank before it compiles for long
            self.run(tuple(ops.zeros(*each) for each in arrive), self.idle(arguments))
            self.compiled.add(key)
        out = self.run(tuple(collectives.receive(self.mesh, self.at - 1, *each) for each in arrive), arguments)
        if self.at < self.last:
            for x in out:
                collectives.send(self.mesh, self.at + 1, x)
            out = [ops.zeros(*each) for each in results]
        return tuple(self.to_all(x) for x in out)


def build_score(cfg, sharding, kernels):
    """Returns score(params, tokens, targets, positions, segment_ids) -> (nats, gap), see qwen3.model.score_targets. params: the tree of
    own_specs."""
    layers, at, last = tuple(own_layers(cfg, sharding.mesh)), sharding.mesh.index(pipeline.AXES), sharding.mesh.pp - 1
    op, stack = model.build(cfg, sharding, False, kernels).op, run_layers.stack_stats(sharding, _moe_layers(cfg, layers))

    def run(params, carried, batch):
        carried = through_layers(cfg, op, layers, at == 0, stack, params, carried, batch)
        return model.nats_and_gap(cfg, op, params, carried[0], batch["targets"]) if at == last else carried

    stage = _compiled(run, at == 0)

    def of_stage(carried, given):
        return stage(given["params"], carried, given["batch"])

    def arrive(given):
        return carried_shapes(cfg, sharding, own_layers(cfg, sharding.mesh), given["batch"]["tokens"].size)

    def results(given):
        return [((given["batch"]["tokens"].size, 1), ms.float32)] * 2

    relay = Relay(sharding.mesh, of_stage, arrive, results, lambda given: given)

    def score(params, tokens, targets, positions, segment_ids):
        batch = {"tokens": tokens, "targets": targets, "positions": positions, "segment_ids": segment_ids}
        return tuple(x.reshape(tokens.shape) for x in relay({"params": params, "batch": batch}))

    return score


def build_extend(cfg, sharding, kernels):
    """Returns extend(params, cache, table, tokens_R, positions_R, row_R, last_B, adapters) -> (logits, cache), see
    qwen3.generate.extended_pages.

    params: the tree of own_specs. cache: the pages of this rank's layers; each rank must have at least one layer.
    """
    layers, at, last = tuple(own_layers(cfg, sharding.mesh)), sharding.mesh.index(pipeline.AXES), sharding.mesh.pp - 1
    op, in_place = model.build(cfg, sharding, False, kernels, rows_alone=True).op, writes_in_place(kernels)

    def run(params, carried, batch):
        x = carried[0] if at else model.embed(cfg, op, params, rearrange(batch["tokens"], "tokens -> tokens 1", {}))
        own, positions = (), rearrange(batch["positions"], "tokens -> tokens 1", {})
        for i in layers:
            own += (params["layers"][str(i)],)
        rows = model.rows_over_pages(op, batch["cache"], batch["table"], positions, batch["row"], batch["adapters"])
        wanted = batch["last"] if at == last else None
        x, cache = model.layers_over_cache(cfg, op, own, layers, x, batch["cache"], rows, batch["row"] is None, wanted)
        if at == last:
            x = model.full_logits(cfg, op, params, x)
        return x if in_place else (x, cache)  # a graph copies what it returns

    stage, kept = _compiled(run, at == 0), None

    def of_stage(carried, given):
        nonlocal kept
        arrays = {key: given[key] if given[key] is None else ms.Tensor(given[key]) for key in ARRAYS}
        out = stage(given["params"], carried, {**arrays, "cache": given["cache"]})
        out, kept = (out, given["cache"]) if in_place else out
        return (out,)

    def arrive(given):
        return [((given["tokens"].size, cfg.hidden_size), getattr(ms, cfg.compute_dtype))]

    def results(given):
        return [((len(given["tokens"] if given["last"] is None else given["last"]), cfg.vocab_size), ms.float32)]

    def idle(given):
        return {**given, "table": np.full_like(given["table"], -1)}  # no row has a page, so nothing is stored

    relay = Relay(sharding.mesh, of_stage, arrive, results, idle)

    def extend(params, cache, table, tokens, positions, row, last, adapters=None):
        arrays = dict(zip(ARRAYS, (table, tokens, positions, row, last, adapters)))
        (logits,) = relay({"params": params, "cache": cache, **arrays})
        return logits, kept

    return extend


def _compiled(stage, first):
    """Returns stage(params, carried, batch), compiled. The first stage has carried=(), which is left out because a graph takes no empty
    tuple."""

    def from_nothing(params, batch):
        return stage(params, (), batch)

    compiled = jit(from_nothing if first else stage)
    return (lambda params, carried, batch: compiled(params, batch)) if first else compiled
