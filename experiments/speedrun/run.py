"""Runs the seeds of records, each a process of experiments.pretrain on one thread, and the baseline beside them in turns."""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from typing import NamedTuple

from experiments import flags
from experiments.speedrun import corpus
from experiments.speedrun.record import BASE, Record, budget, faults
from experiments.sweep.sweeps import text
from experiments.train import run_folder
from experiments.watch.records import METRICS, read_records

FRESH = 1000  # the first seed of a check: other seeds than those of the record, which may have been chosen


def target(record, seed, data="", workdir=""):
    """Returns the command of a seed without Python: [module, *arguments]."""
    keys = {**record.overrides, "train.seed": seed, "data.path": data}
    return ["experiments.pretrain", f"--config={BASE}", f"--workdir={workdir}", *(f"--config.{k}={text(v)}" for k, v in keys.items())]


def flops_of(record):
    """Returns the budget of a record. Raises ValueError for overrides that are no config."""
    try:
        return budget(flags.resolved(target(record, 0), 1))
    except ValueError as error:
        raise ValueError(f"{record.name}: {error}") from error


def one_seed(record, seed, folder):
    """Trains with one seed, in a new folder inside `folder`, which holds corpus.txt. Returns its entry of results.json, without
    baseline_cpu_s, and the commit of the code."""
    workdir = tempfile.mkdtemp(dir=folder, prefix=f"{record.name}_seed{seed}_")
    log, before = f"{workdir}.log", _cpu_s()
    with open(log, "w", encoding="utf-8") as out:
        command = [sys.executable, "-m", *target(record, seed, os.path.join(folder, "corpus.txt"), workdir)]
        code = subprocess.run(command, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    cpu_s = _cpu_s() - before
    if code:
        with open(log, encoding="utf-8", errors="replace") as file:
            said = [line.strip() for line in file if line.startswith("error:")] or ["see its log"]
        raise ValueError(f"{record.name} with train.seed={seed} ended with status {code}: {said[-1]} ({log})")
    found = read_records(os.path.join(workdir, METRICS))
    curve = [[line["step"], round(line["bits_per_byte"], 5)] for line in found if "bits_per_byte" in line]
    bits = next(line["final_bits_per_byte"] for line in reversed(found) if "final_bits_per_byte" in line)
    entry = {"seed": seed, "bits_per_byte": bits, "cpu_s": round(cpu_s, 2), "curve": curve}
    return entry, run_folder.saved_config(workdir).get("git_hash")


def _cpu_s():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _results(record):
    """Returns results to which seeds are added. Raises ValueError where those of the record are of something else."""
    made = {"corpus": corpus.DIGEST, "overrides": record.overrides, "flops": flops_of(record)}
    for key, value in made.items():
        if record.seeds and record.results.get(key) != value:
            raise ValueError(f"{record.folder}/results.json is of another {key} than its record.json now; remove it, and run again")
    return {**made, "commit": None, "seeds": list(record.seeds)}


def in_turns(records, baseline, seeds, workdir, done=lambda record, results: None):
    """Runs the seeds of records, and of the baseline, in turns: each seed of all before the next seed. Returns the records with results.

    Seeds that a record's results have are left out. done(record, results) is called after each seed.
    """
    os.makedirs(workdir, exist_ok=True)
    corpus.write(workdir)
    results = {record.folder: _results(record) for record in records}
    for seed in seeds:
        missing = [r for r in records if seed not in [entry["seed"] for entry in results[r.folder]["seeds"]]]
        if not missing:
            continue
        beside, commit = one_seed(baseline, seed, workdir)
        for record in missing:
            entry, commit = one_seed(record, seed, workdir) if record.overrides != baseline.overrides else (beside, commit)
            found = results[record.folder]
            found["seeds"].append({**entry, "baseline_cpu_s": beside["cpu_s"]})
            found["commit"] = commit
            print(f"{record.name}, seed {seed}: {entry['bits_per_byte']:.4f} bits a byte, {entry['cpu_s']:.1f} CPU s", flush=True)
            done(record, found)
    return [Record(r.folder, r.title, r.overrides, results[r.folder]) for r in records]


class Verdict(NamedTuple):
    holds: bool
    lines: list


def check(record, everything, count, workdir):
    """Trains a record, the one before it and the baseline in turns with fresh seeds. Returns the Verdict. everything: all records.

    The record holds if its own results and the fresh ones do. Its CPU seconds are told, and decide nothing.
    """
    place = [each.name for each in everything].index(record.name)
    before = everything[place - 1] if place else None
    flops, before_flops = flops_of(record), before and flops_of(before)
    wrong = [f"as written: {fault}" for fault in faults(record, flops, before, before_flops)]
    if wrong:
        return Verdict(False, [f"{record.name} does not hold, and was not run again", *wrong])
    pair = [each._replace(results={}) for each in ([before] if before else []) + [record]]
    ran = in_turns(pair, everything[0], range(FRESH, FRESH + count), workdir)
    wrong = [f"run again: {fault}" for fault in faults(ran[-1], flops, before, before_flops)]
    lines = [f"{record.name} {'does not hold' if wrong else 'holds'}", *wrong]
    for each in ran:
        spread = f"{statistics.fmean(each.bits):.4f} bits a byte over {len(each.bits)} other seeds"
        lines.append(f"{each.name}: {spread}, {each.results['flops']:.3g} FLOPs, {each.cpu_ratio:.2f} of the baseline's CPU seconds")
    return Verdict(not wrong, lines)
