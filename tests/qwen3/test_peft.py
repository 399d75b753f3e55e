"""Adapters in PEFT's format: what PEFT computes with them, both ways; what is refused, and why."""

import json

import mindspore as ms
import numpy as np
import pytest

from experiments.train import adapter
from parallel.specs import init_params
from parallel.trees import tree_map, tree_paths
from qwen3 import hf, hf_files, peft
from qwen3.config import Lora
from qwen3.model import build, param_specs
from tests.golden.make_peers import ADAPTERS
from tests.qwen3.hf_folders import GOLDEN
from tests.tiny import DENSE, KINDS, MIXED, MOE, assert_close, random_params

STORED = GOLDEN.parent / "peers" / "peft"


def adapted(cfg, **changes):
    return cfg.replace(lora=Lora(**{"rank": 3, "alpha": 5.0, "targets": cfg.lora_targets, **changes}))


def saved(folder, cfg, **changes):
    """A base in folder/base, an adapter of it in folder/adapter: (cfg with the adapter, its params as a tree)."""
    cfg = adapted(cfg, **changes)
    params = tree_map(lambda w: w.asnumpy(), random_params(cfg, 3))
    leaves, base = dict(tree_paths(params)), tree_map(ms.Tensor, init_params(param_specs(cfg.base), 0))
    for path, _ in tree_paths(param_specs(cfg.base)):
        leaves[path][...] = dict(tree_paths(base))[path].asnumpy()
    hf.save(folder / "base", cfg.base, base)
    mark = adapter.fingerprint(cfg, lambda path, slices: leaves[path][slices])
    peft.save(folder / "adapter", cfg, {path: leaves[path] for path in peft.adapters(cfg)}, str(folder / "base"), mark)
    return cfg, tree_map(ms.Tensor, params)


def test_an_adapters_file_may_not_lead_out_of_its_folder(tmp_path):
    cfg, _ = saved(tmp_path, DENSE)
    file = tmp_path / "adapter" / peft.WEIGHTS
    file.rename(tmp_path / "outside.safetensors")
    file.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(ValueError, match=f"{peft.WEIGHTS} leads outside of .*; put the file itself into the folder"):
        peft.open_adapter(tmp_path / "adapter", cfg)


PEERS = {
    "dense, untied": (DENSE.replace(tie_embeddings=False), {"rslora": True}),
    "dense, tied": (DENSE, {}),
    "qwen2": (KINDS["qwen2"], {"targets": ("q", "v", "down")}),
    "moe": (MOE, {}),
}


@pytest.mark.parametrize("name", PEERS)
def test_peft_computes_the_same_with_a_saved_adapter(name, tmp_path):
    torch, transformers, theirs = (pytest.importorskip(module) for module in ("torch", "transformers", "peft"))
    cfg, params = saved(tmp_path, PEERS[name][0], **PEERS[name][1])
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager", dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 9)).astype(np.int32)
    model = theirs.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        want = model(torch.from_numpy(tokens).long()).logits.numpy()
    logits, _ = build(cfg).forward(params, ms.Tensor(tokens))
    assert_close(want, logits, 2e-5)
    with_it, joined = (adapter.with_adapter(*hf.load(tmp_path / "base"), tmp_path / "adapter", merge=merge) for merge in (False, True))
    for given in (with_it, joined):
        got, _ = build(given[0]).forward(given[1], ms.Tensor(tokens))
        assert_close(logits, got, 1e-5)


