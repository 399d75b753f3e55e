"""Frozen weights kept in bfloat16 or float16: which parameters, their bits, what a step computes, files, going on, and what is refused."""

import numpy as np
import pytest

from experiments import flags as command_line
from experiments.train import program as train_program
from experiments.train import weights
from experiments.train.state import held_arrays, placements
from parallel import zero
from parallel.checkpoint.arrays import pieces
from parallel.mesh import ONE_DEVICE, Mesh
from parallel.placement import nbytes, place
from parallel.sharding import Sharding
from parallel.simulation import traffic
from parallel.trees import tree_leaves, tree_paths
from qwen3 import hf
from qwen3.config import Lora
from qwen3.model import param_specs
from tests.experiments.test_train import DENSE, make_batch, make_config, run
from tests.tiny import MOE, random_params

ADAPTERS = Lora(2, 4.0, ("q", "v", "down"))
NARROW = ("bfloat16", "float16")


def adapted(cfg=DENSE, dtype="bfloat16"):
    return cfg.replace(lora=ADAPTERS, frozen_dtype=dtype)


def rounded(read, cfg):
    """read() with the values that a run with this config keeps, in float32."""
    dtypes = {path: spec.dtype for path, spec in tree_paths(param_specs(cfg))}
    return lambda path, slices: hf.cast(read(path, slices), dtypes[path], path).astype(np.float32)


def test_matrices_that_do_not_train_are_narrow_and_all_else_is_float32():
    cfg = MOE.replace(lora=Lora(2, 4.0, ("q", "router", "experts.gate"), dropout=0.0), frozen_dtype="bfloat16")
    narrow = {path for path, spec in tree_paths(param_specs(cfg)) if spec.dtype != "float32"}
    expected = {"embed", "lm_head"} | {f"layers.{i}.attention.{w}" for i in range(2) for w in ("wq", "wk", "wv", "wo")}
    assert narrow == expected | {f"layers.{i}.moe.{w}" for i in range(2) for w in ("w_gate", "w_up", "w_down")}
    chosen = DENSE.replace(frozen=(("embed", "*norm", "layers.0.*"), ("*w_up",)), frozen_dtype="float16")
    narrow = {path.removeprefix("layers.0.") for path, spec in tree_paths(param_specs(chosen)) if spec.dtype == "float16"}
    assert narrow == {"embed", "attention.wq", "attention.wk", "attention.wv", "attention.wo", "mlp.w_gate", "mlp.w_down"}


@pytest.mark.extended
@pytest.mark.parametrize(
    "dtype, changes",
    [
        ("bfloat16", {}),
        pytest.param("float16", {"train.layer_loop": "scan"}, marks=pytest.mark.slow),
        pytest.param("bfloat16", {"train.recompute": "full"}, marks=pytest.mark.slow),
        pytest.param("bfloat16", {"train.recompute": "attention", "parallel.micro_batches": 2}, marks=pytest.mark.slow),
    ],
)
def test_steps_are_to_the_bit_those_of_a_float32_base_with_the_same_values(dtype, changes):
    config, narrow, wide = make_config(**changes), adapted(dtype=dtype), adapted(dtype="float32")
    read = weights.random(narrow, config)
    found, kept = run(narrow, config, steps=3, params=read)
    wanted, _ = run(wide, config, steps=3, params=rounded(read, narrow))
    other, _ = run(wide, config, steps=3, params=read)
    assert [m["objective"] for m in found] == [m["objective"] for m in wanted] != [m["objective"] for m in other]
    assert [m["grad_norm"] for m in found] == [m["grad_norm"] for m in wanted]
    assert str(kept["embed"].dtype) == dtype and np.array_equal(kept["embed"].astype(np.float32), rounded(read, narrow)("embed", ()))


