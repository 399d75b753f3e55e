"""The same numbers as Hugging Face transformers: logits, losses, every gradient and greedy ids; on golden files, and live."""

import functools
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

from parallel.step import value_and_grad
from parallel.trees import tree_map, tree_paths
from qwen3 import hf
from qwen3.generate import generate
from qwen3.model import build, forward, metric_names
from tests.tiny import assert_close

GOLDEN = Path(__file__).parents[1] / "golden" / "hf"
NAMES = sorted(p.name for p in GOLDEN.iterdir())
IN_A_GRAPH = ("dense_tied", "qwen2_bias", "moe_mixed")  # which have every part of a layer between them
USUAL = [pytest.param(name, marks=() if name in IN_A_GRAPH else pytest.mark.slow) for name in NAMES]
LOGITS, LOSS, GRADIENT = 2e-5, 1e-5, 1e-4  # float32 sums in another order; gradients pass every layer twice


@functools.lru_cache
def golden(name):
    cfg, params = hf.load(GOLDEN / name)
    return cfg, params, dict(np.load(GOLDEN / name / "reference.npz"))


def batch_of(tokens):
    """Hugging Face's loss as weights: the last token of a row has no target."""
    weights = np.ones(tokens.shape, np.float32)
    weights[:, -1] = 0
    positions = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
    ids = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "segment_ids": np.ones_like(tokens), "positions": positions}
    return tree_map(ms.Tensor, {**{k: v.astype(np.int32) for k, v in ids.items()}, "loss_weights": weights})


def check_logits(cfg, params, reference):
    logits, aux = forward(params, ms.Tensor(reference["tokens"].astype(np.int32)), cfg)
    assert_close(reference["logits"], logits, LOGITS)
    assert ("router_loss" in aux) == ("aux_loss" in reference)
    if aux:
        assert_close(reference["aux_loss"], aux["router_loss"], LOSS)


def check_losses_and_gradients(cfg, params, reference, compiled):
    vg = value_and_grad(build(cfg).loss_fn, aux=metric_names(cfg), compiled=compiled)
    (loss, metrics), grads = vg(params, batch_of(reference["tokens"]))
    assert_close(reference["total_loss"], loss, LOSS)
    assert_close(reference["loss"], metrics["loss"], LOSS)
    assert metrics["tokens"] == reference["tokens"][:, 1:].size
    seen = set()
    for path, grad in tree_paths(grads):
        origin = hf.source(path, tuple(grad.shape))
        theirs = [reference[f"grad/{name}"] for name in origin.names]
        seen.update(origin.names)
        wanted = np.stack(theirs) if origin.stacked else theirs[0]
        assert_close(wanted.swapaxes(-1, -2) if origin.transposed else wanted, grad, GRADIENT, path)
    assert seen == {key[5:] for key in reference if key.startswith("grad/")}


def test_every_golden_model_is_covered():
    assert {"dense_tied", "dense_untied", "dense_yarn", "qwen2_bias", "moe_norm", "moe_nonorm", "moe_mixed"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_golden_logits(name):
    check_logits(*golden(name))


@pytest.mark.extended(but=("moe_mixed",))
@pytest.mark.parametrize("name", USUAL)
def test_golden_losses_and_gradients(name):
    check_losses_and_gradients(*golden(name), compiled=True)


@pytest.mark.extended(but=("qwen2_bias",))
@pytest.mark.parametrize("name", USUAL)
def test_golden_greedy_continuation(name):
    cfg, params, reference = golden(name)
    out = generate(params, reference["prompt"].tolist(), cfg, len(reference["greedy"]))
    assert out == [reference["greedy"].tolist()]


@pytest.fixture(scope="module")
def maker():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.golden import make_hf_models

    return make_hf_models


def fresh(maker, kind, options, first_seed, seq_len):
    """The first model and reference from first_seed on without a close choice."""
    for seed in range(first_seed, first_seed + 1000):
        model = maker.make(kind, options, seed)
        reference = maker.reference(model, seq_len, seed)
        if reference is not None:
            return model, reference
    raise AssertionError("no seed will do")


@pytest.mark.parametrize("name", NAMES)
def test_golden_files_come_from_their_script(name, maker):
    """Weights bitwise; what transformers computes from them to the last digits, which move between versions."""
    cfg, params, stored = golden(name)
    model, reference = fresh(maker, *maker.MODELS[name], 0, stored["tokens"].shape[1])
    weights = {k: v for key, p in model.named_parameters() for k, v in maker.per_expert(key, p.detach()).items()}
    for path, leaf in tree_paths(params):
        origin = hf.source(path, tuple(leaf.shape))
        theirs = np.stack([weights[key].numpy() for key in origin.names])
        theirs = theirs.swapaxes(-1, -2) if origin.transposed else theirs
        np.testing.assert_array_equal(theirs.reshape(leaf.shape), leaf.asnumpy(), err_msg=path)
    assert stored.keys() == reference.keys()
    for key, value in stored.items():
        assert_close(value, reference[key], 1e-5, key)


LIVE = {
    "dense_tied": ("dense_tied", dict(num_key_value_heads=4)),
    "dense_untied": ("dense_untied", dict(num_hidden_layers=1)),
    "qwen2": ("qwen2_bias", dict(num_key_value_heads=1)),
    "moe_norm": ("moe_norm", dict(num_experts=5, num_experts_per_tok=3)),
    "moe_nonorm": ("moe_nonorm", dict(num_experts_per_tok=1)),
    "moe_mlp_only_layers": ("moe_mixed", dict(mlp_only_layers=[0], num_hidden_layers=2)),
    "moe_sparse_step": ("moe_mixed", dict(mlp_only_layers=[], decoder_sparse_step=2)),
}


@pytest.mark.parametrize("name", LIVE)
def test_live_models(name, maker, tmp_path):
    """Fresh random models, through save_pretrained and back."""
    base, changes = LIVE[name]
    kind, options = maker.MODELS[base]
    model, reference = fresh(maker, kind, {**options, **changes}, 5000, 10)
    model.save_pretrained(tmp_path / "theirs")
    cfg, params = hf.load(tmp_path / "theirs")
    check_logits(cfg, params, reference)
    check_losses_and_gradients(cfg, params, reference, compiled=False)
    hf.save(tmp_path / "ours", cfg, params)
    again = maker.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    with maker.torch.no_grad():
        logits = again(maker.torch.from_numpy(reference["tokens"])).logits.numpy()
    np.testing.assert_array_equal(logits, reference["logits"])
