"""The training step, and the loop around it."""

import contextlib
import dataclasses
import math
import time
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import mindspore as ms
import numpy as np
from tqdm import tqdm

from experiments import muon
from experiments import optim as optimizer
from experiments.accumulate import RunningSum
from experiments.data.loader import rank_rows
from experiments.metrics import held_out
from layers import lora
from parallel import collectives, context, zero
from parallel.placement import Held, Spread, load, local_shape, place, reader, stacked
from parallel.sharding import DATA, Sharding
from parallel.source import function
from parallel.spec import hash_bits, merge, select, shallow, tree_leaves, tree_map, unflatten
from parallel.step import flatten_in_graph, from_tuple, grad_in_graph, grad_of_nested, jit, joined, rebuild_flat, subscripts, to_tuple
from qwen3.model import build, choose_kernels, drops, metric_names, param_specs, stacked_specs

SUMS = ("tokens", "expert_overflow")  # metrics that add up over micro-batches; the others are weighted means
SCAN_ABOVE_LAYERS = 8  # a scanned layer compiles once, and takes less memory; unrolled ones compute no forward twice


@dataclasses.dataclass(frozen=True)
class Program:
    """The functions of one run; see build_program."""

    init: object
    params: object
    step: object
    evaluate: object
    held: object = None
    restore: object = None
    spread: object = None
    executor: object = None  # of a pipeline: its parallel.pipeline_run.Executor


def build_program(cfg, config, sharding=None):
    """Pure functions over an opaque state, for a model, a run's config and a layout; each compiles on first use, once per batch shape.
    Raises ValueError for weights that are not float32, or that the layout cannot split.

    init(params) -> state, from a tree as qwen3.model and hf.save take it, or from read(path, slices), which gives a rank its part.
    spread(state) -> the tree as parallel.placement.Spread, of which all ranks together get whole arrays, one by one; params(state) -> it as
    whole tensors on every rank; all call it.
    step(state, batch, lr, step from 0) -> (state, metrics); batch: a dict of numpy [rows, S], whole rows, this dp rank's; metrics: floats
    and lists, of the global batch. The state that it is given is used up: its arrays may have been changed in place. Where the gradient
    norm is not finite they have not. evaluate(state, batches) -> cross-entropy in nats per target, of all ranks' batches.
    held(state) -> what this rank has of each array, as parallel.checkpoint takes it, without a state the sizes alone; the running norm, a
    number, is not among them.
    restore(read, norm) -> state, from read(name, slices) of those arrays.
    """
    _check_dtype(cfg)
    if sharding and sharding.mesh.pp > 1:
        from experiments import train_pipeline  # which is made of this module's parts

        return train_pipeline.build_program(cfg, config, sharding)
    sharding, scan = sharding or Sharding(), uses_scan(cfg, config.train.layer_loop)
    placed = placements(cfg, sharding, scan)
    kernels = choose_kernels(config.ops, cfg, sharding)
    model, specs = build(cfg, sharding, scan, kernels, config.train.recompute), stacked_specs(cfg) if scan else param_specs(cfg)
    parts, layers, held_there = Parts.of(placed), cfg.num_layers if scan else 0, optimizer.resident(kernels)
    if parts.moving is None:
        raise ValueError("train.freeze_include leaves nothing to train; take patterns out, or name what trains in train.freeze_exclude")
    trained, gradient = Parts.of(specs).moving, _gradient(model, specs, metric_names(cfg))

    def init(params):
        read = params if callable(params) else reader(params)
        moving, fixed = (to_tuple(_load(sharding.mesh, part, read, layers)) if part else None for part in parts)
        state = {"params": moving, **optimizer.init_state(to_tuple(shapes(sharding.mesh, parts.moving, "state")), config.optim)}
        return held_there({**state, "frozen": fixed} if fixed else state)

    def whole(state):
        fixed = from_tuple(parts.fixed, state["frozen"]) if parts.fixed else None
        return merge(specs, from_tuple(trained, state["params"]), fixed)

    def spread(state):
        return spread_arrays(sharding, cfg, whole(state), scan)

    def params_of(state):
        return tree_map(lambda leaf: _copy(leaf.asnumpy(everywhere=True)), spread(state))

    step = _step(cfg, config, sharding, gradient, trained, parts.moving, kernels)
    evaluate = _evaluate(build(lora.without_dropout(cfg), sharding, scan, kernels), sharding.mesh, whole)
    held = partial(held_arrays, placed, layers, config.optim, with_frozen=cfg.lora is None)

    def restore(read, norm):
        return held_there(restored(sharding.mesh, placed, layers, config.optim, read, norm))

    return Program(init, params_of, step, evaluate, held, restore, spread)


