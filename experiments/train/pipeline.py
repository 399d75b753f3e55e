"""The training step of a pipeline: every rank runs the compiled functions of its stages, in the order of its list. See build_step.

A tree of a state is here a tuple of trees, one for each of a rank's stages; names of parameters are those of the whole model.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import mindspore as ms
import numpy as np
from mindspore import ops

from experiments.train import optim as optimizer
from experiments.train.accumulate import RunningSum
from experiments.train.batch import metric_weight, metrics_of, shares, split_batch, tensors, with_noise
from experiments.train.state import local_shapes, split_trainable, stage_placements
from experiments.train.update import build_clip, build_update
from layers import lora
from parallel import collectives, zero
from parallel.context import split as context
from parallel.graph.jit import jit
from parallel.graph.nested import flatten_in_graph, from_tuple, joined, to_tuple
from parallel.pipeline import schedule as pipeline
from parallel.pipeline.run import Executor
from parallel.step import grad_of_nested
from parallel.trees import merge, tree_leaves
from qwen3.model import metric_names
from qwen3.stages import build_stage, carried_shapes

EVAL_GROUP = 4  # times the stages: micro-batches of one run of forwards, after which all ranks wait for each other


def build_step(stages, has_peers):
    """step(state, batch, lr, step from 0) -> (state, metrics): gradient, accumulation over micro-batches, sum over ranks, clip, update.

    has_peers: whether there are other ranks, for which a first step compiles all stages at once.
    """
    cfg, config, sharding, mesh = stages.cfg, stages.config, stages.sharding, stages.sharding.mesh
    # flat, as MindSpore nests no more than 6 tuples, and the update's results are one level deeper than a rank's trees
    trainable = tuple(tree_leaves(stages.trainable))
    specs = tuple(p.spec for p in trainable)
    gradients, reduce_every_micro_batch = Gradients(stages, has_peers), stages.reduce_every_micro_batch
    sum_over_ranks = zero.sum_gradients(sharding, trainable)
    clip = build_clip(specs, trainable, sharding, config.optim, stages.kernels)
    update, changed, merge_changed = build_update(specs, trainable, sharding, config.optim, stages.kernels)

    def finish(params, grads, m, v, mean_norm, values):
        """The graph after the last micro-batch. ZeRO 2 and 3 have reduced after each, see build_backward; ZeRO 0 and 1 do so here."""
        if not reduce_every_micro_batch:
            grads = sum_over_ranks(grads)
        norm, factor, keep, mean_norm = clip(grads, mean_norm, values, ())
        p, m, v = update(params, grads, m, v, factor, keep, values)
        norm = ops.depend(norm, (p, m, v))  # a kernel that works in place is dropped where no result of the graph depends on it
        return norm, 1 - keep, changed(p, m, v, mean_norm)

    finish = jit(finish, order="dfs")

    def step(state, batch, lr, at):
        batch = context.cut(mesh, with_noise(cfg, config, mesh, batch, at))
        values = optimizer.scalars(config.optim, lr, at)
        grads, found = gradients.accumulated(state, batch)  # over the micro-batches, as the schedule orders them
        grads = sum_tied_embeddings(stages, grads)
        params, m, v = (tuple(tree_leaves(state[name])) if name in state else None for name in ("params", "m", "v"))
        norm, skipped, new = finish(params, tuple(grads), m, v, state["norm"], values)
        return merge_changed(state, new), metrics_of(cfg, config, lr, *_objective_and_metrics(cfg, found), norm, skipped)

    return step


def build_backward(stages, number, add):
    """backward(inputs, frozen, sums, share, batch, cotangents): the graph of a micro-batch's gradient in a stage. add: of its RunningSum.

    It returns what the RunningSum takes; behind the first stage, also the cotangents for the stage before; and of the last stage, also
    (objective, metrics).

    inputs: (params nested,), and behind the first stage (params, carried), which came from the stage before. cotangents: of the results,
    from the stage after; None for the last, which has the loss.
    """
    k, first, last = stages.numbers.index(number), number == 0, number == stages.last
    trainable, frozen = stages.trainable_of[k], stages.frozen_of[k]
    stage, tree_of = stages.build(number), joined(stages.placed[k], trainable, frozen)
    sum_over_ranks, reduce_every_micro_batch = zero.sum_gradients(stages.sharding, tree_leaves(trainable)), stages.reduce_every_micro_batch
    flatten, sent, cast, total = flatten_in_graph(to_tuple(trainable)), len(stages.carried(number + 1)), ops.Cast(), ops.ReduceSum()

    def results(inputs, frozen, batch):
        params = tree_of(inputs[0], frozen)
        if first:
            return stage(params, (), batch)
        return stage(params, inputs[1], batch)

    def along(inputs, frozen, batch, cotangents):
        """A number whose gradient is that of the stage's results, times these."""
        out, value = results(inputs, frozen, batch), 0.0
        for i in range(sent):
            value = value + total(cast(out[i], ms.float32) * cast(cotangents[i], ms.float32), ())
        return value

    gradient = grad_of_nested(results, metric_names(stages.cfg)) if last else grad_of_nested(along)

    def backward(inputs, frozen, sums, share, batch, cotangents):
        if last:
            out, grads = gradient(inputs, frozen, batch)
        else:
            out, grads = gradient(inputs, frozen, batch, cotangents)
        of_params = flatten(grads[0])
        if reduce_every_micro_batch:  # ZeRO 2 and 3: the sum is of this rank's shard alone
            of_params = sum_over_ranks(of_params)
        added = add(share, sums, of_params)
        if first:
            return (added,)
        if last:
            return added, grads[1], out
        return added, grads[1]

    return jit(backward)