def test_a_folder_in_bfloat16_is_kept_as_it_is(tmp_path):
    hf.save(tmp_path / "base", DENSE, random_params(DENSE), dtype="bfloat16")
    config = make_config(init_from=str(tmp_path / "base"), **{"train.frozen_dtype": "bfloat16"})
    cfg, files = adapted(), hf.Reader(tmp_path / "base")
    state = train_program.build_program(cfg, config).init(weights.initial_params(cfg, config)[0])
    arrays = [h for h in held_arrays(placements(cfg, Sharding(), False), 0, config.optim, state) if h.names[0].startswith("params/")]
    for h in arrays:
        path = h.names[0].removeprefix("params/")
        if h.spec.trains:
            assert weights.is_adapter(path) and str(h.data.dtype) == "Float32"
            continue
        values, kept = files.read(path), h.data.asnumpy()
        assert str(values.dtype) == "bfloat16" and kept.dtype.itemsize == (2 if len(h.spec.shape) > 1 else 4)
        assert np.array_equal(kept.astype(np.float32), values.astype(np.float32))
    wide, narrow = (stored_bytes(adapted(dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert sum(h.data.nbytes for h in arrays) == narrow < 0.6 * wide


def stored_bytes(cfg, mesh=ONE_DEVICE, zero=0):
    return sum(nbytes(mesh, p, "stored") for p in tree_leaves(place(Sharding(mesh, zero=zero), param_specs(cfg))))


def test_zero_3_gathers_narrow_weights_in_their_own_dtype():
    """In buckets of one dtype, of half the bytes."""
    mesh, sent, elements = Mesh(dp=2), {}, {}
    for dtype in ("float32", "bfloat16"):
        layout = Sharding(mesh, zero=3)
        placed = [p for p in tree_leaves(place(layout, param_specs(adapted(dtype=dtype)))) if not p.spec.trains]
        for _, _, bucket in zero.buckets(mesh, placed):
            assert len({placed[i].spec.dtype for i in bucket}) == 1
        calls = traffic.of_gathered(layout, placed)
        gathers = {call: n for call, n in calls.items() if call.phase == "forward"}
        sent[dtype] = sum(n * call.sent(mesh) for call, n in gathers.items())
        elements[dtype] = sum(n * call.elements for call, n in gathers.items())
    assert elements["float32"] == elements["bfloat16"] and sent["bfloat16"] < 0.6 * sent["float32"]


@pytest.mark.extended
def test_what_is_frozen_by_its_path_goes_through_a_checkpoint_and_leaves_as_float32(tmp_path):
    cfg = DENSE.replace(frozen=(("embed", "layers.*"), ("*w_up",)), frozen_dtype="bfloat16")
    config = make_config()
    program = train_program.build_program(cfg, config)
    state = program.init(weights.random(cfg, config))
    state, _ = program.step(state, make_batch(0), 1e-2, 0)
    saved = {piece.name: piece.data for piece in pieces(ONE_DEVICE, program.held(state))}
    assert str(saved["params/embed"].dtype) == "bfloat16" and saved["params/layers.0.mlp.w_up"].dtype == np.float32
    again = program.restore(lambda name, slices: saved[name][slices], 0.0)
    for kind in ("params", "frozen", "m", "v"):
        for a, b in zip(tree_leaves(state[kind]), tree_leaves(again[kind]), strict=True):
            assert a.dtype == b.dtype and np.array_equal(a.asnumpy(), b.asnumpy())
    (_, first), (_, second) = (program.step(each, make_batch(1), 1e-2, 1) for each in (again, state))
    assert first == second
    hf.save(tmp_path / "hf", cfg, program.spread(again), dtype=cfg.param_dtype)
    files = hf.Reader(tmp_path / "hf")
    assert {files.dtype(path) for path in files.paths} == {"float32"} and files.config.param_dtype == "float32"
    assert np.array_equal(files.read("embed"), saved["params/embed"].astype(np.float32))


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"train.frozen_dtype": "bfloat16"},
            "train.frozen_dtype=bfloat16: nothing is frozen, and what trains is kept in float32; set lora.rank",
        ),
        ({"train.frozen_dtype": "int8", "lora.rank": 2}, "train.frozen_dtype='int8' is not one of auto, float32, float16, bfloat16"),
    ],
)
def test_a_dtype_that_cannot_be_kept_is_refused(changes, said):
    config = make_config(**changes)
    with pytest.raises(ValueError, match=said):
        command_line.check(config)
        command_line.model_config(config, "any")


def test_a_stack_of_bfloat16_layers_is_refused_on_cpu():
    with pytest.raises(ValueError, match="train.frozen_dtype=bfloat16 with layers in a loop: .*layer_loop=unroll"):
        train_program.build_program(adapted(), make_config(**{"train.layer_loop": "scan"}))


def test_a_value_that_float16_cannot_hold_is_refused_by_its_path():
    config, cfg = make_config(), adapted(dtype="float16")
    read = weights.random(cfg, config)
    with pytest.raises(ValueError, match="embed has values above 65504, the largest of float16; use bfloat16"):
        train_program.build_program(cfg, config).init(lambda path, slices: read(path, slices) * (1e7 if path == "embed" else 1))


def test_auto_is_the_compute_dtype_for_the_base_of_adapters_alone():
    found = {}
    for name, changes in {"lora": {"lora.rank": 2}, "frozen": {"train.freeze_include": "embed"}, "all": {}}.items():
        config = make_config(**{"model_args.compute_dtype": "bfloat16", **changes})
        found[name] = command_line.model_config(config, "any").frozen_dtype
    assert found == {"lora": "bfloat16", "frozen": "float32", "all": "float32"}
    assert command_line.model_config(make_config(**{"lora.rank": 2})).frozen_dtype == "float32"
