"""The training benchmark: AdamW with clipping on one fixed model, dense or with experts. Ours and the peers take turns."""

import os
import tempfile

import numpy as np
from einops import rearrange

from experiments.bench.peers import contest, median, named, ratio, write_weights
from experiments.configs import common
from experiments.watch import metrics
from parallel.random import hash_uniform
from parallel.specs import count
from qwen3.config import Qwen3Config
from qwen3.model import param_specs

# These sizes do not change, so that figures of different versions and peers can be compared.
MODEL = dict(vocab_size=8192, hidden_size=256, num_layers=6, num_heads=8, num_kv_heads=4, head_dim=32, ffn_size=768, tie_embeddings=True)
MOE = dict(MODEL, model_type="qwen3_moe", num_experts=16, experts_per_token=4, moe_ffn_size=256)
BATCH, SEQ_LEN, LEARNING_RATE = 8, 256, 1e-3
WARMUP_STEPS, STEPS_A_TURN = 10, 4  # the loss after the first is compared
LOSS_TOLERANCE = 1e-4  # relative; AdamW increases float32 rounding differences from step to step


def bench_train(options, model=None, rows=BATCH, seq_len=SEQ_LEN):
    """Returns figures as a dict, medians over all steps; ours have no prefix. over_NAME: the median over rounds of NAME's step time divided
    by ours.

    options: moe, steps, layer_loop, kernels, check, peer, peer_python. check: ours with reference ops is also measured. Peers get each
    document as a separate row, so they compute the same loss with less attention and no document mask. loss_difference: the largest
    relative difference of the losses after WARMUP_STEPS steps; rounding explains up to LOSS_TOLERANCE.
    """
    cfg = Qwen3Config(**(model or (MOE if options.moe else MODEL)))
    peaks = []
    ours = {"ours": {}, **({"reference": {"kernels": "reference"}} if options.check else {})}
    with tempfile.TemporaryDirectory() as folder:
        job = train_job(cfg, options, rows, seq_len, WARMUP_STEPS, folder)
        rounds = -(-options.steps // STEPS_A_TURN)
        found, others = contest(job, ours, options, rounds, STEPS_A_TURN, lambda: peaks.append(metrics.peak_flops()))
    flops, tokens = metrics.flops_per_token(cfg, seq_len) / max(peaks), rows * seq_len
    figures = {"what": "train", "model": cfg.model_type, "parameters": count(param_specs(cfg)), "cores": os.cpu_count()}
    figures.update(matmul_gflops=max(peaks) / 1e9, load_of_others=others)
    for name, (facts, times, memory) in found.items():
        figures.update(named(name, _figures(facts, times, memory, tokens, flops)))
        if name != "ours":
            figures[f"over_{name}"] = ratio(found["ours"][1], times, step_time)
    losses = [facts["loss"] for facts, _, _ in found.values()]
    figures["loss_difference"] = float(np.ptp(losses) / np.max(np.abs(losses)))  # NaN if one loss is NaN
    return figures


def train_job(cfg, options, rows, seq_len, warmup_steps, folder):
    """Returns the job of all contestants that train, and writes its initial weights and batch to the folder."""
    batch, optim = packed_batch(cfg.vocab_size, rows, seq_len), common.get_config().optim
    np.savez(os.path.join(folder, "batch.npz"), **batch)
    documents = {key: rearrange(value, "row (document token) -> (row document) token", document=2) for key, value in batch.items()}
    np.savez(os.path.join(folder, "documents.npz"), **documents)
    job = {"what": "train", "layer_loop": options.layer_loop, "kernels": options.kernels, "warmup_steps": warmup_steps}
    job["optim"] = {"lr": LEARNING_RATE, **{key: optim[key] for key in ("b1", "b2", "eps", "weight_decay", "clip_norm")}}
    return {**job, **write_weights(cfg, folder)}


def step_time(step):
    return step["step_time_s"]


def _figures(facts, times, memory, tokens, flops):
    step_time_s = median(times, step_time)
    return {
        "step_time_s": step_time_s,
        "tokens_per_s": tokens / step_time_s,
        "mfu": tokens / step_time_s * flops,
        "peak_mem_gib": memory,
        **{key: value for key, value in facts.items() if key != "loss"},
        f"loss_after_{WARMUP_STEPS}_steps": facts["loss"],
    }


def packed_batch(vocab_size, rows=BATCH, seq_len=SEQ_LEN):
    """Returns a batch of random tokens, with two documents per row."""
    place = np.arange(rows * seq_len, dtype=np.uint64).reshape(rows, seq_len)
    tokens = (hash_uniform(0, 1, place) * vocab_size).astype(np.int32)
    column = np.tile(np.arange(seq_len, dtype=np.int32), (rows, 1))
    half = seq_len // 2
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "loss_weights": ((column != half - 1) & (column != seq_len - 1)).astype(np.float32),
        "segment_ids": 1 + (column >= half).astype(np.int32),
        "positions": column % half,
    }
