import json
import re
import shutil

import mindspore as ms
import numpy as np
import pytest
from safetensors.numpy import load_file

from parallel.specs import init_params
from parallel.trees import tree_map, tree_paths
from qwen3 import hf
from qwen3.config import SIZES
from qwen3.model import param_specs
from tests.qwen3.hf_folders import (
    GOLDEN,
    MODELS,
    arrays,
    assert_same,
    by_hand,
    contents,
    edit_config,
    edit_tensors,
)

SINGLE = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "lm_head": "lm_head.weight"}
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
PROJECTIONS = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
PROJECTIONS.update({"w_gate": "gate_proj", "w_up": "up_proj", "w_down": "down_proj"})


def expected(tensors, path):
    """Our leaf from Hugging Face's tensors, written apart from the table under test."""
    if path in SINGLE:
        return tensors[SINGLE[path]]
    _, layer, *part, last = path.split(".")
    root = f"model.layers.{layer}."
    if last in NORMS:
        return tensors[f"{root}{NORMS[last]}.weight"]
    if last in ("q_norm", "k_norm"):
        return tensors[f"{root}self_attn.{last}.weight"]
    if last in ("bq", "bk", "bv"):
        return tensors[f"{root}self_attn.{last[1]}_proj.bias"]
    if last == "router":
        return tensors[f"{root}mlp.gate.weight"].T
    name = PROJECTIONS[last]
    if part == ["moe"]:
        experts = len([k for k in tensors if re.fullmatch(rf"{re.escape(root)}mlp\.experts\.\d+\.{name}\.weight", k)])
        return np.stack([tensors[f"{root}mlp.experts.{e}.{name}.weight"].T for e in range(experts)])
    return tensors[f"{root}{'self_attn' if part == ['attention'] else 'mlp'}.{name}.weight"].T


@pytest.mark.parametrize("name", MODELS)
def test_load_gives_every_tensor_of_the_file(name):
    tensors = by_hand(GOLDEN / name / "model.safetensors")
    cfg, params = hf.load(GOLDEN / name)
    assert cfg.param_dtype == "float32"
    leaves = dict(tree_paths(params))
    assert sum(leaf.size for leaf in leaves.values()) == sum(t.size for t in tensors.values())
    for path, leaf in leaves.items():
        assert isinstance(leaf, ms.Tensor) and leaf.dtype == ms.float32
        np.testing.assert_array_equal(leaf.asnumpy(), expected(tensors, path), err_msg=path)


