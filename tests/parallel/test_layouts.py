"""Any layout gives the numbers of one process, and holds its parts of the whole alone."""

import functools
import json

import numpy as np
import pytest

from parallel.mesh import Mesh
from parallel.placement import local_shape, place
from parallel.sharding import Sharding
from parallel.spec import tree_leaves
from qwen3.model import param_specs
from tests import processes
from tests.parallel import layouts
from tests.parallel.layouts import LAYOUTS, MODELS, SLOW
from tests.tiny import error

TOLERANCE = {"loss": 1e-5, "grad_norm": 1e-5, "gradient": 1e-4, "parameter": 1e-5}


@functools.lru_cache
def one_process(model, loop, micro):
    return layouts.run(model, dict(loop=loop, micro=micro))


@functools.lru_cache
def on_processes(count, slow):
    """For each rank {"name|key": array}, of all layouts of so many processes, which are started once; or why they failed."""
    names = [name for name, (_, options) in LAYOUTS.items() if layouts.processes(options) == count and (name in SLOW) == slow]
    try:
        return processes.run("tests.parallel.layouts:main", count, json.dumps(names), timeout_s=1200)
    except AssertionError as error:
        return str(error)


def found(name):
    """What each rank returned."""
    count = layouts.processes(LAYOUTS[name][1])
    ranks = on_processes(count, name in SLOW)
    assert not isinstance(ranks, str), ranks
    return [{key.split("|")[1]: v for key, v in rank.items() if key.startswith(f"{name}|")} for rank in ranks]


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in LAYOUTS])
def test_a_layout_equals_one_process(name):
    model, options = LAYOUTS[name]
    want, ranks = one_process(model, options.get("loop"), options.get("micro", 1)), found(name)
    checked = dict.fromkeys(TOLERANCE, 0)
    for key, value in want.items():
        kind = key.split(".")[0]
        if kind in TOLERANCE:
            checked[kind] += 1
            worst = error(value, ranks[0][key])
            assert worst <= TOLERANCE[kind], f"{key}: error {worst:.3g} is above {TOLERANCE[kind]}"
    assert all(checked.values())
    for rank in ranks[1:]:  # replicas have not drifted apart by a bit
        for key in want:
            if key.split(".")[0] in TOLERANCE:
                np.testing.assert_array_equal(rank[key], ranks[0][key], err_msg=key)
    check_parts(MODELS[model], options, ranks)


def check_parts(cfg, options, ranks):
    """Each rank holds the parts that the specs say, and no more bytes."""
    sizes = {axis: options[axis] for axis in ("dp", "tp", "ep") if axis in options}
    mesh = Mesh(**sizes, kv_repeat=max(1, sizes.get("tp", 1) // cfg.num_kv_heads))
    sharding = Sharding(mesh, seq_parallel=options.get("seq", False), zero=options.get("zero", 0))
    placed = tree_leaves(place(sharding, param_specs(cfg)))
    floats = sum(np.prod(local_shape(mesh, p.spec, p.stored)) + 2 * np.prod(local_shape(mesh, p.spec, p.state)) for p in placed)
    for rank in ranks:
        assert rank["state bytes"] == 4 * floats
    if options.get("loop") != "scan":
        for p in placed:
            assert tuple(ranks[-1][f"shape.{p.path}"]) == local_shape(mesh, p.spec, p.state), p.path
