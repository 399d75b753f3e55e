"""Norms before a layer's parts, behind them, or both: against a model in numpy, over a cache, in files."""

import json

import mindspore as ms
import numpy as np
import pytest

from parallel.step import value_and_grad
from parallel.trees import tree_map, tree_paths
from qwen3 import generate, hf
from qwen3.config import Qwen3Config
from qwen3.model import build, forward, layer_specs
from tests import reference
from tests.tiny import DENSE, MIXED, assert_close, assert_trees_close, documents, host, packed_batch, random_params

POST, BOTH = DENSE.replace(norm_placement="post"), DENSE.replace(norm_placement="both")
NORMS = {"pre": ["attention_norm", "mlp_norm"], "post": ["attention_out_norm", "mlp_out_norm"]}
SLOW = pytest.mark.slow


def test_a_layer_has_the_norms_of_its_placement():
    for cfg, names in ((DENSE, NORMS["pre"]), (POST, NORMS["post"]), (BOTH, NORMS["pre"] + NORMS["post"])):
        assert sorted(name for name in layer_specs(cfg, 0) if name.endswith("norm")) == sorted(names)
    with pytest.raises(ValueError, match="norm_placement='after' is not one of pre, post, both"):
        DENSE.replace(norm_placement="after")


@pytest.mark.parametrize("cfg", [POST, pytest.param(MIXED.replace(norm_placement="both"), marks=SLOW)], ids=["post", "mixed, both"])
def test_logits_are_those_of_a_model_in_numpy(cfg):
    params, batch = random_params(cfg), packed_batch(cfg)
    found = host(forward(params, batch["tokens"], cfg, positions=batch["positions"], segment_ids=batch["segment_ids"])[0])
    for row, *inputs in zip(found, *(host(batch[key]) for key in ("tokens", "positions", "segment_ids"))):
        assert_close(reference.layers(cfg, params, *inputs)[1], row, 1e-5)


@pytest.mark.parametrize("cfg", [BOTH, pytest.param(POST, marks=SLOW)], ids=["both", "post"])
def test_tokens_over_a_cache_are_those_of_the_full_forward(cfg):
    """Greedily, in the loop on the device that generation uses."""
    params, prompts = random_params(cfg), [row.tolist() for row in documents(cfg, (7, 4))]
    for prompt, told in zip(prompts, generate.generate(params, prompts, cfg, 6)):
        logits = host(forward(params, ms.Tensor(np.array([prompt + told], np.int32)), cfg)[0])[0]
        np.testing.assert_array_equal(logits[len(prompt) - 1 : -1].argmax(1), told)


@SLOW
@pytest.mark.parametrize("recompute", ["attention", "full"])
@pytest.mark.parametrize("cfg", [POST, BOTH], ids=["post", "both"])
def test_recomputed_layers_have_the_same_gradients(cfg, recompute):
    params, batch = random_params(cfg), packed_batch(cfg)
    plain, again = (value_and_grad(build(cfg, recompute=how).loss_fn, aux=("loss",), compiled=True) for how in ("none", recompute))
    assert_trees_close(plain(params, batch)[1], again(params, batch)[1], 1e-6)


@pytest.mark.parametrize("placement", ["post", "both"])
def test_a_folder_keeps_the_placement_and_warns_that_others_do_not_know_it(tmp_path, placement):
    cfg = DENSE.replace(norm_placement=placement)
    params = tree_map(host, random_params(cfg))
    with pytest.warns(UserWarning, match=f"transformers does not know norm_placement={placement}"):
        hf.save(tmp_path / "model", cfg, params)
    assert hf.who_opens(DENSE) == "which transformers opens"
    assert (
        hf.who_opens(cfg) == hf.who_opens(MIXED.replace(router_bias=True)) == "which transformers opens as another model; see the warning"
    )
    assert json.loads((tmp_path / "model" / "config.json").read_text())["norm_placement"] == placement
    loaded, again = hf.load(tmp_path / "model")
    assert loaded.norm_placement == placement
    for (path, a), (other, b) in zip(tree_paths(params), tree_paths(again), strict=True):
        assert path == other
        np.testing.assert_array_equal(a, b.asnumpy(), err_msg=path)
    assert "norm_placement" not in DENSE.to_hf() and Qwen3Config.from_hf(DENSE.to_hf()).norm_placement == "pre"


@SLOW
def test_transformers_opens_the_folder_and_ignores_what_it_does_not_know(tmp_path):
    transformers = pytest.importorskip("transformers")
    with pytest.warns(UserWarning, match="transformers does not know"):
        hf.save(tmp_path / "model", BOTH, tree_map(host, random_params(BOTH)))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not any("out_norm" in name for name, _ in model.named_parameters())
