"""Describes a layout as text without starting a process: a table of every parameter's shards, and the bytes of a rank."""

import itertools
import math
import re

from experiments import flags as command_line
from experiments.layout import check as layout
from experiments.layout import pipeline as layout_pipeline
from experiments.layout import traffic as layout_traffic
from experiments.layout.sharding import sharding_of
from experiments.train import lr_groups
from experiments.train.optim_rules import MOMENTS
from parallel.mesh import AXES
from parallel.placement import local_shape, nbytes, place
from parallel.trees import tree_leaves
from qwen3.model import check_frozen, param_specs

COLUMNS = ("parameter", "global shape", "dims", "split over", "local shape", "bytes a rank")


def describe(config):
    """Returns the table as text. config: from experiments.flags.resolve. Equal parameters of several layers share a line."""
    cfg = command_line.model_config(config, "any")
    check_frozen(cfg)
    lr_groups.check(config.optim.lr_groups, param_specs(cfg))
    mesh = layout.mesh(cfg, config.parallel)
    sharding = sharding_of(config, cfg, mesh, "manual")
    placed = tree_leaves(place(sharding, param_specs(cfg)))
    lines = [summary(config), "", *_table([COLUMNS, *_rows(sharding, placed)]), ""]
    if mesh.pp > 1:
        table, schedule = layout_pipeline.lines(config, cfg, sharding)
        return "\n".join([*lines, *_table(table), *layout_pipeline.NOTES, "", *schedule])
    trained = [p for p in placed if p.spec.trains]
    of = {"stored": placed, "state": trained}
    totals = [(name, sum(nbytes(mesh, p, axes) for p in of[axes]) * times) for name, axes, times in _totals(config)]
    lines += [f"{name:<16} {_gib(size)} a rank" for name, size in [*totals, ("together", sum(size for _, size in totals))]]
    if mesh.world > 1:
        lines += ["", *_table(layout_traffic.table(config, cfg, sharding)), *layout_traffic.notes(config, cfg)]
    return "\n".join(lines)


def _totals(config):
    """Returns (name, axes of a Placed, copies) of each kind of memory: parameters and state between steps, and the gradients that
    the optimizer reads."""
    return (("parameters", "stored", 1), ("gradients", "state", 1), ("optimizer state", "state", len(MOMENTS[config.optim.name])))


def summary(config):
    """Returns the layout as one line."""
    parallel = config.parallel
    sizes = {axis: parallel[axis] for axis in AXES}
    world = math.prod(n for axis, n in sizes.items() if axis != "ep")
    axes = " x ".join(f"{axis} {n}" for axis, n in sizes.items() if n > 1 and axis != "ep") or "one device"
    extra = [f"{sizes['pp'] * parallel.virtual_stages} stages, {parallel.pp_schedule}"] * (sizes["pp"] > 1)
    extra += [f"{parallel.cp_attention} attention"] * (sizes["cp"] > 1)
    extra += [f"experts over {sizes['ep']}"] * (sizes["ep"] > 1) + ["sequence parallel"] * parallel.seq_parallel
    extra += [f"ZeRO {parallel.zero}"] * (parallel.zero > 0) + [f"{parallel.micro_batches} micro-batches"] * (parallel.micro_batches > 1)
    return f"{world} rank{'s' * (world > 1)}: " + ", ".join([axes, *extra])


def _rows(sharding, placed):
    keyed = [(re.sub(r"^layers\.\d+\.", "layers.*.", p.path), p) for p in placed]
    seen = {}
    for key, p in keyed:
        seen.setdefault((key, p.spec), []).append(p)
    for (key, spec), same in seen.items():
        p = same[0]
        axes = [_axes(sharding, dim, atoms, p) for dim, atoms in zip(spec.dims, p.stored)]
        path = key.replace("*", _numbers([q.path for q in same])) if "*" in key else key
        local = local_shape(sharding.mesh, spec, p.stored)
        size = nbytes(sharding.mesh, p, "stored") * len(same)
        yield path, _shape(spec.shape), " ".join(spec.dims), " ".join(axes), _shape(local), f"{size:,}"


def _axes(sharding, dim, atoms, p):
    own = "+".join(axis for axis in sharding.rules[dim] if sharding.mesh.size((axis,)) > 1)
    zero = "zero" if len(atoms) > len(sharding.atoms(dim)) else ""
    return "+".join(axes for axes in (own, zero) if axes) or "-"


def _numbers(paths):
    """Returns the numbers of layers as text, for example 0-3,5 for layers 0, 1, 2, 3 and 5."""
    numbers = [int(path.split(".")[1]) for path in paths]
    runs = [list(run) for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)


def _shape(shape):
    return " x ".join(map(str, shape))


def _gib(size):
    return f"{size / 2**30:10.3f} GiB" if size >= 1 << 27 else f"{size / 2**20:10.3f} MiB"


def _table(rows):
    rows = [tuple(row) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
