import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from mindspore.common.np_dtype import bfloat16

from parallel.trees import tree_map, tree_paths
from qwen3 import hf, hf_files
from qwen3.config import SIZES
from qwen3.model import param_specs
from tests.qwen3.hf_folders import (
    GOLDEN,
    MODELS,
    ROOT,
    arrays,
    assert_same,
    contents,
    edit_config,
    edit_tensors,
    peak_memory,
    write_raw,
)
from tests.tiny import assert_close

# Bad folders: what is done to a copy of dense_tied, the error, and what its message says.


def _truncate(f):
    os.truncate(f / "model.safetensors", (f / "model.safetensors").stat().st_size - 4)


def _header(entry):
    return lambda f: write_raw(f, {"model.norm.weight": entry}, bytes(16))


def _f32(shape, start, stop):
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


def _only_pickle(f):
    (f / "model.safetensors").unlink()
    (f / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _add(name, array):
    return lambda f: edit_tensors(f, lambda t: t.update({name: array}))


def _float64(t):
    t["model.norm.weight"] = t["model.norm.weight"].astype(np.float64)


def _config(**changes):
    return lambda f: edit_config(f, **changes)


NORM = "model.norm.weight"
PACKAGE = r"model.safetensors: the safetensors package refuses the file \(.*deserializ.*\); fetch it again, or update safetensors"
BAD = {
    "no_folder": (lambda f: shutil.rmtree(f), FileNotFoundError, "model is missing; give a folder"),
    "no_config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "config.json is missing"),
    "broken_json": (lambda f: (f / "config.json").write_text("{"), ValueError, "config.json: broken JSON"),
    "json_list": (lambda f: (f / "config.json").write_text("[]"), ValueError, "config.json: a JSON object is needed, not list"),
    "deep_json": (lambda f: (f / "config.json").write_text("[" * 10**6), ValueError, "config.json: broken JSON"),
    "not_text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), ValueError, "config.json: broken JSON"),
    "other_model": (_config(model_type="llama"), ValueError, "model_type='llama'.*not supported"),
    "sliding_window": (_config(use_sliding_window=True), ValueError, "use_sliding_window=true is not supported"),
    "quantised": (_config(quantization_config={"quant_method": "fp8"}), ValueError, "quant_method='fp8'.*not supported"),
    "string_size": (_config(hidden_size="40"), ValueError, "config.json: hidden_size='40' must be a whole number from 1 to"),
    "wrong_type": (_config(rope_parameters=[1]), ValueError, "config.json"),
    "huge_depth": (
        _config(num_hidden_layers=10**9, layer_types=None),
        ValueError,
        "num_hidden_layers=1000000000 must be a whole number",
    ),
    "great_depth": (_config(num_hidden_layers=4000, layer_types=None), ValueError, "num_hidden_layers=4000, but.* 24 tensors"),
    "no_weights": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "neither model.safetensors nor"),
    "pickle": (_only_pickle, FileNotFoundError, "convert pytorch_model.bin to safetensors: pickle files are not read"),
    "missing": (lambda f: edit_tensors(f, lambda t: t.pop(NORM)), ValueError, f"missing tensors {NORM}"),
    "extra": (_add("model.layers.7.mlp.bias", np.ones(2)), ValueError, r"unexpected tensors model.layers.7.mlp.bias"),
    "untied": (_config(tie_word_embeddings=False), ValueError, "missing tensors lm_head.weight"),
    "shape": (_add(NORM, np.ones(39, np.float32)), ValueError, rf"{NORM} has shape \[39\], but config.json makes it \[40\]"),
    "dtype": (lambda f: edit_tensors(f, _float64), ValueError, f"{NORM} is F64; convert it to one of F32, F16, BF16"),
    "truncated": (_truncate, ValueError, r"model.safetensors: tensor \S+ ends at byte \d+ of \d+; the file is truncated"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), ValueError, "a header of 0 bytes in a file of 0"),
    "long_header": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), ValueError, "a header of 18446744073709551615 bytes"),
    "lfs": (lambda f: (f / "model.safetensors").write_text("version https://git-lfs"), ValueError, "git lfs pull"),
    "broken_header": (lambda f: write_raw(f, b"{nonsense"), ValueError, "model.safetensors: broken JSON"),
    "header_entry": (_header({"dtype": "F32"}), ValueError, f"header entry of tensor {NORM} is malformed"),
    "negative_shape": (_header(_f32([-4], 0, 16)), ValueError, "malformed"),
    "negative_size": (_header(_f32([4], 16, 0)), ValueError, "malformed"),
    "text_shape": (_header(_f32("ab", 0, 16)), ValueError, "malformed"),
    "wrong_bytes": (_header(_f32([3], 0, 16)), ValueError, r"F32 \[3\] has 16 bytes"),
    "huge_tensor": (_header(_f32([2**60], 0, 2**62)), ValueError, "the file is truncated"),
    "hole": (_header(_f32([2], 8, 16)), ValueError, "starts at byte"),
    "unknown_dtype": (_header({"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}), ValueError, PACKAGE),
    "metadata": (lambda f: write_raw(f, {"__metadata__": {"a": 1}, NORM: _f32([4], 0, 16)}, bytes(16)), ValueError, PACKAGE),
    "tail": (_header(_f32([2], 0, 8)), ValueError, "the header accounts for"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folder_is_refused_before_data_is_read(case, folder, monkeypatch):
    break_it, error, message = BAD[case]
    break_it(folder)
    monkeypatch.setattr(hf_files.TensorFile, "arrays", lambda *_: pytest.fail("tensor data was read"))
    with pytest.raises(error, match=message):
        hf.load(folder)


def _weight_map(change):
    def apply(folder):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"] = change(index["weight_map"], folder)
        path.write_text(json.dumps(index))

    return apply


def _link_out(folder):
    shard = next(folder.glob("model-00002*"))
    shard.rename(folder.parent / "outside.safetensors")
    shard.symlink_to(folder.parent / "outside.safetensors")


def test_weights_in_one_file_may_not_lead_out_of_their_folder_either(folder):
    outside = folder.parent / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(ValueError, match="model.safetensors leads outside of .*; put the file itself into the folder"):
        hf.load(folder)
    outside.rename(folder / "inside.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("inside.safetensors")
    hf.load(folder)


@pytest.mark.parametrize("name", ["folder", "sharded"])
def test_the_cache_of_a_hub_loads_though_its_snapshots_link_to_blobs(name, request, tmp_path):
    """models--X--Y/snapshots/REVISION/FILE is a link to ../../blobs/DIGEST. A link to that snapshot, too, is such a folder."""
    folder, cache = request.getfixturevalue(name), tmp_path / "models--X--Y"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(cache / "blobs" / f"{number:064}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064}")
    (tmp_path / "link").symlink_to(snapshot)
    assert_same(hf.load(snapshot)[1], hf.load(tmp_path / "link")[1])
    weights = sorted(snapshot.glob("*.safetensors"))[-1]
    weights.unlink()
    weights.symlink_to("../../../elsewhere")
    with pytest.raises(ValueError, match=f"{weights.name} leads outside of"):
        hf.load(snapshot)


BAD_INDEX = {
    "parent": (_weight_map(lambda m, f: {**m, NORM: "../secret.safetensors"}), ValueError, "leads outside"),
    "back_in": (_weight_map(lambda m, f: {**m, NORM: f"../{f.name}/{m[NORM]}"}), ValueError, "leads outside"),
    "absolute": (_weight_map(lambda m, f: {**m, NORM: str(f / m[NORM])}), ValueError, "leads outside"),
    "link": (_link_out, ValueError, "model-00002-of-.* leads outside"),
    "no_shard": (lambda f: next(f.glob("model-00002*")).unlink(), FileNotFoundError, "model-00002-of-.*, named by .* is missing"),
    "folder": (_weight_map(lambda m, f: {**m, NORM: "."}), FileNotFoundError, "is missing"),
    "wrong_shard": (_weight_map(lambda m, f: {**m, NORM: min(m.values())}), ValueError, f"{NORM} should be in model-00001.* lacks it"),
    "list": (_weight_map(lambda m, f: list(m)), ValueError, "weight_map=.* must be an object that maps tensor names"),
    "numbers": (_weight_map(lambda m, f: {NORM: 1}), ValueError, "weight_map=.* must be an object that maps tensor names"),
    "broken": (lambda f: (f / "model.safetensors.index.json").write_text("{"), ValueError, "index.json: broken JSON"),
}


@pytest.mark.parametrize("case", BAD_INDEX)
def test_bad_index_is_refused_before_data_is_read(case, sharded, monkeypatch):
    break_it, error, message = BAD_INDEX[case]
    break_it(sharded)
    monkeypatch.setattr(hf_files.TensorFile, "arrays", lambda *_: pytest.fail("tensor data was read"))
    with pytest.raises(error, match=message):
        hf.load(sharded)


def test_opening_a_huge_file_reads_its_header_only(folder, monkeypatch):
    """64 GB of holes, which reading or allocating would make felt."""
    header = {"model.norm.weight": _f32([2**34], 0, 2**36)}
    write_raw(folder, header)
    os.truncate(folder / "model.safetensors", 8 + len(json.dumps(header)) + 2**36)
    monkeypatch.setattr(hf_files.TensorFile, "arrays", lambda *_: pytest.fail("tensor data was read"))
    edit_config(folder, num_hidden_layers=1, layer_types=None)
    with peak_memory() as peak:
        assert list(hf_files.TensorFile(folder / "model.safetensors").entries) == ["model.norm.weight"]
        with pytest.raises(ValueError, match="missing tensors"):
            hf.load(folder)
    assert peak[0] < 16 << 20
    hf.Reader(GOLDEN / "moe_norm")


BAD_PARAMS = {
    "missing": (lambda p: p.pop("final_norm"), "missing final_norm; unexpected none"),
    "extra": (lambda p: p.update(lm_head=p["embed"]), "unexpected lm_head"),
    "shape": (lambda p: p.update(final_norm=np.ones(3, np.float32)), r"final_norm has shape \[3\], but the config makes it \[40\]"),
    "dtype": (lambda p: p.update(final_norm=np.ones(40)), "final_norm is float64; cast it"),
}


@pytest.mark.parametrize("case", BAD_PARAMS)
def test_params_that_do_not_fit_are_not_saved(case, tmp_path):
    cfg, params = hf.load(GOLDEN / "dense_tied")
    break_it, message = BAD_PARAMS[case]
    break_it(params)
    with pytest.raises(ValueError, match=message):
        hf.save(tmp_path / "out", cfg, params)
    assert not any(tmp_path.iterdir())


def test_bad_arguments_are_named(tmp_path):
    cfg, params = hf.load(GOLDEN / "dense_tied")
    with pytest.raises(ValueError, match="dtype='int8' is not one of"):
        hf.load(GOLDEN / "dense_tied", dtype="int8")
    with pytest.raises(ValueError, match="dtype='fp16' is not one of"):
        hf.save(tmp_path / "out", cfg, params, dtype="fp16")
    with pytest.raises(ValueError, match="max_shard_bytes=0 must be above 0"):
        hf.save(tmp_path / "out", cfg, params, max_shard_bytes=0)


def test_folders_with_other_things_are_not_replaced(folder, tmp_path):
    cfg, params = hf.load(folder)
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    other = shutil.copytree(GOLDEN / "dense_tied", tmp_path / "llama")
    (other / "reference.npz").unlink()
    edit_config(other, model_type="llama")
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    for target, message in (
        (folder, "holds notes.txt, reference.npz, which saving would delete"),
        (tmp_path / "file", "is a file"),
        (other, "something other than a Qwen model"),
        (tokenizer, "something other than a Qwen model"),
    ):
        before = contents(target) if target.is_dir() else None
        with pytest.raises(ValueError, match=message):
            hf.save(target, cfg, params)
        assert before is None or contents(target) == before
    (tmp_path / "empty").mkdir()
    hf.save(tmp_path / "empty", cfg, params)
    hf.save(tmp_path / "deep" / "er", cfg, params)
    assert contents(tmp_path / "empty") == contents(tmp_path / "deep" / "er")


@pytest.mark.parametrize("step", ["write", "swap", "sync"])
def test_failed_save_leaves_the_old_folder(step, sharded, monkeypatch):
    cfg, params = hf.load(sharded)
    before, calls = contents(sharded), []

    def fail_second(function):
        def wrapped(*args):
            calls.append(args)
            if len(calls) == 2:
                raise OSError("No space left on device")
            return function(*args)

        return wrapped

    if step == "write":
        monkeypatch.setattr(hf_files, "write_tensors", fail_second(hf_files.write_tensors))
    elif step == "sync":
        monkeypatch.setattr(hf_files, "sync_file", fail_second(hf_files.sync_file))
    else:
        monkeypatch.setattr(hf_files, "_exchange", lambda *_: False)  # as where the system cannot
        monkeypatch.setattr(hf_files.os, "rename", fail_second(os.rename))
    with pytest.raises(OSError, match="No space left"):
        hf.save(sharded, cfg, tree_map(lambda t: t * 2, params), max_shard_bytes=50_000)
    assert len(calls) >= 2 and contents(sharded) == before
    assert [p.name for p in sharded.parent.iterdir()] == ["model"]


KILLED = """
import os, signal, sys
from qwen3 import hf, hf_files
calls = []
def killed_at(count, function):
    def wrapped(*args):
        calls.append(args)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return wrapped
if sys.argv[2] == "write":
    hf_files.write_tensors = killed_at(3, hf_files.write_tensors)
else:
    hf_files._exchange = lambda *_: False
    os.rename = killed_at(2, os.rename)
cfg, params = hf.load(sys.argv[1])
params["final_norm"] = params["final_norm"] * 2
hf.save(sys.argv[1], cfg, params, max_shard_bytes=50_000)
"""


@pytest.mark.extended
@pytest.mark.parametrize("step", ["write", "swap"])
def test_killed_save_leaves_the_old_folder_and_the_next_one_cleans_up(step, sharded):
    before = contents(sharded)
    cfg, params = hf.load(sharded)
    done = subprocess.run([sys.executable, "-c", KILLED, str(sharded), step], cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(list(sharded.parent.iterdir())) == 2 and sharded.exists() == (step == "write")
    with pytest.raises(ValueError, match="max_shard_bytes"):
        hf.save(sharded, cfg, params, max_shard_bytes=0)
    with pytest.raises(OSError, match="stop here"), hf_files.replacing(sharded):
        assert contents(sharded) == before  # it has its name again
        raise OSError("stop here")
    hf.save(sharded, cfg, params)
    assert_same(hf.load(sharded)[1], params)
    assert [p.name for p in sharded.parent.iterdir()] == ["model"]


def test_what_a_running_save_has_made_is_left_alone(sharded):
    cfg, params = hf.load(sharded)
    with hf_files.replacing(sharded.parent / "other") as other, hf_files.replacing(sharded) as new:
        for path in (new, other):
            (path / "config.json").write_text("{}")
        hf.save(sharded, cfg, params)
        assert new.exists() and other.exists()
        (new / "config.json").write_bytes((sharded / "config.json").read_bytes())
    assert [p.name for p in sharded.parent.iterdir() if p.name.startswith(".")] == []


def test_replacing_removes_stale_shards(sharded):
    cfg, params = hf.load(sharded)
    hf.save(sharded, cfg, params)
    assert sorted(contents(sharded)) == ["config.json", "model.safetensors"]


def test_save_holds_one_tensor_at_a_time(tmp_path, monkeypatch):
    """Leaves are made when asked for, as a checkpoint's are; none is asked for before the one ahead has been written. Of files that are too
    large for the package, which takes all tensors of a file at once."""
    monkeypatch.setattr(hf_files, "PACKAGE_BYTES", 0)
    cfg = SIZES["tiny-moe"].replace(num_layers=2)
    alive, most = set(), []

    class Leaf:
        def __init__(self, path, spec):
            self.path, self.shape, self.dtype = path, spec.shape, np.dtype(np.float32)

        def asnumpy(self):
            alive.add(self.path)
            most.append(len(alive))
            array = Counted(self.shape, np.float32)
            array.fill(0)
            array.path = self.path
            return array

    class Counted(np.ndarray):
        def __del__(self):
            alive.discard(getattr(self, "path", None))

    specs = param_specs(cfg)
    paths = iter([p for p, _ in tree_paths(specs)])
    hf.save(tmp_path / "out", cfg, tree_map(lambda s: Leaf(next(paths), s), specs), max_shard_bytes=200_000)
    assert most == [1] * len(tree_paths(specs)), most  # each once


def _transformers(folder, **options):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options).eval()


@pytest.mark.parametrize("name", MODELS)
def test_transformers_opens_a_saved_folder_to_the_same_model(name, tmp_path):
    torch = pytest.importorskip("torch")
    cfg, params = hf.load(GOLDEN / name)
    hf.save(tmp_path / "out", cfg, params, max_shard_bytes=60_000)
    ours, theirs = _transformers(tmp_path / "out"), _transformers(GOLDEN / name)
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    reference = np.load(GOLDEN / name / "reference.npz")
    with torch.no_grad():
        logits, want = (model(torch.from_numpy(reference["tokens"])).logits.numpy() for model in (ours, theirs))
    np.testing.assert_array_equal(logits, want)
    assert_close(reference["logits"], want, 1e-5)  # made on another machine


@pytest.mark.parametrize("name", ["dense_untied", "moe_mixed"])
def test_shards_of_transformers_load(name, tmp_path):
    _transformers(GOLDEN / name).save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert_same(hf.load(tmp_path / "sharded")[1], hf.load(GOLDEN / name)[1])


def test_transformers_agrees_on_bfloat16(tmp_path):
    torch = pytest.importorskip("torch")
    _transformers(GOLDEN / "dense_tied", dtype=torch.bfloat16).save_pretrained(tmp_path / "theirs")
    cfg, params = hf.load(tmp_path / "theirs")
    assert cfg.param_dtype == "bfloat16" and arrays(params)["embed"].dtype == bfloat16
    hf.save(tmp_path / "ours", cfg, params)
    a, b = _transformers(tmp_path / "ours"), _transformers(tmp_path / "theirs")
    assert a.dtype == torch.bfloat16 and all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
