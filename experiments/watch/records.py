"""The metrics of a run as arrays, read from its metrics.jsonl. Without MindSpore, so that it takes no seconds to start.

A run that still goes on, or was killed, may end in half a line, which is left out. One that went on from an earlier checkpoint may have
written steps twice; the later ones count.
"""

import io
import json
import os

import numpy as np

METRICS, CONFIG = "metrics.jsonl", "config.json"
AXES = ("step", "tokens", "time")


def read_records(path):
    """The lines of a metrics.jsonl that are objects with a step: the last one is not where the process was killed as it wrote. Raises
    ValueError for a line that is not text."""
    records = []
    if os.path.exists(path):
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line.decode("utf-8"))
                except UnicodeDecodeError:
                    raise ValueError(f"{path}, line {number} is not text; remove the line, or move the file away") from None
                except (ValueError, RecursionError):
                    continue
                if isinstance(record, dict) and isinstance(record.get("step"), int | float):
                    records.append(record)
    return records


def columns(path, names):
    """{name: float array}, an element a line, NaN where the line has no such number. Raises ValueError for a file with no such line."""
    import pyarrow as pa  # here, as training needs of this module what takes no memory
    from pyarrow import json as arrow_json

    with open(path, "rb") as file:
        data = file.read()
    whole, schema = data[: data.rfind(b"\n") + 1], pa.schema([(name, pa.float64()) for name in names])
    options = arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    try:
        table = arrow_json.read_json(io.BytesIO(whole), parse_options=options)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # NaN, a list in place of a number, a broken line: slower
        return _by_json(whole, names)
    return {name: table[name].to_numpy() for name in names}


def _by_json(data, names):
    out = {name: [] for name in names}
    for line in data.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        for name in names:
            value = record.get(name) if isinstance(record, dict) else None
            out[name].append(value if isinstance(value, int | float) else np.nan)
    return {name: np.array(values, np.float64) for name, values in out.items()}


def series(folder, metrics, axis="step"):
    """{metric: (x, values)} of a run's folder, by step, by tokens seen, or by hours of training, those that the run has.

    Raises ValueError where the folder is none of a run.
    """
    path = os.path.join(folder, METRICS)
    if not os.path.isfile(path):
        raise ValueError(f"{folder} has no {METRICS}; give the folder of a run, its --workdir")
    table = columns(path, ["step", "tokens_seen", "step_time_s", *metrics])
    step, x = table["step"], _along(table, axis)
    out = {}
    for metric in metrics:
        rows = np.flatnonzero(~np.isnan(table[metric]) & ~np.isnan(step))
        rows = rows[_last_of_each(step[rows])]
        if len(rows):
            out[metric] = x[rows], table[metric][rows]
    return out


def of_training_steps(folder, metrics):
    """Returns those of `metrics` whose values come with a training step's time. The others, such as those of evaluations, are too few for
    a mean of several."""
    table = columns(os.path.join(folder, METRICS), ["step_time_s", *metrics])
    return {m for m in metrics if 2 * np.sum(~np.isnan(table[m]) & ~np.isnan(table["step_time_s"])) > np.sum(~np.isnan(table[m]))}


def _last_of_each(steps):
    """The places whose step is below all later ones: what an earlier process wrote of steps that were done again is left out."""
    later = np.minimum.accumulate(np.append(steps, np.inf)[::-1])[::-1][1:]
    return np.flatnonzero(steps < later)


def _along(table, axis):
    """For each line where it lies; lines without a training step's figures lie at the step before."""
    step = table["step"]
    if axis == "step":
        return step
    trained = np.flatnonzero(~np.isnan(table["step_time_s"]))
    trained = trained[_last_of_each(step[trained])]
    if axis == "tokens":
        values = table["tokens_seen"][trained]
    else:
        values = np.cumsum(table["step_time_s"][trained] * np.diff(step[trained], prepend=0)) / 3600
    at = np.searchsorted(step[trained], step, side="right")
    return np.concatenate([[0.0], values])[at]


def smoothed(values, count):
    """The mean of the last `count` values, of fewer at the start."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - count)
    return (sums[ends] - sums[starts]) / (ends - starts)


def thinned(x, values, most):
    """At most that many points, evenly taken, with the first and the last."""
    if len(x) <= most:
        return x, values
    kept = np.unique(np.linspace(0, len(x) - 1, most).round().astype(int))
    return x[kept], values[kept]


def config_differences(folders):
    """{key: [value in each folder]} of the keys in which the runs' config.json differ; None where a run has no such key, or no config."""
    every = [flat(_config(folder)) for folder in folders]
    keys = dict.fromkeys(key for config in every for key in config)
    values = {key: [config.get(key) for config in every] for key in keys}
    return {key: found for key, found in values.items() if any(v != found[0] for v in found)}


def _config(folder):
    try:
        with open(os.path.join(folder, CONFIG), encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def flat(tree, path=""):
    """{dotted key: value} of nested dicts."""
    out = {}
    for key, value in tree.items():
        out.update(flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value})
    return out
