"""The monitors benchmark: a training step with monitors off, on between two watched steps, and watching each step, each in its own process,
in turns."""

import tempfile

import numpy as np

from experiments.bench.peers import contest, median, ratio
from experiments.bench.train import BATCH, MODEL, MOE, SEQ_LEN, STEPS_A_TURN, WARMUP_STEPS, step_time, train_job
from parallel.specs import count
from qwen3.config import Qwen3Config
from qwen3.model import param_specs

EVERY = {"off": 0, "between": 10**9, "watched": 1}  # train.monitor_every of each


def bench_monitors(options, model=None, rows=BATCH, seq_len=SEQ_LEN):
    """Figures as a dict, by the name of the contestant. options: moe, steps, layer_loop, kernels, peer and peer_python, of which there are
    none.

    off: the step alone, as train.monitor_every=0 has it; between: a step that is not the one in train.monitor_every; watched: one that is,
    with all that is written of it. values: so many are written of a step. over_off: the median over rounds of the step time over that of
    off. loss_difference has to be 0.
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
