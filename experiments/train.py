"""The training step, and the loop around it."""

import contextlib
import dataclasses
import math
import time
from functools import partial

import mindspore as ms
import numpy as np
from tqdm import tqdm

from experiments import optim as optimizer
from parallel.spec import init_params, tree_map
from parallel.step import from_tuple, grad_in_graph, jit, to_tuple
from qwen3 import hf
from qwen3.model import build, metric_names, param_specs, stack_layers, stacked_specs, unstack_layers

SCAN_ABOVE_LAYERS = 2  # a scanned layer compiles once, and on CPU ran faster and in less memory than unrolled ones


@dataclasses.dataclass(frozen=True)
class Program:
    """The functions of one run; see build_program."""

    init: object
    params: object
    step: object
    evaluate: object


def build_program(cfg, config):
    """Pure functions over an opaque state, for a model and a run's config; each compiles on first use, once per batch shape.
    Raises ValueError for weights that are not float32.

    init(params tree) -> state, and params(state) -> params tree, as qwen3.model and hf.save take it.
    step(state, batch, lr, step from 0) -> (state, metrics); batch: a dict of numpy [rows, S]; metrics: floats and lists.
    evaluate(state, batches) -> cross-entropy in nats per target.
    """
    if cfg.param_dtype != "float32":
        raise ValueError(
            f"model_args.param_dtype={cfg.param_dtype!r}: training keeps its weights in float32, whatever it computes in;"
            " use --config.model_args.param_dtype=float32"
        )
    scan = uses_scan(cfg, config.train.layer_loop)
    model, specs = build(cfg, scan=scan), stacked_specs(cfg) if scan else param_specs(cfg)
    names = metric_names(cfg)
    run_step = (_one_batch if config.parallel.micro_batches == 1 else _accumulated)(model, specs, names, config)
    eval_loss = jit(_eval_loss(model))

    def init(params):
        nested = to_tuple(stack_layers(params) if scan else params)
        return {"params": nested, **optimizer.init_state(nested)}

    def params_of(state):
        tree = from_tuple(specs, state["params"])
        return unstack_layers(tree) if scan else tree

    def step(state, batch, lr, at):
        state, (objective, aux, norm, skipped) = run_step(state, batch, optimizer.scalars(config.optim, lr, at))
        metrics = {name: _number(value) for name, value in zip(names, aux)}
        metrics.update(objective=_number(objective), grad_norm=_number(norm), lr=lr)
        if cfg.moe_layers:
            metrics["expert_load_max"] = float(np.max(metrics["expert_load"]) * cfg.num_experts)  # of any expert, over the mean
        return state, {**metrics, "skipped": _number(skipped)} if config.optim.skip_spikes else metrics

    def evaluate(state, batches):
        tree, nats, targets = from_tuple(specs, state["params"]), 0.0, 0.0
        for batch in batches:
            loss, tokens = map(_number, eval_loss(tree, _tensors(batch)))
            nats, targets = nats + loss * tokens, targets + tokens
        return nats / max(targets, 1.0)

    return Program(init, params_of, step, evaluate)


def uses_scan(cfg, layer_loop):
    """Whether train.layer_loop makes one compiled layer run in a loop instead of unrolling all."""
    one_kind = len({cfg.is_moe_layer(i) for i in range(cfg.num_layers)}) == 1
    return layer_loop == "scan" or (layer_loop == "auto" and one_kind and cfg.num_layers > SCAN_ABOVE_LAYERS)


def _eval_loss(model):
    def eval_loss(params, batch):
        _, metrics = model.loss_fn(params, batch)
        return metrics["loss"], metrics["tokens"]

    return eval_loss


def _one_batch(model, specs, names, config):
    """Gradients and update in one graph."""
    grad, update = grad_in_graph(model.loss_fn, specs, names), optimizer.adamw(specs, config.optim)

    def fused(params, m, v, mean_norm, values, batch):
        (loss, aux), grads = grad(params, batch)
        new, mean_norm, norm, skipped = update(params, grads, m, v, mean_norm, values)
        return (loss, aux, norm, skipped), new, mean_norm

    fused = jit(fused)

    def run(state, batch, values):
        out, new, mean_norm = fused(state["params"], state["m"], state["v"], state["norm"], values, _tensors(batch))
        return _state(state["params"], new, mean_norm), out

    return run


