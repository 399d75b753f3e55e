"""What a probe finds of the layers, against a model in numpy."""

import mindspore as ms
import numpy as np
import pytest

from parallel.graph.jit import jit
from parallel.sharding import Sharding
from parallel.trees import tree_map
from qwen3.model import build, choose_kernels
from qwen3.probe import SEEN, build_probe, names
from tests import reference
from tests.tiny import DENSE, FUSED, MIXED, MOE, assert_close, host, packed_batch, random_params, stack_layers

CASES = {"dense": DENSE, "mixed": MIXED, "post": MOE.replace(norm_placement="post"), "both": DENSE.replace(norm_placement="both")}


def probed(cfg, params, batch, scan=False, sharding=None, compiled=True, by_row=False):
    """{name: array} of all layers as one stage."""
    layers, sharding = range(cfg.num_layers), sharding or Sharding()
    probe = build_probe(cfg, sharding, FUSED, layers, scan=scan, by_row=by_row)
    tree = stack_layers(params) if scan else {**params, "layers": {str(i): params["layers"][i] for i in layers}}
    out = (jit(probe) if compiled else probe)(tree, None, tree_map(ms.Tensor, batch))
    return dict(zip(names(layers, by_row=by_row), map(host, out)))


def expected(cfg, params, batch):
    """seen [layers, SEEN], in numpy, row by row."""
    seen = np.zeros((cfg.num_layers, len(SEEN)))
    seen[:, 3] = -np.inf
    for tokens, positions, segments in zip(*(host(batch[key]) for key in ("tokens", "positions", "segment_ids"))):
        real = segments > 0
        for i, (x, top, probs) in enumerate(reference.layers(cfg, params, tokens, positions, segments)[0]):
            entropy = 0 if probs is None else -(probs[real] * np.log(probs[real])).sum()
            seen[i, :3] += (x[real] ** 2).sum(), entropy, real.sum()
            seen[i, 3] = max(seen[i, 3], top)
    return seen


@pytest.mark.extended
@pytest.mark.parametrize("kind", [kind if kind == "mixed" else pytest.param(kind, marks=pytest.mark.slow) for kind in CASES])
def test_numbers_of_layers_are_those_of_a_model_in_numpy(kind):
    cfg = CASES[kind]
    params, batch = random_params(cfg), packed_batch(cfg)
    assert (host(batch["segment_ids"]) == 0).any() and (host(batch["segment_ids"]) == 2).any()  # padding and several documents
    want = expected(cfg, params, batch)
    assert_close(want, probed(cfg, params, batch, compiled=False, sharding=Sharding(check=True))["seen"], 1e-5)
    found = probed(cfg, params, batch)["seen"]
    for column, name in enumerate(SEEN):
        assert_close(want[:, column], found[:, column], 1e-5, name)


@pytest.mark.slow
def test_a_loop_over_layers_finds_the_same():
    cfg = MOE.replace(num_layers=3)
    params, batch = random_params(cfg), packed_batch(cfg)
    assert_close(probed(cfg, params, batch)["seen"], probed(cfg, params, batch, scan=True)["seen"], 1e-6)


@pytest.mark.slow
def test_the_loss_of_rows_adds_up_to_that_of_the_batch():
    params, batch = random_params(DENSE), packed_batch(DENSE, lengths=(5, 9, 3, 7, 12, 2))
    found = probed(DENSE, params, batch, by_row=True)
    loss, metrics = build(DENSE, kernels=choose_kernels({}, DENSE)).loss_fn(params, batch)
    np.testing.assert_array_equal(found["weights"], host(batch["loss_weights"]).sum(1))
    assert_close(loss, np.float32(found["nats"].sum() / found["weights"].sum()), 1e-6)
    alone = {key: ms.Tensor(host(value)[1:2]) for key, value in batch.items()}
    assert_close(build(DENSE).loss_fn(params, alone)[0], np.float32(found["nats"][1] / found["weights"][1]), 1e-5)