def _step(cfg, config, sharding, gradient, trained, placed, kernels):
    """Program.step. trained, placed: the specs and Placed of what trains."""
    update, noisy = update_of(trained, placed, sharding, config.optim, kernels), noise(cfg, config, sharding.mesh)
    micro, names = config.parallel.micro_batches, metric_names(cfg)
    several = partial(_accumulated, gradient, names, update, sharding, placed, micro, optimizer.changes_in_place(kernels))
    run_step = _one_batch(gradient, update) if micro == 1 else several()

    def step(state, batch, lr, at):
        batch = context.cut(sharding.mesh, noisy(batch, at))
        state, out = run_step(state, batch, optimizer.scalars(config.optim, lr, at))
        return state, metrics_of(cfg, config, out, lr)

    return step


def _evaluate(model, mesh, whole):
    """Program.evaluate. whole(state) -> all parameters."""
    eval_loss = jit(_eval_loss(model))

    def evaluate(state, batches):
        tree, nats, targets = whole(state), 0.0, 0.0
        for batch in batches:
            loss, tokens = map(_number, eval_loss(tree, tensors(context.cut(mesh, batch))))
            nats, targets = nats + loss * tokens, targets + tokens
        return nats / max(targets, 1.0)

    return evaluate


class Parts(NamedTuple):
    """Of a tree of ParamSpecs or of Placed what trains, and what is frozen, None where nothing is; see parallel.spec.select and shallow."""

    moving: object
    fixed: object

    @classmethod
    def of(cls, tree):
        moving, fixed = select(tree, _trains), select(tree, lambda leaf: not _trains(leaf))
        return cls(moving if fixed is None or moving is None else shallow(moving), fixed)


def _trains(leaf):
    return getattr(leaf, "spec", leaf).trains


def noise(cfg, config, mesh):
    """f(batch, step) -> the batch with the integers of which dropout draws, of the run's seed, the step and the token's place in the global
    batch."""

    def noisy(batch, at):
        rows, length = batch["tokens"].shape
        mine = np.array(rank_rows(rows * mesh.dp, mesh.index(("dp",)), mesh.dp, config.parallel.micro_batches), np.uint64)
        place = mine[:, None] * np.uint64(length) + np.arange(length, dtype=np.uint64)
        return {**batch, "noise": hash_bits(config.train.seed, at, place).view(np.int32)}

    def as_it_is(batch, at):
        return batch

    return noisy if drops(cfg) else as_it_is


def _gradient(model, specs, names):
    """gradient(params, frozen, batch) -> ((loss, aux), grads of params), for use in a graph; params, frozen: nested tuples, or None."""
    moving, fixed = Parts.of(specs)
    if fixed is None:
        of_all = grad_in_graph(model.loss_fn, specs, names)

        def gradient(params, frozen, batch):
            return of_all(params, batch)

        return gradient
    join = joined(specs, moving, fixed)

    def loss(params, frozen, batch):
        return model.loss_fn(join(params, frozen), batch)

    return grad_of_nested(loss, names)


def metrics_of(cfg, config, out, lr):
    """A step's metrics. out: the objective, the values of metric_names, the gradient's norm, and 1 where the update was skipped."""
    objective, aux, norm, skipped = out
    metrics = {name: _number(value) for name, value in zip(metric_names(cfg), aux)}
    metrics.update(objective=_number(objective), grad_norm=_number(norm), lr=lr)
    if cfg.moe_layers:
        metrics["expert_load_max"] = float(np.max(metrics["expert_load"]) * cfg.num_experts)  # of any expert, over the mean
    return {**metrics, "skipped": _number(skipped)} if config.optim.skip_spikes else metrics


def _check_dtype(cfg):
    if cfg.param_dtype != "float32":
        raise ValueError(
            f"model_args.param_dtype={cfg.param_dtype!r}: training keeps its weights in float32, whatever it computes in;"
            " use --config.model_args.param_dtype=float32"
        )


def spread_arrays(sharding, cfg, tree, scan):
    """The tree of Spread of a model's parameters. tree: this rank's stored parts; with scan those of the layers are stacked."""
    single, of = place(sharding, param_specs(cfg)), partial(Spread, sharding.mesh)
    if not scan:
        return tree_map(of, single, tree)
    layers = [tree_map(partial(of, layer=i), layer, tree["layers"]) for i, layer in enumerate(single["layers"])]
    return {key: layers if key == "layers" else tree_map(of, single[key], tree[key]) for key in single}


