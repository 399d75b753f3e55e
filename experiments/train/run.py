"""A training run from its config, for the mains: loads the data, builds the model, restores or initializes it, trains, and finishes."""

import contextlib
import os
from dataclasses import replace
from functools import partial

import mindspore as ms

from experiments import flags as command_line
from experiments.data import batch_ramp, corpus, loader
from experiments.evaluate import during
from experiments.layout import check as layout
from experiments.layout import memory as layout_memory
from experiments.layout import table as layout_table
from experiments.layout.sharding import sharding_of
from experiments.posttrain import reference
from experiments.posttrain.rollouts import Rollouts
from experiments.posttrain.settings import caches_reference
from experiments.train import checkpoints, lr_groups, run_folder
from experiments.train.finish import check_results, finish, save_at
from experiments.train.loop import train
from experiments.train.program import build_program
from experiments.train.state import uses_scan
from experiments.watch import metrics, monitors, profiling, trackers
from experiments.watch.probe import Probe
from ops import registry
from parallel import collectives
from parallel.specs import count
from qwen3 import hf
from qwen3.model import check_frozen, choose_kernels, param_specs


def train_in(workdir, config):
    """Trains in the folder `workdir`, from the start or from its newest checkpoint. config: from experiments.flags.resolve."""
    rank, _ = collectives.start()
    cfg, parallel = command_line.model_config(config, ms.get_context("device_target")), config.parallel
    check_frozen(cfg)
    trackers.check(config.watch.trackers)
    lr_groups.check(config.optim.lr_groups, param_specs(cfg))
    mesh = layout.mesh(cfg, parallel, rank)
    layout_memory.check(config, cfg, sharding_of(config, cfg, mesh))
    with run_folder.locked(workdir, mesh):
        data = corpus.load(config, cfg.vocab_size)
        cfg = corpus.with_token_ids(cfg, data.tokenizer, not config.data.tokenizer, bool(config.data.format or config.data.conversations))
        run(config, cfg, data, workdir, mesh)


def run(config, cfg, data, workdir, mesh):
    if (config.train.save_hf or config.train.save_hf_every) and not cfg.lora:
        _check_names(cfg)
    sharding = sharding_of(config, cfg, mesh, device=ms.get_context("device_target"))
    program = build_program(cfg, config, sharding)
    start = checkpoints.start(workdir, cfg, config, mesh, program)
    if caches_reference(config):
        data = reference.with_reference(workdir, cfg, config, mesh, program, data)
    tasks = during.build(cfg, config, sharding, choose_kernels(config.ops, cfg, sharding), program, data.tokenizer)
    peak = metrics.mesh_peak_flops(mesh, cfg.compute_dtype)
    if mesh.rank == 0:
        check_results(workdir, cfg, config)
        announce(cfg, config, data, sharding, peak, start)

    (place, dp), train_ = ((0, 1) if sharding.lowering == "shard" else (mesh.index(("dp",)), mesh.dp)), config.train
    held = {key: value[: train_.eval_rows or None] for key, value in data.held_out.items()}
    eval_batches = list(loader.eval_batches(held, train_.batch_size, place, dp))
    cost = metrics.flops_per_token(cfg, train_.seq_len)
    micro, state = config.parallel.micro_batches, start.make(program)
    if mesh.rank == 0:  # once everything of an earlier start is read: what is refused leaves the folder as it was
        metrics.check(workdir, start.step)
        run_folder.begin(workdir, config, data.tokenizer)
    with contextlib.ExitStack() as opened:
        sent = trackers.Trackers(workdir, config.watch, run_folder.to_dict(config), start.step) if mesh.rank == 0 else None
        writer = opened.enter_context(metrics.Writer(workdir if mesh.rank == 0 else None, start.step, sent))
        rows_of = batch_ramp.rows_of(train_)
        batches = loader.Loader(data.train, rows_of, train_.seed, place, dp, micro, start.loader, begun=start.step)
        batches = opened.enter_context(batches)
        begun = start.step, start.tokens
        saving = opened.enter_context(checkpoints.Saving(workdir, cfg, config, mesh, program, batches, writer, begun))
        if config.rl.loss:
            rollouts = opened.enter_context(Rollouts(workdir, cfg, config, sharding, program, data, start.step))
            program = replace(program, step=rollouts.step, evaluate=rollouts.evaluate)
        of_bytes = None if config.prefer.loss or config.rl.loss else corpus.bytes_per_target(data.tokenizer, held)
        mfu_of = lambda speed: speed * cost / peak if peak else 0.0
        if train_.monitor_every:
            probe = Probe(cfg, config, sharding, program, batches.sources if hasattr(data.train, "source_of") else None)
            monitor = monitors.Monitor(program, mesh, config.optim, train_.monitor_every, writer.write, probe)
            program = replace(program, step=monitor.step)
        if train_.profile_steps and mesh.rank == 0:
            profile = opened.enter_context(profiling.Profile(workdir, train_.profile_steps))
            program = replace(program, step=profile.around(program.step))

        def after_step(state, done, tokens):
            if train_.save_hf_every and done % train_.save_hf_every == 0 and done < train_.steps:
                save_at(done, program, state, cfg, config, data.tokenizer, workdir, mesh)
            return saving.after_step(state, done, tokens)

        state = train(program, state, batches, eval_batches, config, writer, mfu_of, begun, after_step, of_bytes, tasks)
        saved = saving.end(state)
        if not saving.stopped:
            saving.finish(partial(finish, program, state, cfg, config, data, writer, workdir, mesh, saved))


def _check_names(cfg):
    """Raises ValueError for a model that could not be saved at the end of the run."""
    try:
        hf.check_names(cfg)
    except ValueError as error:
        raise ValueError(f"train.save_hf=true: {error}, or use --config.train.save_hf=false and save_hf_every=0") from error


def announce(cfg, config, data, sharding, peak, start):
    mesh, device = sharding.mesh, ms.get_context("device_target")
    looped = uses_scan(cfg, config.train.layer_loop) and mesh.pp == 1
    how = "one compiled layer, looped over" if looped else "unrolled"
    print(f"model      {config.model}: {count(param_specs(cfg)):,} parameters, {cfg.num_layers} layers, {how}")
    if mesh.world > 1:
        print(f"layout     {layout_table.summary(config)}")
    print(f"ops        {registry.describe(choose_kernels(config.ops, cfg, sharding), device)}")
    print(f"start      {start.text}{'; left out: ' * bool(start.not_loaded)}{start.not_loaded}")
    print(f"data       {corpus.describe(data, config.train.seq_len)}")
    cost, what = metrics.flops_per_token(cfg, config.train.seq_len), "these processes'" if mesh.world > 1 else "this machine's"
    print(
        f"compute    {cost:.3g} FLOPs a token; {what} {cfg.compute_dtype} matmul peak {peak / 1e9:.0f} GFLOP/s; {os.cpu_count()} cores",
        flush=True,
    )
