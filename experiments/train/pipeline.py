"""The training step under pipeline parallelism: each rank runs the compiled functions of its stages in the order of the schedule.

See build_step. In a state, each tree is here a tuple of trees, one for each stage of the rank. Parameters have the names of the full model:
the first layer of a later stage may be "layers.8".
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
from experiments.train.batch import metric_weight, metrics_of, shares, split_batch, tensors, tokens_of_rank, with_dropout_seeds
from experiments.train.state import local_shapes, split_trainable, stage_placements
from experiments.train.update import build_clip, build_update
from layers import lora
from parallel import collectives, zero
from parallel.graph.jit import jit
from parallel.graph.nested import flatten_in_graph, from_tuple, joined, to_tuple
from parallel.pipeline import schedule as pipeline
from parallel.pipeline.run import Executor
from parallel.step import grad_of_nested
from parallel.trees import merge, tree_leaves
from qwen3.model import metric_names
from qwen3.stages import build_stage, carried_shapes

EVAL_GROUP = 4  # an evaluation runs this many micro-batches per stage between two synchronizations of the ranks


def build_step(stages, has_peers):
    """Returns step(state, batch, lr, step from 0) -> (state, metrics): gradients, accumulation, sum over ranks, clip, update.

    has_peers: whether the other ranks run too. If so, the first step first compiles all stages, so that the ranks compile at one time.
    """
    cfg, config, sharding, mesh = stages.cfg, stages.config, stages.sharding, stages.sharding.mesh
    # flat: MindSpore allows tuples nested 6 deep, and the results of the update are one level deeper than a rank's trees
    trainable = tuple(tree_leaves(stages.trainable))
    specs = tuple(p.spec for p in trainable)
    gradients, reduce_every_micro_batch = Gradients(stages, has_peers), stages.reduce_every_micro_batch
    sum_over_ranks = zero.sum_gradients(sharding, trainable)
    clip = build_clip(specs, trainable, sharding, config.optim, stages.kernels)
    update, changed, merge_changed = build_update(specs, trainable, sharding, config.optim, stages.kernels)

    def finish(params, grads, m, v, mean_norm, values):
        """The graph after the last micro-batch. ZeRO 0 and 1 reduce here; ZeRO 2 and 3 after every micro-batch, in build_backward."""
        if not reduce_every_micro_batch:
            grads = sum_over_ranks(grads)
        norm, factor, keep, mean_norm = clip(grads, mean_norm, values, ())
        p, m, v = update(params, grads, m, v, factor, keep, values)
        norm = ops.depend(norm, (p, m, v))  # a kernel that works in place is dropped where no result of the graph depends on it
        return norm, 1 - keep, changed(p, m, v, mean_norm)

    finish = jit(finish, order="dfs")

    def step(state, batch, lr, at):
        batch = tokens_of_rank(sharding, with_dropout_seeds(cfg, config, mesh, batch, at))
        values = optimizer.scalars(config.optim, lr, at)
        grads, metric_sums = gradients.accumulated(state, batch)
        grads = sum_tied_embeddings(stages, grads)
        params, m, v = (tuple(tree_leaves(state[name])) if name in state else None for name in ("params", "m", "v"))
        norm, skipped, new = finish(params, tuple(grads), m, v, state["norm"], values)
        return merge_changed(state, new), metrics_of(
            cfg, config, metric_names(cfg), lr, *_objective_and_metrics(cfg, metric_sums), norm, skipped
        )

    return step


def build_backward(stages, number, add):
    """Returns backward(inputs, frozen, sums, share, batch, cotangents), the graph of the gradient of one micro-batch in one stage.

    add: RunningSum.add of the stage. inputs: (params,) in the first stage, else (params, carried), where `carried` came from the previous
    stage. cotangents: gradients of the stage's results, from the next stage; None in the last stage, which computes the loss.

    Returns (added,) in the first stage, (added, cotangents for the previous stage) in the others, and in the last also (objective,
    metrics). `added` goes to RunningSum.take.
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

    def inner_product(inputs, frozen, batch, cotangents):
        """The inner product of the results and the cotangents: its gradient is the vector-Jacobian product of the stage."""
        out, value = results(inputs, frozen, batch), 0.0
        for i in range(sent):
            value = value + total(cast(out[i], ms.float32) * cast(cotangents[i], ms.float32), ())
        return value

    gradient = grad_of_nested(results, metric_names(stages.cfg)) if last else grad_of_nested(inner_product)

    def backward(inputs, frozen, sums, share, batch, cotangents):
        if last:
            out, grads = gradient(inputs, frozen, batch)
        else:
            out, grads = gradient(inputs, frozen, batch, cotangents)
        of_params = flatten(grads[0])
        if reduce_every_micro_batch:  # ZeRO 2 and 3: the running sum has this rank's shard alone
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
    """A batch in progress: the state, each micro-batch's tensors and share of the loss weight, and the sums of the metrics so far."""

    state: dict
    batches: list
    shares: np.ndarray
    metric_sums: np.ndarray


