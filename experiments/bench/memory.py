"""The memory benchmark: a training step with each form of recomputation. Each form has its own process, and the processes take turns."""

import tempfile

import numpy as np

from experiments.bench.peers import contest, median, ratio
from experiments.bench.train import step_time, train_job
from parallel.specs import count
from qwen3.config import Qwen3Config
from qwen3.model import param_specs
from qwen3.run_layers import RECOMPUTE

MODEL = dict(vocab_size=4096, hidden_size=512, num_layers=16, num_heads=8, num_kv_heads=4, head_dim=64, ffn_size=1536, tie_embeddings=True)
ROWS, SEQ_LEN = 4, 512
WARMUP_STEPS, STEPS_A_TURN = 2, 2
FORMS = {**{form: {"layer_loop": "unroll", "recompute": form} for form in RECOMPUTE}, "scan": {"layer_loop": "scan"}}


def bench_memory(options, model=None, rows=ROWS, seq_len=SEQ_LEN):
    """Returns figures as a dict; their names begin with the form of recomputation. Layers are unrolled, except in the form "scan", the
    loop, which recomputes each layer in full. options: as in bench_train, without peers; layer_loop is set by the form.

    held_mem_gib: memory of the process before its first step, with parameters and optimizer state. above_held_gib: peak memory minus
    held_mem_gib; it includes the compiler's memory. above_params_gib: above_held_gib plus the optimizer state. above_..._over_none: these
    divided by those of the form "none". time_over_none: the median over rounds of the step time divided by that of "none".
    loss_difference must be 0.
    """
    cfg = Qwen3Config(**(model or MODEL))
    with tempfile.TemporaryDirectory() as folder:
        job = train_job(cfg, options, rows, seq_len, WARMUP_STEPS, folder)
        found, others = contest(job, FORMS, options, -(-options.steps // STEPS_A_TURN), STEPS_A_TURN)
    parameters = count(param_specs(cfg))
    figures = {"what": "memory", "parameters": parameters, "tokens": rows * seq_len, "load_of_others": others}
    for form, (facts, times, peak) in found.items():
        above = {"held": peak - facts["held_mem_gib"]}
        above["params"] = above["held"] + 2 * 4 * parameters / 2**30  # m and v
        figures[f"{form}_held_mem_gib"], figures[f"{form}_step_time_s"] = facts["held_mem_gib"], median(times, step_time)
        figures.update({f"{form}_above_{what}_gib": gib for what, gib in above.items()})
        if form != "none":
            figures.update({f"{form}_above_{what}_over_none": gib / figures[f"none_above_{what}_gib"] for what, gib in above.items()})
            figures[f"{form}_time_over_none"] = ratio(found["none"][1], times, step_time)
    losses = [facts["loss"] for facts, _, _ in found.values()]
    figures["loss_difference"] = float(np.ptp(losses))
    return figures
