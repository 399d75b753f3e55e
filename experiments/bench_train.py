"""The training benchmark: AdamW with clipping on one fixed model."""

import os
import resource
import statistics
import time

import mindspore as ms
import numpy as np

from experiments import metrics
from experiments.configs import common
from experiments.train import build_program, uses_scan
from parallel.spec import count, hash_uniform, init_params, tree_map
from qwen3.config import Qwen3Config
from qwen3.model import param_specs

# Fixed, so that figures of different versions and peers compare.
MODEL = dict(vocab_size=8192, hidden_size=256, num_layers=6, num_heads=8, num_kv_heads=4, head_dim=32, ffn_size=768, tie_embeddings=True)
BATCH, SEQ_LEN = 8, 256


def bench_train(steps, layer_loop):
    """Figures as a dict: medians over `steps` steps."""
    cfg, config = Qwen3Config(**MODEL), common.get_config()
    config.train.layer_loop = layer_loop
    program, batch = build_program(cfg, config), packed_batch(cfg.vocab_size)
    state = program.init(tree_map(ms.Tensor, init_params(param_specs(cfg), 0)))
    times = []
    for at in range(steps + 2):
        start = time.perf_counter()
        state, out = program.step(state, batch, 1e-3, at)
        times.append(time.perf_counter() - start)
    assert np.isfinite(out["loss"])
    step_time_s = statistics.median(times[2:])
    tokens_per_s = BATCH * SEQ_LEN / step_time_s
    peak_flops = metrics.peak_flops()
    return {
        "what": "train",
        "cores": os.cpu_count(),
        "parameters": count(param_specs(cfg)),
        "layer_loop": "scan" if uses_scan(cfg, layer_loop) else "unroll",
        "step_time_s": step_time_s,
        "tokens_per_s": tokens_per_s,
        "mfu": tokens_per_s * metrics.flops_per_token(cfg, SEQ_LEN) / peak_flops,
        "matmul_gflops": peak_flops / 1e9,
        "peak_mem_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "compile_time_s": times[0] - step_time_s,
    }


def packed_batch(vocab_size):
    """Random tokens, two documents a row."""
    place = np.arange(BATCH * SEQ_LEN, dtype=np.uint64).reshape(BATCH, SEQ_LEN)
    tokens = (hash_uniform(0, 1, place) * vocab_size).astype(np.int32)
    column = np.tile(np.arange(SEQ_LEN, dtype=np.int32), (BATCH, 1))
    half = SEQ_LEN // 2
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "loss_weights": ((column != half - 1) & (column != SEQ_LEN - 1)).astype(np.float32),
        "segment_ids": 1 + (column >= half).astype(np.int32),
        "positions": column % half,
    }
