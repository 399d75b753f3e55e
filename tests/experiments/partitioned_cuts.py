"""The shards into which MindSpore's partitioner cuts the Parameters of a training step, held to those of parallel/placement.py.

    python -m tests.experiments.partitioned_cuts CASE

in an environment of parallel.simulation.standin. MindSpore cuts Parameters that have values in Python, where they can be seen; the values
that a simulated device holds cannot. Prints, after RESULT, {"cut": how many were cut, "wrong": [their names]} as JSON.
"""

import json
import os
import sys
from unittest import mock

import mindspore as ms
import numpy as np
from mindspore.communication import init
from mindspore.parallel import _utils

from experiments.train import partitioned
from experiments.train.batch import blank
from parallel.placement import cut, place
from parallel.sharding import Sharding
from parallel.trees import tree_leaves
from qwen3.model import choose_kernels, param_specs
from tests.parallel import layouts

RESULT = "RESULT "
CASES = {
    "dense, dp2 tp2": ("dense", dict(dp=2, tp=2)),
    "dense, dp2 tp2, ZeRO 1": ("dense", dict(dp=2, tp=2, zero=1)),
    "experts, dp2 tp2 ep2, ZeRO 3": ("moe", dict(dp=2, tp=2, ep=2, zero=3)),
}


def main(name):
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("Ascend")
    init()
    (model, options), found, known = CASES[name], {}, {}
    cfg, config, made = layouts.MODELS[model], layouts.run_config(options), layouts.sharding_of(layouts.MODELS[model], options)
    mesh = layouts.sharding_of(cfg, options, int(os.environ["RANK_ID"])).mesh
    sharding = Sharding(mesh, zero=made.zero, lowering="shard")
    config.parallel.lowering, config.train.batch_size, config.train.seq_len = "shard", layouts.ROWS, 16
    placed = place(sharding, param_specs(cfg))

    def with_values(sharding, p, path):
        """A Parameter in which every element has another value; the padding is 0."""
        values = np.zeros(partitioned.padded(sharding, p.spec), np.float32)
        known[path] = np.arange(1, 1 + np.prod(p.spec.shape), dtype=np.float32).reshape(p.spec.shape)
        values[tuple(slice(0, n) for n in p.spec.shape)] = known[path]
        return ms.Parameter(ms.Tensor(values), name=path)

    by_layout = _utils._load_tensor_by_layout

    def seen(tensor, layout, rank):
        out = by_layout(tensor, layout, rank)
        found[tensor.name] = out.asnumpy()
        return out

    with mock.patch.object(partitioned, "_parameter", with_values), mock.patch.object(_utils, "_load_tensor_by_layout", seen):
        arrays = partitioned.Arrays(sharding, placed, placed, config)
        step = partitioned.build_step(cfg, config, sharding, choose_kernels(config.ops, cfg, sharding), arrays)
        step(arrays.state(0.0), blank(config.train.batch_size, config.train.seq_len), 1e-3, 0)
    wrong = []
    for p in tree_leaves(placed):
        want = cut(mesh, p.spec, p.stored, known[p.path].__getitem__)
        if not np.array_equal(found.get(p.path, known[p.path]), want):
            wrong.append(p.path)
    return {"cut": len(set(found) & set(known)), "wrong": wrong}


if __name__ == "__main__":
    print(RESULT + json.dumps(main(sys.argv[1])), flush=True)
