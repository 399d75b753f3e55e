"""Evaluation tasks in our own file format, one JSON object a line, scored by log-likelihood:

    {"context": "The capital of France is", "choices": ["Rome", "Paris"], "answer": 1}      multiple choice
    {"context": "The capital of France is", "target": "Paris"}                              cloze
    {"text": "A complete text."}                                                            perplexity of a text

"delimiter", by default a space, stands between the context and a choice or target. answer is the index of the right choice, from 0.
"""

import math
import os
import re
from typing import NamedTuple

import numpy as np

from experiments.evaluate import scoring
from experiments.watch.metrics import held_out
from parallel.json_text import loads

KEYS = {"choices": {"context", "choices", "answer"}, "target": {"context", "target"}, "text": {"text"}}  # kind of task: its keys


class Task(NamedTuple):
    """A task. name: the file's name without its extension. kind: a key of KEYS. lines: the JSON objects."""

    name: str
    kind: str
    lines: list


def read(path):
    """Reads a file's Task. Raises ValueError that names the line where one is wrong, or of another kind than the first."""
    lines, kinds = [], []
    with open(path, encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                lines.append(_parse_line(text, f"{path}, line {number}"))
                kinds.append(next(kind for kind in KEYS if kind in lines[-1]))
                if kinds[-1] != kinds[0]:
                    raise ValueError(f"{path}, line {number} has {kinds[-1]!r}, but line 1 has {kinds[0]!r}; put each kind in its own file")
    if not lines:
        raise ValueError(f"--tasks: {path} is empty; give one JSON object a line")
    return Task(os.path.splitext(os.path.basename(path))[0], kinds[0], lines)


def _parse_line(text, where):
    try:
        line = loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    kind = next((kind for kind in KEYS if isinstance(line, dict) and kind in line), None)
    if kind is None or not KEYS[kind] <= set(line) <= KEYS[kind] | {"delimiter"}:
        raise ValueError(f"{where}: give the keys context, choices and answer; or context and target; or text")
    texts = [line[key] for key in ("context", "target", "text", "delimiter") if key in line]
    choices, answer = line.get("choices", ["", ""]), line.get("answer", 0)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(t, str) for t in texts + choices):
        raise ValueError(f"{where}: context, target, text and delimiter must be strings, and choices a list of at least two strings")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"{where}: answer={answer!r} must be the index of a choice, from 0 to {len(choices) - 1}")
    if kind == "choices" and not all(choices):
        raise ValueError(f"{where}: a choice is empty; give it at least one character")
    return line


def run(scorer, task):
    """Scores a model on a Task. Returns ({metric: value}, {metric: standard error})."""
    return {"choices": _choices, "target": _cloze, "text": _texts}[task.kind](scorer, task.lines)


def _after(line, text):
    return line["context"], line.get("delimiter", " ") + text


def _choices(scorer, lines):
    """Scores multiple choice. acc: how often the choice with the highest log-likelihood is right; acc_norm and acc_bytes: the same with the
    log-likelihood divided by the choice's characters or bytes."""
    found = iter(scoring.loglikelihood(scorer, [_after(line, choice) for line in lines for choice in line["choices"]]))
    hits = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for line in lines:
        logprobs = np.array([next(found)[0] for _ in line["choices"]])
        characters, size = ([len(c) for c in texts] for texts in (line["choices"], [c.encode() for c in line["choices"]]))
        for name, per in (("acc", 1.0), ("acc_norm", characters), ("acc_bytes", size)):
            hits[name].append(float(np.argmax(logprobs / per) == line["answer"]))
    return {name: float(np.mean(x)) for name, x in hits.items()}, {name: _stderr(x) for name, x in hits.items()}


def _cloze(scorer, lines):
    """Scores cloze. acc: how often every token of the target is the greedy choice; perplexity: exp(-mean log-likelihood of a target)."""
    found = scoring.loglikelihood(scorer, [_after(line, line["target"]) for line in lines])
    greedy, logprobs = [float(g) for _, g in found], [logprob for logprob, _ in found]
    loss = -float(np.mean(logprobs))
    perplexity = held_out(loss)["perplexity"]
    return {"acc": float(np.mean(greedy)), "perplexity": perplexity}, {"acc": _stderr(greedy), "perplexity": perplexity * _stderr(logprobs)}


def _texts(scorer, lines):
    """Scores complete texts: the perplexities per word and per byte, and bits per byte, over all texts together."""
    texts = [line["text"] for line in lines]
    nats = -sum(scoring.loglikelihood_rolling(scorer, texts))
    words, size = (sum(map(len, units)) for units in ([re.split(r"\s+", t) for t in texts], [t.encode() for t in texts]))
    words_, bytes_ = (held_out(nats / max(n, 1))["perplexity"] for n in (words, size))
    return {"word_perplexity": words_, "byte_perplexity": bytes_, "bits_per_byte": nats / math.log(2) / max(size, 1)}, {}


def _stderr(values):
    """Returns the standard error of the mean; 0 for a single value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
