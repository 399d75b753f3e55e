"""The training step: deterministic, equal under accumulation and layer loops, compiled once, and stopped by what is not finite."""

import contextlib
import dataclasses
import itertools
import json
import math
import os

import mindspore as ms
import numpy as np
import pytest
from mindspore.graph import api
from ml_collections import ConfigDict

from experiments.configs import common
from experiments.train import loop as train
from experiments.train import optim, weights
from experiments.train import program as train_program
from experiments.train import run as training
from experiments.train import state as train_state
from experiments.train.state import Program, uses_scan
from experiments.watch import metrics
from layers.bound_ops import BoundOps
from parallel.graph.jit import jit
from parallel.graph.nested import to_tuple
from parallel.mesh import ONE_DEVICE
from parallel.random import hash_uniform
from parallel.sharding import Sharding
from parallel.specs import ParamSpec, count, init_array, init_params, normal
from parallel.trees import tree_leaves, tree_map, tree_paths
from qwen3 import hf, run_layers
from qwen3.config import SIZES
from qwen3.model import param_specs
from tests.tiny import FUSED, REFERENCE, random_params

GOLDEN = os.path.join(os.path.dirname(__file__), "..", "golden", "training_curves.json")
DENSE = SIZES["tiny"].replace(vocab_size=64, hidden_size=32, num_layers=3, head_dim=16, ffn_size=48)
MOE = SIZES["tiny-moe"].replace(vocab_size=64, hidden_size=32, num_layers=2, head_dim=16, ffn_size=48, moe_ffn_size=24)


def make_config(**changes):
    c = common.get_config()
    c.optim.lr, c.optim.warmup_steps, c.optim.eps = 1e-2, 2, 1e-5
    c.train.steps, c.train.layer_loop = 8, "unroll"
    c.update_from_flattened_dict(changes)
    return c


def make_batch(step, rows=4, seq_len=16, vocab=64):
    """A text that can be learnt: each token follows from the last by a fixed rule, with some noise; two documents a row."""
    place = np.arange(rows * (seq_len + 1), dtype=np.uint64).reshape(rows, -1)
    noise = hash_uniform(7, np.uint32(step), place)
    text = (np.cumsum(1 + 5 * (noise > 0.7), axis=1) * 3 % vocab).astype(np.int32)
    column = np.tile(np.arange(seq_len, dtype=np.int32), (rows, 1))
    cut = seq_len // 3
    return {
        "tokens": text[:, :-1],
        "targets": text[:, 1:],
        "loss_weights": (noise[:, 1:] > 0.1).astype(np.float32) * (column != cut - 1),
        "segment_ids": 1 + (column >= cut).astype(np.int32),
        "positions": np.where(column >= cut, column - cut, column).astype(np.int32),
    }


def run(cfg, config, steps=5, params=None, program=None):
    """(metrics of each step, final parameters as numpy). program: one that is built, and compiled, already"""
    program = program or train_program.build_program(cfg, config)
    state = program.init(params or weights.random(cfg, config))
    rate, out = optim.learning_rate(config.optim, config.train.steps), []
    for at in range(steps):
        state, m = program.step(state, make_batch(at), rate(at), at)
        out.append(m)
    return out, tree_map(lambda w: w.asnumpy(), program.params(state))


def error(a, b):
    return max(float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-30)) for x, y in zip(tree_leaves(a), tree_leaves(b)))


GENTLE = {"optim.eps": 1e-4}  # with less, Adam makes steps of the rounding of gradients that are nearly 0


@pytest.fixture(scope="module")
def gentle():
    """A program that several tests share, as each compiles for seconds."""
    return train_program.build_program(DENSE, make_config(**GENTLE))


@pytest.fixture(scope="module")
def gentle_run(gentle):
    return run(DENSE, make_config(**GENTLE), program=gentle)


