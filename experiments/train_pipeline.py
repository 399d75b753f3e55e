"""The training step of a pipeline: every rank runs the compiled functions of its stages, in the order of its list of actions.

What a state's trees are made of here is one tree for each of a rank's stages; names of parameters are those of the whole model.
"""

import math
from dataclasses import replace
from itertools import islice

import mindspore as ms
import numpy as np
from mindspore import ops

from experiments import optim as optimizer
from experiments import train
from experiments.accumulate import RunningSum
from layers import lora
from parallel import collectives, context, pipeline, zero
from parallel.pipeline_run import Executor
from parallel.placement import Spread, load, place, reader
from parallel.sharding import DATA
from parallel.spec import merge, tree_leaves, tree_map
from parallel.step import flatten_in_graph, from_tuple, grad_of_nested, jit, joined, to_tuple
from qwen3.model import choose_kernels, metric_names, param_specs
from qwen3.stages import build_stage, carried_shapes, stage_specs

EVAL_GROUP = 4  # times the stages: micro-batches of one run of forwards, after which all ranks wait for each other


def build_program(cfg, config, sharding, waits=True):
    """experiments.train's Program for a mesh with pp > 1. waits: whether there are other ranks, for which a first step compiles all at
    once; a simulated rank has none."""
    parts = Parts(cfg, config, sharding, waits)
    step, executor, held_there = _step(parts), parts.executor, optimizer.resident(parts.kernels)

    def init(params):
        read, (moving, fixed) = params if callable(params) else reader(params), parts.kinds
        state = {"params": to_tuple(load(sharding.mesh, moving, read))}
        state.update(optimizer.init_state(to_tuple(train.shapes(sharding.mesh, moving, "state")), config.optim))
        return held_there({**state, "frozen": to_tuple(load(sharding.mesh, fixed, read))} if fixed else state)

    def spread(state):
        moving, fixed = parts.kinds
        mine = {p.path: w for p, w in zip(tree_leaves(moving), tree_leaves(state["params"]))}
        mine.update({p.path: w for p, w in zip(tree_leaves(fixed), tree_leaves(state["frozen"]))} if fixed else {})
        return tree_map(lambda p: Spread(sharding.mesh, p, mine.get(p.path)), parts.whole)

    def params_of(state):
        return tree_map(lambda leaf: ms.Tensor(np.array(leaf.asnumpy(everywhere=True))), spread(state))

    def held(state=None):
        of = parts.placed if state else parts.whole  # as a checkpoint has them all
        return train.held_arrays(of, 0, config.optim, state, with_frozen=cfg.lora is None)

    def restore(read, norm):
        return held_there(train.restored(sharding.mesh, parts.placed, 0, config.optim, read, norm))

    return train.Program(init, params_of, step, _evaluate(parts), held, restore, spread, executor)


def placements(cfg, config, sharding):
    """(the range of layers of each stage, the tree of Placed of each, and that of the whole model)"""
    parallel, pp, holders = config.parallel, sharding.mesh.pp, {}
    layers = pipeline.stage_ranges(cfg.num_layers, pp, parallel.virtual_stages, tuple(parallel.stage_layers))
    stages = [place(sharding, stage_specs(cfg, each, s == 0, s == len(layers) - 1)) for s, each in enumerate(layers)]
    for s, placed in enumerate(stages):
        for p in tree_leaves(placed):
            holders[p.path] = (*holders.get(p.path, ()), s % pp)

    def held(placed):
        return tree_map(lambda p: replace(p, holders=holders[p.path]), placed)

    return layers, list(map(held, stages)), held(place(sharding, param_specs(cfg)))


