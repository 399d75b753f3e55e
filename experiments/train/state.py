"""The training state: its arrays on a rank, and how they are made, saved, restored and joined to a tree of parameters.

A state is a dict of nested tuples of tensors, the local shards of this rank: "params", the trainable parameters; "frozen", the frozen ones,
if there are any; "m" and, for AdamW and Muon, "v", the optimizer's moments; "ema", the average of the parameters, if the run keeps one;
and "norm", a number, the running mean of gradient norms.

A tree of Placed (parallel/placement.py) gives the sharding of each array. It has a leaf for each parameter of the model. With a layer loop,
a leaf stands for one parameter of all layers, stacked. Under pipeline parallelism it is a tuple of trees, one for each stage of the rank.
"""

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import mindspore as ms
import numpy as np

from experiments.train import ema
from experiments.train import optim as optimizer
from parallel.graph.nested import from_tuple, to_tuple
from parallel.pipeline import schedule as pipeline
from parallel.placement import Held, Spread, load, local_shape, place, stacked
from parallel.trees import merge, select, shallow, tree_leaves, tree_map
from qwen3 import hf
from qwen3.model import param_specs
from qwen3.run_layers import parameters_of
from qwen3.stages import stage_specs

SCAN_ABOVE_LAYERS = 8  # scan compiles one layer and takes less memory; unrolled layers compute no forward twice


@dataclass(frozen=True)
class Program:
    """The functions of a run; see experiments.train.program.build_program."""

    init: object
    params: object
    step: object
    evaluate: object
    held: object = None
    restore: object = None
    spread: object = None
    score: object = None  # where no pipeline and no partitioner is
    tree: object = None  # where no pipeline and no partitioner is
    executor: object = None  # the parallel.pipeline.run.Executor, under pipeline parallelism


def check_dtype(cfg):
    if cfg.param_dtype != "float32":
        raise ValueError(
            f"model_args.param_dtype={cfg.param_dtype!r}: training keeps weights in float32 with every compute dtype;"
            " use --config.model_args.param_dtype=float32"
        )


def check_stackable(cfg, device):
    """Raises ValueError for stacked layers whose frozen weights are in bfloat16 on CPU: MindSpore takes no layer out of such a stack."""
    if device == "CPU" and any(spec.dtype == "bfloat16" for spec in tree_leaves(param_specs(cfg)["layers"])):
        raise ValueError(
            "train.frozen_dtype=bfloat16 with layers in a loop: on CPU MindSpore reads no layer from a stack of bfloat16; use"
            " --config.train.layer_loop=unroll, or train.frozen_dtype=float16 or float32"
        )


def uses_scan(cfg, layer_loop):
    """Whether train.layer_loop means a loop over one compiled layer (scan) instead of unrolled layers."""
    one_kind = len({cfg.at_layer(i) for i in range(cfg.num_layers)}) == 1 and _layers_are_alike(cfg)
    return layer_loop == "scan" or (layer_loop == "auto" and one_kind and cfg.num_layers > SCAN_ABOVE_LAYERS)


def _layers_are_alike(cfg):
    """Whether all layers have the same parameters, and freeze the same ones."""
    return len({parameters_of(layer) for layer in param_specs(cfg)["layers"]}) == 1


def placements(cfg, sharding, scan):
    """The tree of Placed of a model. With scan, the layers are one tree of stacked arrays, whose paths are those of the first layer."""
    tree = place(sharding, param_specs(cfg))
    return {**tree, "layers": tree_map(lambda p: stacked(p, cfg.num_layers), tree["layers"][0])} if scan else tree


def stage_placements(cfg, config, sharding):
    """(the range of layers of each pipeline stage, the tree of Placed of each stage, the tree of Placed of the model)"""
    parallel, pp, holders = config.parallel, sharding.mesh.pp, {}
    layers = pipeline.stage_ranges(cfg.num_layers, pp, parallel.virtual_stages, tuple(parallel.stage_layers))
    stages = [place(sharding, stage_specs(cfg, each, s == 0, s == len(layers) - 1)) for s, each in enumerate(layers)]
    for s, placed in enumerate(stages):
        for p in tree_leaves(placed):
            holders[p.path] = (*holders.get(p.path, ()), s % pp)

    def with_holders(placed):
        return tree_map(lambda p: replace(p, holders=holders[p.path]), placed)

    return layers, list(map(with_holders, stages)), with_holders(place(sharding, param_specs(cfg)))


def split_trainable(tree):
    """Splits a tree of ParamSpec or Placed into (trainable, frozen), which keep the paths; None for one that has no leaves.

    If something is frozen, the trainable tree is made shallow, see parallel.trees.shallow.
    """
    trainable, frozen = select(tree, _trains), select(tree, lambda leaf: not _trains(leaf))
    return (trainable if trainable is None or frozen is None else shallow(trainable)), frozen


def check_trains(placed):
    """Raises ValueError if no parameter of a tree of ParamSpec or Placed is trainable."""
    if split_trainable(placed)[0] is None:
        raise ValueError("train.freeze_include leaves nothing to train; take patterns out, or name what trains in train.freeze_exclude")


def _trains(leaf):
    return getattr(leaf, "spec", leaf).trains