def _accumulated(model, specs, names, config):
    """Gradients of micro-batches, each weighted by its share of the targets, and one update: two graphs."""
    grad, update = grad_in_graph(model.loss_fn, specs, names), optimizer.adamw(specs, config.optim)
    apply = jit(update)
    everywhere = ms.ops.HyperMap()

    def add_share(share, total, g):
        return total + share * ms.ops.Cast()(g, ms.float32)

    def accumulate(params, total, share, batch):
        (loss, aux), grads = grad(params, batch)
        return loss, aux, everywhere(partial(add_share, share), total, grads)

    accumulate = jit(accumulate)

    def run(state, batch, values):
        total, loss, aux = optimizer.zeros_like(state["params"]), 0.0, [0.0] * len(names)
        for share, part in micro_batches(batch, config.parallel.micro_batches):
            part_loss, part_aux, total = accumulate(state["params"], total, ms.Tensor(share, ms.float32), _tensors(part))
            loss += share * _number(part_loss)
            aux = [a + (1.0 if name == "tokens" else share) * x.asnumpy() for name, a, x in zip(names, aux, part_aux)]
        new, mean_norm, norm, skipped = apply(state["params"], total, state["m"], state["v"], state["norm"], values)
        return _state(state["params"], new, mean_norm), (loss, aux, norm, skipped)

    return run


def micro_batches(batch, count):
    """[(share of the batch's loss weight, slice of its rows)]; equal shares where nothing has weight."""
    rows = len(batch["tokens"]) // count
    parts = [{key: value[i * rows : (i + 1) * rows] for key, value in batch.items()} for i in range(count)]
    weights = np.array([part["loss_weights"].sum(dtype=np.float64) for part in parts])
    return list(zip(weights / weights.sum() if weights.sum() else np.full(count, 1 / count), parts))


def _state(like, new, mean_norm):
    """The state from the update's nested tuples, whose leaves are (p, m, v)."""
    return {**{name: _part(like, new, i) for i, name in enumerate(("params", "m", "v"))}, "norm": mean_norm}


def _part(like, nested, i):
    return tuple(_part(a, b, i) for a, b in zip(like, nested)) if isinstance(like, tuple) else nested[i]


def _tensors(batch):
    return {key: ms.Tensor(np.ascontiguousarray(value)) for key, value in batch.items()}


def _number(value):
    return (value.asnumpy() if hasattr(value, "asnumpy") else np.asarray(value)).tolist()


def initial_params(cfg, config):
    """Weights of config.init_from (a Hugging Face folder), else random ones from train.seed; tensors of cfg.param_dtype."""
    if not config.init_from:
        dtype = getattr(ms, cfg.param_dtype)
        return tree_map(lambda w: ms.Tensor(w, dtype), init_params(param_specs(cfg), config.train.seed))
    found, params = hf.load(config.init_from, dtype=cfg.param_dtype)
    ours, theirs = param_specs(cfg), param_specs(found)
    if ours != theirs:
        raise ValueError(
            f"init_from={config.init_from} holds another model than model={config.model}; use --config.model={config.init_from}"
        )
    return params


def train(program, state, batches, eval_batches, config, writer, mfu_of):
    """train.steps steps, logged to `writer`; returns the last state. mfu_of: tokens per second -> MFU.

    batches: an iterator over dicts of [batch_size, S]; eval_batches: a list of such.

    Raises FloatingPointError at a loss or gradient norm that is not finite, before the state is replaced or anything is written.
    """
    steps = config.train.steps
    rate, targets = optimizer.learning_rate(config.optim, steps), 0.0
    # Also compiles it now: MindSpore reads the source when it compiles, so a file edited during the run would go into the result.
    writer.write(0, {"eval_loss": program.evaluate(state, eval_batches)})
    timer = Timer()
    with tqdm(total=steps, unit="step", dynamic_ncols=True) as bar:
        for done in range(1, steps + 1):
            batch = next(batches)
            new_state, metrics = program.step(state, batch, rate(done - 1), done - 1)
            _stop_if_not_finite(metrics, done)
            state, targets = new_state, targets + metrics["tokens"]
            timer.tick()
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
            bar.update()
            if done in (1, steps) or done % config.train.log_every == 0:
                step_time_s = timer.lap()
                speed = batch["tokens"].size / step_time_s
                times = {"step_time_s": step_time_s, "tokens_per_s": speed, "mfu": mfu_of(speed)}
                writer.write(done, {**metrics, "tokens_seen": targets, **times})
            if config.train.eval_every and done % config.train.eval_every == 0 and done < steps:
                with timer.paused():
                    writer.write(done, {"eval_loss": program.evaluate(state, eval_batches)})
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


def _stop_if_not_finite(metrics, step):
    for name in ("objective",) if metrics.get("skipped") else ("objective", "grad_norm"):
        if not math.isfinite(metrics[name]):
            raise FloatingPointError(
                f"step {step}: {name}={metrics[name]} is not finite; the run stops and what it had saved stays as it is."
                " Lower optim.lr, lengthen optim.warmup_steps, or look at this step's batch"
            )