class Parts:
    """What the functions of a Program share: the model's stages, of which this rank has `mine`; specs, placed, moving and fixed hold a tree
    for each of those, fixed None where nothing is frozen; whole one for the model. kinds: the moving and the fixed together, as a state has
    them."""

    def __init__(self, cfg, config, sharding, waits=True):
        self.cfg, self.config, self.sharding, self.mesh, self.waits = cfg, config, sharding, sharding.mesh, waits
        self.layers, stages, self.whole = placements(cfg, config, sharding)
        _check_trains(stages)
        self.last, self.kernels = len(self.layers) - 1, choose_kernels(config.ops, cfg, sharding)
        self.mine = tuple(range(self.mesh.index(("pp",)), len(self.layers), self.mesh.pp))
        self.placed = tuple(stages[s] for s in self.mine)
        self.specs = tuple(tree_map(lambda p: p.spec, each) for each in self.placed)
        self.kinds = train.Parts.of(self.placed)
        self.moving, self.fixed = (tuple(_of_stage(tree, k) for k in range(len(self.mine))) for tree in self.kinds)
        self.shared = [i for i, p in enumerate(tree_leaves(self.kinds.moving)) if len(p.holders) > 1]  # the same matrix on two ranks
        self.executor = Executor(len(self.layers), self.send, self.receive)
        self.forward = {s: jit(self.stage(s)) for s in self.mine if s != self.last}
        self.rows = 0  # of the micro-batches under way

    def carried(self, stage):
        """[(shape, dtype)] of what arrives at a stage from the one before; nothing at the first, or behind the last."""
        return carried_shapes(self.cfg, self.sharding, self.layers[stage], self.rows) if 0 < stage <= self.last else []

    def stage(self, number, cfg=None):
        """f(params, batch), or of all stages but the first (params, batch, carried): see qwen3.stages.build_stage."""
        ends, recompute = (number == 0, number == self.last), self.config.train.recompute
        stage = build_stage(cfg or self.cfg, self.sharding, self.kernels, self.layers[number], *ends, recompute)

        def first(params, batch):
            return stage(params, (), batch)

        def other(params, batch, carried):
            return stage(params, carried, batch)

        return other if number else first

    def params(self, state, stage):
        """A stage's parameters of a state, as a tree."""
        k, frozen = self.mine.index(stage), self.frozen(state, stage)
        return merge(self.specs[k], from_tuple(self.moving[k], state["params"][k]), frozen and from_tuple(self.fixed[k], frozen))

    def frozen(self, state, stage):
        """Those that are frozen, as nested tuples; None where none are."""
        k = self.mine.index(stage)
        return state["frozen"][sum(fixed is not None for fixed in self.fixed[:k])] if self.fixed[k] else None

    def compile(self, call):
        """call(stage, its input, cotangents of its result) on zeros, so that all ranks compile at once, not one when the last has done."""
        for s in self.mine:
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
        if train.Parts.of(placed).moving is None:
            raise ValueError(
                f"train.freeze_include leaves nothing to train in pipeline stage {number}; take patterns out, use a smaller --pp, or other"
                " parallel.stage_layers"
            )


class Gradients:
    """The gradients of a batch: runs the rank's list of a training step."""

    def __init__(self, parts):
        config, mesh, zero_stage = parts.config, parts.mesh, parts.sharding.zero
        self.parts, self.micro = parts, config.parallel.micro_batches
        lists = pipeline.schedule(config.parallel.pp_schedule, mesh.pp, self.micro, config.parallel.virtual_stages)
        self.actions = lists[mesh.index(("pp",))]
        axes, in_place = "state" if zero_stage >= 2 else "used", optimizer.changes_in_place(parts.kernels)
        shapes = [tuple(tree_leaves(train.shapes(mesh, placed, axes))) for placed in parts.moving]
        self.total = {s: RunningSum(each, in_place) for s, each in zip(parts.mine, shapes)}
        self.backward = {s: jit(_backward(parts, s, self.total[s].add)) for s in parts.mine}
        self.compiled = not parts.waits

    def of(self, state, batch):
        """(flat gradients of what trains of this rank's parameters, [objective, *metrics] on all ranks)"""
        parts, (slices, weights) = self.parts, train.micro_batches(batch, self.micro)
        self.state, self.batches, parts.rows = state, [train.tensors(part) for part in slices], slices[0]["tokens"].size
        self.shares = train.shares(collectives.host_sum(parts.mesh, DATA, weights))
        self._start()
        if not self.compiled:
            parts.compile(self._both_ways)
            self.compiled = True
            self._start()
        parts.executor.run(self.actions, self._on_forward, self._on_backward)
        found = collectives.host_sum(parts.mesh, ("pp",), self.found)
        return _sum_shared(parts, [g for s in parts.mine for g in self.total[s].arrays]), found

    def _start(self):
        self.found = np.zeros(count_found(self.parts.cfg))
        for total in self.total.values():
            total.start()

    def _both_ways(self, stage, carried, cotangents):
        self._on_forward(pipeline.Forward(0, stage), carried)
        self._on_backward(pipeline.Backward(0, stage), carried, cotangents)

    def _on_forward(self, action, carried):
        if action.stage == self.parts.last:
            return ()  # its backward computes it
        params, rest = self.parts.params(self.state, action.stage), (carried,) if carried else ()
        return self.parts.forward[action.stage](params, self.batches[action.micro], *rest)

    def _on_backward(self, action, carried, cotangents):
        s, share = action.stage, self.shares[action.micro]
        inputs = (self.state["params"][self.parts.mine.index(s)], *((carried,) if carried else ()))
        given = self.parts.frozen(self.state, s), self.batches[action.micro], *((cotangents,) if cotangents else ())
        added, *out = self.backward[s](inputs, self.total[s].arrays, ms.Tensor(share, ms.float32), *given)
        self.total[s].take(added)
        if s == self.parts.last:
            objective, aux = out.pop()
            each = [share * objective.asnumpy().reshape(-1)]
            for name, x in zip(metric_names(self.parts.cfg), aux):
                each.append((1.0 if name in train.SUMS else share) * x.asnumpy().reshape(-1))
            self.found += np.concatenate(each)
        return out[0] if out else ()


