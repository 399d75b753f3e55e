"""The training step of a dry run with --lowering=shard: a program with global shapes, for MindSpore's partitioner
(parallel/lowering/partitioner.py).

The step closes over the parameters, and the moments are clones of them, because the partitioner shards only this form. The update works on
a rank's shards.
"""

from dataclasses import replace

import mindspore as ms
import numpy as np
from mindspore import ops
from mindspore.common.initializer import initializer

from experiments.train import optim
from parallel import zero
from parallel.placement import place
from parallel.trees import tree_leaves, tree_paths, unflatten
from qwen3.model import build, choose_kernels, param_specs

TRAIN_STEPS = 2
# config keys that this lowering restricts: key -> (the only value, the reason)
REFUSED = {
    "parallel.pp": (1, "MindSpore's pipeline needs Cells that share no primitive, and separate ranks for each stage, see docs/dryrun.md"),
    "parallel.cp": (1, "MindSpore has no rule for a ring"),
    "optim.name": ("adamw", "other optimizers are not supported there"),
    "optim.lr_groups": ("", "groups of learning rates are not supported there"),
    "optim.skip_spikes": (0.0, "skipping of updates is not supported there"),
}


def check(config, cfg, step):
    """Raises ValueError, naming the key, for a config that --lowering=shard cannot compile."""
    for name, (only, why) in REFUSED.items():
        section, key = name.split(".")
        if (value := config[section][key]) != only:
            raise ValueError(f"{name}={value} with parallel.lowering=shard: {why}; use {name}={only}, or --lowering=manual")
    if cfg.lora or cfg.frozen[0]:
        raise ValueError("parallel.lowering=shard trains every parameter; leave out lora.rank and train.freeze_include")
    if step != "train":
        raise ValueError(f"--step={step} with parallel.lowering=shard: it compiles training steps; use --lowering=manual")


def prepare(world, zero):
    """Sets MindSpore to partition the graphs that this process compiles. zero: the ZeRO stage, which is MindSpore's optimizer_level."""
    ms.set_auto_parallel_context(device_num=world, full_batch=True, parallel_mode="semi_auto_parallel", enable_alltoall=True)
    if zero:
        level = {"parallel_optimizer_threshold": 0, "optimizer_level": f"level{zero}"}
        ms.set_auto_parallel_context(enable_parallel_optimizer=True, parallel_optimizer_config=level)


def train_step(config, cfg, sharding):
    """Compiles and runs two steps. Returns {params, optimizer: {path: [local shape, dtype]}}, without gradients, which stay in the
    graph."""
    specs = param_specs(cfg)
    params = [ms.Parameter(initializer("zeros", padded(sharding, spec), ms.float32), name=path) for path, spec in tree_paths(specs)]
    m, v = ([_like(w, kind) for w in params] for kind in "mv")
    step = _compiled(config, cfg, sharding, specs, params, m, v)
    for at in range(TRAIN_STEPS):
        step(optim.scalars(config.optim, 1e-3, at), *_batch(config))
    held = {"params": params, "optimizer": (*m, *v)}
    return {kind: {w.name: [list(w.shape), "float32"] for w in tensors} for kind, tensors in held.items()}


