"""Our side of a contest, a process of its own: python -m experiments.bench_ours, run by bench_peers.py."""

from dataclasses import replace
from pathlib import Path

import mindspore as ms
import numpy as np

from experiments.bench_turns import held_mem_gib, mem_mib, serve, timed, warmed_up
from experiments.configs import common
from experiments.train import build_program, uses_scan
from ops import registry
from parallel import runtime
from parallel.sharding import Sharding
from parallel.spec import init_params, tree_map
from qwen3 import hf
from qwen3.engine import Engine, Request
from qwen3.generate import generate, prefill
from qwen3.model import param_specs

REQUESTS = 400  # short ones, for the engine's memory


def load(job):
    cfg = hf.Reader(Path(job["folder"]) / "model").config
    return cfg, tree_map(ms.Tensor, init_params(param_specs(cfg), 0))


def train(job):
    """A step is forward, backward, clipping and AdamW on one batch; with monitor_every, watched."""
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

    tree_map(lambda zeros: zeros.asnumpy().fill(0), (state["m"], state["v"]))  # what nothing was written to is not held yet
    held = held_mem_gib()
    facts = {"held_mem_gib": held, **warmed_up(step, job["warmup_steps"])}
    facts.update({"values": len(written)} if "monitor_every" in job else {})
    facts["layer_loop"] = "scan" if uses_scan(cfg, job["layer_loop"]) else "unroll"
    return facts, lambda: {"step_time_s": timed(step)[0]}


def _watched(cfg, config, program, every, written):
    """The program whose steps train.monitor_every watches; `written` gets what they write."""
    from experiments import monitors, probe  # which import what training alone does without, and its memory is measured, too

    sharding = Sharding()
    seen = probe.Probe(cfg, config, sharding, program)
    monitor = monitors.Monitor(program, sharding.mesh, config.optim, every, lambda _, values: written.update(values), seen)
    return replace(program, step=monitor.step)


def decode(job):
    """A step reads the prompts, and reads and continues them greedily."""
    (cfg, params), prompts, count = load(job), job["prompts"], job["new_tokens"]
    kernels = registry.choose({op: job["kernels"] for op in registry.OPS}, "CPU", cfg.compute_dtype)
    length = len(prompts[0]) + count
    if job.get("engine"):
        return _engine(Engine(params, cfg, slots=len(prompts), length=length, kernels=kernels), prompts, count)

    def read():
        logits, _ = prefill(params, prompts, cfg, length, kernels)
        return logits.asnumpy().argmax(-1)

    def write():
        return generate(params, prompts, cfg, count, kernels=kernels)

    def step():
        first, _ = timed(read)
        every, _ = timed(write)
        return {"prefill_s": first, "total_s": every}

    ids = write()
    return {"ids": ids}, step


def _engine(engine, prompts, count):
    """The same by continuous batching; and what many requests leave of memory."""

    def write(prompts, count):
        numbers = [engine.submit(Request(prompt, count)) for prompt in prompts]
        ids = {number: [] for number in numbers}
        while engine.busy():
            for event in engine.step():
                ids[event.id].append(event.token)
        return [ids[number] for number in numbers]

    def step():
        first, _ = timed(write, prompts, 1)
        every, _ = timed(write, prompts, count)
        return {"prefill_s": first, "total_s": every}

    ids, short = write(prompts, count), [prompts[i % len(prompts)][: 1 + i % 16] for i in range(REQUESTS)]
    write(short[: REQUESTS // 4], 4)
    before = mem_mib()
    write(short, 4)
    return {"ids": ids, "served": {"requests": REQUESTS, "grown_mib": mem_mib() - before}}, step


if __name__ == "__main__":
    runtime.set_up()
    serve({"train": train, "decode": decode})
