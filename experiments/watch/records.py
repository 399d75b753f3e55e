"""Reads the metrics of a run from its metrics.jsonl as arrays. It does not import MindSpore, so it starts fast.

The file of a run that still trains, or was killed, may end in an incomplete line, which is ignored. A run that continued from an earlier
checkpoint may have written some steps twice; the later lines count.
"""

import io
import json
import os

import numpy as np

from parallel.json_text import loads

METRICS, CONFIG = "metrics.jsonl", "config.json"
AXES = ("step", "tokens", "time")


def read_records(path):
    """Returns the records of a metrics.jsonl, objects with a step. Broken lines are left out, such as the last one if the process was
    killed while writing it. Raises ValueError for a line that is not text."""
    records = []
    if os.path.exists(path):
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                text = _text_of(path, number, line)
                try:
                    record = json.loads(text)
                except (ValueError, RecursionError):
                    continue
                if isinstance(record, dict) and isinstance(record.get("step"), int | float):
                    records.append(record)
    return records


def _text_of(path, number, line):
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}, line {number} is not text; remove the line, or move the file away") from None


def columns(path, names):
    """Returns {name: float array} with one element per line of the file, NaN where the line has no such number. Raises ValueError for a
    line that is not text."""
    import pyarrow as pa  # imported here to save memory, because training does not need it
    from pyarrow import json as arrow_json

    with open(path, "rb") as file:
        data = file.read()
    complete, schema = data[: data.rfind(b"\n") + 1], pa.schema([(name, pa.float64()) for name in names])
    options = arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    try:
        table = arrow_json.read_json(io.BytesIO(complete), parse_options=options)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # NaN, a list in place of a number, or a broken line
        return _by_json(path, complete, names)  # slower
    return {name: table[name].to_numpy() for name in names}


def _by_json(path, data, names):
    out = {name: [] for name in names}
    for number, line in enumerate(data.split(b"\n"), 1):
        text = _text_of(path, number, line)
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            continue
        for name in names:
            value = record.get(name) if isinstance(record, dict) else None
            out[name].append(value if isinstance(value, int | float) else np.nan)
    if data.strip() and not out[names[0]]:
        raise ValueError(f"{path} has no line with a step; remove it, or put back the file that the run wrote")
    return {name: np.array(values, np.float64) for name, values in out.items()}


def series(folder, metrics, axis="step"):
    """Returns {metric: (x, values)} for the metrics that a run's folder has. axis: x is the step, the tokens seen, or the hours of
    training.

    Raises ValueError if the folder has no metrics.jsonl.
    """
    path = os.path.join(folder, METRICS)
    if not os.path.isfile(path):
        raise ValueError(f"{folder} has no {METRICS}; give the folder of a run, its --workdir")
    table = columns(path, ["step", "tokens_seen", "step_time_s", *metrics])
    step = table["step"]
    if len(step) and np.isnan(step).all():
        raise ValueError(f"{path} has no line with a step; remove it, or put back the file that the run wrote")
    x = _along(table, axis)
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
    """Returns the indices of the lines whose step is below all later ones. This leaves out lines of steps that ran again later."""
    later = np.minimum.accumulate(np.append(steps, np.inf)[::-1])[::-1][1:]
    return np.flatnonzero(steps < later)


def _along(table, axis):
    """Returns the x value of each line. A line without a training step's figures gets that of the step before."""
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
    """Returns the running mean of the last `count` values; at the start, of fewer."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - count)
    return (sums[ends] - sums[starts]) / (ends - starts)


def thinned(x, values, most):
    """Returns at most `most` of the points, evenly spaced, with the first and the last."""
    if len(x) <= most:
        return x, values
    kept = np.unique(np.linspace(0, len(x) - 1, most).round().astype(int))
    return x[kept], values[kept]


def config_differences(folders):
    """Returns {key: [value in each folder]} for the keys in which the runs' config.json differ; None for a run without the key or the
    file."""
    every = [flat(_config(folder)) for folder in folders]
    keys = dict.fromkeys(key for config in every for key in config)
    values = {key: [config.get(key) for config in every] for key in keys}
    return {key: found for key, found in values.items() if any(v != found[0] for v in found)}


def _config(folder):
    try:
        with open(os.path.join(folder, CONFIG), encoding="utf-8") as file:
            config = loads(file.read())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def flat(tree, path=""):
    """Returns {dotted key: value} of nested dicts."""
    out = {}
    for key, value in tree.items():
        out.update(flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value})
    return out
