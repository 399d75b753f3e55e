"""How summed gradients change a state in a layout: the clip by their global norm, and the optimizer on this rank's shards."""

from experiments.train import muon
from experiments.train import optim as optimizer
from parallel import zero
from parallel.graph.nested import flatten_in_graph, rebuild_flat, subscripts, to_tuple
from parallel.graph.source import function
from parallel.trees import tree_leaves, unflatten


def build_clip(specs, trainable, sharding, optim, kernels):
    """clip(flat summed gradients, running mean, scalars, after) -> (norm, factor, keep, running mean): optim.build_clip, with the norm of
    the whole gradient on every rank. specs, trainable: the tree of ParamSpec and of Placed of what trains."""
    if sharding.mesh.world == 1:
        return optimizer.build_clip(specs, optim, kernels)
    norm_squared = zero.global_norm_squared(sharding, tree_leaves(trainable), optimizer.in_norm(specs))
    return optimizer.build_clip(specs, optim, kernels, norm_squared)


def build_update(specs, trainable, sharding, optim, kernels):
    """(update, changed, merge). specs, trainable: as for build_clip; specs are of one layer where layers are stacked.

    For use in a graph, params, m and v being nested tuples of this rank's shards, v None of an optimizer without a second moment:
    update(params, flat summed gradients, m, v, factor, keep, scalars) -> (p, m, v), the new ones, flat;
    changed(p, m, v, running mean) -> those of them that did not change in place, which the graph has to return.
    On the host: merge(state, changed) -> the new state.

    With ZeRO 1 and 2 a rank has full parameters, and the optimizer's state of a shard of them: the update is of the shard, and the new
    shards of all ranks are gathered and written over the old parameters.
    """
    if optim.name == "muon":
        muon.check_whole(tree_leaves(specs), tree_leaves(trainable))
    flat, like = tree_leaves(trainable), to_tuple(specs)
    optimize = optimizer.build_update(specs, optim, kernels)
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
    """f(flat) -> the elements at these places, for use in a graph."""
    return function("elements(flat)", [f"return ({''.join(f'flat[{i}], ' for i in places)})"])


def _column(like, i):
    """A function, for use in a graph, from nested tuples of (p, m, v) to the flat tuple of one of the three."""
    return function("column(new)", [f"return ({''.join(f'new{at}[{i}], ' for at in subscripts(like))})"])


def _replaced(nested, places, new):
    """Nested tuples with other leaves at these places."""
    leaves = tree_leaves(nested)
    for i, leaf in zip(places, new):
        leaves[i] = leaf
    return unflatten(nested, leaves)