@pytest.mark.parametrize("max_shard_bytes", [2**30, 50_000, 1])
@pytest.mark.parametrize("name", MODELS)
def test_save_then_load_is_bitwise(name, max_shard_bytes, tmp_path):
    cfg, params = hf.load(GOLDEN / name)
    hf.save(tmp_path / "out", cfg, params, max_shard_bytes=max_shard_bytes)
    again, loaded = hf.load(tmp_path / "out")
    assert again == cfg
    assert_same(loaded, params)
    golden, saved = by_hand(GOLDEN / name / "model.safetensors"), {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors, theirs = by_hand(file), load_file(file)
        assert tensors.keys() == theirs.keys() and all(np.array_equal(tensors[k], theirs[k]) for k in tensors)
        saved.update(tensors)
    assert saved.keys() == golden.keys() and all(np.array_equal(saved[k], golden[k]) for k in golden)
    if max_shard_bytes == 2**30:
        assert sorted(contents(tmp_path / "out")) == ["config.json", "model.safetensors"]


def test_shards_keep_to_the_limit_and_the_index_adds_up(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    tensors = {name: by_hand(sharded / name) for name in set(index["weight_map"].values())}
    assert len(tensors) > 3 and {p.name for p in sharded.glob("*.safetensors")} == set(tensors)
    assert all(name in tensors[file] for name, file in index["weight_map"].items())
    sizes = [sum(t.nbytes for t in file.values()) for file in tensors.values()]
    assert max(sizes) <= 50_000 and index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["dense_tied", "moe_norm"])
def test_half_precision_round_trip(name, dtype, tmp_path):
    reference = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.float16
    cfg, params = hf.load(GOLDEN / name)
    hf.save(tmp_path / "half", cfg, params, dtype=dtype)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == dtype
    half_cfg, half = hf.load(tmp_path / "half")
    assert half_cfg == cfg.replace(param_dtype=dtype)
    for path, value in arrays(half).items():
        assert value.tobytes() == arrays(params)[path].astype(reference).tobytes(), path
    hf.save(tmp_path / "again", half_cfg, half)
    assert contents(tmp_path / "again") == contents(tmp_path / "half")
    wide_cfg, wide = hf.load(tmp_path / "half", dtype="float32")
    assert wide_cfg.param_dtype == "float32"
    assert_same(wide, tree_map(lambda t: t.astype(ms.float32), half))
    assert_same(hf.load(GOLDEN / name, dtype=dtype)[1], half)


def test_numpy_and_parameter_leaves_save_the_same_file(tmp_path):
    cfg, params = hf.load(GOLDEN / "moe_mixed", dtype="bfloat16")
    hf.save(tmp_path / "tensor", cfg, params)
    hf.save(tmp_path / "numpy", cfg, tree_map(lambda t: t.asnumpy(), params))
    hf.save(tmp_path / "parameter", cfg, tree_map(lambda t: ms.Parameter(t, name="w"), params))
    assert contents(tmp_path / "numpy") == contents(tmp_path / "tensor") == contents(tmp_path / "parameter")


def test_mixed_dtypes_keep_their_own(tmp_path):
    cfg, params = hf.load(GOLDEN / "dense_tied", dtype="bfloat16")
    params["final_norm"] = params["final_norm"].astype(ms.float32)
    hf.save(tmp_path / "out", cfg, params)
    again, loaded = hf.load(tmp_path / "out")
    assert again.param_dtype == "bfloat16" and loaded["final_norm"].dtype == ms.float32
    assert_same(loaded, params)


def test_value_too_large_for_float16_is_an_error(tmp_path):
    cfg, params = hf.load(GOLDEN / "dense_tied")
    params["final_norm"] = params["final_norm"] * 1e6
    with pytest.raises(ValueError, match="final_norm has values above 65504"):
        hf.save(tmp_path / "out", cfg, params, dtype="float16")
    assert not any(tmp_path.iterdir())


def fuse(tensors):
    """Per-expert tensors to transformers 5's fused form, in place."""
    for root in {k.split(".experts.")[0] + ".experts." for k in tensors if ".experts." in k}:
        count = len([k for k in tensors if k.startswith(root)]) // 3
        gate, up, down = ([tensors.pop(f"{root}{e}.{w}_proj.weight") for e in range(count)] for w in ("gate", "up", "down"))
        tensors[root + "gate_up_proj"] = np.concatenate([np.stack(gate), np.stack(up)], 1)
        tensors[root + "down_proj"] = np.stack(down)


def test_fused_experts_load_the_same(tmp_path):
    shutil.copytree(GOLDEN / "moe_mixed", tmp_path / "fused")
    edit_tensors(tmp_path / "fused", fuse)
    assert_same(hf.load(tmp_path / "fused")[1], hf.load(GOLDEN / "moe_mixed")[1])


@pytest.mark.parametrize("form", ["plain", "fused", "bfloat16"])
@pytest.mark.parametrize("name", ["dense_untied", "moe_mixed"])
def test_slices_equal_the_whole(name, form, tmp_path):
    folder = shutil.copytree(GOLDEN / name, tmp_path / "model")
    if form == "fused":
        edit_tensors(folder, fuse)
    if form == "bfloat16":
        hf.save(folder / "half", *hf.load(folder), dtype="bfloat16")
        folder = folder / "half"
    reader, whole = hf.Reader(folder), arrays(hf.load(folder)[1])
    assert reader.paths == list(whole)
    for path, value in whole.items():
        assert reader.shape(path) == value.shape and reader.dtype(path) == value.dtype.name
        halves = tuple(slice(n // 2, n) for n in value.shape)
        for index in (None, halves, tuple(slice(0, max(1, n // 3)) for n in value.shape), halves[:1], (slice(0, 0),)):
            part = reader.read(path, index)
            assert part.flags.c_contiguous and part.flags.writeable and part.dtype == value.dtype
            assert part.tobytes() == value[index or ()].tobytes(), (path, index)


@pytest.mark.parametrize("index", [(slice(0, 41),), (slice(-1, 4),), (slice(0, 4, 2),), (slice(0, 1),) * 3])
def test_slice_outside_the_parameter_is_an_error(index):
    with pytest.raises(ValueError, match=r"is not inside layers.0.attention.wq of shape \[40, 64\]"):
        hf.Reader(GOLDEN / "dense_tied").read("layers.0.attention.wq", index)


def test_tied_model_has_no_lm_head_and_accepts_one(folder, tmp_path):
    cfg, params = hf.load(folder)
    hf.save(tmp_path / "out", cfg, params)
    assert "lm_head" not in params and "lm_head.weight" not in by_hand(tmp_path / "out" / "model.safetensors")
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert_same(hf.load(folder)[1], params)


def moved(tensors):
    """The last row of the head is another."""
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    return {"lm_head.weight": head}


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_tied_model_with_a_head_of_its_own_is_refused(block, folder, monkeypatch):
    """Not reading that head would compute another model, and lose it on saving."""
    monkeypatch.setattr(hf.hf_files, "MAPPED_BYTES", block)
    edit_tensors(folder, lambda t: t.update(moved(t)))
    with pytest.raises(ValueError, match="lm_head.weight differs from the embedding; set tie_word_embeddings to false in config.json"):
        hf.load(folder)
    edit_config(folder, tie_word_embeddings=False)
    assert hf.load(folder)[1]["lm_head"].shape == (101, 40)
    edit_config(folder, tie_word_embeddings=True)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:5].copy()}))
    with pytest.raises(ValueError, match=r"lm_head.weight is F32 \[5, 40\], not the embedding"):
        hf.load(folder)


def test_rotary_buffers_of_old_files_are_ignored(folder):
    before = hf.load(folder)[1]
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8)}))
    assert_same(hf.load(folder)[1], before)