def full_tree(placed, params, frozen):
    """Joins nested tuples of trainable and of frozen arrays (None if there are none) to a tree of the structure of `placed`."""
    trainable_placed, frozen_placed = split_trainable(placed)
    return merge(placed, from_tuple(trainable_placed, params), from_tuple(frozen_placed, frozen) if frozen_placed else None)


def local_shapes(mesh, placed, axes):
    """A tree of objects that have only a `shape`, that of the local shard, and a `dtype`, the name of that of its spec.

    axes: the field of Placed, "used", "stored" or "state".
    """
    return tree_map(lambda p: SimpleNamespace(shape=local_shape(mesh, p.spec, getattr(p, axes)), dtype=p.spec.dtype), placed)


def load_shards(mesh, placed, read, num_stacked, axes="stored"):
    """Reads the local shards of a tree of Placed with read(path, slices), and casts them to the dtypes of their specs.

    num_stacked: layers in a stack, 0 if they are not stacked.
    """
    dtypes = {p.path: p.spec.dtype for p in tree_leaves(placed)}

    def read_cast(path, slices):
        return hf.cast(read(path, slices), dtypes[path], path)

    if not num_stacked:
        return load(mesh, placed, read_cast, axes)

    def read_stack(path, slices):
        rest, out = path.split(".", 2)[2], None
        for i in range(num_stacked):
            layer = hf.cast(read(f"layers.{i}.{rest}", slices[1:]), dtypes[path], f"layers.{i}.{rest}")
            out = np.empty((num_stacked, *layer.shape), layer.dtype) if out is None else out
            out[i] = layer
        return out

    return {key: load(mesh, {key: value}, read_stack if key == "layers" else read_cast, axes)[key] for key, value in placed.items()}


def state_kinds(optim, averages=False):
    """Returns optimizer.state_kinds, and with averages "ema" too."""
    return {**optimizer.state_kinds(optim), **({"ema": "stored"} if averages else {})}


def new_state(mesh, placed, num_stacked, optim, read, averages=False):
    """Makes the state before the first step, with parameters from read(path, slices). averages: whether it has an average of them."""
    trainable, frozen = split_trainable(placed)
    state = {"params": to_tuple(load_shards(mesh, trainable, read, num_stacked))}
    state.update(optimizer.init_state(to_tuple(local_shapes(mesh, trainable, "state")), optim))
    if averages:
        state["ema"] = ema.first(state["params"])
    if frozen:
        state["frozen"] = to_tuple(load_shards(mesh, frozen, read, num_stacked))
    return state


def restored(mesh, placed, num_stacked, optim, read, norm, averages=False):
    """Makes the state from a checkpoint. read(name, slices): its arrays, by the names of held_arrays; norm: running mean of norms."""
    trainable, frozen = split_trainable(placed)

    def shards(kind, tree, axes):
        return to_tuple(load_shards(mesh, tree, lambda path, slices: read(f"{kind}/{path}", slices), num_stacked, axes))

    state = {kind: shards(kind, trainable, axes) for kind, axes in state_kinds(optim, averages).items()}
    if frozen:
        state["frozen"] = shards("params", frozen, "stored")
    return {**state, "norm": ms.Tensor(norm, ms.float32)}


def held_arrays(placed, num_stacked, optim, state=None, with_frozen=True, averages=False):
    """Lists the local shards of a state as [Held], for parallel.checkpoint.arrays; without a state, their sizes alone.

    with_frozen: also list the frozen parameters, under the names "params/...".
    """
    trainable, frozen = split_trainable(placed)
    kinds = [(name, name, axes, trainable) for name, axes in state_kinds(optim, averages).items()]
    if frozen and with_frozen:
        kinds.append(("params", "frozen", "stored", frozen))
    return [
        Held(_saved_names(kind, p.path, num_stacked), p.spec, getattr(p, axes), w, p.holders)
        for kind, name, axes, tree in kinds
        for p, w in zip(tree_leaves(tree), tree_leaves(state[name]) if state else [None] * len(tree_leaves(tree)))
    ]


def _saved_names(kind, path, num_stacked):
    """The names of a leaf's arrays in a checkpoint: one name, or one for each of the stacked layers."""
    if not num_stacked or not path.startswith("layers."):
        return (f"{kind}/{path}",)
    return tuple(f"{kind}/layers.{i}.{path.split('.', 2)[2]}" for i in range(num_stacked))


def spread_arrays(mesh, model_placed, placed, state, num_stacked):
    """The model's parameters as a tree of Spread. model_placed: the tree of Placed with a leaf for each parameter of the model."""
    trainable, frozen = split_trainable(placed)
    shards = {p.path: w for p, w in zip(tree_leaves(trainable), tree_leaves(state["params"]))}
    if frozen:
        shards.update({p.path: w for p, w in zip(tree_leaves(frozen), tree_leaves(state["frozen"]))})
    return tree_map(partial(_spread, mesh, shards, num_stacked), model_placed)


def _spread(mesh, shards, num_stacked, p):
    if num_stacked and p.path.startswith("layers."):
        _, layer, rest = p.path.split(".", 2)
        return Spread(mesh, p, shards[f"layers.0.{rest}"], int(layer))
    return Spread(mesh, p, shards.get(p.path))
