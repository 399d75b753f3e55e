"""The layer of experts with C++ kernels, against the one of references."""

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest

from layers import moe
from layers.bound_ops import BoundOps
from ops import registry
from parallel.graph.scan import scan
from parallel.sharding import Sharding
from parallel.step import value_and_grad
from parallel.trees import tree_map
from tests.tiny import MOE, assert_close, assert_trees_close

REFERENCE, CPU = registry.Kernels(), registry.Kernels(routing="cpu", grouped_matmul="cpu", swiglu="cpu")
TOLERANCE = 1e-5  # float32 sums in another order
CASES = {
    "many rows": (MOE, 67),
    "one row": (MOE, 1),
    "probabilities as they are": (MOE.replace(norm_topk_prob=False), 30),
    "bias": (MOE.replace(router_bias=True), 30),
    "more experts than choices": (MOE.replace(num_experts=50, experts_per_token=3), 5),
    "every expert": (MOE.replace(num_experts=4, experts_per_token=4), 13),
}


def inputs(cfg, rows, seed=0):
    """Trained parameters and x, and which rows are valid."""
    rng = np.random.default_rng(seed)
    p = {key: rng.normal(0, 0.4, spec.shape).astype(np.float32) for key, spec in moe.specs(cfg).items()}
    x, valid = rng.normal(0, 1, (rows, cfg.hidden_size)), np.arange(rows) % 5 != 3
    return tree_map(ms.Tensor, {"p": p, "x": x.astype(np.float32)}), ms.Tensor(valid.astype(np.float32))


def loss_of(cfg, kernels):
    """Every result enters it; row by row with another weight."""
    op = BoundOps(cfg, Sharding(), kernels)

    def loss(trained, valid):
        y, stats = moe.moe(cfg, op, trained["p"], trained["x"], {"valid": valid})
        return (y * y * y).sum() + (stats * stats).sum()

    return loss


def compare(cfg, trained, valid, compiled, kernels=CPU):
    each = [value_and_grad(loss_of(cfg, k), compiled=compiled)(trained, valid) for k in (REFERENCE, kernels)]
    (expected, d_expected), (found, d_found) = each
    assert_close(expected, found, TOLERANCE)
    assert_trees_close(d_expected, d_found, TOLERANCE)


IN_A_GRAPH = [pytest.param(name, True, marks=() if name == "bias" else pytest.mark.slow) for name in CASES]


@pytest.mark.extended(but=("many rows-False", "bias-True"))
@pytest.mark.parametrize("name, compiled", [*((name, False) for name in CASES), *IN_A_GRAPH])
def test_values_and_gradients_are_those_of_the_references(name, compiled):
    cfg, rows = CASES[name]
    compare(cfg, *inputs(cfg, rows), compiled)


@pytest.mark.parametrize("op", ["routing", "grouped_matmul", "swiglu"])
def test_each_op_can_be_chosen_alone(op):
    compare(MOE, *inputs(MOE, 30), False, replace(REFERENCE, **{op: "cpu"}))


def test_all_rows_to_the_same_experts():
    """The others get no rows, and gradients of 0."""
    trained, valid = inputs(MOE, 30)
    trained["p"]["router"] = trained["p"]["router"] * 0
    cfg = MOE.replace(router_bias=True)
    trained["p"]["router_bias"] = ms.Tensor(np.array([0, 0, 1, 0, 1, 0], np.float32))
    compare(cfg, trained, valid, False)
    grads = value_and_grad(loss_of(cfg, CPU))(trained, valid)[1]["p"]
    for name in ("w_gate", "w_up", "w_down"):
        used = np.abs(grads[name].asnumpy()).max((1, 2)) > 0
        np.testing.assert_array_equal(used, [False, False, True, False, True, False])


def test_ranks_add_up_the_gradient_of_the_bias_exactly():
    """It is E times what the load is above its mean. The optimizer takes the sign of the sum over ranks, so rounding would move the bias of
    an expert that has the mean load."""
    cfg = MOE.replace(router_bias=True)
    trained, _ = inputs(cfg, 35)
    E, k, valid = cfg.num_experts, cfg.experts_per_token, np.ones(35, np.float32)

    def gradient(rows):
        part = {"p": trained["p"], "x": trained["x"][rows]}
        return value_and_grad(loss_of(cfg, CPU))(part, ms.Tensor(valid[rows]))[1]["p"]["router_bias"].asnumpy()

    at_once = gradient(slice(None))
    assert (at_once == np.round(at_once)).all() and at_once.sum() == 0 and at_once.any() and np.abs(at_once).max() <= E * 35
    assert ((at_once + 35 * k) % E == 0).all()
    np.testing.assert_array_equal(sum(gradient(slice(start, start + 5)) for start in range(0, 35, 5)), at_once)


def test_the_annotations_hold():
    trained, valid = inputs(MOE, 30)
    for cfg in (MOE, MOE.replace(router_bias=True, norm_topk_prob=False)):
        trained, valid = inputs(cfg, 30)
        moe.moe(cfg, BoundOps(cfg, Sharding(check=True), CPU), trained["p"], trained["x"], {"valid": valid})


@pytest.mark.extended
def test_in_a_loop_over_layers_whose_backward_is_written_by_hand():
    layers = [inputs(MOE, 11, seed)[0]["p"] for seed in range(3)]
    stacked = {name: ms.Tensor(np.stack([p[name].asnumpy() for p in layers])) for name in layers[0]}
    x, valid = inputs(MOE, 11)[0]["x"], inputs(MOE, 11)[1]

    def run(kernels):
        op = BoundOps(MOE, Sharding(), kernels)

        def body(p, x, consts):
            y, stats = moe.moe(MOE, op, p, x, {"valid": consts[0]})
            return x + y * 0.1, stats

        loop = scan(body, layers[0], 3, (moe.stats_size(MOE),))

        def loss(trained, valid):
            y, stats = loop(trained["x"], trained["p"], (valid,))
            return (y * y).sum() + stats.sum()

        return value_and_grad(loss, compiled=True)({"p": stacked, "x": x}, valid)

    (expected, d_expected), (found, d_found) = run(REFERENCE), run(CPU)
    assert_close(expected, found, TOLERANCE)
    assert_trees_close(d_expected, d_found, TOLERANCE)
