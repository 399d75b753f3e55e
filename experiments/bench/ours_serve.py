"""Our side of the serving benchmark, for experiments/bench/ours.py."""

import numpy as np

from experiments.bench.ours_train import load
from experiments.bench.turns import Clock, measured
from ops import registry
from parallel.random import hash_uniform
from qwen3.engine import Engine, Request

SLOTS = 16
STREAMED = 4  # tokens of a row in one step of the engine, as where clients of a server read streams


def serve_part(job):
    """Returns (facts, step) of one part of the benchmark; see experiments/bench/serve.py."""
    cfg, params = load(job)
    kernels = registry.choose({op: job["kernels"] for op in registry.OPS}, "CPU", cfg.compute_dtype)
    length = max(len(prompt) + new for prompt, new in _sizes(job))
    engine = Engine(params, cfg, slots=SLOTS, length=length, kernels=kernels, page=job["page"], reuse=job["part"] in ("reuse", "load"))
    engine.warm_up()
    if job["part"] == "prefill":
        return {}, lambda: {
            **measured("prefill_one", answers, engine, [job["one"]], [1])[0],
            **measured("prefill_many", answers, engine, job["many"], [1] * len(job["many"]))[0],
        }
    if job["part"] == "batch":
        ids = answers(engine, job["many"], job["answers"])
        return {"ids": ids}, lambda: measured("batch", answers, engine, job["many"], job["answers"])[0]
    if job["part"] == "reuse":
        return _reuse(engine, job, cfg.vocab_size)
    return {}, lambda: arrivals(engine, job["load"], Clock(job["clock"]))


def _sizes(job):
    """Returns [(tokens of the prompt, new tokens)] of the longest requests of a part."""
    if job["part"] == "reuse":
        return [([0] * (job["shared"] + job["suffix"]), job["replies"])]
    if job["part"] == "load":
        return [(each["prompt"], each["new_tokens"]) for each in job["load"]]
    return [(job["one"], 1), *zip(job["many"], job["answers"])]


def answers(engine, prompts, counts):
    """Returns the new tokens of requests that come together."""
    numbers = [engine.submit(Request(prompt, count)) for prompt, count in zip(prompts, counts)]
    ids = {number: [] for number in numbers}
    while engine.busy():
        for event in engine.step():
            ids[event.id].append(event.token)
    return [ids[number] for number in numbers]


def _reuse(engine, job, vocab_size):
    """Returns (facts, step). Each step has texts of its own, so that it finds nothing of an earlier one in the cache."""
    turn = 0

    def step():
        nonlocal turn
        turn += 1
        place = np.arange(job["shared"] + 2 * job["sharing"] * job["suffix"])
        ids = (hash_uniform(turn, 4, place) * vocab_size).astype(int).tolist()
        suffixes = [ids[at : at + job["suffix"]] for at in range(job["shared"], len(ids), job["suffix"])]
        counts, half = [job["replies"]] * job["sharing"], job["sharing"]
        read, reused = engine.totals.prefill_tokens, engine.totals.reused_tokens
        times, _ = measured("reuse", answers, engine, [ids[: job["shared"]] + suffix for suffix in suffixes[:half]], counts)
        found = {"reuse_read": engine.totals.prefill_tokens - read, "reuse_reused": engine.totals.reused_tokens - reused}
        return {**times, **measured("reuse_suffixes", answers, engine, suffixes[half:], counts)[0], **found}

    return {}, step


def arrivals(engine, load, clock):
    """Runs requests that arrive at load[i]["at"]. Returns the times of their first and last tokens."""
    first, last, of = [0.0] * len(load), [0.0] * len(load), {}
    coming = list(range(len(load)))
    while coming or engine.busy():
        if not engine.busy():
            clock.wait_until(load[coming[0]]["at"])
        while coming and load[coming[0]]["at"] <= clock.now():
            each = load[coming[0]]
            of[engine.submit(Request(each["prompt"], each["new_tokens"]))] = coming.pop(0)
        for event in engine.step(STREAMED):
            i = of[event.id]
            last[i] = clock.now()
            first[i] = first[i] or last[i]
    return {"first": first, "last": last}
