"""Norms of layers: against gradients and weights themselves, and the same in every layout."""

import json

import mindspore as ms
import numpy as np
import pytest

from experiments.train import program as train_program
from experiments.watch.monitors import Monitor
from parallel import collectives
from parallel.mesh import ONE_DEVICE
from parallel.step import value_and_grad
from parallel.trees import tree_map, tree_paths
from qwen3.model import build, metric_names
from tests import processes
from tests.experiments.test_train import make_batch
from tests.parallel import layouts
from tests.tiny import DENSE, MOE, random_params

LAYOUTS = {
    "dp2 tp2, sequence parallel, ZeRO 1": ("dense", dict(dp=2, tp=2, seq=True, zero=1)),
    "moe, dp2 tp2 ep2, ZeRO 3, scan": ("moe8", dict(dp=2, tp=2, ep=2, zero=3, loop="scan", seq=True)),
    "pp2 dp2, tied": ("dense", dict(pp=2, dp=2, micro=2)),
    "frozen, dp4, ZeRO 2": ("frozen", dict(dp=4, zero=2)),
}


def watched(program, mesh, optim, state, batches, every=1):
    """([(step, values)], the last state)"""
    found = []
    monitor = Monitor(program, mesh, optim, every, lambda step, values: found.append((step, values)))
    for at, batch in enumerate(batches):
        state, _ = monitor.step(state, batch, 1e-2, at)
    return found, state


def norm(arrays):
    return np.sqrt(sum(float((np.asarray(a, np.float64) ** 2).sum()) for a in arrays))


def by_group(tree):
    out = {}
    for path, x in tree_paths(tree):
        key = ".".join(path.split(".")[:2]) if path.startswith("layers") else path
        out.setdefault(key, []).append(x.asnumpy())
    return out


@pytest.mark.extended
@pytest.mark.parametrize(
    "cfg, clip",
    [pytest.param(DENSE, 0.05, marks=pytest.mark.slow), (MOE.replace(router_bias=True, num_layers=1), 0.05)],
    ids=["dense, clipped", "moe, clipped, a bias that AdamW does not train"],
)
def test_norms_are_those_of_gradients_weights_and_updates(cfg, clip):
    config = layouts.run_config({})
    config.optim.clip_norm = clip
    program, params, batch = train_program.build_program(cfg, config), random_params(cfg), make_batch(0, vocab=cfg.vocab_size)
    _, grads = value_and_grad(build(cfg).loss_fn, aux=metric_names(cfg))(params, tree_map(ms.Tensor, batch))
    state = program.init(tree_map(lambda w: w.asnumpy(), params))
    found, state = watched(program, ONE_DEVICE, config.optim, state, [batch])
    new, bias = by_group(program.params(state)), "router_bias"
    old = by_group({**params, "layers": [_without(layer, bias) for layer in params["layers"]]})
    trained = by_group({**program.params(state), "layers": [_without(layer, bias) for layer in program.params(state)["layers"]]})
    grads = by_group({**grads, "layers": [_without(layer, bias) for layer in grads["layers"]]})
    ((step, values),) = found
    assert step == 1 and len(values) == 3 * len(new)
    for key in new:
        assert values[f"weight_norm/{key}"] == pytest.approx(norm(new[key]), rel=1e-5)
        assert values[f"grad_norm/{key}"] == pytest.approx(norm(grads[key]), rel=1e-4)
        moved = norm([a - b for a, b in zip(trained[key], old[key])]) / norm(old[key])
        assert values[f"update_ratio/{key}"] == pytest.approx(moved, rel=1e-5) and moved > 0


def _without(layer, name):
    return {k: {n: w for n, w in v.items() if n != name} if isinstance(v, dict) else v for k, v in layer.items()}


@pytest.mark.extended
def test_only_the_asked_for_steps_are_watched_and_none_is_changed():
    config, batches = layouts.run_config({}), [make_batch(at, vocab=DENSE.vocab_size) for at in range(5)]
    program = train_program.build_program(DENSE, config)
    start = tree_map(lambda w: w.asnumpy(), random_params(DENSE))
    found, state = watched(program, ONE_DEVICE, config.optim, program.init(start), batches, every=2)
    assert [step for step, _ in found] == [2, 4]
    other = program.init(start)
    for at, batch in enumerate(batches):
        other, _ = program.step(other, batch, 1e-2, at)
    for (path, a), (_, b) in zip(tree_paths(program.params(state)), tree_paths(program.params(other)), strict=True):
        np.testing.assert_array_equal(a.asnumpy(), b.asnumpy(), err_msg=path)


def in_layout(model, options, rank=0):
    """{step|key: value} of three steps."""
    cfg, config, sharding, program, state, mine = layouts.begun(model, options, rank)
    batches = [layouts.batch_of(cfg, options, at, mine) for at in range(3)]
    found, _ = watched(program, sharding.mesh, config.optim, state, batches)
    return {f"{step}|{key}": value for step, values in found for key, value in values.items()}


def main(names):
    rank = collectives.start()[0]
    return {f"{name}|{key}": value for name in json.loads(names) for key, value in in_layout(*LAYOUTS[name], rank).items()}


@pytest.mark.slow
def test_norms_are_those_of_one_process_in_any_layout():
    ranks = processes.run("tests.experiments.test_monitors:main", 4, json.dumps(list(LAYOUTS)), timeout_s=400)
    for name, (model, options) in LAYOUTS.items():
        want = in_layout(model, {"micro": options.get("micro", 1)})
        for rank in ranks:
            assert {key for key in rank if key.startswith(f"{name}|")} == {f"{name}|{key}" for key in want}
            for key, value in want.items():
                assert rank[f"{name}|{key}"] == pytest.approx(value, rel=2e-4), (name, key)
