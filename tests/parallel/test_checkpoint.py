"""Any layout in, any layout out. A rank's parts depend on its place in the mesh alone, so one process can be each rank in turn."""

import json

import numpy as np
import pytest

from experiments.train import optim
from experiments.train import state as train_state
from parallel.checkpoint import store as checkpoint_store
from parallel.checkpoint.arrays import match, pieces, wanted
from parallel.checkpoint.files import step_folder
from parallel.checkpoint.read import Reader
from parallel.placement import cut
from parallel.trees import tree_paths
from qwen3.model import param_specs
from tests import processes
from tests.parallel import checkpoint_groups
from tests.parallel.layouts import run_config, sharding_of
from tests.tiny import DENSE, MOE

OPTIM = run_config({}).optim
MODELS = {"dense": DENSE.replace(num_layers=3), "moe": MOE.replace(num_experts=8, router_bias=True)}
LAYOUTS = {
    "one": dict(),
    "one, scan": dict(loop="scan"),
    "dp2": dict(dp=2),
    "tp2": dict(tp=2),
    "dp2 tp2": dict(dp=2, tp=2),
    "dp2, ZeRO 1": dict(dp=2, zero=1),
    "dp2, ZeRO 2, scan": dict(dp=2, zero=2, loop="scan"),
    "dp4, ZeRO 3": dict(dp=4, zero=3),
    "dp2 tp2, ZeRO 3, scan": dict(dp=2, tp=2, zero=3, loop="scan"),
    "tp4 of 2 kv heads": dict(tp=4),
    "cp2, ring": dict(cp=2),
    "cp4, Ulysses, ZeRO 2": dict(cp=4, ulysses=4, zero=2),
    "cp2 tp2, ZeRO 3, scan": dict(cp=2, tp=2, zero=3, loop="scan"),
    "dp2 tp4, ZeRO 1": dict(dp=2, tp=4, zero=1),
    "dp8, ZeRO 2": dict(dp=8, zero=2),
    "pp2 dp2, ZeRO 1": dict(pp=2, dp=2, zero=1),
    "pp2 tp2, interleaved": dict(pp=2, tp=2, schedule="interleaved", virtual=2),
    "pp4, ends without layers": dict(pp=4, layers=(0, 2, 1, 0)),
}
EXPERTS = {
    "dp2 ep2": dict(dp=2, ep=2),
    "dp2 tp2 ep4": dict(dp=2, tp=2, ep=4, seq=True),
    "cp4 tp2 ep4, hybrid, ZeRO 1": dict(cp=4, tp=2, ep=4, ulysses=2, seq=True, zero=1),
    "dp4 ep2, ZeRO 3, scan": dict(dp=4, ep=2, zero=3, loop="scan"),
    "dp4 tp2 ep4, ZeRO 2": dict(dp=4, tp=2, ep=4, seq=True, zero=2),
    "pp2 dp2 ep2, ZeRO 3": dict(pp=2, dp=2, ep=2, zero=3),
}
CASES = [("dense", name) for name in LAYOUTS] + [("moe", name) for name in {**LAYOUTS, **EXPERTS} if "layers" not in LAYOUTS.get(name, ())]


def rng_state(cfg):
    """{name: array} of a whole state; norms and biases too are anything but 0 or 1."""
    rng = np.random.default_rng(7)
    specs = tree_paths(param_specs(cfg))
    kinds = optim.state_kinds(OPTIM)
    return {f"{kind}/{path}": rng.standard_normal(spec.shape).astype(np.float32) for kind in kinds for path, spec in specs}


def ranks_of(cfg, options):
    """(mesh, tree of placements, stacked layers or 0) of every rank."""
    scan = options.get("loop") == "scan"
    for rank in range(sharding_of(cfg, options).mesh.world):
        sharding = sharding_of(cfg, options, rank)
        mesh = sharding.mesh
        if mesh.pp > 1:
            yield mesh, train_state.stage_placements(cfg, run_config(options), sharding)[1][mesh.index(("pp",)) :: mesh.pp], 0
            continue
        yield mesh, train_state.placements(cfg, sharding, scan), cfg.num_layers if scan else 0


def held_of(mesh, placed, layers, arrays):
    """What a rank holds of these arrays, cut out by itself."""

    def part(held):
        if not held.is_stacked:
            return cut(mesh, held.spec, held.axes, lambda at: arrays[held.names[0]][at])
        return cut(mesh, held.spec, held.axes, lambda at: np.stack([arrays[name][at[1:]] for name in held.names]))

    return [held._replace(data=part(held)) for held in train_state.held_arrays(placed, layers, OPTIM)]