def held_arrays(placed, num_layers, optim, state=None, with_frozen=True):
    """[Held] of what a rank has of each array of a state, for parallel.checkpoint; without a state, of the sizes alone.

    num_layers: of the stacked layers, 0 where none are. with_frozen: whether what does not train is saved too.
    """
    parts = Parts.of(placed)
    kinds = [(name, name, axes, parts.moving) for name, axes in optimizer.state_kinds(optim).items()]
    if parts.fixed and with_frozen:
        kinds.append(("params", "frozen", "stored", parts.fixed))
    return [
        Held(_names(kind, p.path, num_layers), p.spec, getattr(p, axes), w, p.holders)
        for kind, name, axes, part in kinds
        for p, w in zip(tree_leaves(part), tree_leaves(state[name]) if state else [None] * len(tree_leaves(part)))
    ]


def restored(mesh, placed, num_layers, optim, read, norm):
    """The state of which read(name, slices) gives the arrays; those that are frozen, too, by their name as parameters."""

    parts = Parts.of(placed)

    def tree(kind, part, axes):
        return to_tuple(_load(mesh, part, lambda path, slices: read(f"{kind}/{path}", slices), num_layers, axes))

    state = {kind: tree(kind, parts.moving, axes) for kind, axes in optimizer.state_kinds(optim).items()}
    if parts.fixed:
        state["frozen"] = tree("params", parts.fixed, "stored")
    return {**state, "norm": ms.Tensor(norm, ms.float32)}


def _names(kind, path, num_layers):
    """The names of the arrays of a leaf: one, or that of each of `num_layers` stacked layers."""
    if not num_layers or not path.startswith("layers."):
        return (f"{kind}/{path}",)
    return tuple(f"{kind}/layers.{i}.{path.split('.', 2)[2]}" for i in range(num_layers))


def placements(cfg, sharding, scan):
    """The tree of Placed of a model; with scan, one for each leaf of the stacked layers."""
    tree = place(sharding, param_specs(cfg))
    return {**tree, "layers": tree_map(lambda p: stacked(p, cfg.num_layers), tree["layers"][0])} if scan else tree


def _load(mesh, placed, read, num_layers, axes="stored"):
    """The tensors of a tree of Placed; of `num_layers` stacked layers, where that is not 0."""
    if not num_layers:
        return load(mesh, placed, read, axes)

    def of_layers(path, slices):
        rest, out = path.split(".", 2)[2], None
        for i in range(num_layers):
            layer = read(f"layers.{i}.{rest}", slices[1:])
            out = np.empty((num_layers, *layer.shape), layer.dtype) if out is None else out
            out[i] = layer
        return out

    return {key: load(mesh, {key: value}, of_layers if key == "layers" else read, axes)[key] for key, value in placed.items()}


def shapes(mesh, placed, axes):
    """For each of a tree of Placed something with the shape of a rank's part, for optim. axes: used, stored or state."""
    return tree_map(lambda p: SimpleNamespace(shape=local_shape(mesh, p.spec, getattr(p, axes))), placed)


def uses_scan(cfg, layer_loop):
    """Whether train.layer_loop makes one compiled layer run in a loop instead of unrolling all."""
    one_kind = len({cfg.is_moe_layer(i) for i in range(cfg.num_layers)}) == 1 and _train_alike(cfg)
    return layer_loop == "scan" or (layer_loop == "auto" and one_kind and cfg.num_layers > SCAN_ABOVE_LAYERS)


def _train_alike(cfg):
    """Whether the same of every layer is frozen."""
    layers = param_specs(cfg)["layers"]
    return len({tuple(spec.trains for spec in tree_leaves(layer)) for layer in layers}) == 1


def _eval_loss(model):
    def eval_loss(params, batch):
        _, metrics = model.loss_fn(params, batch)
        return metrics["loss"], metrics["tokens"]

    return eval_loss


class Update(NamedTuple):
    """How gradients change a state. For use in a graph, on the parts that a rank has, params, m and v being nested tuples:
    sum_gradients(flat) -> flat; flatten(nested) -> flat; apply(params, flat gradients, m, v, mean norm, scalars, after) -> (norm, skipped,
    changed), where changed is what merge wants, and norm waits for all that is changed in place.
    On the host: merge(state, changed) -> state."""

    sum_gradients: object
    flatten: object
    apply: object
    merge: object