class Gradients:
    """Computes the gradients of a batch: runs the rank's actions of the pipeline schedule and sums over the micro-batches."""

    def __init__(self, stages, has_peers):
        config, mesh = stages.config, stages.mesh
        self.stages, self.micro_batches = stages, config.parallel.micro_batches
        lists = pipeline.schedule(config.parallel.pp_schedule, mesh.pp, self.micro_batches, config.parallel.virtual_stages)
        self.actions = lists[mesh.index(("pp",))]
        axes, in_place = "state" if stages.reduce_every_micro_batch else "used", optimizer.changes_in_place(stages.kernels)
        shapes = [tuple(tree_leaves(local_shapes(mesh, trainable, axes))) for trainable in stages.trainable_of]
        self.sums = {s: RunningSum(each, in_place) for s, each in zip(stages.numbers, shapes)}
        self.backward = {s: build_backward(stages, s, self.sums[s].add) for s in stages.numbers}
        self.has_peers, self.compiled = has_peers, set()  # sizes of micro-batches that all stages are compiled for

    def accumulated(self, state, batch):
        """Returns (flat gradients of this rank's trainable parameters, [objective, *metrics], which all ranks get)."""
        stages, slices = self.stages, split_batch(batch, self.micro_batches)
        stages.rows = slices[0]["tokens"].size
        metric_sums = np.zeros(count_metrics(stages.cfg))
        work = Work(state, [tensors(micro_batch) for micro_batch in slices], shares(stages.mesh, slices), metric_sums)
        if self.has_peers and stages.rows not in self.compiled:
            self._start()
            stages.compile_all(partial(self._both_ways, replace(work, metric_sums=np.zeros_like(metric_sums))))
            self.compiled.add(stages.rows)
        self._start()
        stages.executor.run(self.actions, partial(self._forward, work), partial(self._backward, work))
        metric_sums = collectives.host_sum(stages.mesh, ("pp",), metric_sums)
        return [g for s in stages.numbers for g in self.sums[s].arrays], metric_sums

    def _start(self):
        for each in self.sums.values():
            each.start()

    def _both_ways(self, work, stage, carried, cotangents):
        self._forward(work, pipeline.Forward(0, stage), carried)
        self._backward(work, pipeline.Backward(0, stage), carried, cotangents)

    def _forward(self, work, action, carried):
        if action.stage == self.stages.last:
            return ()  # the backward of the last stage computes the forward too
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
            work.metric_sums[:] += np.concatenate(each)
        return out[0] if out else ()


def sum_tied_embeddings(stages, grads):
    """Sums the gradient of tied embeddings over the first and the last stage, which both have the matrix. grads: flat, changed in place."""
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


def count_metrics(cfg):
    """How many numbers a step reports for a batch: the objective, and the elements of all metrics of metric_names."""
    return 1 + sum(math.prod(shape) for shape in _metric_shapes(cfg))


def _metric_shapes(cfg):
    """The shapes of the metrics of metric_names."""
    return [(len(cfg.moe_layers), cfg.num_experts) if name == "expert_load" else () for name in metric_names(cfg)]


def _objective_and_metrics(cfg, numbers):
    """Splits the vector of all numbers into (objective, [metrics])."""
    out, at = [], 1
    for shape in _metric_shapes(cfg):
        out.append(numbers[at : at + math.prod(shape)].reshape(shape))
        at += math.prod(shape)
    return numbers[0], out


def build_evaluate(stages):
    """Returns evaluate(state, batches) -> cross-entropy in nats per target. Micro-batches have the size of a training step's."""
    mesh, parallel, cfg = stages.mesh, stages.config.parallel, lora.without_dropout(stages.cfg)
    last_stage = stages.build(stages.last, cfg)
    forwards = stages.forward if cfg == stages.cfg else {s: stages.compiled_forward(s, cfg) for s in stages.forward}

    def loss(params, carried, batch):
        _, metrics = last_stage(params, carried, batch)
        return metrics["loss"], metrics["tokens"]

    loss, compiled = jit(loss), []

    def run(state, group):
        sums, batches = np.zeros(2), [tensors(micro_batch) for micro_batch in group]
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
        own = (tokens_of_rank(stages.sharding, batch) for batch in batches)
        micro_batches = (each for batch in own for each in split_batch(batch, parallel.micro_batches))
        sums = np.zeros(2)
        while group := list(islice(micro_batches, EVAL_GROUP * len(stages.layers))):
            sums += run(state, group)
        return float(sums[0] / max(sums[1], 1.0))

    return evaluate