def padded(sharding, spec):
    """Returns the global shape of a parameter, with padding: each dim is a multiple of its number of shards."""
    return [-(-n // sharding.shards(dim)) * sharding.shards(dim) for n, dim in zip(spec.shape, spec.dims)]


def _like(w, kind):
    state = w.clone("zeros")
    state.name = f"{kind}.{w.name}"
    return state


def _compiled(config, cfg, sharding, specs, params, m, v):
    """Returns step(scalars, *tensors of a micro-batch) -> loss."""
    kernels = choose_kernels(config.ops, cfg, sharding)
    loss_fn, tree = build(cfg, sharding, kernels=kernels, recompute=config.train.recompute).loss_fn, unflatten(specs, params)

    def loss_of(tokens, targets, segment_ids, positions, loss_weights):
        batch = {"tokens": tokens, "targets": targets, "segment_ids": segment_ids, "positions": positions, "loss_weights": loss_weights}
        return loss_fn(tree, batch)[0]

    grad, update = ms.value_and_grad(loss_of, None, weights=params), _update(config, sharding, specs, kernels)
    params, m, v = tuple(params), tuple(m), tuple(v)
    if config.parallel.micro_batches > 1:
        return _accumulated(grad, update, params, m, v, config.parallel.micro_batches)

    @ms.jit
    def step(values, *batch):  # flat arguments: the partitioner does not look into tuples
        loss, grads = grad(*batch)
        return ops.depend(loss, update(params, grads, m, v, values))

    return step


def _accumulated(grad, update, params, m, v, count):
    """Returns step(scalars, *tensors of a micro-batch) -> loss, which accumulates gradients over `count` equal micro-batches.

    It has two graphs. MindSpore partitions the one that accumulates, and sums its gradients over ranks. It does not partition the one that
    updates, which works on this rank's shards.
    """
    total, places = tuple(_like(w, "sum") for w in params), range(len(params))
    assign, depend, clear = ops.Assign(), ops.depend, _cleared()

    @ms.jit
    def accumulate(share, *batch):
        loss, grads = grad(*batch)
        done = loss
        for i in places:
            done = assign(total[i], depend(total[i], done) + share * depend(grads[i], done))
        return depend(loss, done)

    @ms.jit
    def finish(values):
        done = update(params, total, m, v, values)
        for i in places:
            done = assign(total[i], clear(depend(total[i], done)))
        return done

    def step(values, *batch):
        for _ in range(count):
            loss = accumulate(ms.Tensor(1 / count, ms.float32), *batch)
        ms.set_auto_parallel_context(parallel_mode="stand_alone")
        finish(values)
        ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel")
        return loss

    return step


def _cleared():
    """Returns f(x) -> zeros, also where x is not finite. ops.ZerosLike is not used, because a graph stores its result as a constant of full
    size."""
    greater, cast = ops.Greater(), ops.Cast()

    def cleared(x):
        return cast(greater(x, float("inf")), ms.float32)

    return cleared


def _update(config, sharding, specs, kernels):
    """Returns update(params, grads, m, v, scalars) -> gradient norm: the trainer's clipping and AdamW on flat tuples, in place.

    MindSpore partitions nothing after the gradients, so the update works on this rank's shards, and the norm is summed by our collectives.
    """
    flat = tree_leaves(specs)
    squares = zero.global_norm_squared(sharding.inside(), tree_leaves(place(sharding, specs)), optim.in_norm(specs))
    # The reference implementation, because the others read global shapes.
    control, leaf = optim.norm_control(config.optim), optim.leaf_update(config.optim, replace(kernels, adamw="reference"))
    kinds, count = tuple(optim.leaf_kind(config.optim, spec) for spec in flat), len(flat)
    sqrt, assign, depend = ops.Sqrt(), ops.Assign(), ops.depend

    def update(params, grads, m, v, values):
        norm = sqrt(squares(grads))
        scale, keep, _ = control(norm, values[0] * 0, values[3])
        done = scale
        for i in range(count):  # one after the other; otherwise MindSpore computes products such as b1 * m of all arrays first
            p, g, m_old, v_old = depend(params[i], done), depend(grads[i], done), depend(m[i], done), depend(v[i], done)
            new = leaf(values, scale, keep, kinds[i], p, g, m_old, v_old)
            done = assign(params[i], new[0]), assign(m[i], new[1]), assign(v[i], new[2])
        return depend(norm, done)

    return update


def _batch(config):
    """Returns a micro-batch of all data ranks, because with full_batch every rank takes the global batch."""
    shape = config.train.batch_size // config.parallel.micro_batches, config.train.seq_len
    ints = [ms.Tensor(np.ones(shape, np.int32)) for _ in range(4)]
    return (*ints, ms.Tensor(np.ones(shape, np.float32)))
