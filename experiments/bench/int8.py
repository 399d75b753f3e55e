"""The benchmark of weights in 8 bits: float32 and int8 take turns to decode with a random model of the shape of Qwen3-0.6B."""

import os
import resource
import time

import mindspore as ms
import numpy as np

from ops import sampling as sampling_op
from parallel.trees import tree_paths, unflatten
from qwen3 import generate
from qwen3.config import SIZES
from qwen3.int8 import int8_specs
from qwen3.model import choose_kernels, param_specs

STEPS, LENGTH, SEEN = 32, 256, 100  # tokens that are decoded in a turn; slots of the cache; the first position
CONSTANT = {"ones": 1.0, "zeros": 0.0}


def bench_int8(options, model=None):
    """Returns figures as a dict, for a model of the shape of Qwen3-0.6B with options.layers layers, or of the Qwen3Config `model`:
    medians over `options.steps` turns, for each of options.batch rows: float_cpu_s and int8_cpu_s, seconds of this process's CPU time for a
    token of all rows; float_over_int8, the median over turns of their ratio; float_gib and int8_gib, the size of the weights; peak_gib, the
    most memory of the process, which holds both."""
    cfg = model or SIZES["qwen3-0.6b"].replace(num_layers=options.layers)
    kernels, specs = choose_kernels({}, cfg), param_specs(cfg)
    params = {"float": random_tree(specs), "int8": random_tree(int8_specs(specs))}
    figures = {"what": "int8", "layers": cfg.num_layers, "cores": os.cpu_count()}
    figures.update({f"{kind}_gib": sum(w.nbytes for _, w in tree_paths(tree)) / 2**30 for kind, tree in params.items()})
    for batch in options.batch:
        turns = {kind: [] for kind in params}
        runs = {kind: decoder(tree, cfg, kernels, batch) for kind, tree in params.items()}
        for turn in range(options.steps + 1):  # the first one compiles
            for kind, run in runs.items():
                began = time.process_time()
                run()
                if turn:
                    turns[kind].append((time.process_time() - began) / STEPS)
        name = f"batch{batch}_" if len(options.batch) > 1 else ""
        figures.update({f"{name}{kind}_cpu_s": float(np.median(found)) for kind, found in turns.items()})
        figures[f"{name}float_over_int8"] = float(np.median(np.divide(turns["float"], turns["int8"])))
    return {**figures, "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def random_tree(specs):
    """Returns a tree of tensors for a tree of specs. It draws fast numbers of no meaning."""
    return unflatten(specs, [ms.Tensor(random_array(spec)) for _, spec in tree_paths(specs)])


def random_array(spec):
    """Returns the values of random_tree for one spec, a numpy array."""
    rng = np.random.default_rng(0)
    if spec.dtype == "int8":
        return rng.integers(-127, 128, spec.shape, np.int8)
    if spec.optimizer == "none":  # the scales of int8
        return np.full(spec.shape, 0.02 / 127, np.float32)
    if spec.init[0] in CONSTANT:
        return np.full(spec.shape, CONSTANT[spec.init[0]], np.float32)
    return (rng.random(spec.shape, np.float32) - 0.5) * np.float32(0.04)


def decoder(params, cfg, kernels, batch):
    """Returns run(), which decodes STEPS tokens of each row in one graph."""
    cache, loop = generate.init_cache(cfg, batch, LENGTH), generate.decode_loop(cfg, kernels)
    options = ms.Tensor(sampling_op.options(batch))
    draws, one = ms.Tensor(np.full((STEPS, batch), 0.5, np.float32)), ms.Tensor(1, ms.int32)

    def run():
        token, at = (ms.Tensor(np.full(batch, n, np.int32)) for n in (7, SEEN))
        ids, running = ms.Tensor(np.zeros((1, STEPS, 1, batch), np.int32)), ms.Tensor(np.ones(batch, np.int32))
        found = loop(params, cache, None, token, at, running, one, draws, options, None, ids, ms.Tensor(STEPS, ms.int32))
        return [x.asnumpy() for x in found]

    return run
