"""The serving benchmark: the engine and transformers take turns to read prompts, to answer many requests at once, and to answer requests
that arrive over time. The weights are random, and all tokens are chosen greedily."""

import bisect
import heapq
import os
import tempfile
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from experiments.bench.peers import contest, median, named, write_weights
from experiments.bench.train import MODEL
from parallel.random import hash_uniform
from parallel.specs import count
from qwen3.config import Qwen3Config
from qwen3.model import param_specs
from qwen3.tokenizer import train_bpe

SHAPES = {"tiny": MODEL, "wide": dict(MODEL, hidden_size=1024, num_layers=8, num_heads=16, num_kv_heads=8, head_dim=128, ffn_size=3072)}
RATES = {"tiny": 4.0, "wide": 0.2}  # requests a second that arrive, by default
FIRST_S, TOKEN_S = {"tiny": 1.0, "wide": 15.0}, {"tiny": 0.05, "wide": 0.5}  # an answer in time: until its first token, and for each other
PEERS = ("transformers",)  # the peers that generate
PARTS = {  # the times of each part
    "one": ("prefill_one",),
    "many": ("prefill_many", "prefill_grouped"),
    "batch": ("batch",),
    "reuse": ("reuse", "reuse_warm", "reuse_suffixes"),
    "load": (),
    "guess": (),
}
OURS_ALONE = ("reuse", "guess")  # parts that compare the engine with itself
GUESSES = 8  # tokens that are guessed at a time
EDIT = "key=None", "key=None, strict=False"  # the change of the edited file
TEXTS = ("edit", "new", "random")
# lengths: of the `prompts` prompts that are read together, the least and the most; answers: of new tokens. reuse: `sharing` requests begin
# with the same `shared` tokens. load: half of the `arrivals` requests begin with one of `texts` texts of `beginning` tokens.
WORK = {"prompt": 512, "prompts": 16, "lengths": (32, 512), "answers": (16, 128)}
WORK |= {"written": 256, "sharing": 50, "shared": 1000, "suffix": 128, "replies": 16, "arrivals": 60, "texts": 4, "beginning": 256}


def bench_serve(options, model=None, work=None):
    """Returns figures as a dict, medians over `options.steps` turns; those of the engine have no prefix.

    options: shape (of SHAPES), part (a list of names in PARTS), threads, rate, page, steps, kernels, peer, peer_python. Of each time there
    are NAME_s, in wall seconds, and NAME_cpu_s, in CPU seconds of the process. over_PEER: the median over turns of PEER's time divided by
    ours; with one thread of CPU time, else of wall time.

    prefill_one: from one prompt to its first new token. prefill_many: from many prompts to their first new tokens; transformers pads them
    to the longest, and prefill_grouped is in four batches of like lengths. batch: as many requests, whose answers have different lengths;
    transformers goes on until the longest is complete. same_ids: the fraction of PEER's tokens that equal ours. reuse: requests that begin
    alike, when their beginning is not in the cache; reuse_warm: such requests when it is; reuse_suffixes: requests of what comes after it
    alone, whose tokens attend to nothing before; reuse_over_warm, reuse_over_suffixes: the quotients. load: requests arrive at random
    times; first_s: seconds from there to the first token, at the median and the 90th percentile;
    token_s: for each token after it; in_time: the fraction of the answers with both below FIRST_S and TOKEN_S; goodput: those a second.
    With one thread, the clock of the load is CPU time, so that other work on the machine does not change it.

    guess: speculation by prompt lookup, of one text and of four at a time. The prompt is a file of Python's library, and a script dictates
    the answer: this file with a small change (edit), another file (new) or random tokens (random). plain_over_guess: the time without
    speculation over the time with it, which includes the script's. per_step: tokens for each time that a row is decoded. right: the
    fraction of the guesses.
    """
    if wrong := [peer for peer in options.peer if peer not in PEERS]:
        raise ValueError(f"--peer={wrong[0]} does not generate; use --peer={PEERS[0]}, or --what=train")
    cfg, work, clock = Qwen3Config(**(model or SHAPES[options.shape])), work or WORK, "cpu_s" if options.threads == 1 else "s"
    figures = {"what": "serve", "parameters": count(param_specs(cfg)), "cores": os.cpu_count(), "threads": options.threads}
    job = {"what": "serve", "kernels": options.kernels, "threads": options.threads, "page": options.page, "clock": clock}
    job |= requests(cfg.vocab_size, work, options.rate or RATES[options.shape])
    job |= {"guesses": GUESSES, "texts": texts(cfg.vocab_size, work["written"]) if "guess" in options.part else {}}
    with tempfile.TemporaryDirectory() as folder:
        job.update(write_weights(cfg, folder))
        for part in options.part:
            peers = [] if part in OURS_ALONE else options.peer
            contestants = SimpleNamespace(peer=peers, peer_python=options.peer_python)
            # a step takes so long that one before it would change little; each contestant has warmed up
            found, others = contest({**job, "part": part}, {"ours": {}}, contestants, options.steps, 1, untimed=0)
            figures[f"{part}_load_of_others"] = others
            for name, (_, rounds, _) in found.items():
                figures.update(named(name, times(rounds)))
                if part == "load":
                    figures.update(named(name, load_figures(rounds, job["load"], FIRST_S[options.shape], TOKEN_S[options.shape])))
            figures.update(comparisons(part, found, clock, job))
    return figures


