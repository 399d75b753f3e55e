"""Our side of the serving benchmark, for experiments/bench/ours.py."""

from dataclasses import dataclass

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
    if job["part"] == "guess":
        return _guess(job, params, cfg, kernels)
    length = max(len(prompt) + new for prompt, new in _sizes(job))
    engine = Engine(params, cfg, slots=SLOTS, length=length, kernels=kernels, page=job["page"], reuse=job["part"] in ("reuse", "load"))
    engine.warm_up()
    if job["part"] == "one":
        return {}, lambda: measured("prefill_one", answers, engine, [job["one"]], [1])[0]
    if job["part"] == "many":
        return {}, lambda: measured("prefill_many", answers, engine, job["many"], [1] * len(job["many"]))[0]
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


def answers(engine, prompts, counts, guide=None):
    """Returns the new tokens of requests that come together. guide: of all of them."""
    numbers = [engine.submit(Request(prompt, count, guide=guide)) for prompt, count in zip(prompts, counts)]
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
        warm, _ = measured("reuse_warm", answers, engine, [ids[: job["shared"]] + suffix for suffix in suffixes[half:]], counts)
        return {**times, **warm, **measured("reuse_suffixes", answers, engine, suffixes[half:], counts)[0], **found}

    return {}, step


@dataclass(frozen=True)
class Script:
    """A guide (qwen3/guide.py) that dictates the tokens of a text."""

    ids: tuple

    def start(self):
        return _Dictation(self.ids)


class _Dictation:
    def __init__(self, ids):
        self.ids, self.at = ids, 0

    def allowed(self, size):
        mask = np.zeros(size, bool)
        mask[self.ids[self.at]] = True
        return mask

    def take(self, token):
        self.at += 1


def _guess(job, params, cfg, kernels):
    """Returns (facts, step). The engine without speculation writes as many tokens of its own choice, which takes as long as any others."""
    texts, engines = job["texts"], {}
    prompt = texts.pop("prompt")
    count = len(texts["edit"])
    for rows in (1, 4):
        for guesses in (0, job["guesses"]):
            options = {"slots": rows, "length": len(prompt) + count, "kernels": kernels, "page": job["page"], "speculate": guesses}
            engines[rows, guesses] = engine = Engine(params, cfg, **options)
            engine.warm_up()
            answers(engine, [prompt] * rows, [1] * rows)  # from here on the prompt is in the cache

    def step():
        found = {}
        for rows in (1, 4):
            found.update(measured(f"plain_{rows}", answers, engines[rows, 0], [prompt] * rows, [count] * rows)[0])
            engine = engines[rows, job["guesses"]]
            for name, ids in texts.items():
                guessed, right = engine.totals.guessed_tokens, engine.totals.right_tokens
                given = engine, [prompt] * rows, [count] * rows, Script(tuple(ids))
                found.update(measured(f"guess_{name}_{rows}", answers, *given)[0])
                right = engine.totals.right_tokens - right
                found[f"guess_{name}_{rows}_per_step"] = rows * (count - 1) / (rows * (count - 1) - right)
                found[f"guess_{name}_{rows}_right"] = right / max(1, engine.totals.guessed_tokens - guessed)
        return found

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
