"""The ops benchmark: times each compiled implementation of the ops in experiments/bench/cases.py; those of a case take turns."""

import concurrent.futures
import importlib
import os
import statistics

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from experiments.bench.cases import cases
from experiments.bench.turns import peak_mem_gib, timed
from experiments.watch import metrics
from ops import registry
from parallel.graph.jit import jit
from parallel.step import value_and_grad

COPIED = 1 << 27  # bytes of an array that is larger than the caches


def bench_ops(options):
    """Returns figures as a dict, medians over options.steps calls: CASE.forward.* and, if there is a gradient, CASE.forward_backward.*

    bytes, flop: the bytes that the case must move, and the operations that it must compute. For each implementation, _s: seconds of a call
    of the compiled function, which include call_s, the time of a call that does nothing. _of_matmul, _of_copy: flop and bytes per second
    divided by the machine's peaks; _of_copy can exceed 1 for data in the caches. reference_over_NAME: the reference's time divided by
    NAME's.

    options: ops, names of cases, empty for all except those with Case.alone; kernels, an implementation, or auto for all.
    """
    table, asked = cases(), options.ops
    if unknown := [name for name in asked if name not in table]:
        raise ValueError(f"--ops={unknown[0]} is not a case; use {', '.join(table)}")
    peaks = {"matmul_gflops": metrics.peak_flops() / 1e9, "copy_gb_per_s": copy_bandwidth() / 1e9}
    figures = {"what": "ops", "cores": os.cpu_count(), **peaks, "call_s": _call_s(options.steps)}
    for name, case in table.items():
        if name in asked or not (asked or case.alone):
            figures.update({f"{name}.{key}": value for key, value in bench_case(case, options, peaks).items()})
    return {**figures, "peak_mem_gib": peak_mem_gib()}


def bench_case(case, options, peaks):
    """Returns the figures of a case, without the case's name in their keys."""
    wanted = registry.IMPLEMENTATIONS if options.kernels == "auto" else (options.kernels,)
    calls, sizes = {"forward": {}, "forward_backward": {}}, None
    for implementation in wanted:
        if factory := _factory(case, implementation):
            made, sizes = _calls(case, implementation, case.make(factory))
            for kind, call in made.items():
                calls[kind][implementation] = call
    figures = {}
    for at, (kind, made) in enumerate(calls.items()):
        if not made:
            continue
        moved, flop = (case.bytes or sizes)[at], case.flop[at]
        figures.update({f"{kind}.bytes": moved, f"{kind}.flop": flop})
        times = _times(made, options.steps)
        for name, seconds in times.items():
            figures[f"{kind}.{name}_s"] = seconds
            if flop:
                figures[f"{kind}.{name}_of_matmul"] = flop / seconds / (peaks["matmul_gflops"] * 1e9)
            figures[f"{kind}.{name}_of_copy"] = moved / seconds / (peaks["copy_gb_per_s"] * 1e9)
        if "reference" in times:
            figures.update({f"{kind}.reference_over_{name}": times["reference"] / s for name, s in times.items() if name != "reference"})
    return figures


def _factory(case, implementation):
    """Returns the factory of an implementation; None if the op has none, or if it cannot run on this device."""
    module = importlib.import_module(f"ops.{case.op}")
    try:
        registry.choose({case.op: implementation}, ms.get_context("device_target"), "float32")
    except ValueError:
        return None
    return getattr(module, f"{implementation}_{case.function}" if case.function else implementation, None)


def _calls(case, implementation, op):
    """Returns ({kind: a function to time}, the bytes of each kind if every array moves once)."""
    arrays, others = case.inputs(implementation)
    if case.op == "sampling" and implementation == "reference":  # it runs on the host, on numpy arrays
        out = op(*others)
        return {"forward": lambda: op(*others)}, (_bytes(others) + out.nbytes, None)
    inputs, fixed = (tuple(map(ms.Tensor, each)) for each in (arrays, others))
    forward = jit(_first_element(op) if case.in_place else _values(op))
    outs = _tuple(forward(inputs, fixed))
    made = {"forward": lambda: _tuple(forward(inputs, fixed))[-1].asnumpy()}
    floats = tuple(i for i, out in enumerate(outs) if out.dtype == ms.float32)
    once, grads = _bytes(inputs + fixed + outs), 2 * _bytes(inputs) + _bytes(fixed) + _bytes([outs[i] for i in floats])
    if case.flop[1] is None:
        return made, (once, None)
    backward = value_and_grad(_seeded(op, len(outs) > 1, floats), compiled=True)
    weights = tuple(ms.Tensor(np.cos(np.arange(outs[i].size, dtype=np.float32)).reshape(outs[i].shape)) for i in floats)
    made["forward_backward"] = lambda: backward(inputs, fixed, weights)[0].asnumpy()
    return made, (once, once + grads)


def _values(op):
    def values(inputs, fixed):
        return op(*inputs, *fixed)

    return values


def _first_element(op):
    """Wraps an op that changes its arguments so that it returns one element. A graph that returns the arguments would copy them."""
    reshape = ops.Reshape()

    def first(inputs, fixed):
        out = op(*inputs, *fixed)
        return reshape(out[0] if isinstance(out, tuple) else out, (-1,))[:1]

    return first


def _seeded(op, several, floats):
    """Returns a scalar function of an op's results whose gradient with respect to them is `weights`, without any computation."""
    seed, n = _Seed(), len(floats)

    def of_one(inputs, fixed, weights):
        return seed(op(*inputs, *fixed), weights[0])

    def of_several(inputs, fixed, weights):
        out = op(*inputs, *fixed)
        total = seed(out[floats[0]], weights[0])
        for i in range(1, n):
            total += seed(out[floats[i]], weights[i])
        return total

    return of_several if several else of_one


class _Seed(nn.Cell):
    """y, dy -> the first element of y. The gradient of y is dy."""

    def __init__(self):
        super().__init__()
        self.reshape, self.zeros_like = ops.Reshape(), ops.ZerosLike()

    def construct(self, y, dy):
        return self.reshape(self.reshape(y, (-1,))[:1], ())

    def bprop(self, y, dy, out, dout):
        return dy, self.zeros_like(dy)


def _times(calls, steps):
    """Times calls that take turns. Returns {name: median seconds}, without the first two of each."""
    times = {name: [] for name in calls}
    for at in range(steps + 2):
        for name, call in calls.items():
            seconds, _ = timed(call)
            if at >= 2:
                times[name].append(seconds)
    return {name: statistics.median(each) for name, each in times.items()}


def _call_s(steps):
    add, x = jit(_values(ops.Add())), ms.Tensor(np.ones(1, np.float32))
    return _times({"call": lambda: add((x, x), ()).asnumpy()}, steps)["call"]


def copy_bandwidth(repeats=5):
    """Measures the bytes per second that all cores together read and write while they copy. Returns the best of `repeats` runs."""
    cores = len(os.sched_getaffinity(0))
    pairs = [(np.ones(COPIED // 4 // cores, np.float32), np.zeros(COPIED // 4 // cores, np.float32)) for _ in range(cores)]
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        best = min(timed(lambda: list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs)))[0] for _ in range(repeats))
    return 2 * sum(pair[0].nbytes for pair in pairs) / best


def _tuple(out):
    return out if isinstance(out, tuple) else (out,)


def _bytes(arrays):
    return sum(x.nbytes for x in arrays)