def update_of(specs, placed, sharding, optim, kernels):
    """The Update of a model in a layout."""
    flat, like = tree_leaves(placed), to_tuple(specs)
    if optim.name == "muon":
        muon.check_whole(tree_leaves(specs), flat)
    norm = zero.global_norm_squared(sharding, flat, optimizer.in_norm(specs)) if sharding.mesh.world > 1 else None
    apply, nest, flatten = optimizer.build(specs, optim, kernels, norm), rebuild_flat(like), flatten_in_graph(like)
    split, join = zero.split_params(sharding, flat), zero.join_params(sharding, flat)
    second = "v" in optimizer.MOMENTS[optim.name]
    params_of, m_of, v_of = _column(like, 0), _column(like, 1), _column(like, 2) if second else _elements(())
    moved = tuple(i for i, done in enumerate(optimizer.in_place(specs, kernels, optim)) if not done)
    cut = any(p.stored != p.state for p in flat) and not optimizer.changes_in_place(kernels)  # then parts change, and are joined
    places = (tuple(range(len(flat))) if cut else moved, moved, moved if second else ())
    back = zero.written_back(flat, places[0])
    changed_p, changed_m, changed_v = map(_elements, places)

    def update(params, grads, m, v, mean_norm, values, after):
        new, mean_norm, norm, skipped = apply(nest(split(flatten(params))), nest(grads), m, v, mean_norm, values, after)
        p, m, v = back(flatten(params), join(params_of(new))), m_of(new), v_of(new)
        return ms.ops.depend(norm, (p, m, v)), skipped, (changed_p(p), changed_m(m), changed_v(v), mean_norm)

    def merge(state, changed):
        new = {name: _replaced(state[name], *each) for name, *each in zip(("params", "m", "v"), places, changed) if name in state}
        return {**state, **new, "norm": changed[3]}

    return Update(zero.sum_gradients(sharding, flat), flatten, update, merge)


def _elements(places):
    """f(flat) -> the elements at these places, for use in a graph."""
    return function("elements(flat)", [f"return ({''.join(f'flat[{i}], ' for i in places)})"])


def _replaced(nested, places, new):
    """Nested tuples with other leaves at these places."""
    leaves = tree_leaves(nested)
    for i, leaf in zip(places, new):
        leaves[i] = leaf
    return unflatten(nested, leaves)


def _copy(x):
    """A tensor of a tensor's or an array's values, with memory of its own."""
    return ms.Tensor(np.array(x.asnumpy() if hasattr(x, "asnumpy") else x))


def _column(like, i):
    """A function, for use in a graph, from nested tuples of (p, m, v) to the flat tuple of one of the three."""
    return function("column(new)", [f"return ({''.join(f'new{at}[{i}], ' for at in subscripts(like))})"])


def _one_batch(grad, update):
    """Gradients and update in one graph."""
    sum_gradients, flatten, apply = update.sum_gradients, update.flatten, update.apply

    def fused(params, frozen, m, v, mean_norm, values, batch):
        (loss, aux), grads = grad(params, frozen, batch)
        norm, skipped, changed = apply(params, sum_gradients(flatten(grads)), m, v, mean_norm, values, (loss, aux))
        return (loss, aux, norm, skipped), changed

    fused = jit(fused, order="dfs")

    def run(state, batch, values):
        out, changed = fused(state["params"], state.get("frozen"), state["m"], state.get("v"), state["norm"], values, tensors(batch))
        return update.merge(state, changed), out

    return run


def _accumulated(grad, names, update, sharding, placed, count, in_place):
    """Gradients of micro-batches, each weighted by its share of the targets, and one update: two graphs.

    From ZeRO stage 2 on they are summed over the data ranks as they come, and a rank keeps its part of the sum; before, once at the end.
    in_place: of the sum, see RunningSum.
    """
    sum_gradients, flatten, apply = update.sum_gradients, update.flatten, update.apply
    early, late = (sum_gradients, zero.same) if sharding.zero >= 2 else (zero.same, sum_gradients)
    total = RunningSum(tuple(tree_leaves(shapes(sharding.mesh, placed, "state" if sharding.zero >= 2 else "used"))), in_place)
    add = total.add

    def accumulate(params, frozen, total, share, batch):
        (loss, aux), grads = grad(params, frozen, batch)
        return loss, aux, add(share, total, early(flatten(grads)))

    def finish(params, total, m, v, mean_norm, values):
        return apply(params, late(total), m, v, mean_norm, values, ())

    accumulate, finish = jit(accumulate), jit(finish, order="dfs")

    def run(state, batch, values):
        total.start()
        loss, aux = 0.0, [0.0] * len(names)
        slices, weights = micro_batches(batch, count)
        for share, part in zip(shares(collectives.host_sum(sharding.mesh, DATA, weights)), slices):
            weight, rows = ms.Tensor(share, ms.float32), tensors(part)
            part_loss, part_aux, added = accumulate(state["params"], state.get("frozen"), total.arrays, weight, rows)
            total.take(added)
            loss += share * _number(part_loss)
            aux = [a + (1.0 if name in SUMS else share) * x.asnumpy() for name, a, x in zip(names, aux, part_aux)]
        norm, skipped, changed = finish(state["params"], total.arrays, state["m"], state.get("v"), state["norm"], values)
        return update.merge(state, changed), (loss, aux, norm, skipped)

    return run