def _backward(parts, number, add):
    """f((params, carried if any) nested, flat sums, share, frozen nested, batch, cotangents) -> (what a RunningSum takes, whose `add` it
    is; cotangents of what came from the stage before; of the last stage, which takes no cotangents, also (objective, metrics)). From ZeRO
    stage 2 on the gradients are summed over the data ranks at once, and a rank keeps its part."""
    k, sharding, cast = parts.mine.index(number), parts.sharding, ops.Cast()
    names, stage = metric_names(parts.cfg), parts.stage(number)
    early = zero.sum_gradients(sharding, tree_leaves(parts.moving[k])) if sharding.zero >= 2 else zero.same
    join = joined(parts.specs[k], parts.moving[k], *((parts.fixed[k],) if parts.fixed[k] else ()))
    flatten, n, total = flatten_in_graph(to_tuple(parts.moving[k])), len(parts.carried(number + 1)), ops.ReduceSum()

    def of_all(inputs, frozen):
        return join(inputs[0])

    def with_frozen(inputs, frozen):
        return join(inputs[0], frozen)

    whole = with_frozen if parts.fixed[k] else of_all

    def from_tokens(inputs, frozen, batch):
        return stage(whole(inputs, frozen), batch)

    def from_stage(inputs, frozen, batch):
        return stage(whole(inputs, frozen), batch, inputs[1])

    run = from_stage if number else from_tokens

    def along(inputs, frozen, batch, cotangents):
        """A number whose gradient is that of the stage's results, times these."""
        out, value = run(inputs, frozen, batch), 0.0
        for i in range(n):
            value = value + total(cast(out[i], ms.float32) * cast(cotangents[i], ms.float32), ())
        return value

    grad = grad_of_nested(run, names) if number == parts.last else grad_of_nested(along)

    def first(inputs, sums, share, frozen, batch, cotangents):
        _, grads = grad(inputs, frozen, batch, cotangents)
        return (add(share, sums, early(flatten(grads[0]))),)

    def inner(inputs, sums, share, frozen, batch, cotangents):
        _, grads = grad(inputs, frozen, batch, cotangents)
        return add(share, sums, early(flatten(grads[0]))), grads[1]

    def last(inputs, sums, share, frozen, batch):
        out, grads = grad(inputs, frozen, batch)
        return add(share, sums, early(flatten(grads[0]))), grads[1], out

    return last if number == parts.last else inner if number else first


def _sum_shared(parts, totals):
    """The gradients, with those of a matrix that the first and the last stage have, tied embeddings, summed over both."""
    mesh = parts.mesh
    here, flat = mesh.index(("pp",)), tree_leaves(parts.kinds.moving)
    for i in parts.shared:
        a, b = flat[i].holders
        if here == a:
            totals[i] = totals[i] + collectives.receive(mesh, b, totals[i].shape, ms.float32)
            collectives.send(mesh, b, totals[i])
        else:
            collectives.send(mesh, a, totals[i])
            totals[i] = collectives.receive(mesh, a, totals[i].shape, ms.float32)
    return totals


