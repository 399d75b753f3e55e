"""The decoding benchmark: `generate`, the engine and transformers take turns to continue prompts greedily, with the model of
experiments/bench/train.py."""

import os
import tempfile

import numpy as np

from experiments.bench.peers import contest, median, named, ratio, write_weights
from experiments.bench.train import MODEL, MOE
from parallel.random import hash_uniform
from qwen3.config import Qwen3Config

PROMPT, NEW_TOKENS = 128, 128
PEERS = ("transformers",)  # the peers that generate


def bench_decode(options, model=None, prompt=PROMPT, new_tokens=NEW_TOKENS):
    """Returns figures as a dict, medians over `options.steps` generations; those of qwen3.generate have no prefix.

    options: moe, batch (a list; with several, the figures of each begin with batchN_), steps, kernels, check, peer, peer_python.
    over_NAME: the median over rounds of NAME's decoding time divided by ours; prefill_over_NAME and total_over_NAME likewise, for the
    prefill and for both together; engine_over_NAME: NAME's time divided by the engine's. prefill_s: seconds from the prompts to the first
    new token.
    decode_tokens_per_s: new tokens, without the first of each row, divided by (total time - prefill_s). same_ids: the fraction of NAME's
    tokens that equal ours. engine_grown_mib: the growth of the engine process's memory while it served engine_requests short requests,
    after a warm-up with a quarter as many.
    """
    if wrong := [peer for peer in options.peer if peer not in PEERS]:
        raise ValueError(f"--peer={wrong[0]} does not generate; use --peer={PEERS[0]}, or --what=train")
    cfg = Qwen3Config(**(model or (MOE if options.moe else MODEL)))
    figures = {"what": "decode", "model": cfg.model_type, "cores": os.cpu_count()}
    for batch in options.batch:
        found = _of_batch(options, cfg, batch, prompt, new_tokens)
        figures.update({f"batch{batch}_{key}" if len(options.batch) > 1 else key: value for key, value in found.items()})
    return figures


def _of_batch(options, cfg, batch, prompt, new_tokens):
    place = np.arange(batch * prompt).reshape(batch, prompt)
    prompts = (hash_uniform(0, 2, place) * cfg.vocab_size).astype(np.int32)
    ours = {"ours": {"kernels": options.kernels}, "engine": {"kernels": options.kernels, "engine": True}}
    ours |= {"reference": {"kernels": "reference"}} if options.check else {}
    with tempfile.TemporaryDirectory() as folder:
        job = {"what": "decode", "prompts": prompts.tolist(), "new_tokens": new_tokens, **write_weights(cfg, folder)}
        found, others = contest(job, ours, options, options.steps, 1)
    figures = {"batch": batch, "load_of_others": others}
    ids = np.array(found["ours"][0]["ids"])
    for name, (facts, rounds, memory) in found.items():
        figures.update(named(name, _figures(rounds, memory, batch, prompt, new_tokens)))
        if name != "ours":
            figures[f"{name}_same_ids"] = float((ids == np.array(facts["ids"])).mean())
            for part, of in (("", decode_time), ("prefill_", prefill_time), ("total_", total_time)):
                figures[f"{part}over_{name}"] = ratio(found["ours"][1], rounds, of)
                if name in PEERS:
                    figures[f"engine_{part}over_{name}"] = ratio(found["engine"][1], rounds, of)
    return {**figures, **named("engine", found["engine"][0]["served"])}


def decode_time(step):
    return step["total_s"] - step["prefill_s"]


def prefill_time(step):
    return step["prefill_s"]


def total_time(step):
    return step["total_s"]


def _figures(rounds, memory, batch, prompt, new_tokens):
    decode_s, prefill_s, total_s = (median(rounds, of) for of in (decode_time, prefill_time, total_time))
    return {
        "decode_tokens_per_s": batch * (new_tokens - 1) / decode_s,
        "tokens_per_s": batch * new_tokens / total_s,
        "prefill_tokens_per_s": batch * prompt / prefill_s,
        "prefill_s": prefill_s,
        "peak_mem_gib": memory,
    }