@pytest.mark.extended(but=("dense",))
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_loss_follows_the_stored_curve(name, gentle_run):
    # 1e-5: the same operations on another CPU may round differently; a change of the mathematics moves it by far more.
    got = gentle_run[0] if name == "dense" else run(MOE, make_config(**GENTLE))[0]
    with open(GOLDEN) as file:
        want = json.load(file)[name]
    for key in want[0]:
        np.testing.assert_allclose([m[key] for m in got], [m[key] for m in want], rtol=1e-5, err_msg=key)
    assert got[-1]["loss"] < got[0]["loss"] - 0.3


@pytest.mark.parametrize("compiled_again", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_equal_runs_are_bitwise_equal(gentle, gentle_run, compiled_again):
    again = run(DENSE, make_config(**GENTLE), program=None if compiled_again else gentle)
    assert [m["objective"] for m in again[0]] == [m["objective"] for m in gentle_run[0]]
    assert all(np.array_equal(a, b) for a, b in zip(tree_leaves(again[1]), tree_leaves(gentle_run[1])))


def test_a_batch_with_more_documents_than_attention_takes_ends_the_run():
    program = train_program.build_program(DENSE, common.get_config(), Sharding(documents=2))
    batch = make_batch(0, vocab=DENSE.vocab_size)
    batch["segment_ids"] = np.tile(np.repeat(np.arange(1, 5, dtype=np.int32), 4), (4, 1))
    state = program.init(tree_map(lambda w: w.asnumpy(), random_params(DENSE)))
    with pytest.raises(ValueError, match="data.max_documents: row 0 of a rank's batch has 4 documents, .* up to 2 a row"):
        program.step(state, batch, 1e-3, 0)
    with pytest.raises(ValueError, match="data.max_documents: row 0"):
        program.evaluate(state, [batch])


@pytest.mark.extended
@pytest.mark.parametrize("micro", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_accumulation_equals_one_batch(micro, gentle_run):
    got = run(DENSE, make_config(**{"parallel.micro_batches": micro, **GENTLE}))
    assert error(gentle_run[1], got[1]) < 1e-5
    for a, b in zip(gentle_run[0], got[0]):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["tokens"] == a["tokens"]
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_scanned_layers_train_as_unrolled_ones(gentle_run):
    got = run(DENSE, make_config(**{"train.layer_loop": "scan", **GENTLE}))
    assert error(gentle_run[1], got[1]) < 1e-5
    assert got[0][-1]["loss"] == pytest.approx(gentle_run[0][-1]["loss"], rel=1e-5)


BIASED = MOE.replace(router_bias=True, router_z_coef=1e-3)
BIAS_RATE = {"optim.router_bias_rate": 0.01}


@pytest.fixture(scope="module")
def biased():
    return train_program.build_program(BIASED, make_config(**GENTLE, **BIAS_RATE))


@pytest.mark.slow
def test_scanned_experts_train_as_unrolled_ones(biased):
    a = run(BIASED, make_config(**GENTLE, **BIAS_RATE), 3, program=biased)
    b = run(BIASED, make_config(**{"train.layer_loop": "scan", **GENTLE, **BIAS_RATE}), 3)
    assert error(a[1], b[1]) < 1e-5
    np.testing.assert_allclose(a[0][-1]["expert_load"], b[0][-1]["expert_load"], rtol=1e-6)
    assert a[0][-1]["router_z_loss"] == pytest.approx(b[0][-1]["router_z_loss"], rel=1e-5)


def test_nothing_compiles_again_from_step_to_step_or_for_a_new_learning_rate(gentle):
    state = gentle.init(weights.random(DENSE, make_config()))
    state, _ = gentle.step(state, make_batch(0), 1e-3, 0)
    compiled = len(api.ms_compile_cache)
    for at in range(1, 4):
        state, _ = gentle.step(state, make_batch(at), 1e-3 / at, at)
    assert len(api.ms_compile_cache) == compiled > 0


def test_a_model_of_many_layers_of_a_kind_is_scanned():
    assert uses_scan(DENSE.replace(num_layers=64), "auto") and not uses_scan(DENSE, "auto")


@pytest.mark.slow
def test_a_model_of_64_layers_trains():
    got, _ = run(DENSE.replace(num_layers=64), make_config(**{"train.layer_loop": "auto"}), steps=1)
    assert math.isfinite(got[0]["loss"])


def test_a_model_of_mixed_layers_is_unrolled_or_refused():
    mixed = MOE.replace(num_layers=3, mlp_only_layers=(1,))
    assert not uses_scan(mixed, "auto")
    with pytest.raises(ValueError, match="train.layer_loop=scan needs layers of one kind"):
        train_program.build_program(mixed, make_config(**{"train.layer_loop": "scan"}))


@pytest.mark.extended
def test_router_bias_moves_against_the_load(biased):
    got, params = run(BIASED, make_config(**GENTLE, **BIAS_RATE), steps=1, program=biased)
    for layer, load in zip(params["layers"], got[0]["expert_load"]):
        want = -0.01 * np.sign(np.array(load) - np.mean(load))
        np.testing.assert_allclose(layer["moe"]["router_bias"], want, atol=1e-6)


def optim_config(**changes):
    return make_config(**{f"optim.{key}": value for key, value in changes.items()}).optim


def optimizer_step(specs, o, kernels):
    """A compiled f(params, grads, m, v, running mean, scalars) -> (nested tuples of (p, m, v), running mean, norm, 1 if skipped)."""
    clip, update = optim.build_clip(specs, o, kernels), optim.build_update(specs, o, kernels)

    def step(params, grads, m, v, mean_norm, values):
        norm, factor, keep, mean_norm = clip(grads, mean_norm, values, ())
        return update(params, grads, m, v, factor, keep, values), mean_norm, norm, 1 - keep

    return jit(step)


def numpy_adamw(params, grads, o, lrs):
    """torch.optim.AdamW with clip_grad_norm_, in float64; params: dict of arrays."""
    params = {k: v.astype(np.float64) for k, v in params.items()}
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(x) for k, x in params.items()}
    for t, (g, lr) in enumerate(zip(grads, lrs), 1):
        norm = math.sqrt(sum(float((x.astype(np.float64) ** 2).sum()) for x in g.values()))
        scale = min(1.0, o.clip_norm / (norm + 1e-6)) if o.clip_norm else 1.0
        for k, x in g.items():
            x = x * scale
            m[k], v[k] = o.b1 * m[k] + (1 - o.b1) * x, o.b2 * v[k] + (1 - o.b2) * x * x
            params[k] *= 1 - lr * (o.weight_decay if params[k].ndim > 1 else 0)
            params[k] -= lr * (m[k] / (1 - o.b1**t)) / (np.sqrt(v[k] / (1 - o.b2**t)) + o.eps)
    return params


@pytest.mark.parametrize("kernels", [REFERENCE, FUSED], ids=["reference", "fused"])
@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_adamw_equals_the_formula(clip_norm, kernels):
    specs = {"matrix": ParamSpec((5, 4), ("embed", "ffn"), normal(1.0)), "vector": ParamSpec((6,), ("embed",), normal(1.0))}
    o, lrs = optim_config(clip_norm=clip_norm, weight_decay=0.3, eps=1e-8), [0.1, 0.02, 0.3]
    start = init_params(specs, 0)
    grads = [init_params(specs, seed) for seed in (1, 2, 3)]
    params = tuple(map(ms.Tensor, start.values()))
    state, update = optim.init_state(params, o), optimizer_step(specs, o, kernels)
    m, v, norm = state["m"], state["v"], state["norm"]
    for at, (g, lr) in enumerate(zip(grads, lrs)):
        new, norm, _, _ = update(params, to_tuple(tree_map(ms.Tensor, g)), m, v, norm, optim.scalars(o, lr, at))
        params, m, v = ([leaf[i] for leaf in new] for i in range(3))
    want = numpy_adamw(start, grads, o, lrs)
    for got, name in zip(params, start):
        np.testing.assert_allclose(got.asnumpy(), want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernels", [REFERENCE, FUSED], ids=["reference", "fused"])
def test_a_norm_spike_is_skipped_and_nothing_of_it_is_kept(kernels):
    o, specs = optim_config(skip_spikes=3.0, clip_norm=0.0), {"w": ParamSpec((4, 4), ("embed", "ffn"), normal(1.0))}
    update, params = optimizer_step(specs, o, kernels), (ms.Tensor(np.ones((4, 4), np.float32)),)
    state = optim.init_state(params, o)
    m, v, norm = state["m"], state["v"], state["norm"]

    def g(x):
        return (ms.Tensor(np.full((4, 4), x, np.float32)),)

    for at, size in enumerate([1.0, 1.0, 1.0]):
        new, norm, _, skipped = update(params, g(size), m, v, norm, optim.scalars(o, 0.1, at + optim.SPIKE_WARMUP_STEPS))
        params, m, v = ([leaf[i] for leaf in new] for i in range(3))
        assert int(skipped) == 0
    before = [x[0].asnumpy().copy() for x in (params, m, v)]  # the update may work in place
    for size, step in ((100.0, 30), (float("inf"), 30), (float("nan"), 30), (float("inf"), 0), (float("nan"), 0)):  # 0: of the warm-up
        new, after, seen, skipped = update(params, g(size), m, v, norm, optim.scalars(o, 0.1, step))
        assert int(skipped) == 1 and not float(seen) < 100 and float(after) == float(norm)
        for i, old in enumerate((params, m, v)):
            assert np.array_equal(new[0][i].asnumpy(), before[i]) and np.array_equal(old[0].asnumpy(), before[i])
    _, _, _, skipped = update(params, g(1.1), m, v, norm, optim.scalars(o, 0.1, 31))
    assert int(skipped) == 0


def test_the_first_step_that_may_be_skipped_follows_the_warm_up():
    """The spike itself is skipped, not the step after it."""
    o, specs = optim_config(skip_spikes=3.0), {"w": ParamSpec((2,), ("embed",), normal(1.0))}
    clip = optim.build_clip(specs, o, REFERENCE)

    def skipped(norm, mean, at):
        grads = (ms.Tensor(np.array([0.6 * norm, 0.8 * norm], np.float32)),)
        found, _, keep, seen = clip(grads, ms.Tensor(mean, ms.float32), optim.scalars(o, 0.1, at), ())
        assert float(found) == pytest.approx(norm, rel=1e-6)
        return 1 - int(keep), float(seen)

    warm = optim.SPIKE_WARMUP_STEPS
    assert skipped(10.0, 1.0, warm - 1) == (0, pytest.approx(0.95 + 0.5))
    assert skipped(10.0, 1.0, warm) == (1, 1.0)
    assert skipped(2.9, 1.0, warm)[0] == 0 and skipped(3.1, 1.0, warm)[0] == 1


@pytest.mark.parametrize("kernels", [REFERENCE, FUSED], ids=["reference", "fused"])
def test_the_bias_of_the_router_is_not_in_the_gradient_norm(kernels):
    """Its gradient is the load of the experts, which says nothing of the size of a step."""
    tree = {"w": ParamSpec((2,), ("embed",), normal(1.0)), "bias": ParamSpec((2,), ("router",), normal(1.0), optimizer="sign")}
    grads = ms.Tensor(np.array([3.0, 4.0], np.float32)), ms.Tensor(np.array([500.0, -700.0], np.float32))
    clip = optim.build_clip(tree, optim_config(clip_norm=1.0), kernels)
    norm, factor, _, _ = clip(grads, ms.Tensor(0.0, ms.float32), optim.scalars(optim_config(), 0.1, 0), ())
    assert float(norm) == pytest.approx(5.0) and float(factor) == pytest.approx(0.2, rel=1e-5)


def values_of(tree):
    return [x.asnumpy().copy() for x in tree_leaves(tree)]


@pytest.mark.parametrize("loop", ["unroll", pytest.param("scan", marks=pytest.mark.slow)])
def test_steps_work_in_place_on_nothing_but_the_state(loop, gentle):
    start, config = random_params(DENSE), make_config(**{"train.layer_loop": loop})
    program, given = gentle if loop == "unroll" else train_program.build_program(DENSE, config), values_of(start)
    state, _ = program.step(program.init(start), make_batch(0), 1e-2, 0)
    taken = program.params(state)
    held = values_of(taken)
    program.step(state, make_batch(1), 1e-2, 1)
    for tree, before in ((start, given), (taken, held)):
        for x, old in zip(tree_leaves(tree), before):
            np.testing.assert_array_equal(x.asnumpy(), old)
    assert any((a != b).any() for a, b in zip(values_of(program.params(state)), held))  # in place, so the test above can fail


@pytest.mark.slow
def test_the_update_of_ascend_gives_the_numbers_of_the_reference(monkeypatch):
    """On CPU, where its primitive works too: in place, after everything that reads the old values."""
    cfg, found = DENSE.replace(num_layers=1), {}
    for adamw in ("reference", "vendor"):
        monkeypatch.setattr(train_program, "choose_kernels", lambda *_, adamw=adamw: dataclasses.replace(REFERENCE, adamw=adamw))
        program = train_program.build_program(cfg, make_config())
        state = program.init(random_params(cfg))
        metrics = []
        for step in range(3):
            state, each = program.step(state, make_batch(step), 1e-2, step)
            metrics.append(each)
        found[adamw] = values_of(state), metrics
    assert found["vendor"][1] == found["reference"][1]
    for a, b in zip(*(values for values, _ in found.values())):
        np.testing.assert_array_equal(a, b)


def test_a_gradient_that_is_not_finite_changes_nothing(gentle):
    state, _ = gentle.step(gentle.init(random_params(DENSE)), make_batch(0), 1e-2, 0)
    before = values_of(state)
    infinite = {**make_batch(1), "loss_weights": np.full((4, 16), np.inf, np.float32)}
    after, metrics = gentle.step(state, infinite, 1e-2, 1)
    assert not np.isfinite(metrics["grad_norm"])
    for old, x in zip(before, tree_leaves(after)):
        np.testing.assert_array_equal(old, x.asnumpy())


@pytest.mark.parametrize(
    "schedule, want",
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.7, 0.4, 0.1]),
        ("cosine", [0.5, 1.0, 1.0, 0.775, 0.325, 0.1]),
        ("wsd", [0.5, 1.0, 1.0, 1.0, 0.7, 0.1]),
    ],
)
def test_schedules(schedule, want):
    rate = optim.learning_rate(optim_config(lr=1.0, schedule=schedule, warmup_steps=2, min_lr_ratio=0.1, decay_fraction=0.5), 6)
    np.testing.assert_allclose([rate(at) for at in range(6)], want, atol=1e-9)


