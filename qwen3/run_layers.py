"""Runs a model's layers: unrolled or in a loop, with or without recomputation, and with parameters all-gathered under ZeRO 3.

The functions of the model do not depend on this choice: `bind` sets `op.run`, which runs one layer, and `op.layers`, which runs all.
"""

from dataclasses import fields

from mindspore import ops

from layers import moe
from layers.attention import attention
from parallel import zero
from parallel.graph.recompute import recomputed
from parallel.graph.scan import scan
from parallel.trees import tree_paths

RECOMPUTE = ("none", "full", "attention")  # attention: the layer's attention and the norm before it


def bind(cfg, op, functions, specs, looped=False, recompute="none", more_rows=(), stats_size=None):
    """Sets how `op` runs the layers of a model:

    op.of_layer[i]: the BoundOps for the functions of layer i, made for its config cfg.at_layer(i).
    op.gathered[i](stored parameters of layer i) -> the parameters for the ops, all-gathered under ZeRO 3.
    op.run[i](stored parameters of layer i, x_RD, rows) -> x_RD, statistics.
    op.layers(stored parameters of all layers, x_RD, rows) -> x_RD, statistics [layers, n]. The parameters are a list of trees or, if
    `looped`, one tree of arrays stacked on a first dim.

    functions: the model's functions (layer, attention_input, finish_layer), see qwen3/model.py. specs: the ParamSpecs of each layer.
    recompute: the activations that the backward pass computes again, one of RECOMPUTE; a loop computes all again. For op.watch: more_rows,
    names of further entries of `rows`, and stats_size, the size of a layer's statistics.
    """
    kinds = [(cfg.at_layer(i), parameters_of(specs[i])) for i in range(cfg.num_layers)]
    names, made, own_ops = row_names(cfg, op) + more_rows, {}, {}
    if looped:
        recompute = "none"  # the loop recomputes each layer in any case, and MindSpore compiles no recompute of attention inside it
    for i, kind in enumerate(kinds):  # one function serves all layers of a kind, so that MindSpore compiles it once
        if kind not in made:
            gathered = zero.gathered(op.sharding, specs[i])
            if kind[0] not in own_ops:
                own_ops[kind[0]] = op.at(kind[0])
            own = own_ops[kind[0]]
            made[kind] = own, gathered, one_layer(kind[0], own, functions, specs[i], gathered, recompute, names)
    op.of_layer, op.gathered, op.run = (tuple(made[kind][which] for kind in kinds) for which in range(3))
    size = stats_size or (moe.stats_size(cfg) if cfg.moe_layers else 1)
    op.layers = in_a_loop(cfg, op, kinds, specs[0], names, size) if looped else unrolled(cfg, op)


def parameters_of(specs):
    """((path, shape, optimizer), ...) of a layer's parameters: layers that are equal in this can share a function and a stack of arrays."""
    return tuple((path, spec.shape, spec.optimizer) for path, spec in tree_paths(specs))


def of_attention(op):
    """Returns the names of the entries of `rows` that attention reads."""
    return ("cos", "sin", "documents") if op.by_lengths else ("cos", "sin", "segments", "order")


def row_names(cfg, op):
    """Returns the names of the entries of `rows` that the layers of a model read. See qwen3.model.rows_of."""
    return of_attention(op) + (("valid",) if cfg.moe_layers else ()) + tuple(f"noise_{which}" for which in op.noises)


def one_layer(cfg, op, functions, specs, gathered, recompute, names):
    """Returns run(p, x_RD, rows) -> x_RD, statistics, for a layer with these specs. gathered: see `bind`. names: of all entries of rows."""
    layer, attention_input, finish_layer = functions
    to_attention = of_attention(op)

    def plain(p, x, rows):
        x, stats, _ = layer(cfg, op, gathered(p), x, rows, None)
        return x, stats

    # A Cell with a backward of its own takes `rows` as a tuple.
    def of_tuple(p, x, rows):
        return plain(p, x, named(names, rows))

    def attention_of_tuple(p, x, rows):
        return (attention(cfg, op, p["attention"], attention_input(cfg, op, p, x), named(to_attention, rows), None)[0],)

    if recompute == "full":
        again = recomputed(of_tuple, specs, op.sharding.lowering)
    elif recompute == "attention":
        again = recomputed(attention_of_tuple, attention_weights(specs), op.sharding.lowering)

    def layer_again(p, x, rows):
        return again(p, x, in_order(names, rows))

    def attention_again(p, x, rows):
        p = gathered(p)
        return finish_layer(cfg, op, p, x, again(attention_weights(p), x, in_order(to_attention, rows))[0], rows)

    return {"none": plain, "full": layer_again, "attention": attention_again}[recompute]


