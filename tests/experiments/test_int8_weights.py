"""--weights=int8: a folder in 8 bits gives the text and the losses of the floats that the numbers stand for, and little is lost."""

import mindspore as ms
import numpy as np
import pytest

from experiments.evaluate import __main__ as evaluate_main
from experiments.evaluate import evaluation
from experiments.train import weights
from parallel.sharding import Sharding
from parallel.step import value_and_grad
from parallel.trees import tree_leaves, unflatten
from qwen3 import generate, hf
from qwen3.int8 import quantised
from qwen3.model import build, loss_fn, metric_names
from tests.qwen3.quantised_folders import awq, gptq, write
from tests.qwen3.test_int8_models import with_floats
from tests.tiny import DENSE, MOE, host, random_params

PROMPTS = [[5, 3, 9], [2, 7, 1, 8, 4]]


def text(opened, kind):
    return generate.generate(opened.params(Sharding(), kind), PROMPTS, opened.cfg, 20)


@pytest.mark.extended
@pytest.mark.parametrize("cfg", [DENSE, MOE], ids=["dense", "moe"])
def test_the_text_is_that_of_the_floats_that_the_numbers_stand_for(tmp_path, cfg):
    params = random_params(cfg)
    hf.save(tmp_path / "model", cfg, params)
    hf.save(tmp_path / "floats", cfg, with_floats(quantised(cfg, params)))
    model, floats = weights.inference(str(tmp_path / "model")), weights.inference(str(tmp_path / "floats"))
    assert text(model, "int8") == text(floats, "float")
    assert model.describe("int8").endswith("model, in 8 bits") and model.describe() == model.text


@pytest.mark.extended(but=("awq",))
@pytest.mark.parametrize("form", [gptq(), awq()], ids=["gptq", "awq"])
def test_quantised_folders_are_generated_from(tmp_path, form):
    write(tmp_path / "m", DENSE, form)
    cfg, params = hf.load(tmp_path / "m")
    hf.save(tmp_path / "floats", cfg, params)
    model = weights.inference(str(tmp_path / "m"))
    assert text(model, "float") == text(weights.inference(str(tmp_path / "floats")), "float")
    assert all(len(row) == 20 for row in text(model, "int8"))


def test_only_cpu_has_kernels(tmp_path, monkeypatch):
    hf.save(tmp_path / "m", DENSE, random_params(DENSE))
    model = weights.inference(str(tmp_path / "m"))
    monkeypatch.setattr(weights.ms, "get_context", lambda key: "Ascend")
    with pytest.raises(ValueError, match="--weights=int8 has kernels for CPU only, and this is Ascend; use --weights=float"):
        model.params(Sharding(), "int8")


def sequences(count, length, seed):
    """Sequences in which the next token follows from the last one, but for one of 8 that is drawn."""
    rng = np.random.default_rng(seed)
    out = np.empty((count, length + 1), np.int32)
    out[:, 0] = rng.integers(1, 61, count)
    for i in range(length):
        follows = (out[:, i] * 5 + 3) % 60 + 1
        out[:, i + 1] = np.where(rng.random(count) < 1 / 8, rng.integers(1, 61, count), follows)
    return out


def batch(count, length, seed):
    ids, ones = sequences(count, length, seed), np.ones((count, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (count, 1))
    arrays = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "loss_weights": ones.astype(np.float32)}
    return {name: ms.Tensor(np.ascontiguousarray(x)) for name, x in {**arrays, "segment_ids": ones, "positions": positions}.items()}


@pytest.mark.extended
def test_a_trained_model_loses_less_than_1_percent_of_perplexity():
    cfg = DENSE.replace(initializer_range=0.05)
    params = random_params(cfg)

    def loss(params, batch):
        return loss_fn(params, batch, cfg)

    grad = value_and_grad(loss, metric_names(cfg), compiled=True)
    moments = [(np.zeros(w.shape, np.float32), np.zeros(w.shape, np.float32)) for w in tree_leaves(params)]
    for step in range(1, 121):
        _, grads = grad(params, batch(16, 24, step))
        leaves = []
        for i, (w, g) in enumerate(zip(tree_leaves(params), tree_leaves(grads))):
            g, (m, v) = host(g), moments[i]
            moments[i] = m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g * g
            rate = 0.01 / (1 - 0.9**step)
            leaves.append(ms.Tensor((host(w) - rate * m / (np.sqrt(v / (1 - 0.98**step)) + 1e-8)).astype(np.float32)))
        params = unflatten(params, leaves)
    held_out = batch(64, 24, 0)
    exact, found = (float(build(cfg).loss_fn(p, held_out)[1]["loss"].asnumpy()) for p in (params, quantised(cfg, params)))
    assert exact < 2.5, "the model has not learnt"  # a guess among 60 has 4.1 nats
    assert abs(np.exp(found - exact) - 1) < 0.01


def test_several_kinds_are_compared_with_the_first():
    found = {}
    for kind, value in (("float", 8.0), ("int8", 10.0)):
        of_kind = {"data": {"values": {"perplexity": value}, "errors": {}}, "task": {"values": {"acc": value}, "errors": {}}}
        found = evaluation.joined(found, of_kind, kind)
    assert {name: each["values"] for name, each in found.items()} == {
        "data": {"perplexity": 8.0},
        "task": {"acc": 8.0},
        "data, int8": {"perplexity": 10.0, "perplexity_ratio": 1.25},
        "task, int8": {"acc": 10.0},
    }


@pytest.mark.parametrize("given", ["int4", "float,float", "int8,"])
def test_other_weights_are_named(given):
    with pytest.raises(ValueError, match=rf"--weights={given} must be float, int8 or several of them"):
        evaluate_main.check_weights(given.split(","))