class Stages:
    """The pipeline stages of a model: this rank's stages, their compiled forwards, and the messages between stages.

    numbers: this rank's stages among all. placed: their trees of Placed, a tuple; model_placed: the tree of the full model. trainable,
    frozen: `placed` without the other kind of parameters, see split_trainable. trainable_of[k], frozen_of[k]: these trees for the k-th of
    the rank's stages, None if it has no such parameters.
    """

    def __init__(self, cfg, config, sharding, kernels):
        self.cfg, self.config, self.sharding, self.mesh, self.kernels = cfg, config, sharding, sharding.mesh, kernels
        self.layers, placed_stages, self.model_placed = stage_placements(cfg, config, sharding)
        _check_trains(placed_stages)
        self.last = len(self.layers) - 1
        self.numbers = tuple(range(self.mesh.index(("pp",)), len(self.layers), self.mesh.pp))
        self.placed = tuple(placed_stages[s] for s in self.numbers)
        self.trainable, self.frozen = split_trainable(self.placed)
        self.trainable_of, self.frozen_of = (
            tuple(_of_stage(tree, k) for k in range(len(self.numbers))) for tree in (self.trainable, self.frozen)
        )
        self.reduce_every_micro_batch = sharding.zero >= 2
        self.executor = Executor(len(self.layers), self.send, self.receive)
        self.forward = {s: self.compiled_forward(s, cfg) for s in self.numbers if s != self.last}
        self.rows = 0  # tokens of this data rank in the current micro-batches

    def carried(self, stage):
        """[(shape, dtype)] of the tensors that `stage` receives from the previous one; [] for the first stage and for last + 1."""
        return carried_shapes(self.cfg, self.sharding, self.layers[stage], self.rows) if 0 < stage <= self.last else []

    def build(self, number, cfg=None):
        """Returns f(params, carried, batch) of a stage, see qwen3.stages.build_stage."""
        ends, train = (number == 0, number == self.last), self.config.train
        return build_stage(cfg or self.cfg, self.sharding, self.kernels, self.layers[number], *ends, train.recompute, train.loss_chunks)

    def compiled_forward(self, number, cfg):
        """Returns f(params, carried, batch) of a stage, compiled; carried is None for the first stage."""
        stage, first = self.build(number, cfg), number == 0

        def forward(params, carried, batch):
            if first:
                return stage(params, (), batch)
            return stage(params, carried, batch)

        return jit(forward)

    def params_of(self, state, stage):
        """The tree of a stage's parameters in a state."""
        k = self.numbers.index(stage)
        frozen = from_tuple(self.frozen_of[k], self.frozen_in(state, stage)) if self.frozen_of[k] else None
        return merge(self.placed[k], from_tuple(self.trainable_of[k], state["params"][k]), frozen)

    def frozen_in(self, state, stage):
        """A stage's frozen parameters, as nested tuples; None where it has none."""
        k = self.numbers.index(stage)
        return state["frozen"][sum(each is not None for each in self.frozen_of[:k])] if self.frozen_of[k] else None

    def compile_all(self, call):
        """Runs call(stage, carried, cotangents) on zeros for each of the rank's stages. All ranks then compile at once, not one by one."""
        for s in self.numbers:
            call(s, *(tuple(ops.zeros(*each) for each in self.carried(at)) for at in (s, s + 1)))

    def send(self, message, rank):
        for x in message:
            collectives.send(self.mesh, rank, x)

    def receive(self, action, rank):
        stage = action.stage + (not isinstance(action, pipeline.Forward))  # the gradient has the shapes of what was sent to the next stage
        return tuple(collectives.receive(self.mesh, rank, *each) for each in self.carried(stage))


def _of_stage(tree, k):
    """The k-th stage's tree, of a tuple of trees or a dict of them by number, see parallel.trees.select; None if it has none."""
    return tree.get(str(k)) if isinstance(tree, dict) else tree and tree[k]


def _check_trains(stages):
    for number, placed in enumerate(stages):
        if split_trainable(placed)[0] is None:
            raise ValueError(
                f"train.freeze_include leaves nothing to train in pipeline stage {number}; take patterns out, use a smaller --pp, or other"
                " parallel.stage_layers"
            )
