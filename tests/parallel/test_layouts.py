"""Any layout gives the numbers of one process, and holds its parts of the whole alone."""

import functools
import json

import numpy as np
import pytest

from experiments.train.optim_rules import MOMENTS
from experiments.train.program import build_program
from parallel.pipeline.schedule import split_layers
from parallel.placement import local_shape, nbytes, place
from parallel.trees import tree_leaves
from qwen3.model import param_specs
from tests import processes
from tests.parallel import layouts
from tests.parallel.formulas import live_formula
from tests.parallel.layouts import LAYOUTS, LAYOUTS_RUN, MODELS, OVERFLOWING, RECOMPUTED, ROWS, SLOW
from tests.tiny import error

TOLERANCE = {"loss": 1e-5, "grad_norm": 1e-5, "gradient": 1e-4, "parameter": 1e-5, "average": 1e-5}
GROUP = 12  # layouts that one start of processes runs, so that it ends in minutes


@functools.lru_cache
def one_process(model, loop, micro, packed, evaluate, optim, groups, prefer, ema):
    options = dict(loop=loop, micro=micro, packed=packed, evaluate=evaluate, optim=optim, groups=groups, prefer=prefer, ema=ema)
    return layouts.run(model, options)


def suite_of(name):
    return "slow" if name in SLOW else "default" if name in layouts.DEFAULT else "extended"


def group_of(name):
    """The layouts that run in the processes of this one: of as many ranks, and of the same suite of tests; no more than GROUP."""
    count, suite = layouts.processes(LAYOUTS_RUN[name][1]), suite_of(name)
    alike = [n for n, (_, options) in LAYOUTS_RUN.items() if layouts.processes(options) == count and suite_of(n) == suite]
    start = alike.index(name) // GROUP * GROUP
    return count, tuple(alike[start : start + GROUP])


@functools.lru_cache
def on_processes(count, names):
    """For each rank {"name|key": array}, of these layouts of so many processes, which are started once; or why they failed."""
    try:
        return processes.run("tests.parallel.layouts:main", count, json.dumps(names), timeout_s=1200)
    except AssertionError as error:
        return str(error)


def found(name):
    """What each rank returned."""
    ranks = on_processes(*group_of(name))
    assert not isinstance(ranks, str), ranks
    return [{key.split("|")[1]: v for key, v in rank.items() if key.startswith(f"{name}|")} for rank in ranks]


@pytest.mark.extended(but=layouts.DEFAULT)
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in LAYOUTS])
def test_a_layout_equals_one_process(name):
    model, options = LAYOUTS[name]
    reference = model, options.get("loop"), options.get("micro", 1), options.get("packed"), "pp" in options or options.get("evaluate")
    reference += (options.get("optim", "adamw"), options.get("groups", ""), options.get("prefer"), options.get("ema", 0.0))
    want, ranks = one_process(*reference), found(name)
    checked = dict.fromkeys(TOLERANCE, 0)
    for key, value in want.items():
        kind = key.split(".")[0]
        if kind in TOLERANCE:
            checked[kind] += 1
            worst = error(value, ranks[0][key])
            assert worst <= TOLERANCE[kind], f"{key}: error {worst:.3g} is above {TOLERANCE[kind]}"
    assert all(count for kind, count in checked.items() if kind != "average" or options.get("ema"))
    if "evaluation" in want:
        assert [rank["evaluation"] for rank in ranks] == pytest.approx([want["evaluation"]] * len(ranks), rel=1e-5)
    assert not any(value.any() for key, value in ranks[0].items() if key.startswith("expert_overflow"))
    for rank in ranks[1:]:  # replicas have not drifted apart by a bit
        for key in want:
            if key.split(".")[0] in TOLERANCE:
                np.testing.assert_array_equal(rank[key], ranks[0][key], err_msg=key)
    check_graphs(options, ranks)
    check_parts(MODELS[model], options, ranks)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in RECOMPUTED])
def test_recomputed_layers_are_bitwise_those_that_are_kept(name):
    for rank, kept in zip(found(name), found(RECOMPUTED[name]), strict=True):
        assert list(rank) == list(kept)
        for key in kept:
            np.testing.assert_array_equal(rank[key], kept[key], err_msg=key)


@pytest.mark.extended
def test_what_does_not_fit_into_the_buffers_is_counted_alike_on_every_rank():
    """Two layers, rows of 16 tokens, 2 choices a token, and slots for half of them."""
    lost = [[rank[f"expert_overflow.{at}"] for at in range(layouts.STEPS)] for rank in found(OVERFLOWING)]
    assert lost[0] == lost[1] and min(lost[0]) >= ROWS * 16 * 2 * 2 / 2


def check_graphs(options, ranks):
    """The ranks of a pipeline stage run the same collectives in the same order, which MindSpore derives from the rest of the graph. Ranks
    whose orders differ may wait for each other for ever."""
    size = len(ranks) // options.get("pp", 1)
    for number, rank in enumerate(ranks):
        first = ranks[number // size * size]["collectives"]
        assert len(first) > 1 and list(rank["collectives"]) == list(first), f"rank {number}"


def check_parts(cfg, options, ranks):
    """Each rank holds the parts that the specs say, of its own pipeline stages, and no more bytes."""
    sharding = layouts.sharding_of(cfg, options)
    mesh, every = sharding.mesh, tree_leaves(place(sharding, param_specs(cfg)))
    for number, rank in enumerate(ranks):
        placed = [p for p in every if number * mesh.pp // mesh.world in holders(cfg, options, p.path)]
        trained = [p for p in placed if p.spec.trains]
        size = sum(nbytes(mesh, p, "stored") for p in placed)
        size += sum(len(MOMENTS[options.get("optim", "adamw")]) * nbytes(mesh, p, "state") for p in trained)
        assert rank["state bytes"] == size
        if options.get("loop") != "scan":
            found = {key.partition(".")[2]: tuple(value) for key, value in rank.items() if key.startswith("shape.")}
            assert found == {p.path: local_shape(mesh, p.spec, p.state) for p in trained}
        if mesh.pp > 1:
            assert rank["own parts"]
            name, micro, virtual = options.get("schedule", "1f1b"), options["micro"], options.get("virtual", 1)
            assert rank["live"] == live_formula(name, number * mesh.pp // mesh.world, mesh.pp, micro, virtual)


def holders(cfg, options, path):
    """The places along pp that have a parameter."""
    pp, virtual = options.get("pp", 1), options.get("virtual", 1)
    if path.startswith("layers."):
        counts = options.get("layers") or split_layers(cfg.num_layers, pp * virtual)
        return [int(np.searchsorted(np.cumsum(counts), int(path.split(".")[1]), side="right")) % pp]
    if path == "embed" and cfg.tie_embeddings:
        return [0, pp - 1]
    if path == "embed" or path.startswith("lora."):
        return [0]
    return [pp - 1]


def test_a_pipeline_stage_in_which_nothing_trains_is_refused():
    cfg = MODELS["untied"].replace(frozen=(("embed", "layers.0.*"), ()))
    with pytest.raises(ValueError, match="leaves nothing to train in pipeline stage 0"):
        build_program(cfg, layouts.run_config({}), layouts.sharding_of(cfg, {"pp": 2}))
