"""The functions of a training run with --lowering=shard, where MindSpore's partitioner splits the graphs over the ranks.

Such a graph is written in global shapes and closes over the parameters and the optimizer's moments, which are MindSpore Parameters: the
partitioner splits arrays of no other form (parallel/lowering/partitioner.py). They have their global shapes until a graph is compiled. Then
MindSpore leaves each with this rank's shard, and from there on they are arrays like those of the manual lowering, with the placement that
parallel/placement.py says.

Every rank takes the whole global batch. MindSpore sums the gradients over the ranks; the update works on this rank's shards.
"""

import contextlib
from dataclasses import replace

import mindspore as ms
import numpy as np
from mindspore import ops
from mindspore.common.initializer import initializer

from experiments.layout.check import check_partitioned
from experiments.train import optim as optimizer
from experiments.train import partitioned_stages
from experiments.train.accumulate import cleared
from experiments.train.batch import blank, mean_over_targets, metrics_of, number, over_micro_batches, tensors, with_dropout_seeds
from experiments.train.state import (
    Program,
    check_trains,
    held_arrays,
    new_state,
    restored,
    split_trainable,
    spread_arrays,
    stage_placements,
)
from layers import lora
from parallel import zero
from parallel.context.split import check_documents
from parallel.graph.nested import to_tuple
from parallel.graph.source import function
from parallel.mesh import Mesh
from parallel.placement import place, reader
from parallel.trees import tree_leaves, tree_map, tree_paths, unflatten
from qwen3.model import build, drops, metric_names, param_specs

BATCH = ("tokens", "targets", "segment_ids", "positions", "loss_weights")
ONE_RANK = Mesh()  # every rank has the global batch, as one rank would


def build_program(cfg, config, sharding, kernels):
    """Returns the Program of experiments.train.program.build_program, for --lowering=shard. Its state's arrays are Parameters, which every
    step updates in place."""
    check_partitioned(config, cfg)
    mesh, placed, model_placed = sharding.mesh, *placed_of_rank(cfg, config, sharding)
    check_trains(placed)
    arrays = Arrays(sharding, placed, model_placed, config)
    step = build_step(cfg, config, sharding, kernels, arrays)
    evaluate = build_evaluate(cfg, config, sharding, kernels, arrays)

    def init(params):
        return began(new_state(mesh, placed, 0, config.optim, params if callable(params) else reader(params)))

    def restore(read, norm):
        return began(restored(mesh, placed, 0, config.optim, read, norm))

    def began(state):
        if mesh.world > 1 and not arrays.are_shards():
            batch = blank(config.train.batch_size, config.train.seq_len)
            step(arrays.state(0.0), batch, 0.0, 0)  # its results are overwritten: compiling is what makes MindSpore cut the Parameters
            evaluate(arrays.state(0.0), [batch])
        return arrays.filled(state)

    def held(state=None):
        return held_arrays(placed, 0, config.optim, state, with_frozen=cfg.lora is None)

    def spread(state):
        return spread_arrays(mesh, model_placed, placed, state, 0)

    def params(state):
        return tree_map(lambda leaf: ms.Tensor(np.array(leaf.asnumpy(everywhere=True))), spread(state))  # a copy

    return Program(init, params, step, evaluate, held, restore, spread)


def placed_of_rank(cfg, config, sharding):
    """Returns the trees of Placed of the rank's parameters, which are those of its pipeline stage, and of the model's."""
    if sharding.mesh.pp == 1:
        placed = place(sharding, param_specs(cfg))
        return placed, placed
    _, stages, model_placed = stage_placements(cfg, config, sharding)
    return stages[sharding.mesh.index(("pp",))], model_placed


