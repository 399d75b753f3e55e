"""A record of the speedrun: a folder with record.json, which its author writes, and results.json, which `run` writes.

record.json: {"title": text, "why": text, "overrides": {config key: value}}, against base.py.
results.json: {"corpus", "overrides", "flops", "commit", "seeds": [{"seed", "bits_per_byte", "cpu_s", "baseline_cpu_s", "curve"}]}, where
curve is [[step, bits a byte]] on the held-out text.
"""

import json
import math
import os
import statistics
from typing import NamedTuple

from experiments.configs import common
from experiments.speedrun import corpus, student
from parallel.checkpoint.files import write_json
from parallel.hints import nearest

HERE = os.path.dirname(os.path.abspath(__file__))
BASE, RECORDS = os.path.join(HERE, "base.py"), os.path.join(HERE, "records")
TARGET = 0.430  # held-out bits a byte that a record is below
LEVEL, SEEDS = 0.01, 5  # the p value that a record is below, and how many seeds it has at least
MAY_CHANGE = ("model_args.", "optim.", "train.steps", "train.batch_size", "train.batch_ramp")  # all else is the same in all records


class Record(NamedTuple):
    folder: str
    title: str
    overrides: dict
    results: dict  # of results.json; {} before the first run

    @property
    def name(self):
        return os.path.basename(os.path.abspath(self.folder))

    @property
    def seeds(self):
        return self.results.get("seeds", [])

    @property
    def bits(self):
        return [seed["bits_per_byte"] for seed in self.seeds]

    @property
    def cpu_ratio(self):
        """CPU seconds over those of the baseline, which ran in turns with it."""
        return statistics.fmean(seed["cpu_s"] for seed in self.seeds) / statistics.fmean(seed["baseline_cpu_s"] for seed in self.seeds)


def read(folder):
    """Returns the Record in a folder. Raises ValueError that names the file, the key and the fix."""
    path = os.path.join(folder, "record.json")
    if not os.path.isfile(path):
        raise ValueError(
            f'{folder} is no record: write {path}, such as {{"title": "...", "why": "...", "overrides": {{"optim.lr": 0.01}}}}'
        )
    written = _object(path)
    overrides = written.get("overrides")
    if not isinstance(written.get("title"), str) or not isinstance(overrides, dict):
        raise ValueError(f"{path} needs a title, which is text, and overrides, an object of config keys and values")
    for key in overrides:
        section, _, name = key.partition(".")
        defaults = common.get_config()
        if not (section in defaults and name in getattr(defaults, section, {})):
            known = [f"{part}.{word}" for part in ("model_args", "optim", "train") for word in defaults[part]]
            raise ValueError(f"{path}: there is no key {key!r}{nearest(key, known)}")
        if not key.startswith(MAY_CHANGE) or key == "model_args.vocab_size":
            raise ValueError(f"{path}: {key} is the same in all records; change only model_args.*, optim.*, {', '.join(MAY_CHANGE[2:])}")
    results = os.path.join(folder, "results.json")
    return Record(folder, written["title"], overrides, _object(results) if os.path.exists(results) else {})


def _object(path):
    with open(path, encoding="utf-8") as file:
        try:
            found = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); correct it, or remove it") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object; correct it, or remove it")
    return found


def read_all(folder=RECORDS):
    """Returns the records of a folder in the order of their names. The first one is the baseline."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    found = [read(os.path.join(folder, name)) for name in names if os.path.isdir(os.path.join(folder, name))]
    if not found:
        raise ValueError(f"{folder} has no records; give the folder that holds 00_baseline and the others")
    return found


def save(record, results):
    write_json(os.path.join(record.folder, "results.json"), results)


def budget(config):
    """Returns the training FLOPs of a config, by experiments.watch.metrics.flops_per_token. They do not count the optimizer's work."""
    from experiments import flags
    from experiments.data import batch_ramp
    from experiments.watch.metrics import flops_per_token

    rows = batch_ramp.total(config.train, config.train.steps)
    return flops_per_token(flags.model_config(config, "CPU"), config.train.seq_len) * config.train.seq_len * rows


def faults(record, flops, before=None, before_flops=None):
    """Returns why a record does not hold, as a list of sentences; an empty list if it holds.

    flops: its budget by its own config. before: the record before it, None for the baseline; before_flops: the budget of that.
    """
    if not record.results:
        return ["it was not run yet"]
    out = []
    if record.results.get("corpus") != corpus.DIGEST:
        out.append("its results are of another corpus")
    if record.results.get("overrides") != record.overrides or record.results.get("flops") != flops:
        out.append("its results are of another config than its record.json")
    numbers = [seed.get("seed") for seed in record.seeds]
    if len(set(numbers)) < SEEDS:
        out.append(f"it has {len(set(numbers))} seeds, and a record needs {SEEDS}")
    if len(set(numbers)) < len(numbers):
        out.append("a seed stands twice in its results")
    bits = [bit if isinstance(bit, int | float) else math.nan for bit in (seed.get("bits_per_byte") for seed in record.seeds)]
    if not all(map(math.isfinite, bits)):
        out.append("a result is not a finite number")
    elif len(bits) > 1 and not (p := student.p_below(bits, TARGET)) < LEVEL:
        out.append(f"its mean {statistics.fmean(bits):.4f} is not below the target {TARGET} with p < {LEVEL}: p = {p:.3g}")
    if before and not flops < before_flops:
        out.append(f"it takes {flops:.4g} FLOPs, not fewer than the {before_flops:.4g} of {before.name}")
    return out
