"""Helpers of experiments.evaluate: load a model in a layout, compute the loss of a data set, run tasks, and print a table of results."""

import itertools
import os

import numpy as np

from experiments.data import corpus, loader
from experiments.evaluate import harness, scoring, tasks
from experiments.layout import check as layout
from experiments.train.run_folder import CONFIG, saved_config
from experiments.watch.metrics import held_out
from parallel.sharding import Sharding
from qwen3.model import choose_kernels


def own_data(config, workdir):
    """Copies the data settings of a training run into `config`, a ConfigDict, and returns its data.path. Raises ValueError where they are
    not known."""
    if not workdir:
        raise ValueError("--data and --tasks are missing; give one of them, or --workdir for a run's own held-out rows")
    saved = saved_config(os.path.expanduser(workdir))
    if saved is None:
        raise ValueError(f"--workdir={workdir} has no {CONFIG}, which names a run's data; give --data")
    config.data.update({key: value for key, value in saved["data"].items() if key in config.data and key != "tokenizer"})
    config.train.update({key: saved["train"][key] for key in ("seq_len", "seed", "eval_rows") if key in saved["train"]})
    return config.data.path


def load(model, tokenizer, config, rank, length=None, weights="float"):
    """Returns a scoring.Scorer of an opened model in the layout of config.parallel. Each rank reads its own shards of the weights, as
    "float" or in 8 bits, "int8"."""
    cfg, seq_parallel = model.cfg, config.parallel.seq_parallel
    layout.check_only_computes(config.parallel, cfg)
    sharding = Sharding(layout.mesh(cfg, config.parallel, rank), seq_parallel=seq_parallel)
    options = {"kernels": choose_kernels(config.ops, cfg, sharding), "batch_size": config.train.batch_size, "length": length}
    return scoring.build(model.params(sharding, weights), cfg, tokenizer, sharding=sharding, **options)


def data_set(scorer, config, part, most=0):
    """Evaluates the first `most` rows of the data, 0 for all. part: "all" or "held_out".

    Returns {values: {loss, perplexity, bits_per_byte, ...}, errors: {}, count: targets, of: text that says what was counted}.
    """
    if part == "held_out":
        found = corpus.load(config, scorer.cfg.vocab_size)
        tokenizer, rows = found.tokenizer, ({key: x[i] for key, x in found.held_out.items()} for i in range(len(found.held_out["tokens"])))
    else:
        tokenizer, source = corpus.whole(config, scorer.cfg.vocab_size)
        rows = loader.one_epoch(source, config.train.seed)
    rows, sizes = itertools.islice(rows, most or None), tokenizer.token_bytes()
    nats, targets, size, count = 0.0, 0.0, 0.0, 0
    while batch := list(itertools.islice(rows, scorer.batch_size)):
        batch = {key: np.stack([row[key] for row in batch]) for key in batch[0]}
        weights = batch["loss_weights"].astype(np.float64)
        nats += (scoring.score_rows(scorer, batch)[0] * weights).sum()
        targets, size, count = targets + weights.sum(), size + (sizes[batch["targets"]] * weights).sum(), count + len(weights)
    if not targets:
        raise ValueError(f"data.path={config.data.path!r} has no two tokens in a row to score; give more text")
    values = held_out(nats / targets, size / targets)
    values = {"loss": values.pop("eval_loss"), **values}
    return {"values": values, "errors": {}, "count": int(targets), "of": f"targets, {int(size):,} bytes, {count:,} rows"}


def split_tasks(given, folder):
    """Splits --tasks into ([Task of each file], [names that are not files]). Raises ValueError for a missing file."""
    files = [name for name in given if os.path.isfile(os.path.expanduser(name))]
    names = [name for name in given if name not in files]
    if wrong := [name for name in names if name.endswith(".jsonl")]:
        raise ValueError(f"--tasks={wrong[0]} does not exist; give a file of tasks, as experiments/evaluate/tasks.py describes")
    if folder and not names:
        raise ValueError(f"--task_folder={folder} is for tasks of lm-evaluation-harness, and --tasks names none")
    return [tasks.read(os.path.expanduser(name)) for name in files], names


def run_tasks(scorer, files, names, folder=None, limit=None):
    """Runs tasks from files, and tasks of lm-evaluation-harness by name. Returns {name: {values, errors, count, of}}."""
    out = {}
    for task in files:
        values, errors = tasks.run(scorer, task)
        out[task.name] = {"values": values, "errors": errors, "count": len(task.lines), "of": "documents"}
    for name, (values, errors, count) in (harness.run(scorer, names, folder, limit) if names else {}).items():
        out[name] = {"values": values, "errors": errors, "count": count, "of": "documents, lm-evaluation-harness"}
    return out


def joined(results, found, kind):
    """Adds the results `found` of a kind of weights to those of the kinds before it, {name: results}. The first kind keeps the names, and
    the others' end with their kind; their perplexities are followed by the ratio to the first's, as perplexity_ratio."""
    if not results:
        return found
    out = dict(results)
    for name, one in found.items():
        values = dict(one["values"])
        if "perplexity" in values:
            values["perplexity_ratio"] = values["perplexity"] / results[name]["values"]["perplexity"]
        out[f"{name}, {kind}"] = {**one, "values": values}
    return out


def table(report):
    """Returns the report's results as lines of text."""
    lines, results = [f"weights    {report['weights']}"], report["results"]
    if report["data"] is not None:
        lines.append(f"data       {report['data'] or 'the library of Python'}, {report['part'].replace('_', ' ')}")
    width = max(len(name) for name in results)
    for name, found in results.items():
        for metric, value in found["values"].items():
            error = f" +- {found['errors'][metric]:.4f}" if found["errors"].get(metric) else ""
            lines.append(f"{name:<{width}}  {metric:<16} {value:.4f}{error}")
        lines.append(f"{name:<{width}}  {'of':<16} {found['count']:,} {found['of']}")
    return lines
