"""Adapters: they add what the formula says wherever they are put, in every model; their gradients; dropout; nothing without them."""

import mindspore as ms
import numpy as np
import pytest

from layers import lora
from parallel.graph.jit import jit
from parallel.graph.nested import joined, to_tuple
from parallel.sharding import Sharding
from parallel.step import grad_of_nested, value_and_grad
from parallel.trees import merge, select, tree_map, tree_paths
from qwen3.config import Lora
from qwen3.model import build, metric_names, param_specs, stacked_specs
from tests.tiny import DENSE, KINDS, MIXED, MOE, assert_close, assert_trees_close, packed_batch, random_params, stack_layers

LORA = {"rank": 3, "alpha": 5.0}


def adapted(cfg, **changes):
    return cfg.replace(lora=Lora(**{**LORA, "targets": cfg.lora_targets, **changes}))


def merged(cfg, params):
    """The tree of the base with scale * A B added to its weights."""
    values = {path: leaf.asnumpy() for path, leaf in tree_paths(params)}
    out = {}
    for path, _ in tree_paths(param_specs(cfg.base)):
        head, _, key = path.rpartition(".")
        pair = f"{head}.lora.{key}" if head else f"lora.{key}"
        delta = values[f"{pair}.a"] @ values[f"{pair}.b"] * cfg.lora.scale if f"{pair}.a" in values else 0
        out[path] = ms.Tensor(values[path] + delta)
    return merge(param_specs(cfg.base), out)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_model_is_the_one_with_the_products_added_to_its_weights(kind):
    cfg = adapted(KINDS[kind], rslora=kind == "moe")
    params, batch = random_params(cfg), packed_batch(cfg)
    want = merged(cfg, params)
    if cfg.tie_embeddings:  # the head is the embedding without its adapter, as PEFT has it
        want["lm_head"] = params["embed"]
    logits, _ = build(cfg, Sharding(check=True)).forward(params, batch["tokens"], batch["positions"], batch["segment_ids"])
    base = build(cfg.base.replace(tie_embeddings=False))
    expected, _ = base.forward(want, batch["tokens"], batch["positions"], batch["segment_ids"])
    assert_close(expected, logits, 1e-5)
    plain, _ = build(cfg.base).forward(merge(param_specs(cfg.base), params), batch["tokens"], batch["positions"], batch["segment_ids"])
    assert np.abs(plain.asnumpy() - logits.asnumpy()).max() > 0.1


def gradients(cfg, params, batch, scan):
    """Of what trains, as the training step takes them: compiled, the frozen parameters an argument of their own."""
    specs = stacked_specs(cfg) if scan else param_specs(cfg)
    trained, frozen = (select(specs, keep) for keep in (lambda s: s.trains, lambda s: not s.trains))
    join, model = joined(specs, trained, frozen), build(cfg, scan=scan)

    def loss(moving, fixed, batch):
        return model.loss_fn(join(moving, fixed), batch)

    moving, fixed = (to_tuple(merge(part, params)) for part in (trained, frozen))
    (value, _), grads = jit(grad_of_nested(loss, metric_names(cfg)))(moving, fixed, batch)
    return value, dict(zip((path for path, _ in tree_paths(trained)), tree_map(lambda x: x, flat(grads))))


def flat(nested):
    return [leaf for _, leaf in tree_paths(nested)]


def noise_of(batch, seed):
    values = np.random.default_rng(seed).integers(-(2**31), 2**31, batch["tokens"].shape, np.int64)
    return {**batch, "noise": ms.Tensor(values.astype(np.int32))}