def test_what_peft_saves_is_read(tmp_path):
    """Random A and B of PEFT's own, saved by PEFT."""
    torch, transformers, theirs = (pytest.importorskip(module) for module in ("torch", "transformers", "peft"))
    cfg, _ = saved(tmp_path, DENSE.replace(tie_embeddings=False))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager", dtype=torch.float32)
    options = {"target_modules": ["q_proj", "o_proj", "up_proj", "embed_tokens"], "init_lora_weights": False, "lora_dropout": 0.1}
    model = theirs.get_peft_model(base, theirs.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options)).eval()
    model.save_pretrained(str(tmp_path / "theirs"))  # the base's embedding is beside it
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 9)).astype(np.int32)
    with torch.no_grad():
        want = model(torch.from_numpy(tokens).long()).logits.numpy()
    found, params = adapter.with_adapter(*hf.load(tmp_path / "base"), tmp_path / "theirs", merge=False)
    assert found.lora.targets == ("embed", "q", "o", "up") and (found.lora.rank, found.lora.alpha) == (4, 6.0)
    assert_close(want, build(found).forward(params, ms.Tensor(tokens))[0], 2e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_with_adapters_are_those_that_peft_gave(name):
    """Adapters that PEFT saved by itself, and its logits, stored, so that this is judged without the peer too."""
    stored = np.load(STORED / name / "logits.npz")
    base = hf.load(GOLDEN / ADAPTERS[name][0])
    for merge in (False, True):
        cfg, params = adapter.with_adapter(*base, STORED / name, merge=merge)
        assert_close(stored["logits"], build(cfg).forward(params, ms.Tensor(stored["tokens"]))[0], 2e-5)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_an_adapter_comes_back_bit_for_bit(kind, tmp_path):
    cfg, params = saved(tmp_path, KINDS[kind], rslora=kind == "dense")
    found = peft.open_adapter(tmp_path / "adapter", cfg.base)
    assert found.lora == cfg.lora and found.base == str(tmp_path / "base")
    leaves = dict(tree_paths(params))
    for path, spec in peft.adapters(cfg).items():
        part = tuple(slice(0, max(1, n // 2)) for n in spec.shape)
        assert np.array_equal(found.read(path, part), leaves[path].asnumpy()[part]), path


REFUSED = {
    "use_dora=True is not supported; merge it into its base with PEFT": {"use_dora": True},
    "bias='all' is not supported": {"bias": "all"},
    r"modules_to_save=\['lm_head'\] is not supported": {"modules_to_save": ["lm_head"]},
    r"rank_pattern=\{'q_proj': 4\} is not supported": {"rank_pattern": {"q_proj": 4}},
    "peft_type='IA3' is not supported": {"peft_type": "IA3"},
    "init_lora_weights='pissa' changes the base's weights": {"init_lora_weights": "pissa"},
    "adapter_config.json: r=0 must be a whole number from 1 to 65536": {"r": 0},
    "lora_alpha is missing; give a number above 0": {"lora_alpha": None},
    r"lora_A.weight has shape \[3, 24\], but the base needs \[5, 24\]": {"r": 5},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_not_supported_is_refused_by_name(said, tmp_path):
    cfg, _ = saved(tmp_path, DENSE, targets=("q",))
    path = tmp_path / "adapter" / peft.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **REFUSED[said]}))
    with pytest.raises(ValueError, match=said):
        peft.open_adapter(tmp_path / "adapter", cfg.base)


def test_tensors_that_are_missing_or_of_another_module_are_named(tmp_path):
    cfg, _ = saved(tmp_path, DENSE, targets=("q",))
    with pytest.raises(ValueError, match="missing base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"):
        peft.open_adapter(tmp_path / "adapter", cfg.base.replace(num_layers=3))
    file = hf_files.TensorFile(tmp_path / "adapter" / peft.WEIGHTS)
    entries = [(name.replace("q_proj", "c_proj"), entry.code, entry.shape) for name, entry in file.entries.items()]
    hf_files.write_tensors(tmp_path / "adapter" / peft.WEIGHTS, entries, list(file.arrays(file.entries)))
    with pytest.raises(ValueError, match="c_proj.lora_A.weight is of no module that an adapter of this model has here: embed, q, k"):
        peft.open_adapter(tmp_path / "adapter", cfg.base)


def beside(folder, name, array):
    """Adds a tensor to a saved adapter's file."""
    file = hf_files.TensorFile(folder / peft.WEIGHTS)
    entries = [(name_, entry.code, entry.shape) for name_, entry in file.entries.items()] + [(name, "F32", array.shape)]
    hf_files.write_tensors(folder / peft.WEIGHTS, entries, [*file.arrays(file.entries), array], file.metadata)


def test_the_embedding_that_peft_saves_beside_its_adapter_has_to_be_the_bases(tmp_path):
    """PEFT does so by default where embed_tokens is among the modules."""
    cfg, _ = saved(tmp_path, DENSE, targets=("embed", "q"))
    base_cfg, base = hf.load(tmp_path / "base")
    before = adapter.with_adapter(base_cfg, base, tmp_path / "adapter")[1]
    beside(tmp_path / "adapter", peft.EMBEDDING, base["embed"].asnumpy())
    after = adapter.with_adapter(base_cfg, base, tmp_path / "adapter")[1]
    assert all(np.array_equal(a.asnumpy(), b.asnumpy()) for (_, a), (_, b) in zip(tree_paths(before), tree_paths(after)))
    for name, array, said in (
        (peft.EMBEDDING, base["embed"].asnumpy() + 1e-3, "the embedding saved beside the adapter is not that of the base.*merge it into"),
        (peft.EMBEDDING, np.zeros((7, 24), np.float32), r"base_layer.weight has shape \[7, 24\], but the base needs \[61, 24\]"),
        (f"{peft.PREFIX}lm_head.lora_A.weight", np.zeros((3, 24), np.float32), "lm_head.lora_A.weight is of no module.*merge it into"),
    ):
        peft.save(tmp_path / "adapter", cfg, {p: np.zeros(s.shape) for p, s in peft.adapters(cfg).items()}, "", "")
        beside(tmp_path / "adapter", name, array)
        with pytest.raises(ValueError, match=said):
            adapter.with_adapter(base_cfg, base, tmp_path / "adapter")


def test_an_adapter_of_another_base_is_refused_by_name(tmp_path):
    cfg, _ = saved(tmp_path, DENSE, targets=("q",))
    other = tree_map(ms.Tensor, init_params(param_specs(cfg.base), 1))
    with pytest.raises(ValueError, match=f"holds adapters for the base {tmp_path}/base .*another model"):
        adapter.with_adapter(cfg.base, other, tmp_path / "adapter")


@pytest.mark.parametrize(
    "cfg, changes, said",
    [
        (MOE, {"targets": ("experts.gate",)}, "PEFT adapts both or neither"),
        (MOE, {"rslora": True}, "changes the scale that lora.rslora=true gives"),
        (MIXED, {"targets": ("down",)}, "this model has both"),
    ],
)
def test_an_adapter_that_peft_does_not_reproduce_is_not_written(cfg, changes, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        peft.save(tmp_path / "adapter", adapted(cfg, **changes), {}, "", "")
    assert not (tmp_path / "adapter").exists()
