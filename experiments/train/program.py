"""Builds the functions of a training run from a model, a config and a layout."""

import mindspore as ms
import numpy as np

from experiments.train import ema, partitioned
from experiments.train import optim as optimizer
from experiments.train import pipeline as train_pipeline
from experiments.train import step as train_step
from experiments.train.state import (
    Program,
    check_dtype,
    check_stackable,
    full_tree,
    held_arrays,
    new_state,
    placements,
    restored,
    spread_arrays,
    uses_scan,
)
from parallel.placement import place, reader
from parallel.sharding import Sharding
from parallel.trees import tree_map
from qwen3.model import choose_kernels, param_specs


def build_program(cfg, config, sharding=None, has_peers=True):
    """Returns the Program: functions over an opaque state. Each compiles on first use, once per batch shape.

    init(params) -> state. params: a tree as qwen3.model and hf.save take it, or read(path, slices), which reads a slice of a parameter.
    step(state, batch, lr, step from 0) -> (state, metrics). batch: a dict of numpy [rows, S], the full-length rows of this data rank.
    metrics: floats and lists, for the global batch. Do not use the old state again: its arrays may be updated in place. They are unchanged
    if the gradient norm is not finite.
    evaluate(state, batches) -> cross-entropy in nats per target, over all ranks' batches; of preferences, a dict of metrics.
    score(state, batch) -> the nats of each target of the batch, see experiments.train.step.build_score; None under a pipeline.
    tree(state) -> the tree of the state's own parameters, this rank's shards, not copied; with a loop of layers they are stacked. None
    under a pipeline.
    held(state) -> the local shards for parallel.checkpoint.arrays; held() -> their sizes alone. The running norm is not included.
    restore(read, norm) -> state. read(name, slices): the arrays of a checkpoint; norm: the running norm.
    spread(state) -> a tree of parallel.placement.Spread, which gathers one full array at a time; params(state) -> the tree of full tensors
    on every rank. All ranks call both.

    has_peers: whether the other ranks of the layout run too; False for a simulated rank.

    Raises ValueError for weights that are not float32, or that the layout cannot shard.
    """
    check_dtype(cfg)
    sharding = sharding or Sharding()
    mesh, kernels = sharding.mesh, choose_kernels(config.ops, cfg, sharding)
    if config.parallel.lowering == "shard":
        return partitioned.build_program(cfg, config, sharding, kernels)
    if mesh.pp > 1:
        stages = train_pipeline.Stages(cfg, config, sharding, kernels)
        step, evaluate, executor = train_pipeline.build_step(stages, has_peers), train_pipeline.build_evaluate(stages), stages.executor
        score = tree = None
        placed, num_stacked = stages.placed, 0
        model_placed = saved_placed = stages.model_placed
    else:
        scan = uses_scan(cfg, config.train.layer_loop)
        if scan:
            check_stackable(cfg, ms.get_context("device_target"))
        placed, num_stacked = placements(cfg, sharding, scan), cfg.num_layers if scan else 0
        model_placed, saved_placed = place(sharding, param_specs(cfg)), placed
        step, executor = train_step.build_step(cfg, config, sharding, kernels, placed, scan), None
        evaluate = train_step.build_evaluate(cfg, config, sharding, kernels, placed, scan)
        score = train_step.build_score(cfg, config, sharding, kernels, placed, scan)

        def tree(state):
            return full_tree(placed, state["params"], state.get("frozen"))

    to_device, averages = optimizer.resident(kernels), config.train.ema_decay > 0
    if averages:
        step = ema.with_average(step, config.train.ema_decay, optimizer.changes_in_place(kernels))

    def init(params):
        read = params if callable(params) else reader(params)
        return to_device(new_state(mesh, placed, num_stacked, config.optim, read, averages))

    def restore(read, norm):
        return to_device(restored(mesh, placed, num_stacked, config.optim, read, norm, averages))

    def held(state=None):
        of = placed if state else saved_placed
        return held_arrays(of, num_stacked, config.optim, state, cfg.lora is None, averages)

    def spread(state):
        return spread_arrays(mesh, model_placed, placed, state, num_stacked)

    def params(state):
        return tree_map(lambda leaf: ms.Tensor(np.array(leaf.asnumpy(everywhere=True))), spread(state))  # a copy

    return Program(init, params, step, evaluate, held, restore, spread, score, tree, executor)