@dataclass(frozen=True)
class Work:
    """A batch under way: the state, the tensors of each micro-batch, its share of the loss weight, and the sum of the metrics so far."""

    state: dict
    batches: list
    shares: np.ndarray
    found: np.ndarray


class Gradients:
    """The gradients of a batch: runs the rank's list of actions of a training step, and adds up those of the micro-batches."""

    def __init__(self, stages, has_peers):
        config, mesh = stages.config, stages.mesh
        self.stages, self.micro_batches = stages, config.parallel.micro_batches
        lists = pipeline.schedule(config.parallel.pp_schedule, mesh.pp, self.micro_batches, config.parallel.virtual_stages)
        self.actions = lists[mesh.index(("pp",))]
        axes, in_place = "state" if stages.reduce_every_micro_batch else "used", optimizer.changes_in_place(stages.kernels)
        shapes = [tuple(tree_leaves(local_shapes(mesh, trainable, axes))) for trainable in stages.trainable_of]
        self.sums = {s: RunningSum(each, in_place) for s, each in zip(stages.numbers, shapes)}
        self.backward = {s: build_backward(stages, s, self.sums[s].add) for s in stages.numbers}
        self.compiled = not has_peers

    def accumulated(self, state, batch):
        """(flat gradients of what trains of this rank's parameters, [objective, *metrics] on all ranks)"""
        stages, slices = self.stages, split_batch(batch, self.micro_batches)
        stages.rows = slices[0]["tokens"].size
        work = Work(state, [tensors(part) for part in slices], shares(stages.mesh, slices), np.zeros(count_found(stages.cfg)))
        if not self.compiled:
            self._start()
            stages.compile_all(partial(self._both_ways, replace(work, found=np.zeros_like(work.found))))
            self.compiled = True
        self._start()
        stages.executor.run(self.actions, partial(self._forward, work), partial(self._backward, work))
        found = collectives.host_sum(stages.mesh, ("pp",), work.found)
        return [g for s in stages.numbers for g in self.sums[s].arrays], found

    def _start(self):
        for each in self.sums.values():
            each.start()

    def _both_ways(self, work, stage, carried, cotangents):
        self._forward(work, pipeline.Forward(0, stage), carried)
        self._backward(work, pipeline.Backward(0, stage), carried, cotangents)

    def _forward(self, work, action, carried):
        if action.stage == self.stages.last:
            return ()  # its backward computes it
        params = self.stages.params_of(work.state, action.stage)
        return self.stages.forward[action.stage](params, carried or None, work.batches[action.micro])

    def _backward(self, work, action, carried, cotangents):
        s, share, running_sum = action.stage, work.shares[action.micro], self.sums[action.stage]
        params, frozen = work.state["params"][self.stages.numbers.index(s)], self.stages.frozen_in(work.state, s)
        inputs, batch = (params, carried) if carried else (params,), work.batches[action.micro]
        weight = ms.Tensor(share, ms.float32)
        added, *out = self.backward[s](inputs, frozen, running_sum.arrays, weight, batch, cotangents or None)
        running_sum.take(added)
        if s == self.stages.last:
            objective, aux = out.pop()
            each = [share * objective.asnumpy().reshape(-1)]
            for name, x in zip(metric_names(self.stages.cfg), aux):
                each.append(metric_weight(name, share) * x.asnumpy().reshape(-1))
            work.found[:] += np.concatenate(each)
        return out[0] if out else ()


