"""The end of a training step in a layout: clips the summed gradients by their global norm, and updates this rank's shards."""

from experiments.train import muon
from experiments.train import optim as optimizer
from parallel import zero
from parallel.graph.nested import flatten_in_graph, rebuild_flat, subscripts, to_tuple
from parallel.graph.source import function
from parallel.trees import tree_leaves, unflatten


def build_clip(specs, trainable, sharding, optim, kernels):
    """Returns optim.build_clip's function for sharded gradients: every rank gets the norm of the full gradient.

    specs, trainable: the trees of ParamSpec and of Placed of the trainable parameters.
    """
    if sharding.mesh.world == 1:
        return optimizer.build_clip(specs, optim, kernels)
    norm_squared = zero.global_norm_squared(sharding, tree_leaves(trainable), optimizer.in_norm(specs))
    return optimizer.build_clip(specs, optim, kernels, norm_squared)


def build_update(specs, trainable, sharding, optim, kernels):
    """Returns (update, changed, merge). specs, trainable: as for build_clip; if layers are stacked, specs have one layer.

    Inside a graph, where params, m and v are nested tuples of this rank's shards (v is None without a second moment):
    update(params, flat summed gradients, m, v, factor, keep, scalars) -> the new (p, m, v), flat;
    changed(p, m, v, running mean) -> the arrays that were not updated in place, which the graph must return.
    On the host: merge(state, changed) -> the new state.

    With ZeRO 1 and 2 a rank has full parameters but only its shard of the optimizer's state. It updates its shard of the parameters; then
    an all-gather of the new shards overwrites the old parameters.
    """
    flat, like = tree_leaves(trainable), to_tuple(specs)
    directions = muon.directions(specs, optim, sharding, flat) if optim.name == "muon" else None
    optimize = optimizer.build_update(specs, optim, kernels, optimizer.own_rates(optim, trainable), directions)
    nest, flatten = rebuild_flat(like), flatten_in_graph(like)
    own_shards, gather = zero.split_params(sharding, flat), zero.join_params(sharding, flat)
    second = "v" in optimizer.MOMENTS[optim.name]
    p_of, m_of, v_of = _column(like, 0), _column(like, 1), _column(like, 2) if second else _elements(())
    moved = tuple(i for i, done in enumerate(optimizer.in_place(specs, kernels, optim)) if not done)
    gathers_new = any(p.stored != p.state for p in flat) and not optimizer.changes_in_place(kernels)
    places = (tuple(range(len(flat))) if gathers_new else moved, moved, moved if second else ())
    written_back = zero.written_back(flat, places[0])
    changed_p, changed_m, changed_v = map(_elements, places)

    def update(params, grads, m, v, factor, keep, values):
        params = flatten(params)
        new = optimize(nest(own_shards(params)), nest(grads), m, v, factor, keep, values)
        return written_back(params, gather(p_of(new))), m_of(new), v_of(new)

    def changed(p, m, v, mean_norm):
        return changed_p(p), changed_m(m), changed_v(v), mean_norm

    def merge(state, changed):
        new = {name: _replaced(state[name], *each) for name, *each in zip(("params", "m", "v"), places, changed) if name in state}
        return {**state, **new, "norm": changed[3]}

    return update, changed, merge


def _elements(places):
    """Returns f(flat) -> the tuple of the elements at `places`, for use in a graph."""
    return function("elements(flat)", [f"return ({''.join(f'flat[{i}], ' for i in places)})"])


def _column(like, i):
    """Returns f(nested tuples of (p, m, v)) -> the flat tuple of element i of each, for use in a graph."""
    return function("column(new)", [f"return ({''.join(f'new{at}[{i}], ' for at in subscripts(like))})"])


def _replaced(nested, places, new):
    """Nested tuples with the leaves at `places` replaced by `new`."""
    leaves = tree_leaves(nested)
    for i, leaf in zip(places, new):
        leaves[i] = leaf
    return unflatten(nested, leaves)