@pytest.mark.parametrize("name", MODELS)
def test_config_of_transformers_4_is_the_same_model(name, tmp_path):
    folder = shutil.copytree(GOLDEN / name, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_parameters"]
    changes = {"rope_theta": rope.pop("rope_theta"), "torch_dtype": "float32"}
    changes["rope_scaling"] = rope if rope["rope_type"] == "yarn" else None
    if "num_local_experts" in config:
        changes["num_experts"] = config["num_local_experts"]
    edit_config(folder, drop=("rope_parameters", "num_local_experts", "dtype", "layer_types"), **changes)
    cfg, params = hf.load(folder)
    assert cfg == hf.load(GOLDEN / name)[0]
    assert_same(params, hf.load(GOLDEN / name)[1])


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_config_says_what_transformers_wrote(name, tmp_path):
    """Of each key that both have; and the angles, which transformers 5 keeps in one place. So far the peer is not needed to see a slip."""
    hf.save(tmp_path / "out", *hf.load(GOLDEN / name))
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", GOLDEN / name))
    shared = sorted((ours.keys() & theirs.keys()) - {"architectures", "use_cache", "torch_dtype"})
    assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared} and len(shared) > 15
    rope = theirs["rope_parameters"]
    assert ours["rope_theta"] == rope["rope_theta"] and ours["architectures"] == theirs["architectures"]
    given = {**(ours["rope_scaling"] or {"rope_type": "default"}), "rope_theta": ours["rope_theta"]}
    assert {key: given[key] for key in rope} == rope