def sum_tied_embeddings(stages, grads):
    """The flat gradients, with those of a matrix that the first and the last stage have, tied embeddings, summed over both."""
    mesh, here = stages.mesh, stages.mesh.index(("pp",))
    for i, p in enumerate(tree_leaves(stages.trainable)):
        if len(p.holders) < 2:
            continue
        a, b = p.holders
        if here == a:
            grads[i] = grads[i] + collectives.receive(mesh, b, grads[i].shape, ms.float32)
            collectives.send(mesh, b, grads[i])
        else:
            collectives.send(mesh, a, grads[i])
            grads[i] = collectives.receive(mesh, a, grads[i].shape, ms.float32)
    return grads


def count_found(cfg):
    """Numbers that a step finds of a batch: the objective, and those of metric_names."""
    return 1 + sum(math.prod(shape) for shape in _metric_shapes(cfg))


def _metric_shapes(cfg):
    """The shapes of the metrics of metric_names."""
    return [(len(cfg.moe_layers), cfg.num_experts) if name == "expert_load" else () for name in metric_names(cfg)]


def _objective_and_metrics(cfg, found):
    """(objective, [metrics]) from the vector of all their numbers."""
    out, at = [], 1
    for shape in _metric_shapes(cfg):
        out.append(found[at : at + math.prod(shape)].reshape(shape))
        at += math.prod(shape)
    return found[0], out


def build_evaluate(stages):
    """evaluate(state, batches) -> nats per target: micro-batches of the size of a step's, forward through all stages."""
    mesh, parallel, cfg = stages.mesh, stages.config.parallel, lora.without_dropout(stages.cfg)
    judge = stages.build(stages.last, cfg)
    forwards = stages.forward if cfg == stages.cfg else {s: stages.compiled_forward(s, cfg) for s in stages.forward}

    def loss(params, carried, batch):
        _, metrics = judge(params, carried, batch)
        return metrics["loss"], metrics["tokens"]

    loss, compiled = jit(loss), []

    def run(state, group):
        sums, batches = np.zeros(2), [tensors(part) for part in group]
        stages.rows = group[0]["tokens"].size

        def forward(action, carried):
            params, batch = stages.params_of(state, action.stage), batches[action.micro]
            if action.stage < stages.last:
                return forwards[action.stage](params, carried or None, batch)
            nats, tokens = (float(x.asnumpy()) for x in loss(params, carried, batch))
            sums[:] += nats * tokens, tokens
            return ()

        if not compiled:
            stages.compile_all(lambda stage, carried, _: forward(pipeline.Forward(0, stage), carried))
            compiled.append(True)
            sums[:] = 0
        lists = pipeline.forward_only(mesh.pp, len(group), parallel.virtual_stages)
        stages.executor.run(lists[mesh.index(("pp",))], forward)
        return collectives.host_sum(mesh, ("pp",), sums)

    def evaluate(state, batches):
        cut = (context.cut(mesh, batch) for batch in batches)
        every = (part for batch in cut for part in split_batch(batch, parallel.micro_batches))
        sums = np.zeros(2)
        while group := list(islice(every, EVAL_GROUP * len(stages.layers))):
            sums += run(state, group)
        return float(sums[0] / max(sums[1], 1.0))

    return evaluate


