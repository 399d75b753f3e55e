"""Functions to define a sweep: lists of config overrides, combined with product(), zipped() and chain(), and a name for each run.

A config file defines its sweep beside get_config():

    def sweep(add):
        add(product(over("optim.lr", [1e-3, 3e-3]), over("train.seed", range(3))))
"""

import hashlib
import itertools
import os
import re
import runpy
from typing import NamedTuple

NAME_LENGTH = 80  # characters of a run's folder name; a longer one is shortened and ends in a hash


class Run(NamedTuple):
    """A run of a sweep. name: of its folder, such as "lr=0.001,seed=2", with the keys that differ between runs. overrides: {config key:
    value}."""

    name: str
    overrides: dict


def over(key, values):
    """Returns the list of overrides [{key: value}, ...] for the values."""
    return [{key: value} for value in values]


def product(*lists):
    """Returns all combinations of one element of each list; the last list varies fastest. Raises ValueError where two lists set the same
    key."""
    return [_joined(combination) for combination in itertools.product(*lists)]


def zipped(*lists):
    """Combines the first elements of all lists, the second ones, and so on. Raises ValueError for lists of different lengths."""
    if len({len(each) for each in lists}) > 1:
        raise ValueError(f"zipped() takes lists of one length, and they have {', '.join(str(len(each)) for each in lists)}")
    return [_joined(combination) for combination in zip(*lists)]


def chain(*lists):
    """Concatenates the lists."""
    return [overrides for each in lists for overrides in each]


def _joined(combination):
    out = {}
    for overrides in combination:
        if twice := sorted(out.keys() & overrides.keys()):
            raise ValueError(f"{twice[0]} is set twice in one run of the sweep; leave one out")
        out.update(overrides)
    return out


def check_given(config, workdir, file, folder):
    """Raises ValueError for flags --config and --workdir that are missing, or a config that is no file. file, folder: what they are."""
    for name, value, what in (("config", config, file), ("workdir", workdir, folder)):
        if not value:
            raise ValueError(f"--{name} is missing; give {what}")
    if not os.path.isfile(config):
        raise ValueError(f"--config={config} is not a file")


def load(path):
    """Returns [Run] of a config file's sweep(add); its add() takes overrides, or a list of them. Raises ValueError where the file has no
    sweep, or a run is in it twice."""
    found = []

    def add(more):
        found.extend([more] if isinstance(more, dict) else more)

    sweep = runpy.run_path(path).get("sweep")
    if sweep is None:
        raise ValueError(f"--config={path} has no sweep(add); write one beside get_config(), as experiments/sweep/sweeps.py shows")
    sweep(add)
    if not found:
        raise ValueError(f"--config={path}: its sweep adds no run; call add()")
    return named(found)


def named(every):
    """Returns [Run], one for each of a list of overrides."""
    texts = [tuple(sorted((key, text(value)) for key, value in overrides.items())) for overrides in every]
    for i, one in enumerate(texts):
        if one in texts[:i]:
            raise ValueError(f"the sweep has a run twice: {dict(one)}")
    varying = varying_keys(every)
    short = _short(varying)
    names = [_name({short[key]: text(overrides[key]) for key in varying if key in overrides}) for overrides in every]
    return [Run(_unlike(name, names, one), overrides) for name, one, overrides in zip(names, texts, every)]


def varying_keys(every):
    """Returns the keys whose values differ between runs, in the order in which they first occur."""
    keys = dict.fromkeys(key for overrides in every for key in overrides)
    return [key for key in keys if len({text(o[key]) if key in o else None for o in every}) > 1]


def text(value):
    """Formats a value for --config.KEY=VALUE."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"({','.join(map(repr, value))}{',' if len(value) == 1 else ''})"
    return repr(value) if isinstance(value, float) else str(value)


def _short(keys):
    """Returns {key: short name}, which is the text after the key's last dot, or the full key where another has the same."""
    last = {key: key.rpartition(".")[2] for key in keys}
    return {key: name if list(last.values()).count(name) == 1 else key for key, name in last.items()}


def _name(values):
    name = ",".join(f"{key}={value}" for key, value in values.items()) or "base"
    safe = re.sub(r"[^A-Za-z0-9._=,+-]+", "_", name)
    return safe if len(safe) <= NAME_LENGTH else f"{safe[: NAME_LENGTH - 9]}-{_hash(name)}"


def _unlike(name, names, overrides):
    """Returns the name, with a hash of the overrides where another run has the same name: different values may give equal file names."""
    return name if names.count(name) == 1 else f"{name}-{_hash(overrides)}"


def _hash(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]
