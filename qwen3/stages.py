"""Pipeline stages of the model: some of its layers, the embedding before the first and the head after the last.

They are made of the parts that qwen3.model's own functions are made of. Between stages go x_RD and, of a mixture of experts, the router
statistics of all layers so far, from which the last stage makes the losses: their gradients come back the same way.
"""

import mindspore as ms
from mindspore import ops

from layers import embed, moe, norm
from qwen3.model import build, layer_specs, stack_rows


def stage_specs(cfg, layers, first, last):
    """The specs of a stage, with the paths that they have in the whole model. layers: the range of its layers; first: with the embedding;
    last: with the head, which is the embedding's matrix again where they are tied."""
    tree = {"embed": embed.specs(cfg)} if first or (last and cfg.tie_embeddings) else {}
    if layers:
        tree["layers"] = {str(i): layer_specs(cfg, i) for i in layers}
    if last:
        tree["final_norm"] = norm.specs(cfg)
    if last and not cfg.tie_embeddings:
        tree["lm_head"] = embed.specs(cfg)
    return tree


def carried_shapes(cfg, sharding, layers, rows):
    """[(shape, dtype)] of a rank's part of what a stage with these layers takes from the one before: x_RD, and where there are any the
    router statistics so far. rows: a data rank's batch size times sequence length."""
    x = (rows // (sharding.shards("rows") // sharding.shards("tokens")), cfg.hidden_size), getattr(ms, cfg.compute_dtype)
    before = _moe_layers(cfg, range(layers.start))
    return [x, ((before, moe.stats_size(cfg)), ms.float32)] if before else [x]


def _moe_layers(cfg, layers):
    return sum(cfg.is_moe_layer(i) for i in layers)


def build_stage(cfg, sharding, kernels, layers, first, last):
    """f(params, carried, batch) -> carried, or of the last stage (loss, metrics) as qwen3.model.loss_fn. For use in a graph.

    params: of stage_specs' structure; carried: a tuple of what carried_shapes says, empty for the first stage; batch: as for loss_fn.
    """
    parts, trunk = build(cfg, sharding, False, kernels).parts, _trunk(cfg, sharding, kernels, layers)

    def from_tokens(params, carried, batch):
        return trunk(params, (parts.begin(params, batch["tokens"]),), batch)

    def from_stage(params, carried, batch):
        return trunk(params, carried, batch)

    run, has_stats = from_tokens if first else from_stage, bool(cfg.moe_layers)

    def judged(params, carried, batch):
        out = run(params, carried, batch)
        return parts.loss(parts.end(params, out[0]), out[1] if has_stats else None, batch)

    return judged if last else run


def _trunk(cfg, sharding, kernels, layers):
    """trunk(params, carried, batch) -> carried."""
    parts = build(cfg, sharding, False, kernels).parts
    run, names, n = tuple(parts.layers[i][0] for i in layers), tuple(map(str, layers)), len(layers)
    counted = tuple(cfg.is_moe_layer(i) for i in layers)
    join = _joined(sharding, _moe_layers(cfg, range(layers.start)), sum(counted))

    def unchanged(params, carried, batch):
        return carried

    def trunk(params, carried, batch):
        consts, x, rows = parts.beside(batch["positions"], batch["segment_ids"]), carried[0], ()
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