def requests(vocab_size, work, rate):
    """Returns entries of the job: the prompts and the numbers of new tokens of each part, and the times at which the requests of the load
    arrive. rate: how many arrive a second, as a Poisson process."""
    draws = _Draws(vocab_size)
    many = [draws.prompt(*work["lengths"]) for _ in range(work["prompts"])]
    answers = [draws.number(*work["answers"]) for _ in many]
    load, texts, now = [], [draws.prompt(work["beginning"], work["beginning"]) for _ in range(work["texts"])], 0.0
    for i in range(work["arrivals"]):
        now -= np.log(draws.uniform(1)[0]) / rate
        beginning = texts[i // 2 % len(texts)] if i % 2 else []
        load.append({"prompt": beginning + draws.prompt(*work["lengths"]), "new_tokens": draws.number(*work["answers"]), "at": now})
    keys = ("sharing", "shared", "suffix", "replies")
    one = draws.prompt(work["prompt"], work["prompt"])
    return {"one": one, "many": many, "answers": answers, "load": load, **{key: work[key] for key in keys}}


def texts(vocab_size, written):
    """Returns {"prompt": a file of Python's library, and the first `written` tokens of "edit": this file with a small change, of "new":
    another file, and of "random": uniform numbers}, lists of ids of a tokenizer that is trained on the two files."""
    file, other = (Path(module.__file__).read_text(encoding="utf-8") for module in (bisect, heapq))
    edited = file.replace(*EDIT)
    tokenizer = train_bpe([file, other], vocab_size)
    found = {"prompt": tokenizer.encode(file), "edit": tokenizer.encode(edited)[:written], "new": tokenizer.encode(other)[:written]}
    return {**found, "random": _Draws(vocab_size).prompt(written, written)}


class _Draws:
    """A stream of reproducible random numbers, and of what is made of them."""

    def __init__(self, vocab_size):
        self.vocab_size, self.at = vocab_size, 0

    def uniform(self, count):
        self.at += count
        return hash_uniform(0, 3, np.arange(self.at - count, self.at)).astype(np.float64)

    def number(self, least, most):
        return int(least + self.uniform(1)[0] * (most + 1 - least))

    def prompt(self, least, most):
        return (self.uniform(self.number(least, most)) * self.vocab_size).astype(int).tolist()


def times(rounds):
    """Returns the medians of all numbers that the steps report."""
    names = [name for name, value in rounds[0][0].items() if not isinstance(value, list)]
    return {name: median(rounds, itemgetter(name)) for name in names}


def comparisons(part, found, clock, job):
    """Returns the ratios of one part: the peers' times over ours, and the engine's throughput and its gain by reuse."""
    facts, ours, _ = found["ours"]
    figures = {}
    for name, (other_facts, rounds, _) in found.items():
        for time in PARTS[part] if name != "ours" else ():
            base = "prefill_many" if time == "prefill_grouped" else time
            figures[f"{time}_over_{name}"] = ratio_of(ours, f"{base}_{clock}", rounds, f"{time}_{clock}")
        if part == "batch":
            figures.update(named(name, {"batch_tokens_per_s": sum(job["answers"]) / median(rounds, itemgetter(f"batch_{clock}"))}))
            if name != "ours":
                pairs = [(a, b) for one, other in zip(facts["ids"], other_facts["ids"]) for a, b in zip(one, other)]
                figures[f"{name}_same_ids"] = sum(a == b for a, b in pairs) / len(pairs)
    if part == "guess":
        for rows in (1, 4):
            for text in TEXTS:
                name = f"guess_{text}_{rows}"
                figures[f"plain_over_{name}"] = ratio_of(ours, f"{name}_{clock}", ours, f"plain_{rows}_{clock}")
    if part == "reuse":
        for base in ("warm", "suffixes"):
            figures[f"reuse_over_{base}"] = ratio_of(ours, f"reuse_{base}_{clock}", ours, f"reuse_{clock}")
    return figures


def ratio_of(rounds, key, other, other_key):
    """Returns the median over rounds of (other's median of step[other_key] / the first's median of step[key])."""
    quotients = [median([b], itemgetter(other_key)) / median([a], itemgetter(key)) for a, b in zip(rounds, other)]
    return float(np.median(quotients))


def load_figures(rounds, load, most_first_s, most_token_s):
    """Returns the figures of the load. A step has "first" and "last", for each request the times of its first and last token, counted from
    the same moment as the times of arrival."""
    found = []
    arrival, tokens = np.array([each["at"] for each in load]), np.array([each["new_tokens"] for each in load])
    for first, last in ((np.array(step["first"]), np.array(step["last"])) for steps in rounds for step in steps):
        first_s, token_s, all_s = first - arrival, (last - first) / np.maximum(tokens - 1, 1), last.max() - arrival[0]
        in_time = (first_s <= most_first_s) & (token_s <= most_token_s)
        figures = {"first_s": np.median(first_s), "first_p90_s": np.percentile(first_s, 90)}
        figures |= {"token_s": np.median(token_s), "token_p90_s": np.percentile(token_s, 90)}
        figures |= {"tokens_per_s": tokens.sum() / all_s, "in_time": in_time.mean(), "goodput_per_s": in_time.sum() / all_s}
        found.append(figures)
    return {f"load_{key}": float(np.median([figures[key] for figures in found])) for key in found[0]}