def micro_batches(batch, count):
    """([slice of a batch's rows], the loss weight in each)."""
    rows = len(batch["tokens"]) // count
    parts = [{key: value[i * rows : (i + 1) * rows] for key, value in batch.items()} for i in range(count)]
    return parts, np.array([part["loss_weights"].sum(dtype=np.float64) for part in parts])


def shares(weights):
    """Each micro-batch's share of the loss weight; equal shares where nothing has weight."""
    weights = np.asarray(weights, np.float64)
    return weights / weights.sum() if weights.sum() else np.full(len(weights), 1 / len(weights))


def tensors(batch):
    return {key: ms.Tensor(np.ascontiguousarray(value)) for key, value in batch.items()}


def _number(value):
    return (value.asnumpy() if hasattr(value, "asnumpy") else np.asarray(value)).tolist()


def train(program, state, batches, eval_batches, config, writer, mfu_of, begun=(0, 0.0), after_step=None, bytes_per_target=None):
    """Up to train.steps steps, logged to `writer`; returns the last state. mfu_of: tokens per second -> MFU. bytes_per_target: of the
    held-out rows, for their bits per byte.

    batches: an iterator over dicts of [rows, S], a data rank's part of each batch; eval_batches: a list of such. begun: the steps that are
    done, and the targets they saw. after_step(state, steps done, targets seen) -> whether to stop there.

    Raises FloatingPointError at a loss or gradient norm that is not finite, before the state is replaced or anything is written.
    """
    steps = config.train.steps
    rate, (first, targets) = optimizer.learning_rate(config.optim, steps), begun
    # Also compiles it now: MindSpore reads the source when it compiles, so a file edited during the run would go into the result.
    eval_loss = program.evaluate(state, eval_batches)
    if first == 0:
        writer.write(0, held_out(eval_loss, bytes_per_target))
    timer = Timer()
    with tqdm(total=steps, initial=first, unit="step", dynamic_ncols=True, disable=writer.silent) as bar:
        for done in range(first + 1, steps + 1):
            batch = next(batches)
            new_state, metrics = program.step(state, batch, rate(done - 1), done - 1)
            _stop_if_wrong(metrics, done)
            state, targets = new_state, targets + metrics["tokens"]
            timer.tick()
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
            bar.update()
            if done in (1, steps) or done % config.train.log_every == 0:
                step_time_s = timer.lap()
                speed = config.train.batch_size * config.train.seq_len / step_time_s
                times = {"step_time_s": step_time_s, "tokens_per_s": speed, "mfu": mfu_of(speed)}
                writer.write(done, {**metrics, "tokens_seen": targets, **times})
            if config.train.eval_every and done % config.train.eval_every == 0 and done < steps:
                with timer.paused():
                    writer.write(done, held_out(program.evaluate(state, eval_batches), bytes_per_target))
            if after_step and after_step(state, done, targets):
                break
    return state


class Timer:
    """Seconds per step between laps."""

    def __init__(self):
        self.start, self.steps = time.perf_counter(), 0

    def tick(self):
        self.steps += 1

    def lap(self):
        now = time.perf_counter()
        took, self.start, self.steps = (now - self.start) / self.steps, now, 0
        return took

    @contextlib.contextmanager
    def paused(self):
        began = time.perf_counter()
        yield
        self.start += time.perf_counter() - began


def _stop_if_wrong(metrics, step):
    if lost := metrics.get("expert_overflow"):
        raise FloatingPointError(
            f"step {step}: {lost:.0f} assignments of tokens to experts found no place in the buffers between expert parallel ranks; the run"
            " stops and what it had saved stays as it is. Raise model_args.moe_capacity_factor, or leave it out for the worst case"
        )
    for name in ("objective",) if metrics.get("skipped") else ("objective", "grad_norm"):
        if not math.isfinite(metrics[name]):
            raise FloatingPointError(
                f"step {step}: {name}={metrics[name]} is not finite; the run stops and what it had saved stays as it is."
                " Lower optim.lr, lengthen optim.warmup_steps, or look at this step's batch"
            )