def attention_weights(p):
    """Returns the part of a layer's tree that recompute=attention needs: attention and the norm before it."""
    if "attention_norm" in p:
        return {"attention_norm": p["attention_norm"], "attention": p["attention"]}
    return {"attention": p["attention"]}


def in_order(names, rows):
    """Returns the entries of `rows` with these names, as a tuple."""
    out = ()
    for name in names:
        out += (rows[name],)
    return out


def named(names, entries):
    """Returns the dict of these names and entries. It reverses in_order."""
    rows = {}
    for i in range(len(names)):
        rows[names[i]] = entries[i]
    return rows


def unrolled(cfg, op):
    """Returns layers(list of parameters, x_RD, rows) -> x_RD, statistics of the MoE layers. For a dense model: of its first layer, so that
    there is a row."""
    counted = tuple(op.watch is not None or cfg.is_moe_layer(i) or (i == 0 and not cfg.moe_layers) for i in range(cfg.num_layers))
    stack = stack_stats(op.sharding, sum(counted))

    def layers(params, x, rows):
        every = ()
        for i in range(cfg.num_layers):
            x, stats = op.run[i](params[i], x, rows)
            if counted[i]:
                every += (stats,)
        return x, stack(*every)

    return layers


def in_a_loop(cfg, op, kinds, specs, names, stats_size):
    """Returns layers(stacked parameters, x_RD, rows) -> x_RD, statistics. Raises ValueError unless all layers are of one kind."""
    if len({bool(config.moe_layers) for config, _ in kinds}) > 1:
        raise ValueError("train.layer_loop=scan needs layers of one kind, and this model mixes dense and MoE layers; use unroll")
    if differing := [field.name for field in fields(cfg) if len({getattr(config, field.name) for config, _ in kinds}) > 1]:
        raise ValueError(f"train.layer_loop=scan needs layers of one kind, and {', '.join(differing)} differs between layers; use unroll")
    if differing := [i for i, kind in enumerate(kinds) if kind != kinds[0]]:
        raise ValueError(f"train.layer_loop=scan needs {_how_layers_differ(cfg, kinds, differing[0])}; use unroll")

    def body(p, x, entries):
        return op.run[0](p, x, named(names, entries))

    loop = scan(body, specs, cfg.num_layers, (stats_size,), op.kernels)

    def layers(params, x, rows):
        return loop(x, params, in_order(names, rows))

    return layers


def _how_layers_differ(cfg, kinds, i):
    """Words on layer i, whose parameters are not those of layer 0."""
    first, other = ({path: (shape, optimizer) for path, shape, optimizer in kinds[k][1]} for k in (0, i))
    path = next(path for path in (*first, *other) if first.get(path) != other.get(path))
    if path not in first or path not in other:
        having, lacking = (i, 0) if path in other else (0, i)
        return f"layers with the same parameters, and layer {having} has {path}, which layer {lacking} lacks"
    if first[path][0] != other[path][0]:
        return f"layers with the same parameters, and {path} is {list(first[path][0])} in layer 0 and {list(other[path][0])} in layer {i}"
    why = "train.freeze_include and freeze_exclude tell" if any(cfg.frozen) else "their specs tell"
    return f"layers that train alike, and {why} {path} of layers 0 and {i} apart"


def stack_stats(sharding, count):
    """Returns stack(*vectors) -> [count, n] as an annotated op."""
    dims = ", ".join(["stats"] * max(1, count)) + " -> layers stats"
    return sharding.op(stack_rows(), dims, kind="kernel", sizes={"layers": count})


def stack_rows():
    """Returns stack(*vectors) -> a matrix with these rows. ops.Stack is not used: for a single tensor, in eager mode, it returned the shape
    that the tensor had in an earlier compiled graph."""
    concat, reshape = ops.Concat(0), ops.Reshape()

    def stack(*xs):
        return reshape(concat(xs), (len(xs), -1))

    return stack
