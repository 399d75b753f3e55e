"""The memory benchmark: a training step with each form of recompute, a process each, in turn."""

import tempfile

import numpy as np

from experiments.bench_peers import contest, median, ratio
from experiments.bench_train import step_time, train_job
from parallel.spec import count
from qwen3.config import Qwen3Config
from qwen3.model import RECOMPUTE, param_specs

MODEL = dict(vocab_size=4096, hidden_size=512, num_layers=16, num_heads=8, num_kv_heads=4, head_dim=64, ffn_size=1536, tie_embeddings=True)
ROWS, SEQ_LEN = 4, 512
WARMUP_STEPS, STEPS_A_TURN = 2, 2


def bench_memory(options, model=None, rows=ROWS, seq_len=SEQ_LEN):
    """Figures as a dict, by the name of the form. options: steps, layer_loop, kernels, peer and peer_python, of which there are none.

    held_mem_gib: of the process before its first step, with parameters and optimizer state; above_mem_gib: what its peak is above that,
    the compiler's part included. over_none: the median over rounds of the step time over that of none. loss_difference has to be 0.
    """
    cfg = Qwen3Config(**(model or MODEL))
    with tempfile.TemporaryDirectory() as folder:
        job = train_job(cfg, options, rows, seq_len, WARMUP_STEPS, folder)
        ours = {form: {"recompute": form} for form in RECOMPUTE}
        found, others = contest(job, ours, options, -(-options.steps // STEPS_A_TURN), STEPS_A_TURN)
    figures = {"what": "memory", "parameters": count(param_specs(cfg)), "tokens": rows * seq_len, "load_of_others": others}
    for form, (facts, times, peak) in found.items():
        figures[f"{form}_held_mem_gib"], figures[f"{form}_above_mem_gib"] = facts["held_mem_gib"], peak - facts["held_mem_gib"]
        figures[f"{form}_step_time_s"] = median(times, step_time)
        if form != "none":
            figures[f"{form}_mem_over_none"] = figures[f"{form}_above_mem_gib"] / figures["none_above_mem_gib"]
            figures[f"{form}_time_over_none"] = ratio(found["none"][1], times, step_time)
    losses = [facts["loss"] for facts, _, _ in found.values()]
    figures["loss_difference"] = float(np.ptp(losses))
    return figures