class Arrays:
    """The Parameters of a run: of the model, of the optimizer's moments and, with several micro-batches, of the sum of gradients.

    tree: the model's parameters as a tree; those of other pipeline stages never take memory. trainable, frozen: the rank's that train and
    its that do not, flat. moments: {name: flat list}. sums: flat; empty for one micro-batch without a pipeline.
    """

    def __init__(self, sharding, placed, model_placed, config):
        self.tree = unflatten(model_placed, [_parameter(sharding, p, path) for path, p in tree_paths(model_placed)])
        by_path = dict(tree_paths(self.tree))
        self.trainable_placed, self.frozen_placed = split_trainable(placed)
        self.trainable = [by_path[p.path] for p in tree_leaves(self.trainable_placed)]
        self.frozen = [by_path[p.path] for p in tree_leaves(self.frozen_placed or ())]
        self.moments = {kind: [_like(w, kind) for w in self.trainable] for kind in optimizer.MOMENTS[config.optim.name]}
        if sharding.mesh.pp > 1:
            self.sums = [_like(w, partitioned_stages.SUM) for w in self.trainable]
        else:
            self.sums = [_like(w, "sum") for w in self.trainable] if config.parallel.micro_batches > 1 else []

    def are_shards(self):
        """Whether MindSpore has cut the Parameters to this rank's shards."""
        return all(w.sliced for w in self.trainable)

    def state(self, norm):
        """Returns the Parameters as a training state (experiments/train/state.py)."""
        kinds = {"params": self.trainable, **self.moments}
        state = {kind: to_tuple(unflatten(self.trainable_placed, list(flat))) for kind, flat in kinds.items()}
        if self.frozen:
            state["frozen"] = to_tuple(unflatten(self.frozen_placed, list(self.frozen)))
        return {**state, "norm": ms.Tensor(norm, ms.float32)}

    def filled(self, state):
        """Writes the arrays of a state into the Parameters, and returns the state that has them."""
        mine = self.state(float(number(state["norm"])))
        for kind in mine:
            if kind != "norm":
                for w, value in zip(tree_leaves(mine[kind]), tree_leaves(state[kind]), strict=True):
                    if w.shape != value.shape:
                        raise RuntimeError(f"{w.name}: MindSpore's shard is {list(w.shape)}, and the layout's is {list(value.shape)}")
                    w.set_data(value, slice_shape=True)  # else MindSpore would cut the shards again in its next graph
        for w in self.sums:
            w.set_data(ms.Tensor(np.zeros(w.shape, np.float32)), slice_shape=True)
        return mine


def _parameter(sharding, placed, path):
    """Returns a Parameter of global shape, padded so that each dim is a multiple of its number of shards. It takes no memory before it is
    cut."""
    spec = placed.spec
    return ms.Parameter(initializer("zeros", padded(sharding, spec), getattr(ms, spec.dtype)), name=path, requires_grad=spec.trains)