def count_found(cfg):
    """Numbers that a step finds of a batch: the objective, and those of metric_names."""
    return 1 + sum(math.prod(shape) for shape in _metric_shapes(cfg))


def _metric_shapes(cfg):
    """Of what metric_names names."""
    return [(len(cfg.moe_layers), cfg.num_experts) if name == "expert_load" else () for name in metric_names(cfg)]


def _named(cfg, found):
    """(objective, metrics) from the vector of all their numbers."""
    out, at = [], 1
    for shape in _metric_shapes(cfg):
        out.append(found[at : at + math.prod(shape)].reshape(shape))
        at += math.prod(shape)
    return found[0], out


def _step(parts):
    """step(state, batch, lr, step from 0) -> (state, metrics)."""
    cfg, config, sharding, gradients = parts.cfg, parts.config, parts.sharding, Gradients(parts)
    # flat, as MindSpore nests no more than 6 tuples, and the update's results are one level deeper than a rank's trees
    placed = tuple(tree_leaves(parts.kinds.moving))
    specs, noisy = tuple(p.spec for p in placed), train.noise(cfg, config, parts.mesh)
    update = train.update_of(specs, placed, sharding, config.optim, parts.kernels)
    apply, late = update.apply, zero.same if sharding.zero >= 2 else zero.sum_gradients(sharding, placed)

    def finish(params, total, m, v, mean_norm, values):
        return apply(params, late(total), m, v, mean_norm, values, ())

    finish = jit(finish, order="dfs")

    def step(state, batch, lr, at):
        total, found = gradients.of(state, context.cut(parts.mesh, noisy(batch, at)))
        values = optimizer.scalars(config.optim, lr, at)
        p, m, v = (tuple(tree_leaves(state[name])) if name in state else None for name in ("params", "m", "v"))
        norm, skipped, changed = finish(p, tuple(total), m, v, state["norm"], values)
        return update.merge(state, changed), train.metrics_of(cfg, config, (*_named(cfg, found), norm, skipped), lr)

    return step


def _evaluate(parts):
    """evaluate(state, batches) -> nats per target: micro-batches of the size of a step's, forward through all stages."""
    mesh, parallel, cfg = parts.mesh, parts.config.parallel, lora.without_dropout(parts.cfg)
    judge = parts.stage(parts.last, cfg)
    stages = parts.forward if cfg == parts.cfg else {s: jit(parts.stage(s, cfg)) for s in parts.forward}

    def loss(params, batch, carried):
        _, metrics = judge(params, batch, carried)
        return metrics["loss"], metrics["tokens"]

    loss, compiled = jit(loss), []

    def run(state, group):
        sums, batches = np.zeros(2), [train.tensors(part) for part in group]
        parts.rows = group[0]["tokens"].size

        def forward(action, carried):
            params, batch = parts.params(state, action.stage), batches[action.micro]
            if action.stage < parts.last:
                return stages[action.stage](params, batch, *((carried,) if carried else ()))
            nats, tokens = (float(x.asnumpy()) for x in loss(params, batch, carried))
            sums[:] += nats * tokens, tokens
            return ()

        if not compiled:
            parts.compile(lambda stage, carried, _: forward(pipeline.Forward(0, stage), carried))
            compiled.append(True)
            sums[:] = 0
        lists = pipeline.forward_only(mesh.pp, len(group), parallel.virtual_stages)
        parts.executor.run(lists[mesh.index(("pp",))], forward)
        return collectives.host_sum(mesh, ("pp",), sums)

    def evaluate(state, batches):
        cut = (context.cut(mesh, batch) for batch in batches)
        every = (part for batch in cut for part in train.micro_batches(batch, parallel.micro_batches)[0])
        sums = np.zeros(2)
        while group := list(islice(every, EVAL_GROUP * len(parts.layers))):
            sums += run(state, group)
        return float(sums[0] / max(sums[1], 1.0))

    return evaluate
