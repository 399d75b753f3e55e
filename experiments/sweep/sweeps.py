"""What a sweep runs: overrides of a config, in lists that are put together, and a name for each.

A config file says it beside get_config():

    def sweep(add):
        add(product(over("optim.lr", [1e-3, 3e-3]), over("train.seed", range(3))))
"""

import hashlib
import itertools
import re
import runpy
from typing import NamedTuple

NAME_LENGTH = 80  # of a run's folder; what is longer is cut and marked by a hash


class Run(NamedTuple):
    """name: of its folder, by what differs from other runs. overrides: {key of the config: value}."""

    name: str
    overrides: dict


def over(key, values):
    """[{key: value}] for each value."""
    return [{key: value} for value in values]


def product(*lists):
    """Every combination of an element of each list, the last changing fastest. Raises ValueError where two set one key."""
    return [_joined(parts) for parts in itertools.product(*lists)]


def zipped(*lists):
    """The first elements of all lists together, the second ones, and so on. Raises ValueError for lists of different lengths."""
    if len({len(part) for part in lists}) > 1:
        raise ValueError(f"zipped() takes lists of one length, and they have {', '.join(str(len(part)) for part in lists)}")
    return [_joined(parts) for parts in zip(*lists)]


def chain(*lists):
    """One list after another."""
    return [overrides for part in lists for overrides in part]


def _joined(parts):
    out = {}
    for part in parts:
        if twice := sorted(out.keys() & part.keys()):
            raise ValueError(f"{twice[0]} is set twice in one run of the sweep")
        out.update(part)
    return out


def load(path):
    """[Run] of a config file's sweep(add), where add takes overrides, or a list of them. Raises ValueError where there is no sweep, or it
    has a run twice."""
    found = []

    def add(more):
        found.extend([more] if isinstance(more, dict) else more)

    sweep = runpy.run_path(path).get("sweep")
    if sweep is None:
        raise ValueError(f"--config={path} has no sweep(add); write one beside get_config(), as experiments/sweep/sweeps.py shows")
    sweep(add)
    if not found:
        raise ValueError(f"--config={path}: its sweep adds no run")
    return named(found)


def named(every):
    """[Run] of a list of overrides."""
    texts = [tuple(sorted((key, text(value)) for key, value in overrides.items())) for overrides in every]
    for i, one in enumerate(texts):
        if one in texts[:i]:
            raise ValueError(f"the sweep has a run twice: {dict(one)}")
    varying = varying_keys(every)
    short = _short(varying)
    names = [_name({short[key]: text(overrides[key]) for key in varying if key in overrides}) for overrides in every]
    return [Run(_unlike(name, names, one), overrides) for name, one, overrides in zip(names, texts, every)]


def varying_keys(every):
    """The keys that not all runs set to one value, in the order in which they come."""
    keys = dict.fromkeys(key for overrides in every for key in overrides)
    return [key for key in keys if len({text(o[key]) if key in o else None for o in every}) > 1]


def text(value):
    """A value as --config.KEY=VALUE takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"({','.join(map(repr, value))}{',' if len(value) == 1 else ''})"
    return repr(value) if isinstance(value, float) else str(value)


def _short(keys):
    """{key: its last part, where no other key has that}"""
    last = {key: key.rpartition(".")[2] for key in keys}
    return {key: part if list(last.values()).count(part) == 1 else key for key, part in last.items()}


def _name(values):
    name = ",".join(f"{key}={value}" for key, value in values.items()) or "base"
    safe = re.sub(r"[^A-Za-z0-9._=,+-]+", "_", name)
    return safe if len(safe) <= NAME_LENGTH else f"{safe[: NAME_LENGTH - 9]}-{_hash(name)}"


def _unlike(name, names, overrides):
    """Different values may look alike in a file's name."""
    return name if names.count(name) == 1 else f"{name}-{_hash(overrides)}"


def _hash(what):
    return hashlib.sha256(repr(what).encode()).hexdigest()[:8]
