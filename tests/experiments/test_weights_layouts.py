"""Hugging Face folder to 2 real ranks and back, through the program of a run: bit for bit, in several layouts."""

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

from experiments.train import program as train_program
from parallel import collectives, placement
from parallel.mesh import Mesh
from parallel.specs import ParamSpec, zeros
from parallel.trees import tree_leaves
from qwen3 import hf
from tests import processes
from tests.parallel import layouts
from tests.qwen3.hf_folders import GOLDEN, contents

ROWS = 2048  # of each rank's part of a tensor of 64 MiB
LAYOUTS = {
    "tp2": ("qwen2_bias", dict(tp=2)),
    "dp2 ep2, ZeRO 3, scan": ("moe_norm", dict(dp=2, ep=2, zero=3, loop="scan")),
}


def there_and_back(folder):
    """In each of 2 processes: folder/NAME is written by rank 0 for every layout; what of the whole each rank was given."""
    rank, out = collectives.start()[0], {}
    placement.PIECE_BYTES = 12_000  # several pieces of the larger tensors
    for name, (model, options) in LAYOUTS.items():
        weights = hf.Reader(GOLDEN / model, "float32")
        sharding = layouts.sharding_of(weights.config, options, rank)
        program = train_program.build_program(weights.config, layouts.run_config(options), sharding)
        state = program.init(weights.read)
        spread = program.spread(state)
        if rank == 0:
            hf.save(f"{folder}/{name}", weights.config, spread, max_shard_bytes=60_000)
        else:
            out[f"{name}|given"] = [leaf.asnumpy() is None for leaf in tree_leaves(spread)]
        out[f"{name}|bytes"] = sum(leaf.nbytes for leaf in tree_leaves(state["params"]))
    return {**out, **large(rank)}


def large(rank):
    """A tensor of 64 MiB in parts on 2 ranks is gathered on rank 0: how much more memory each rank takes, and whether it is right."""
    placement.PIECE_BYTES = 2 << 20
    mesh, spec = Mesh(tp=2, rank=rank), ParamSpec((2 * ROWS, 4096), ("heads", "embed"), zeros())
    axes, part = (mesh.atoms(("tp",)), ()), ms.Tensor(np.full((ROWS, 4096), rank, np.float32))
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest is from here on
    found = placement.whole(mesh, spec, axes, part, keep=rank == 0)
    right = found is None if rank else bool((found == np.repeat(np.arange(2), ROWS)[:, None]).all())
    return {"large|memory": memory("VmHWM") - before, "large|right": right}


def memory(name):
    """In bytes."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)) << 10


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return folder, processes.run("tests.experiments.test_weights_layouts:there_and_back", 2, str(folder))


@pytest.mark.extended
@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_of_a_layout_are_saved_as_they_were_read(name, ranks, tmp_path):
    folder, found = ranks
    cfg, params = hf.load(GOLDEN / LAYOUTS[name][0])
    hf.save(tmp_path / "one", cfg, params, max_shard_bytes=60_000)
    assert contents(folder / name) == contents(tmp_path / "one")
    assert all(np.all(rank[f"{name}|given"]) for rank in found[1:])
    total = sum(leaf.nbytes for leaf in tree_leaves(params))
    assert all(rank[f"{name}|bytes"] < 0.7 * total for rank in found)


@pytest.mark.extended
def test_only_rank_0_holds_a_whole_tensor_and_nothing_more(ranks):
    found = ranks[1]
    assert all(rank["large|right"] for rank in found)
    assert 60 << 20 < found[0]["large|memory"] < 96 << 20  # numpy's comparison of it is among the rest
    assert all(rank["large|memory"] < 24 << 20 for rank in found[1:])
