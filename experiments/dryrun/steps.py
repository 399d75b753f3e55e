"""The steps that a dry run compiles: a training step, and generation.

Their tensors are zeros whose pages are never touched, so they use no memory on the machine that compiles.
"""

import mindspore as ms
import ml_dtypes
import numpy as np

from experiments.train import optim
from experiments.train.batch import blank
from experiments.train.program import build_program
from experiments.train.state import local_shapes, placements, split_trainable, stage_placements
from ops import signature
from parallel.graph.jit import in_device_memory, jit
from parallel.graph.nested import to_tuple
from parallel.placement import local_shape, place
from parallel.trees import tree_leaves, tree_map, tree_paths
from qwen3.cache import round_up
from qwen3.model import build, choose_kernels, param_specs

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
TRAIN_STEPS = 2  # the second takes the results of the first, as all later steps of a run do


def train_step(config, cfg, sharding):
    """Runs two steps of the trainer. Returns {params, optimizer, gradients: {path: [shape, dtype]}}; frozen parameters are only in
    params."""
    (trainable, frozen), gradients = rank_placements(config, cfg, sharding), {}
    signature.listeners.append(_gradients_to(gradients))
    program = build_program(cfg, config, sharding, has_peers=False)
    kinds = optim.state_kinds(config.optim)
    state = {kind: to_tuple(_blank(local_shapes(sharding.mesh, trainable, axes))) for kind, axes in kinds.items()}
    if frozen:
        state["frozen"] = to_tuple(_blank(local_shapes(sharding.mesh, frozen, "stored")))
    paths, frozen_paths = ([p.path for p in tree_leaves(tree or ())] for tree in (trainable, frozen))
    given = {kind: [[list(w.shape), name_of(w.dtype)] for w in tree_leaves(state[kind])] for kind in state}
    state = optim.resident(choose_kernels(config.ops, cfg, sharding))({**state, "norm": ms.Tensor(0.0, ms.float32)})
    batch = blank(config.train.batch_size // sharding.mesh.dp, config.train.seq_len)
    for step in range(TRAIN_STEPS):
        state, _ = program.step(state, batch, 1e-3, step)
    params = {**dict(zip(paths, given["params"])), **dict(zip(frozen_paths, given.get("frozen", ())))}
    taken = [gradients.get(tuple(shape), [shape, "float32"]) for shape, _ in given["m"]]
    optimizer = {f"{kind}.{path}": w for kind in optim.MOMENTS[config.optim.name] for path, w in zip(paths, given[kind])}
    return {"params": params, "optimizer": optimizer, "gradients": dict(zip(paths, taken))}


def rank_placements(config, cfg, sharding):
    """Returns (trainable, frozen), trees of a rank's Placed parameters; under a pipeline, tuples with a tree for each of its stages."""
    if sharding.mesh.pp == 1:
        return split_trainable(placements(cfg, sharding, False))
    _, stages, _ = stage_placements(cfg, config, sharding)
    return split_trainable(tuple(stages[sharding.mesh.index(("pp",)) :: sharding.mesh.pp]))


def _gradients_to(found):
    """Returns a listener that records AdamW's arguments in `found`: {local shape of the parameter: [shape, dtype] of the gradient}."""

    def hear(op, shapes, dtypes):
        if op == "adamw" and len(shapes) > 1:  # the call with one shape is the sum of squares
            found[tuple(shapes[3])] = [list(shapes[4]), name_of(dtypes[4])]

    return hear


def name_of(dtype):
    """Returns the name of a MindSpore dtype, such as float32."""
    return str(dtype).lower().split("[")[-1].rstrip("]")


def _blank(tree):
    return tree_map(lambda like: ms.Tensor.from_numpy(np.zeros(like.shape, NUMPY[like.dtype])), tree)


def generate_step(config, cfg, sharding):
    """Reads a prompt of batch_size rows of seq_len, and then one token. Returns {params, cache: {path: [shape, dtype]}}."""
    mesh, rows = sharding.mesh, config.train.batch_size // sharding.mesh.dp
    length, dtype = round_up(config.train.seq_len), cfg.param_dtype
    placed = place(sharding, param_specs(cfg))
    params = in_device_memory(tree_map(lambda p: _empty(local_shape(mesh, p.spec, p.used), dtype), placed))
    heads = cfg.num_kv_heads * mesh.kv_repeat // mesh.tp
    shape = rows, length, heads, cfg.head_dim
    cache = in_device_memory(tuple((_empty(shape, cfg.compute_dtype), _empty(shape, cfg.compute_dtype)) for _ in range(cfg.num_layers)))
    extend = jit(build(cfg, sharding, kernels=choose_kernels(config.ops, cfg, sharding)).extend)
    last = ms.Tensor(np.zeros(rows, np.int32))
    for width in (length, 1):
        ids = ms.Tensor(np.ones((rows, width), np.int32))
        _, cache = extend(params, cache, ids, ids, last)
    of_cache = {f"{i}.{kind}": [list(shape), cfg.compute_dtype] for i in range(cfg.num_layers) for kind in "kv"}
    return {"params": {path: [list(w.shape), dtype] for path, w in tree_paths(params)}, "cache": of_cache}


def _empty(shape, dtype):
    return ms.Tensor.from_numpy(np.zeros(shape, NUMPY[dtype]))


# name -> (the step, how often it counts as run)
STEPS = {"train": (train_step, TRAIN_STEPS), "generate": (generate_step, 1)}
