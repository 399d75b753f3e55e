"""Hugging Face folder to 4 real ranks and back, through the program of a run: bit for bit, in several layouts."""

import numpy as np
import pytest

from experiments import train
from parallel import collectives, placement
from parallel.spec import tree_leaves
from qwen3 import hf
from tests import processes
from tests.parallel import layouts
from tests.qwen3.hf_folders import GOLDEN, contents

LAYOUTS = {
    "tp4 of 2 kv heads, scan": ("dense_untied", dict(tp=4, loop="scan")),
    "dp2 tp2, ZeRO 3": ("qwen2_bias", dict(dp=2, tp=2, zero=3)),
    "dp2 tp2 ep2, ZeRO 3, scan": ("moe_norm", dict(dp=2, tp=2, ep=2, zero=3, loop="scan")),
}


def there_and_back(folder):
    """In each of 4 processes: folder/NAME is written by rank 0 for every layout; what of the whole each rank was given."""
    rank, out = collectives.start()[0], {}
    placement.PIECE_BYTES = 8000  # several pieces of the larger tensors
    for name, (model, options) in LAYOUTS.items():
        weights = hf.Reader(GOLDEN / model, "float32")
        sharding = layouts.sharding_of(weights.config, options, rank)
        program = train.build_program(weights.config, layouts.run_config(options), sharding)
        state = program.init(weights.read)
        spread = program.spread(state)
        if rank == 0:
            hf.save(f"{folder}/{name}", weights.config, spread, max_shard_bytes=60_000)
        else:
            out[f"{name}|given"] = [leaf.asnumpy() is None for leaf in tree_leaves(spread)]
        out[f"{name}|bytes"] = sum(leaf.nbytes for leaf in tree_leaves(state["params"]))
    return out


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return folder, processes.run("tests.experiments.test_weights_layouts:there_and_back", 4, str(folder))


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_of_a_layout_are_saved_as_they_were_read(name, ranks, tmp_path):
    folder, found = ranks
    cfg, params = hf.load(GOLDEN / LAYOUTS[name][0])
    hf.save(tmp_path / "one", cfg, params, max_shard_bytes=60_000)
    assert contents(folder / name) == contents(tmp_path / "one")
    assert all(np.all(rank[f"{name}|given"]) for rank in found[1:])
    total = sum(leaf.nbytes for leaf in tree_leaves(params))
    assert all(rank[f"{name}|bytes"] < 0.7 * total for rank in found)