class Stages:
    """The stages of the model, of which this rank has those of `numbers`; and what their functions send to each other.

    placed: this rank's tree of Placed, a tuple of one a stage; model_placed: that of the whole model. trainable, frozen: its two parts, see
    split_trainable; trainable_of[k], frozen_of[k]: the part of the k-th of this rank's stages, None where it has nothing.
    """

    def __init__(self, cfg, config, sharding, kernels):
        self.cfg, self.config, self.sharding, self.mesh, self.kernels = cfg, config, sharding, sharding.mesh, kernels
        self.layers, every, self.model_placed = stage_placements(cfg, config, sharding)
        _check_trains(every)
        self.last = len(self.layers) - 1
        self.numbers = tuple(range(self.mesh.index(("pp",)), len(self.layers), self.mesh.pp))
        self.placed = tuple(every[s] for s in self.numbers)
        self.trainable, self.frozen = split_trainable(self.placed)
        self.trainable_of, self.frozen_of = (
            tuple(_of_stage(tree, k) for k in range(len(self.numbers))) for tree in (self.trainable, self.frozen)
        )
        self.reduce_every_micro_batch = sharding.zero >= 2
        self.executor = Executor(len(self.layers), self.send, self.receive)
        self.forward = {s: self.compiled_forward(s, cfg) for s in self.numbers if s != self.last}
        self.rows = 0  # tokens of a data rank in the micro-batches under way

    def carried(self, stage):
        """[(shape, dtype)] of what arrives at a stage from the one before; nothing at the first, or behind the last."""
        return carried_shapes(self.cfg, self.sharding, self.layers[stage], self.rows) if 0 < stage <= self.last else []

    def build(self, number, cfg=None):
        """f(params, carried, batch) of a stage: see qwen3.stages.build_stage."""
        ends, recompute = (number == 0, number == self.last), self.config.train.recompute
        return build_stage(cfg or self.cfg, self.sharding, self.kernels, self.layers[number], *ends, recompute)

    def compiled_forward(self, number, cfg):
        """f(params, carried, batch), compiled; carried is None for the first stage."""
        stage, first = self.build(number, cfg), number == 0

        def forward(params, carried, batch):
            if first:
                return stage(params, (), batch)
            return stage(params, carried, batch)

        return jit(forward)

    def params_of(self, state, stage):
        """A stage's parameters of a state, as a tree."""
        k = self.numbers.index(stage)
        frozen = from_tuple(self.frozen_of[k], self.frozen_in(state, stage)) if self.frozen_of[k] else None
        return merge(self.placed[k], from_tuple(self.trainable_of[k], state["params"][k]), frozen)

    def frozen_in(self, state, stage):
        """A stage's frozen parameters, as nested tuples; None where it has none."""
        k = self.numbers.index(stage)
        return state["frozen"][sum(each is not None for each in self.frozen_of[:k])] if self.frozen_of[k] else None

    def compile_all(self, call):
        """call(stage, its input, cotangents of its result) on zeros, so that all ranks compile at once, not one when the last has done."""
        for s in self.numbers:
            call(s, *(tuple(ops.zeros(*each) for each in self.carried(at)) for at in (s, s + 1)))

    def send(self, message, rank):
        for x in message:
            collectives.send(self.mesh, rank, x)

    def receive(self, action, rank):
        stage = action.stage + (not isinstance(action, pipeline.Forward))  # gradients are of what the next stage was sent
        return tuple(collectives.receive(self.mesh, rank, *each) for each in self.carried(stage))


def _of_stage(tree, k):
    """The part of the k-th stage of a tree of them; None where it has none."""
    return tree.get(str(k)) if isinstance(tree, dict) else tree and tree[k]


def _check_trains(stages):
    for number, placed in enumerate(stages):
        if split_trainable(placed)[0] is None:
            raise ValueError(
                f"train.freeze_include leaves nothing to train in pipeline stage {number}; take patterns out, use a smaller --pp, or other"
                " parallel.stage_layers"
            )