class Records:
    silent = False

    def __init__(self):
        self.records = []

    def write(self, step, values):
        self.records.append((step, values))


def fake_program(losses, **extra):
    """A program whose state counts its steps. extra: more metrics of each step."""

    def step(state, batch, lr, at):
        return state + 1, {"loss": losses[at], "tokens": 1.0, "objective": losses[at], "grad_norm": 1.0, "lr": lr, **extra}

    return Program(None, None, step, lambda state, batches: 0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_anything_is_written(bad):
    config = make_config(**{"train.log_every": 1, "train.batch_size": 4})
    writer = Records()
    with pytest.raises(FloatingPointError, match="step 3: objective=.* is not finite.*Lower optim.lr"):
        train.train(fake_program([1.0, 1.0, bad, 1.0]), 0, map(make_batch, itertools.count()), [make_batch(1)], config, writer, float)
    assert [step for step, _ in writer.records] == [0, 1, 2]


@pytest.mark.parametrize(
    "norm, step, stops",
    [(float("nan"), 1, True), (float("nan"), 30, True), (float("inf"), 1, True), (float("inf"), 30, False), (100.0, 30, False)],
)
def test_a_skipped_step_goes_on_only_after_a_spike(norm, step, stops):
    """An infinite norm after the warm-up of the running mean is a spike; NaN never is."""
    program = fake_program([1.0] * 40)
    plain = program.step

    def with_norm(state, batch, lr, at):
        state, metrics = plain(state, batch, lr, at)
        return state, {**metrics, **({"grad_norm": norm, "skipped": 1} if at + 1 == step else {"skipped": 0})}

    config, data = make_config(**{"train.batch_size": 4, "train.steps": 40}), map(make_batch, itertools.count())
    expected = pytest.raises(FloatingPointError, match=f"step {step}: grad_norm=") if stops else contextlib.nullcontext()
    with expected:
        train.train(dataclasses.replace(program, step=with_norm), 0, data, [make_batch(1)], config, Records(), float)


def test_tokens_that_no_expert_had_room_for_stop_the_run():
    config, data = make_config(**{"train.batch_size": 4}), map(make_batch, itertools.count())
    with pytest.raises(FloatingPointError, match="step 1: 3 assignments .* found no place .*Raise model_args.moe_capacity_factor"):
        train.train(fake_program([1.0], expert_overflow=3.0), 0, data, [make_batch(1)], config, Records(), float)


def test_lines_are_logged_and_held_out_text_evaluated_as_often_as_asked():
    config = make_config(**{"train.log_every": 3, "train.eval_every": 4, "train.batch_size": 4})
    writer = Records()
    program, held, seen = fake_program([1.0] * 8), [make_batch(1), make_batch(2)], []
    program = dataclasses.replace(program, evaluate=lambda state, batches: seen.append((state, batches)) or 0.5)
    state = train.train(program, 0, map(make_batch, itertools.count()), held, config, writer, float)
    assert state == 8
    assert seen == [(0, held), (4, held), (8, held)]  # the same rows each time, so that the points are of one curve
    assert [step for step, values in writer.records if "loss" in values] == [1, 3, 6, 8]
    assert [step for step, values in writer.records if "eval_loss" in values] == [0, 4, 8]
    assert [values["tokens_seen"] for _, values in writer.records if "loss" in values][-1] == 8


def test_flops_count_the_active_parameters_the_head_and_causal_attention():
    cfg = DENSE
    by_hand = count(param_specs(cfg)) - cfg.vocab_size * cfg.hidden_size  # tied: the embedding is the head
    attention = cfg.num_layers * cfg.num_heads * cfg.head_dim * 100
    assert metrics.flops_per_token(cfg, 100) == 6 * (by_hand + cfg.vocab_size * cfg.hidden_size + attention)
    experts = [(p, s) for p, s in tree_paths(param_specs(MOE)) if "experts" in s.dims]
    saved = sum(math.prod(s.shape) for _, s in experts) * (1 - MOE.experts_per_token / MOE.num_experts)
    dense_count = count(param_specs(MOE)) - MOE.vocab_size * MOE.hidden_size
    attention = MOE.num_layers * MOE.num_heads * MOE.head_dim * 100
    assert metrics.flops_per_token(MOE, 100) == 6 * (dense_count - saved + MOE.vocab_size * MOE.hidden_size + attention)


def test_weights_of_another_model_are_refused(tmp_path):
    config = make_config(init_from=str(tmp_path / "hf"))
    hf.save(config.init_from, DENSE, tree_map(ms.Tensor, init_params(param_specs(DENSE), 3)))
    same = weights.initial_params(DENSE, config)[0]
    for path, w in tree_paths(init_params(param_specs(DENSE), 3)):
        np.testing.assert_array_equal(same(path, tuple(slice(0, n) for n in w.shape)), w)
    message = (
        r"init_from=.*hf, model=tiny: .*hf holds another model: 11 missing: layers.3.attention_norm, .*; use --config.model=.*--partial to"
    )
    with pytest.raises(ValueError, match=message):
        weights.initial_params(DENSE.replace(num_layers=4), config)


def test_a_model_with_more_parameters_starts_from_a_hugging_face_folder(tmp_path, monkeypatch):
    """partial loads what matches, and starts the rest fresh: an option's parameter, one without a name in files, one of another shape."""
    path = str(tmp_path / "hf")
    saved = init_params(param_specs(DENSE), 3)
    hf.save(path, DENSE, tree_map(ms.Tensor, saved))
    config, cfg = make_config(init_from=path, model=path), DENSE.replace(norm_placement="both", vocab_size=DENSE.vocab_size + 8)

    def with_a_scale(cfg):
        specs = param_specs(cfg)
        specs["layers"][0] = {**specs["layers"][0], "scale": ParamSpec((cfg.hidden_size,), ("embed",), normal(1.0))}
        return specs

    for module in (hf, weights):
        monkeypatch.setattr(module, "param_specs", with_a_scale)
    message = r"missing: layers.0.attention_out_norm, .*; 1 of another shape: embed \[64, 32\] instead of \[72, 32\] .*; --partial to load"
    with pytest.raises(ValueError, match=message) as error:
        weights.initial_params(cfg, config)
    assert "use --config.model" not in str(error.value)  # which it is already
    config.partial = True
    read, _, left_out = weights.initial_params(cfg, config)
    assert "7 missing: " in left_out and "layers.0.scale" in left_out
    have = dict(tree_paths(saved))
    for name, spec in tree_paths(with_a_scale(cfg)):
        found = read(name, tuple(slice(0, n) for n in spec.shape))
        if name in have and have[name].shape == spec.shape:
            np.testing.assert_array_equal(found, have[name])
        else:
            np.testing.assert_array_equal(found, init_array(spec, name, config.train.seed))


def test_a_parameter_without_a_name_in_the_files_is_an_error_before_the_run(monkeypatch, tmp_path):
    def with_a_scale(cfg):
        return {**param_specs(cfg), "scale": ParamSpec((1,), ("one",), normal(1.0))}

    monkeypatch.setattr(hf, "param_specs", with_a_scale)
    config = make_config(**{"train.save_hf": True})
    with pytest.raises(
        ValueError, match=r"train.save_hf=true: the parameter scale has no name .*; add 'scale' to NAMES in qwen3/hf.py, or"
    ):
        training.run(config, DENSE, None, str(tmp_path), ONE_DEVICE)


def test_layers_that_differ_are_unrolled_or_named(monkeypatch):
    """An edit of the specs may give one layer a parameter that the others lack."""
    deep = DENSE.replace(num_layers=12)

    def with_a_scale(cfg, at=3):
        specs = param_specs(cfg)
        specs["layers"][at] = {**specs["layers"][at], "scale": ParamSpec((1,), ("one",), normal(1.0))}
        return specs

    assert uses_scan(deep, "auto")
    monkeypatch.setattr(train_state, "param_specs", with_a_scale)
    assert not uses_scan(deep, "auto")
    op = BoundOps(deep, Sharding(), FUSED)
    with pytest.raises(
        ValueError, match="scan needs layers with the same parameters, and layer 3 has scale, which layer 0 lacks; use unroll"
    ):
        run_layers.bind(deep, op, (None, None, None), with_a_scale(deep)["layers"], True)
    with pytest.raises(ValueError, match="train.freeze_include and freeze_exclude tell .*w_up.* of layers 0 and 2 apart; use unroll"):
        frozen = deep.replace(frozen=(("layers.2.mlp.w_up",), ()))
        run_layers.bind(frozen, op, (None, None, None), param_specs(frozen)["layers"], True)


def test_config_is_a_locked_dict():
    assert isinstance(make_config(), ConfigDict)
    with pytest.raises((AttributeError, KeyError)):
        make_config(**{"train.stepz": 1})


def test_a_warm_up_may_be_a_fraction_of_the_steps():
    o = optim_config(schedule="constant", warmup_steps=7, warmup_ratio=0.25, lr=1.0)
    assert [optim.learning_rate(o, 10)(step) for step in range(5)] == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])
    o.warmup_ratio = 0.0
    assert [optim.learning_rate(o, 10)(step) for step in (0, 6)] == pytest.approx([1 / 7, 1])
