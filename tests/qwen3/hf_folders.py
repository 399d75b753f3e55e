"""Folders to test Hugging Face files with, good and spoilt."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from parallel.trees import tree_paths
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


def by_hand(path):
    """{name: array} of a safetensors file, from its bytes and the format's text alone: the project and the safetensors package, which now
    reads for it and writes, are both judged by this. Raises AssertionError where the file isn't as the format asks."""
    data, out, end = path.read_bytes(), {}, 0
    length = int.from_bytes(data[:8], "little")
    assert data[8:9] == b"{" and 8 + length <= len(data)
    header, data = json.loads(data[8 : 8 + length].decode("utf-8")), data[8 + length :]
    assert all(isinstance(text, str) for text in header.pop("__metadata__", {}).values())
    for name, item in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
        start, stop = item["data_offsets"]
        assert start == end, f"{name}: a hole, or an overlap"
        kind = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": ml_dtypes.bfloat16}[item["dtype"]]
        out[name], end = np.frombuffer(data[start:stop], kind).reshape(item["shape"]), stop
    assert end == len(data)
    return out


@contextmanager
def peak_memory():
    """Gives a list; when the block ends, it holds by how many bytes this process's memory, with the file pages that it maps, rose at most
    within the block, and by how many it is larger at its end."""
    before, out = _memory("VmRSS"), []
    Path("/proc/self/clear_refs").write_text("5")  # the highest is from here on
    yield out
    out += [_memory("VmHWM") - before, _memory("VmRSS") - before]


def _memory(name):
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))


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
