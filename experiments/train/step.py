"""The training step on one device, or in any layout without pipeline parallelism. See build_step."""

import mindspore as ms
from mindspore import ops

from experiments.posttrain import policy, preference
from experiments.train import optim as optimizer
from experiments.train.accumulate import RunningSum
from experiments.train.batch import mean_over_targets, metrics_of, number, over_micro_batches, tensors, tokens_of_rank, with_dropout_seeds
from experiments.train.state import check_trains, full_tree, local_shapes, split_trainable
from experiments.train.update import build_clip, build_update
from layers import lora
from parallel import zero
from parallel.graph.jit import jit
from parallel.graph.nested import flatten_in_graph, joined, to_tuple
from parallel.step import grad_of_nested
from parallel.trees import tree_leaves
from qwen3.model import build, metric_names, param_specs, stacked_specs


def build_step(cfg, config, sharding, kernels, placed, scan):
    """Returns step(state, batch, lr, step from 0) -> (state, metrics): gradients, accumulation, sum over ranks, clip, update.

    placed: the tree of Placed of the model; with scan, its layers are stacked. Raises ValueError if no parameter is trainable.
    """
    check_trains(placed)
    trainable, _ = split_trainable(placed)
    specs, _ = split_trainable(stacked_specs(cfg) if scan else param_specs(cfg))
    micro_batches = config.parallel.micro_batches
    reduce_every_micro_batch = micro_batches > 1 and sharding.zero >= 2  # then the running sum has this rank's shard alone

    options = cfg, sharding, scan, kernels, config.train.recompute, config.train.loss_chunks
    if config.prefer.loss:
        model, names = preference.Preference(config, *options), preference.names(cfg)
    elif config.rl.loss:
        model, names = policy.Policy(config, *options), policy.names(cfg)
    else:
        model, names = build(*options), metric_names(cfg)
    gradient = _build_gradient(model.loss_fn, placed, names)
    sum_shapes = tree_leaves(local_shapes(sharding.mesh, trainable, "state" if reduce_every_micro_batch else "used"))
    running_sum = RunningSum(tuple(sum_shapes), optimizer.changes_in_place(kernels))
    add = running_sum.add
    sum_over_ranks = zero.sum_gradients(sharding, tree_leaves(trainable))
    clip = build_clip(specs, trainable, sharding, config.optim, kernels)
    update, changed, merge = build_update(specs, trainable, sharding, config.optim, kernels)

    def step_in_one_graph(params, frozen, m, v, mean_norm, values, batch):
        """The graph of the full step, for a step of one micro-batch."""
        loss, aux, grads = gradient(params, frozen, batch)
        grads = sum_over_ranks(grads)
        norm, factor, keep, mean_norm = clip(grads, mean_norm, values, (loss, aux))
        p, m, v = update(params, grads, m, v, factor, keep, values)
        norm = ops.depend(norm, (p, m, v))  # a kernel that works in place is dropped where no result of the graph depends on it
        return loss, aux, norm, 1 - keep, changed(p, m, v, mean_norm)

    def accumulate(params, frozen, total, share, batch):
        """The graph of each of several micro-batches. ZeRO 2 and 3 reduce gradients here; ZeRO 0 and 1 once, in finish."""
        loss, aux, grads = gradient(params, frozen, batch)
        if reduce_every_micro_batch:
            grads = sum_over_ranks(grads)
        return loss, aux, add(share, total, grads)

    def finish(params, grads, m, v, mean_norm, values):
        """The graph after the last of several micro-batches."""
        if not reduce_every_micro_batch:
            grads = sum_over_ranks(grads)
        norm, factor, keep, mean_norm = clip(grads, mean_norm, values, ())
        p, m, v = update(params, grads, m, v, factor, keep, values)
        return ops.depend(norm, (p, m, v)), 1 - keep, changed(p, m, v, mean_norm)

    step_in_one_graph, accumulate, finish = jit(step_in_one_graph, order="dfs"), jit(accumulate), jit(finish, order="dfs")

    def step(state, batch, lr, at):
        batch = tokens_of_rank(sharding, with_dropout_seeds(cfg, config, sharding.mesh, batch, at))
        values = optimizer.scalars(config.optim, lr, at)
        params, frozen, m, v, mean_norm = (state.get(name) for name in ("params", "frozen", "m", "v", "norm"))
        if micro_batches == 1:
            loss, aux, norm, skipped, new = step_in_one_graph(params, frozen, m, v, mean_norm, values, tensors(batch))
        else:
            running_sum.start()

            def compute(share, micro_batch):
                share = ms.Tensor(share, ms.float32)
                loss, aux, added = accumulate(params, frozen, running_sum.arrays, share, tensors(micro_batch))
                running_sum.take(added)
                return loss, aux

            loss, aux = over_micro_batches(sharding.mesh, batch, micro_batches, names, compute)
            norm, skipped, new = finish(params, running_sum.arrays, m, v, mean_norm, values)
        return merge(state, new), metrics_of(cfg, config, names, lr, loss, aux, norm, skipped)

    return step