@pytest.mark.extended
@pytest.mark.parametrize(
    "name, cfg, scan",
    [
        ("dense", adapted(DENSE.replace(num_layers=1), dropout=0.3), False),
        pytest.param("dense", adapted(DENSE, dropout=0.3), True, marks=pytest.mark.slow),
        pytest.param("moe", adapted(MOE), False, marks=pytest.mark.slow),
        pytest.param("dense", adapted(DENSE, dropout=0.3), False, marks=pytest.mark.slow),
        pytest.param("moe", adapted(MOE), True, marks=pytest.mark.slow),
    ],
)
def test_compiled_gradients_of_adapters_are_the_eager_ones(name, cfg, scan):
    """Over values that change: those of the eager functions with each leaf an argument, of the unrolled layers."""
    eager = value_and_grad(build(cfg).loss_fn, aux=metric_names(cfg))
    for seed in range(2):
        params, batch = random_params(cfg, seed), packed_batch(cfg, seed=seed)
        params = restore_layers(cfg, params)
        batch = noise_of(batch, seed) if cfg.lora.dropout else batch
        (want, _), grads = eager(params, batch)
        found, got = gradients(cfg, stack_layers(params) if scan else params, batch, scan)
        assert_close(want, found, 1e-6)
        wanted = dict(tree_paths(stack_layers(grads) if scan else grads))
        assert got.keys() == {path for path in wanted if ".lora." in f".{path}"} and len(got) > 6
        for path in got:
            assert_close(wanted[path], got[path], 1e-5, path)
            assert np.abs(got[path].asnumpy()).max() > 0, path


def restore_layers(cfg, params):
    """random_params moves the layers' numbers by noise, too."""
    for i, layer in enumerate(params["layers"]):
        if lora.DROPOUT_LAYER in layer:
            layer[lora.DROPOUT_LAYER] = ms.Tensor([float(i)], ms.float32)
    return params


def test_dropout_zeroes_its_share_and_differs_by_token_layer_weight_and_column():
    def drawn(site=3, layer=0, first=0, noise=range(400)):
        x, noise = ms.Tensor(np.ones((len(noise), 64), np.float32)), ms.Tensor(np.array(noise, np.int32))
        return lora._mask(0.25, site)(first, x, noise, ms.Tensor([float(layer)])).asnumpy()

    mask = drawn()
    assert set(np.unique(mask)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs((mask == 0).mean() - 0.25) < 0.01 and np.ptp((mask == 0).mean(0)) < 0.2
    others = [drawn(site=4), drawn(layer=1), drawn(first=64), drawn(noise=range(1000, 1400))]
    for other in others:
        assert abs(((mask == 0) & (other == 0)).mean() - 0.0625) < 0.01  # independent
    assert np.array_equal(drawn(first=16)[:, :32], mask[:, 16:48])  # a rank's part of the columns


def test_what_does_not_train_is_said_by_the_specs():
    cfg = adapted(MIXED, targets=("q", "experts.up"))
    trained = {path for path, spec in tree_paths(param_specs(cfg)) if spec.trains}
    want = {f"layers.{i}.attention.lora.wq.{x}" for i in range(3) for x in "ab"}
    assert trained == want | {f"layers.{i}.moe.lora.w_up.{x}" for i in (0, 2) for x in "ab"}
    frozen = DENSE.replace(frozen=(("embed", "layers.0.*"), ("*norm",)))
    left = {path for path, spec in tree_paths(param_specs(frozen)) if not spec.trains}
    assert "embed" in left and "layers.0.mlp.w_up" in left and "layers.0.mlp_norm" not in left and "layers.1.mlp.w_up" not in left


def test_dropout_before_experts_is_refused():
    with pytest.raises(ValueError, match="lora.dropout=0.1 cannot be used with lora.targets router: PEFT has no dropout there"):
        Lora(4, 8.0, ("q", "router"), dropout=0.1)


@pytest.mark.extended
def test_a_model_without_adapters_is_the_one_it_was():
    cfg = DENSE.replace(num_layers=1)
    params, batch = random_params(cfg), packed_batch(cfg)
    vg = value_and_grad(build(cfg).loss_fn, aux=metric_names(cfg), compiled=True)
    (loss, _), grads = vg(params, batch)
    value, found = gradients(cfg.replace(frozen=(("final_norm",), ())), params, batch, scan=False)
    assert np.array_equal(loss.asnumpy(), value.asnumpy()) and "final_norm" not in found
    wanted = dict(tree_paths(grads))
    assert_trees_close({path: wanted[path] for path in found}, found, 1e-6)
