"""The monitors benchmark: a training step without monitors, a step between two monitored steps, and a monitored step. Each has its own
process, and the processes take turns."""

import tempfile

import numpy as np

from experiments.bench.peers import contest, median, ratio
from experiments.bench.train import BATCH, MODEL, MOE, SEQ_LEN, STEPS_A_TURN, WARMUP_STEPS, step_time, train_job
from parallel.specs import count
from qwen3.config import Qwen3Config
from qwen3.model import param_specs

EVERY = {"off": 0, "between": 10**9, "watched": 1}  # train.monitor_every of each


def bench_monitors(options, model=None, rows=BATCH, seq_len=SEQ_LEN):
    """Returns figures as a dict; their names begin with off, between or watched. options: moe, steps, layer_loop, kernels.

    off: a step with train.monitor_every=0. between: a step that is not monitored, with monitors on. watched: a monitored step, including
    writing its values. values: the number of values that a step writes. over_off: the median over rounds of the step time divided by that
    of off. loss_difference must be 0.
    """
    cfg = Qwen3Config(**(model or (MOE if options.moe else MODEL)))
    with tempfile.TemporaryDirectory() as folder:
        job = train_job(cfg, options, rows, seq_len, WARMUP_STEPS, folder)
        ours = {name: {"monitor_every": every} for name, every in EVERY.items()}
        found, others = contest(job, ours, options, -(-options.steps // STEPS_A_TURN), STEPS_A_TURN)
    figures = {"what": "monitors", "model": cfg.model_type, "parameters": count(param_specs(cfg)), "load_of_others": others}
    for name, (facts, times, _) in found.items():
        figures[f"{name}_step_time_s"], figures[f"{name}_values"] = median(times, step_time), facts["values"]
        if name != "off":
            figures[f"{name}_over_off"] = ratio(found["off"][1], times, step_time)
    losses = [facts["loss"] for facts, _, _ in found.values()]
    figures["loss_difference"] = float(np.ptp(losses))
    return figures