def _build_gradient(loss_fn, placed, names):
    """Returns gradient(params, frozen, batch) -> (loss, metrics called `names`, flat gradients of params), for use in a graph.

    params, frozen: nested tuples; frozen is None if nothing is frozen.
    """
    trainable, frozen = split_trainable(placed)
    tree_of, flatten = joined(placed, trainable, frozen), flatten_in_graph(to_tuple(trainable))

    def loss(params, frozen, batch):
        return loss_fn(tree_of(params, frozen), batch)

    value_and_grad = grad_of_nested(loss, names)

    def gradient(params, frozen, batch):
        (loss, aux), grads = value_and_grad(params, frozen, batch)
        return loss, aux, flatten(grads)

    return gradient


def build_evaluate(cfg, config, sharding, kernels, placed, scan):
    """Returns evaluate(state, batches) -> cross-entropy in nats per target, over all ranks' batches."""
    options = lora.without_dropout(cfg), sharding, scan, kernels, "none", config.train.loss_chunks
    if config.prefer.loss:
        return _build_evaluate_pairs(preference.Preference(config, *options), sharding, placed)
    loss_fn = build(*options).loss_fn

    def loss_of(params, batch):
        _, metrics = loss_fn(params, batch)
        return metrics["loss"], metrics["tokens"]

    loss_of = jit(loss_of)

    def evaluate(state, batches):
        params = full_tree(placed, state["params"], state.get("frozen"))
        return mean_over_targets(loss_of(params, tensors(tokens_of_rank(sharding, batch))) for batch in batches)

    return evaluate


def _build_evaluate_pairs(model, sharding, placed):
    """Returns evaluate(state, batches) -> the metrics of pairs of answers, over all ranks' batches: see preference.finished."""
    names = ("loss", *preference.SUMS)

    def metrics_of_batch(params, batch):
        _, metrics = model.loss_fn(params, batch)
        picked = ()
        for name in names:
            picked += (metrics[name],)
        return picked

    metrics_of_batch = jit(metrics_of_batch)

    def evaluate(state, batches):
        params, totals = full_tree(placed, state["params"], state.get("frozen")), dict.fromkeys(names, 0.0)
        for batch in batches:
            found = dict(zip(names, map(number, metrics_of_batch(params, tensors(tokens_of_rank(sharding, batch))))))
            found["loss"] *= found["pairs"]
            totals = {name: totals[name] + found[name] for name in names}
        totals["loss"] /= max(totals["pairs"], 1.0)
        return preference.finished(totals, model.settings.loss)

    return evaluate


def build_score(cfg, config, sharding, kernels, placed, scan):
    """Returns score(state, batch) -> float32 [rows, S] on this data rank, the nats of each target of a batch of full rows."""
    scored = jit(build(lora.without_dropout(cfg), sharding, scan, kernels, loss_chunks=config.train.loss_chunks).score)

    def score(state, batch):
        found = tensors(tokens_of_rank(sharding, batch))
        given = (found[key] for key in ("tokens", "targets", "positions", "segment_ids"))
        return scored(full_tree(placed, state["params"], state.get("frozen")), *given)[0].asnumpy()

    return score
