"""Weights from a Hugging Face folder, in any layout: each rank has what it would cut from the whole, and reads nothing else."""

import math

import pytest

from experiments.train import state as train_state
from parallel.mesh import Mesh
from parallel.placement import reader, region
from parallel.sharding import Sharding
from parallel.trees import tree_leaves, tree_paths
from qwen3 import hf, hf_files
from qwen3.config import SIZES
from qwen3.model import param_specs
from tests.qwen3.hf_folders import GOLDEN, MODELS, edit_tensors
from tests.qwen3.test_hf import fuse

DENSE_LAYOUTS = {
    "tp2": (dict(tp=2), 0, False),
    "tp4 of 2 kv heads, scan": (dict(tp=4, kv_repeat=2), 0, True),
    "dp2 tp2, ZeRO 3": (dict(dp=2, tp=2), 3, False),
    "dp4, ZeRO 3, scan": (dict(dp=4), 3, True),
}
MOE_LAYOUTS = {
    "dp2 ep2": (dict(dp=2, ep=2), 0, False),
    "dp2 tp2 ep2, ZeRO 3": (dict(dp=2, tp=2, ep=2), 3, False),
    "tp2, scan": (dict(tp=2), 0, True),
}
CASES = [(name, layout, form) for name in MODELS if name.startswith("moe") for layout in MOE_LAYOUTS for form in ("float32", "fused")]
CASES += [(name, layout, "float32") for name in MODELS if not name.startswith("moe") for layout in DENSE_LAYOUTS]
CASES += [("dense_tied", "tp2", "bfloat16"), ("moe_norm", "dp2 tp2 ep2, ZeRO 3", "bfloat16")]
CASES = [case for case in CASES if case[:2] != ("moe_mixed", "tp2, scan")]  # its layers are of two kinds


@pytest.fixture
def counted(monkeypatch):
    """The bytes of each array that is taken from a file."""
    arrays, taken = hf_files.TensorFile.arrays, []

    def counting(*args):
        for array in arrays(*args):
            taken.append(array.nbytes)
            yield array

    monkeypatch.setattr(hf_files.TensorFile, "arrays", counting)
    return taken


def folder_of(name, form, tmp_path):
    """A golden folder as it is, with fused experts, or as shards of bfloat16."""
    out = tmp_path / "model"
    hf.save(out, *hf.load(GOLDEN / name), dtype="bfloat16" if form == "bfloat16" else None, max_shard_bytes=50_000)
    if form == "fused":
        hf.save(out, *hf.load(GOLDEN / name))
        edit_tensors(out, fuse)
    return out


@pytest.mark.parametrize("name, layout, form", CASES)
def test_each_rank_reads_its_share_and_has_its_part_of_the_whole(name, layout, form, tmp_path, counted):
    sizes, zero, scan = DENSE_LAYOUTS.get(layout) or MOE_LAYOUTS[layout]
    folder = folder_of(name, form, tmp_path)
    cfg, whole = hf.load(folder, dtype="float32")
    weights, layers = hf.Reader(folder, "float32"), cfg.num_layers if scan else 0
    assert weights.config == cfg
    for rank in range(Mesh(**sizes).world):
        sharding = Sharding(Mesh(**sizes, rank=rank), zero=zero)
        placed = train_state.placements(cfg, sharding, scan)
        want = train_state.load_shards(sharding.mesh, placed, reader(whole), layers)
        counted.clear()
        got = train_state.load_shards(sharding.mesh, placed, weights.read, layers)
        share = sum(elements(region(sharding.mesh, p.spec, p.stored)) for p in tree_leaves(placed))
        assert sum(counted) == share * (2 if form == "bfloat16" else 4)
        assert share < 0.9 * sum(w.size for w in tree_leaves(whole))
        for (path, a), b in zip(tree_paths(want), tree_leaves(got)):
            assert a.asnumpy().tobytes() == b.asnumpy().tobytes(), path


def elements(slices):
    return math.prod(s.stop - s.start for s in slices)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["dense_untied", "moe_norm"])
def test_slices_are_cast_as_the_whole_is(name, dtype):
    weights, (cfg, whole) = hf.Reader(GOLDEN / name, dtype), hf.load(GOLDEN / name, dtype)
    assert weights.config == cfg and cfg.param_dtype == dtype
    for path, leaf in tree_paths(whole):
        part = tuple(slice(n // 3, n) for n in leaf.shape)
        assert weights.dtype(path) == dtype and weights.read(path, part).tobytes() == leaf.asnumpy()[part].tobytes(), path


def test_a_slice_is_checked_for_float16_alone(tmp_path):
    cfg, params = hf.load(GOLDEN / "dense_tied")
    big = params["embed"].asnumpy().copy()
    big[0, 0] = 1e6
    hf.save(tmp_path / "big", cfg, {**params, "embed": big})
    weights = hf.Reader(tmp_path / "big", "float16")
    assert weights.read("embed", (slice(1, 3),)).shape == (2, 40)
    with pytest.raises(ValueError, match="embed has values above 65504"):
        weights.read("embed", (slice(0, 3),))
    with pytest.raises(ValueError, match="dtype='int8' is not one of"):
        hf.Reader(tmp_path / "big", "int8")
    assert param_specs(SIZES["tiny"]) != weights.specs