def save(folder, cfg, options, arrays):
    """A checkpoint, each rank's part written in turn; returns the bytes that each wrote."""
    reports, written = [], []
    for mesh, placed, layers in ranks_of(cfg, options):
        mine = pieces(mesh, held_of(mesh, placed, layers, arrays))
        written.append(sum(piece.data.nbytes for piece in mine))
        reports.append(checkpoint_store.write_part(f"{folder}.tmp", mesh.rank, iter(mine)))
    checkpoint_store.commit(f"{folder}.tmp", folder, reports, {"norm": 0.25})
    return written


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{(model, layout): folder}, each saved from that layout; {model: arrays}; {(model, layout): bytes by rank}"""
    folder, written = tmp_path_factory.mktemp("saved"), {}
    arrays = {model: rng_state(cfg) for model, cfg in MODELS.items()}
    folders = {case: str(folder / str(i)) for i, case in enumerate(CASES)}
    for (model, name), path in folders.items():
        written[model, name] = save(path, MODELS[model], {**LAYOUTS, **EXPERTS}[name], arrays[model])
    return folders, arrays, written


@pytest.mark.extended(but=("*one*",))
@pytest.mark.parametrize("model, name", CASES)
def test_every_layout_saves_the_same_arrays_each_element_once_and_by_all_ranks(model, name, saved):
    folders, arrays, written = saved
    reader = Reader(folders[model, name])
    assert set(reader.names) == set(arrays[model])
    for key, want in arrays[model].items():
        got = reader.read(key)
        assert got.dtype == want.dtype and got.tobytes() == want.tobytes(), key
    total, ranks = sum(a.nbytes for a in arrays[model].values()), written[model, name]
    assert sum(ranks) == total and (name.startswith("pp") or max(ranks) < 1.5 * total / len(ranks))


def restore_and_compare(folder, cfg, options, arrays):
    """Every rank of a layout restores, and has what it would cut out of the whole."""
    names = set()
    for mesh, placed, layers in ranks_of(cfg, options):
        reader, shapes = Reader(folder), wanted(train_state.held_arrays(placed, layers, OPTIM))
        assert match(reader, shapes, partial=mesh.pp > 1)[0] == set(shapes)
        names.update(shapes)
        state = train_state.restored(mesh, placed, layers, OPTIM, reader.read, reader.meta["norm"])
        assert state["norm"].asnumpy() == 0.25
        want = held_of(mesh, placed, layers, arrays)
        got = train_state.held_arrays(placed, layers, OPTIM, state)
        for a, b in zip(want, got, strict=True):
            assert a.data.tobytes() == b.data.asnumpy().tobytes() and a.data.shape == b.data.shape, (mesh, a.names)
    assert names == set(arrays)


FEW = ("dp2 tp2, ZeRO 3, scan", "pp2 dp2, ZeRO 1")


@pytest.mark.extended(but=("*tp2*", "*pp2*", "*ZeRO 3*"))
@pytest.mark.parametrize("model, name", CASES)
def test_a_layout_restores_what_others_saved(model, name, saved):
    folders, arrays, _ = saved
    for other in FEW if model == "dense" else ("dp2 tp2 ep4",):
        restore_and_compare(folders[model, other], MODELS[model], {**LAYOUTS, **EXPERTS}[name], arrays[model])


@pytest.mark.slow
@pytest.mark.parametrize("model, name", CASES)
def test_a_layout_restores_what_each_layout_saved(model, name, saved):
    folders, arrays, _ = saved
    for other in [b for m, b in CASES if m == model]:
        restore_and_compare(folders[model, other], MODELS[model], {**LAYOUTS, **EXPERTS}[name], arrays[model])


GROUPS = {
    2: ("one layer", [dict(dp=2, zero=1), dict(tp=2)]),
    4: ("dense", [dict(pp=2, dp=2, micro=2), dict(dp=2, tp=2, zero=1, micro=2)]),
    8: ("moe8", [dict(dp=4, tp=2, ep=4, seq=True, zero=2), dict(dp=8, zero=3), dict(dp=2, cp=2, tp=2, zero=1)]),
}


@pytest.mark.extended
@pytest.mark.parametrize("count", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (4, 8))])
def test_processes_save_while_they_train_and_go_on_in_another_layout(count, tmp_path):
    model, layouts = GROUPS[count]
    (tmp_path / "checkpoints").mkdir()
    ranks = processes.run("tests.parallel.checkpoint_groups:main", count, model, json.dumps(layouts), str(tmp_path), timeout_s=600)
    one = checkpoint_groups.Run(model, {"micro": layouts[0].get("micro", 1)}, 0, str(tmp_path))
    _, alone = one.step(one.restore(step_folder(str(tmp_path), 2)), 2)
    for rank, found in enumerate(ranks):
        assert found["saved"] and found["next state"] and list(found["steps"]) == [2]
        for key in ("objective", "grad_norm"):
            assert found[f"{key} 1"] == found[f"{key} 0"]
            for elsewhere in [alone[key], *(found[f"{key} {i + 1}"] for i in range(1, len(layouts)))]:
                assert elsewhere == pytest.approx(found[f"{key} 0"], rel=1e-5)
        assert ("the disk or a quota is full" if rank <= 1 else "another rank could not save") in str(found["said"]), found["said"]