def test_router_bias_is_kept_and_warned_about(tmp_path):
    cfg = SIZES["tiny-moe"].replace(router_bias=True, num_layers=1, vocab_size=64)
    params = init_params(param_specs(cfg), seed=0)
    params["layers"][0]["moe"]["router_bias"] = np.arange(8, dtype=np.float32)
    with pytest.warns(UserWarning, match="transformers does not know mlp.gate.e_score_correction_bias"):
        hf.save(tmp_path / "out", cfg, params)
    again, loaded = hf.load(tmp_path / "out")
    assert again == cfg
    assert_same(loaded, params)


@pytest.mark.parametrize("kind", ["qwen3", "qwen2"])
def test_attention_that_is_not_the_model_types_is_kept_and_warned_about(kind, tmp_path):
    cfg = SIZES["tiny"].replace(model_type=kind, qk_norm=kind == "qwen2", qkv_bias=kind == "qwen3", num_layers=1, vocab_size=64)
    params = init_params(param_specs(cfg), seed=0)
    with pytest.warns(UserWarning, match="transformers does not know qk_norm=(True|False) and qkv_bias=(True|False) of model_type"):
        hf.save(tmp_path / "out", cfg, params)
    again, loaded = hf.load(tmp_path / "out")
    assert again == cfg
    assert_same(loaded, params)


def test_generation_config_has_the_ids_that_are_set(tmp_path):
    cfg, params = hf.load(GOLDEN / "dense_tied")
    hf.save(tmp_path / "out", cfg.replace(eos_id=5, pad_id=0), params)
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved == {"_from_model_config": True, "eos_token_id": 5, "pad_token_id": 0}


def test_every_id_that_ends_a_text_is_kept(folder, tmp_path):
    edit_config(folder, eos_token_id=[5, 3], bos_token_id=[7], pad_token_id=0)
    cfg, params = hf.load(folder)
    assert (cfg.eos_id, cfg.bos_id, cfg.pad_id) == ((5, 3), 7, 0)
    hf.save(tmp_path / "out", cfg, params)
    assert hf.load(tmp_path / "out")[0] == cfg
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == [5, 3]
    with pytest.raises(ValueError, match=r"eos_id=\(5, 101\) is outside the vocabulary of 101"):
        cfg.replace(eos_id=(5, 101))


def test_generation_config_of_the_model_is_carried_along(tmp_path):
    cfg, params = hf.load(GOLDEN / "dense_tied")
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    given = {"temperature": 0.6, "eos_token_id": [5, 3]}
    (source / "generation_config.json").write_text(json.dumps(given))
    for more in ({"tokenizer_dir": source}, {}):
        hf.save(tmp_path / "out", cfg.replace(eos_id=5), params, **more)
        assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == given
    (tmp_path / "out" / "generation_config.json").write_text('{"_from_model_config": true, "eos_token_id": 1}')
    hf.save(tmp_path / "out", cfg.replace(eos_id=5), params)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 5


def test_tokenizer_files_are_copied_and_stay_on_saving_again(folder, tmp_path):
    cfg, params = hf.load(folder)
    source = tmp_path / "tokenizer"
    source.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "secret.txt"):
        (source / name).write_text(name)
    (source / "vocab.json").mkdir()
    for more in ({"tokenizer_dir": source}, {}):
        hf.save(tmp_path / "out", cfg, params, **more)
        files = sorted(contents(tmp_path / "out"))
        assert files == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    (tmp_path / "elsewhere").write_text("x")
    (source / "merges.txt").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="merges.txt leads outside"):
        hf.save(tmp_path / "new", cfg, params, tokenizer_dir=source)
    with pytest.raises(FileNotFoundError, match="tokenizer_dir=.*has none of tokenizer.json"):
        hf.save(tmp_path / "new", cfg, params, tokenizer_dir=tmp_path / "absent")
    assert not (tmp_path / "new").exists()


def test_hub_cache_links_are_followed(sharded, tmp_path):
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sharded.iterdir()):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert_same(hf.load(snapshot)[1], hf.load(sharded)[1])
