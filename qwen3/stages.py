"""Pipeline stages of the model: some of its layers, the embedding before the first and the head after the last.

They are made of the parts that qwen3.model's own functions are made of. Between stages go x_RD and, of a mixture of experts, the router
statistics of all layers so far, from which the last stage makes the losses: their gradients come back the same way. Where a model only
computes, to generate or to score, each rank has one stage, and the last one's results go to all.
"""

import mindspore as ms
import numpy as np
from mindspore import ops

from layers import moe
from parallel import collectives, pipeline
from parallel.step import jit
from qwen3.model import build, last_rows, noise_in, param_specs, stack_rows


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


def build_stage(cfg, sharding, kernels, layers, first, last, recompute="none"):
    """f(params, carried, batch) -> carried, or of the last stage (loss, metrics) as qwen3.model.loss_fn. For use in a graph.

    params: of stage_specs' structure; carried: a tuple of what carried_shapes says, empty for the first stage; batch: as for loss_fn.
    """
    parts = build(cfg, sharding, False, kernels, recompute).parts
    run, has_stats = _run(cfg, sharding, parts, layers, first), bool(cfg.moe_layers)

    def judged(params, carried, batch):
        out = run(params, carried, batch)
        return parts.loss(params, out[0], out[1] if has_stats else None, batch)

    return judged if last else run


def _run(cfg, sharding, parts, layers, first):
    """f(params, carried, batch) -> carried, of a stage's layers and, of the first, the embedding."""
    trunk = _trunk(cfg, sharding, parts, layers)

    def from_tokens(params, carried, batch):
        return trunk(params, (parts.begin(params, batch["tokens"]),), batch)

    def from_stage(params, carried, batch):
        return trunk(params, carried, batch)

    return from_tokens if first else from_stage


def _trunk(cfg, sharding, parts, layers):
    """trunk(params, carried, batch) -> carried."""
    run, names, n = tuple(parts.layers[i][0] for i in layers), tuple(map(str, layers)), len(layers)
    counted, noise_of = tuple(cfg.is_moe_layer(i) for i in layers), noise_in(cfg)
    join = _joined(sharding, _moe_layers(cfg, range(layers.start)), sum(counted))

    def unchanged(params, carried, batch):
        return carried

    def trunk(params, carried, batch):
        consts, x, rows = parts.beside(batch["positions"], batch["segment_ids"], noise_of(batch)), carried[0], ()
        for i in range(n):
            x, stats = run[i](params["layers"][names[i]], x, consts)
            if counted[i]:
                rows += (stats,)
        return (x, *join(carried[1:], rows))

    return trunk if n else unchanged


def _joined(sharding, before, here):
    """join(earlier, rows) -> the router statistics so far, in a tuple that is empty where there are none. earlier: such a tuple of `before`
    layers; rows: those of `here` layers, one by one."""
    sizes = {"layers": here, "layers_so_far": before + here}
    stack = sharding.op(stack_rows(), ", ".join(["stats"] * max(1, here)) + " -> layers stats", kind="kernel", sizes=sizes)
    dims = "layers_before stats, layers stats -> layers_so_far stats"
    concat = sharding.op(ops.Concat(0), dims, kind="kernel", call=_concat, sizes=sizes)

    def earlier_alone(earlier, rows):
        return earlier

    def first_ones(earlier, rows):
        return (stack(*rows),)

    def both(earlier, rows):
        return (concat(earlier[0], stack(*rows)),)

    if not here:
        return earlier_alone
    return both if before else first_ones


def _concat(concat, *xs):
    return concat(xs)


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
    layers, at, last = own_layers(cfg, sharding.mesh), sharding.mesh.index(pipeline.AXES), sharding.mesh.pp - 1
    parts = build(cfg, sharding, False, kernels).parts
    run = _run(cfg, sharding, parts, layers, at == 0)

    def scored(params, carried, batch):
        return parts.nats_and_gap(params, run(params, carried, batch)[0], batch["targets"])

    stage = _compiled(scored if at == last else run, at == 0)

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
    layers, at, last = own_layers(cfg, sharding.mesh), sharding.mesh.index(pipeline.AXES), sharding.mesh.pp - 1
    parts, in_place = build(cfg, sharding, False, kernels).parts, kernels.cache_write == "cpu"
    over, last_of = parts.over_cache([parts.layers[i] for i in layers], tuple(map(str, layers))), last_rows()

    def run(params, carried, batch):
        x = carried[0] if at else parts.begin(params, batch["tokens"])
        x, cache = over(params["layers"], x, batch["cache"], batch["positions"])
        out = parts.whole_logits(params, last_of(x, batch["last"])) if at == last else x
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
