"""Our side of the training benchmarks, for experiments/bench/ours.py."""

from dataclasses import replace
from pathlib import Path

import mindspore as ms
import numpy as np

from experiments.bench.turns import held_mem_gib, timed, warmed_up
from experiments.configs import common
from experiments.train.program import build_program
from experiments.train.state import uses_scan
from ops import registry
from parallel.sharding import Sharding
from parallel.specs import init_params
from parallel.trees import tree_map
from qwen3 import hf
from qwen3.model import param_specs


def load(job):
    cfg = hf.Reader(Path(job["folder"]) / "model").config
    return cfg, tree_map(ms.Tensor, init_params(param_specs(cfg), 0))


def train(job):
    """Returns (facts, step). A step is forward, backward, clipping and AdamW on one batch, monitored if the job has monitor_every."""
    (cfg, params), config = load(job), common.get_config()
    config.train.layer_loop, config.train.recompute = job["layer_loop"], job.get("recompute", "none")
    config.optim.update(job["optim"])
    config.ops.update({op: job["kernels"] for op in registry.OPS})
    program, batch = build_program(cfg, config), dict(np.load(Path(job["folder"]) / "batch.npz"))
    written = {}
    if job.get("monitor_every"):
        program = _watched(cfg, config, program, job["monitor_every"], written)
    state, at = program.init(params), 0
    del params

    def step():
        nonlocal state, at
        state, metrics = program.step(state, batch, config.optim.lr, at)
        at += 1
        return metrics["loss"]

    tree_map(lambda zeros: zeros.asnumpy().fill(0), (state["m"], state["v"]))  # writing gives memory to pages that were not touched yet
    held = held_mem_gib()
    facts = {"held_mem_gib": held, **warmed_up(step, job["warmup_steps"])}
    facts.update({"values": len(written)} if "monitor_every" in job else {})
    facts["layer_loop"] = "scan" if uses_scan(cfg, job["layer_loop"]) else "unroll"
    return facts, lambda: {"step_time_s": timed(step)[0]}


def _watched(cfg, config, program, every, written):
    """Returns the program with monitored steps. Their values are written to the dict `written`."""
    from experiments.watch import monitors, probe  # imported here because the memory of training without monitors is measured

    sharding = Sharding()
    seen = probe.Probe(cfg, config, sharding, program)
    monitor = monitors.Monitor(program, sharding.mesh, config.optim, every, lambda _, values: written.update(values), seen)
    return replace(program, step=monitor.step)
