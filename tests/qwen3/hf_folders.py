"""Folders to test Hugging Face files with, good and spoilt."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from parallel.spec import tree_paths
from qwen3 import hf

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "hf"
MODELS = ("dense_tied", "dense_untied", "dense_yarn", "moe_mixed", "moe_nonorm", "moe_norm", "qwen2_bias")


def arrays(params):
    return {path: leaf.asnumpy() if hasattr(leaf, "asnumpy") else leaf for path, leaf in tree_paths(params)}


def assert_same(a, b):
    a, b = arrays(a), arrays(b)
    assert list(a) == list(b)
    for path in a:
        assert a[path].dtype == b[path].dtype and a[path].tobytes() == b[path].tobytes(), path


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def edit_config(folder, drop=(), **changes):
    config = json.loads((folder / "config.json").read_text())
    config = {**{k: v for k, v in config.items() if k not in drop}, **changes}
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, change):
    """Rewrite model.safetensors with the safetensors package after change(dict of arrays)."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def write_raw(folder, header, data=b""):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(GOLDEN / "dense_tied", tmp_path / "model")


@pytest.fixture
def sharded(tmp_path):
    cfg, params = hf.load(GOLDEN / "dense_untied")
    hf.save(tmp_path / "model", cfg, params, max_shard_bytes=50_000)
    return tmp_path / "model"