def padded(sharding, spec):
    """Returns the global shape of a parameter, with padding: each dim is a multiple of its number of shards."""
    return [-(-n // sharding.shards(dim)) * sharding.shards(dim) for n, dim in zip(spec.shape, spec.dims)]


def _like(w, kind):
    state = w.clone("zeros")  # the partitioner gives a clone the layout of its original
    state.name = f"{kind}.{w.name}"
    return state


@contextlib.contextmanager
def partitioned(sharding):
    """Inside it, MindSpore partitions the graphs that this process compiles. zero: the ZeRO stage, which is MindSpore's optimizer_level."""
    if sharding.mesh.world == 1:
        yield
        return
    world, stage = sharding.mesh.world, sharding.zero
    ms.set_auto_parallel_context(device_num=world, full_batch=True, parallel_mode="semi_auto_parallel", enable_alltoall=True)
    ms.set_auto_parallel_context(pipeline_stages=sharding.mesh.pp)
    if stage:
        level = {"parallel_optimizer_threshold": 0, "optimizer_level": f"level{stage}"}
        ms.set_auto_parallel_context(enable_parallel_optimizer=True, parallel_optimizer_config=level)
    try:
        yield
    finally:
        ms.set_auto_parallel_context(parallel_mode="stand_alone", pipeline_stages=1)


def build_step(cfg, config, sharding, kernels, arrays):
    """Returns step(state, batch, lr, step from 0) -> (state, metrics). batch: the global batch, on every rank.

    With one micro-batch it is one graph. With more it is one for each micro-batch, which MindSpore partitions and which adds to the sum of
    gradients, and one that updates this rank's shards, which needs no partitioning. Under a pipeline see _build_pipeline_step.
    """
    if sharding.mesh.pp > 1:
        return _build_pipeline_step(cfg, config, sharding, kernels, arrays)
    micro_batches, names = config.parallel.micro_batches, metric_names(cfg)
    keys = (*BATCH, *["noise"] * drops(cfg))
    options = {"recompute": config.train.recompute, "loss_chunks": config.train.loss_chunks}
    gradient = _gradient(build(cfg, sharding, kernels=kernels, **options).loss_fn, arrays, names, keys)
    update = _update(config, sharding, arrays, kernels)

    @ms.jit
    def step_in_one_graph(values, *batch):  # flat arguments: the partitioner does not look into tuples
        (loss, aux), grads = gradient(*batch)
        return loss, aux, ops.depend(update(grads, values), (loss, aux))

    total, places = tuple(arrays.sums), range(len(arrays.sums))
    assign, depend, clear_after = ops.Assign(), ops.depend, _build_clear(arrays.sums)

    @ms.jit
    def accumulate(share, *batch):
        (loss, aux), grads = gradient(*batch)
        done = loss
        for i in places:
            done = assign(total[i], depend(total[i], done) + share * depend(grads[i], done))
        return depend(loss, done), aux

    @ms.jit
    def finish(values):
        return clear_after(update(total, values))

    def flat(batch):
        made = tensors(batch)
        return [made[key] for key in keys]

    def step(state, batch, lr, at):
        check_documents(ONE_RANK, sharding.documents, batch)
        batch = with_dropout_seeds(cfg, config, ONE_RANK, batch, at)
        values = optimizer.scalars(config.optim, lr, at)
        if micro_batches == 1:
            with partitioned(sharding):
                loss, aux, norm = step_in_one_graph(values, *flat(batch))
        else:

            def compute(share, micro_batch):
                with partitioned(sharding):
                    return accumulate(ms.Tensor(share, ms.float32), *flat(micro_batch))

            loss, aux = over_micro_batches(ONE_RANK, batch, micro_batches, names, compute)
            norm = finish(values)
        return state, metrics_of(cfg, config, names, lr, loss, aux, norm, 0.0)

    return step


def _build_pipeline_step(cfg, config, sharding, kernels, arrays):
    """Returns the step under a pipeline, one graph, in which MindSpore runs the micro-batches."""
    keys, names = (*BATCH, *["noise"] * drops(cfg), "shares"), metric_names(cfg)
    network = partitioned_stages.network(cfg, config, sharding, kernels, arrays.tree, keys)
    gradient = partitioned_stages.build_gradient(network, arrays.trainable, arrays.sums, sharding.zero)
    update, clear_after = _update(config, sharding, arrays, kernels), _build_clear(arrays.sums)
    # a Parameter, because MindSpore takes each argument of the graph for micro-batches
    scalars = ms.Parameter(optimizer.scalars(config.optim, 0.0, 0), name="scalars", requires_grad=False)

    @ms.jit
    def graph(*batch):
        (loss, aux), grads = gradient(*batch)
        return loss, aux, clear_after(ops.depend(update(grads, scalars), (loss, aux)))

    def step(state, batch, lr, at):
        check_documents(ONE_RANK, sharding.documents, batch)
        batch = with_dropout_seeds(cfg, config, ONE_RANK, batch, at)
        made = tensors(partitioned_stages.with_shares(batch, config.parallel.micro_batches))
        scalars.set_data(optimizer.scalars(config.optim, lr, at))
        with partitioned(sharding):
            loss, aux, norm = graph(*(made[key] for key in keys))
        loss, aux = partitioned_stages.on_all_ranks(sharding.mesh, names, loss, aux)
        return state, metrics_of(cfg, config, names, lr, loss, aux, norm, 0.0)

    return step


def _build_clear(sums):
    """Returns clear_after(norm) -> norm, which sets the sums to 0 once the norm is known, for use in a graph."""
    sums, places, assign, depend, clear = tuple(sums), range(len(sums)), ops.Assign(), ops.depend, cleared()

    def clear_after(norm):
        done = norm
        for i in places:
            done = assign(sums[i], clear(depend(sums[i], done)))
        return depend(norm, done)

    return clear_after


def _gradient(loss_fn, arrays, names, keys):
    """Returns gradient(*tensors of a batch called `keys`) -> ((loss, metrics called `names`), flat gradients), for use in a graph."""
    batch = ", ".join(f'"{key}": {key}' for key in keys)
    picked = "".join(f'aux["{name}"], ' for name in names)
    lines = [f"loss, aux = loss_fn(tree, {{{batch}}})", f"return loss, ({picked})"]
    loss_of = function(f"loss_of({', '.join(keys)})", lines, loss_fn=loss_fn, tree=arrays.tree)
    value_and_grad = ms.value_and_grad(loss_of, None, weights=arrays.trainable, has_aux=True)

    def gradient(*batch):
        out, grads = value_and_grad(*batch)
        return (out[0], out[1]), grads

    return gradient


def _update(config, sharding, arrays, kernels):
    """Returns update(flat gradients, scalars) -> gradient norm: clips, and updates the Parameters in place, unless the norm is not finite.

    MindSpore partitions nothing after the gradients, so the update works on this rank's shards, and the norm is summed by our collectives.
    """
    placed = tree_leaves(arrays.trainable_placed)
    flat = [p.spec for p in placed]
    squares = zero.global_norm_squared(sharding.inside(), placed, optimizer.in_norm(flat))
    # The reference implementation, because the others read global shapes.
    control, leaf = optimizer.norm_control(config.optim), optimizer.leaf_update(config.optim, replace(kernels, adamw="reference"))
    kinds, count = tuple(optimizer.leaf_kind(config.optim, spec) for spec in flat), len(flat)
    old = tuple(zip(arrays.trainable, *arrays.moments.values()))  # (p, m, v), or (p, m)
    sqrt, assign, depend, select, kept = ops.Sqrt(), ops.Assign(), ops.depend, ops.Select(), range(len(old[0]))

    def update(grads, values):
        norm = sqrt(squares(grads))
        scale, keep, _ = control(norm, values[0] * 0, values[3])
        done = scale
        for i in range(count):  # one after the other; otherwise MindSpore computes products such as b1 * m of all arrays first
            was = ()
            for j in kept:
                was += (depend(old[i][j], done),)
            new = leaf(values, scale, keep, kinds[i], was[0], depend(grads[i], done), *was[1:])
            updates = was[1] * 0 + keep > 0  # of the shape of the shard, which a graph in global shapes cannot name
            written = ()
            for j in kept:
                written += (assign(old[i][j], select(updates, new[j], was[j])),)
            done = written
        return depend(norm, done)

    return update


def build_evaluate(cfg, config, sharding, kernels, arrays):
    """Returns evaluate(state, batches) -> cross-entropy in nats per target. batches: global batches, on every rank."""
    if sharding.mesh.pp > 1:
        return _build_pipeline_evaluate(lora.without_dropout(cfg), config, sharding, kernels, arrays)
    loss_fn = build(lora.without_dropout(cfg), sharding, kernels=kernels, loss_chunks=config.train.loss_chunks).loss_fn
    batch = ", ".join(f'"{key}": {key}' for key in BATCH)
    lines = [f"aux = loss_fn(tree, {{{batch}}})[1]", 'return aux["loss"], aux["tokens"]']
    loss_of = ms.jit(function(f"loss_of({', '.join(BATCH)})", lines, loss_fn=loss_fn, tree=arrays.tree))

    def loss_and_targets(batch):
        check_documents(ONE_RANK, sharding.documents, batch)
        with partitioned(sharding):
            return loss_of(*(tensors(batch)[key] for key in BATCH))

    def evaluate(state, batches):
        return mean_over_targets(map(loss_and_targets, batches))

    return evaluate


def _build_pipeline_evaluate(cfg, config, sharding, kernels, arrays):
    keys, names = (*BATCH, "shares"), metric_names(cfg)
    forward = ms.jit(partitioned_stages.network(cfg, config, sharding, kernels, arrays.tree, keys))

    def loss_and_targets(batch):
        check_documents(ONE_RANK, sharding.documents, batch)
        made = tensors(partitioned_stages.with_shares(batch, config.parallel.micro_batches))
        with partitioned(sharding):
            out = forward(*(made[key] for key in keys))
        loss, aux = out if isinstance(out, tuple) else (out, ())
        metrics = dict(zip(names, partitioned_stages.on_all_ranks(sharding.mesh, names, loss, aux)[1]))
        return metrics["loss"], metrics["tokens"]

    def evaluate(state, batches):
        return mean_over_targets(map(loss_and_targets, batches))

    return evaluate
