"""Writes the tables of a sweep: one with a row for each run, and a summary with a row for all runs that differ only in their seeds."""

import csv
import io
import os
import statistics

from experiments.sweep.sweeps import text, varying_keys
from experiments.train import run_folder
from experiments.watch import records
from parallel.checkpoint.files import write_text


def write(workdir, runs, names, over):
    """Writes runs.csv, summary.csv and table.md, with the last value of each metric in `names`. Returns the text of table.md. over: the
    config keys over which the summary takes mean and spread, the sample standard deviation."""
    keys = varying_keys([run.overrides for run in runs])
    every = [_row(workdir, run, keys, names) for run in runs]
    grouped = [key for key in keys if key not in over]
    tables = {"runs": [["run", *keys, "status", "step", *names], *every], "summary": _summary(every, keys, grouped, names)}
    for name, table in tables.items():
        write_text(os.path.join(workdir, f"{name}.csv"), _csv(table))
    page = "\n".join(f"## {name.capitalize()}\n\n{_markdown(table)}" for name, table in tables.items())
    write_text(os.path.join(workdir, "table.md"), page)
    return page


def _row(workdir, run, keys, names):
    folder = os.path.join(workdir, run.name)
    found = records.read_records(os.path.join(folder, records.METRICS))
    step = found[-1]["step"] if found else 0
    status = "finished" if run_folder.finished_step(folder) is not None else "unfinished" if found else "not begun"
    last = [next((r[name] for r in reversed(found) if name in r), None) for name in names]
    return [run.name, *(text(run.overrides[key]) if key in run.overrides else "" for key in keys), status, step, *last]


def _summary(every, keys, grouped, names):
    """Returns the rows of the summary, which counts finished runs only."""
    groups = {}
    for row in every:
        members = groups.setdefault(tuple(row[1 + keys.index(key)] for key in grouped), [])
        if row[1 + len(keys)] == "finished":
            members.append(row[-len(names) :])
    head = [*grouped, "runs", *(f"{name} {statistic}" for name in names for statistic in ("mean", "spread"))]
    return [head, *([*values, len(members), *_figures(members, len(names))] for values, members in groups.items())]


def _figures(members, count):
    out = []
    for i in range(count):
        values = [row[i] for row in members if row[i] is not None]
        out += [statistics.fmean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None]
    return out


def _csv(table):
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([["" if cell is None else cell for cell in row] for row in table])
    return file.getvalue()


def _markdown(table):
    head, *rows = [[_cell(cell) for cell in row] for row in table]
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in lines)


def _cell(value):
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value).replace("|", "\\|")
