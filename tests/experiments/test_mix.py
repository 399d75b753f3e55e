"""Averages of models, and models between two: the formulas, what is kept, and what is refused."""

import subprocess
import sys

import numpy as np
import pytest

from experiments.convert import mix
from experiments.convert import weights as convert
from parallel.trees import tree_paths
from qwen3 import hf
from qwen3.tokenizer import train_bpe
from tests.tiny import DENSE, MOE, assert_close, random_params


def saved(folder, cfg, seed, dtype="float32"):
    hf.save(folder, cfg, random_params(cfg, seed), dtype=dtype)
    return {path: w.asnumpy().astype(np.float64) for path, w in tree_paths(hf.load(folder, dtype="float32")[1])}


def loaded(folder):
    return {path: w.asnumpy() for path, w in tree_paths(hf.load(folder, dtype="float32")[1])}


def run(lines):
    return "\n".join(lines)


@pytest.mark.parametrize("cfg", [DENSE, MOE], ids=["dense", "moe"])
def test_an_average_is_the_weighted_mean(cfg, tmp_path):
    models = [saved(tmp_path / str(i), cfg, i) for i in range(3)]
    text = run(mix.average([tmp_path / str(i) for i in range(3)], tmp_path / "out", [1, 1, 2], None))
    for path, got in loaded(tmp_path / "out").items():
        assert_close(models[0][path] / 4 + models[1][path] / 4 + models[2][path] / 2, got, 1e-6, path)
    assert "0.5 of" in text and "which transformers opens" in text


def test_checkpoints_and_folders_mix_and_the_first_gives_tokenizer_and_dtype(tmp_path):
    first = saved(tmp_path / "a", DENSE, 0, "bfloat16")
    second = saved(tmp_path / "b", DENSE, 1)
    train_bpe(["plain words " * 9], 61 + 259).save(tmp_path / "a")
    run(convert.write("hf-to-native", str(tmp_path / "b"), str(tmp_path / "native"), None))
    run(mix.average([tmp_path / "a", tmp_path / "native"], tmp_path / "out", None, None))
    assert (tmp_path / "out" / "tokenizer.json").exists() and hf.Reader(tmp_path / "out").config.param_dtype == "bfloat16"
    for path, got in loaded(tmp_path / "out").items():
        assert_close((first[path] + second[path]) / 2, got, 5e-3, path)  # rounded to bfloat16
    run(mix.average([tmp_path / "a", tmp_path / "native"], tmp_path / "exact", None, "float32"))
    for path, got in loaded(tmp_path / "exact").items():
        assert_close((first[path] + second[path]) / 2, got, 1e-6, path)


def formula(a, b, t):
    """On unit vectors the arc; the length in between."""
    sizes = np.linalg.norm(a), np.linalg.norm(b)
    u, v = a / sizes[0], b / sizes[1]
    angle = np.arccos((u * v).sum())
    return ((1 - t) * sizes[0] + t * sizes[1]) * (np.sin((1 - t) * angle) * u + np.sin(t * angle) * v) / np.sin(angle)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_a_model_between_two(t, tmp_path):
    a, b = saved(tmp_path / "a", DENSE, 0), saved(tmp_path / "b", DENSE, 1)
    for method in mix.METHODS:
        run(mix.merge([tmp_path / "a", tmp_path / "b"], tmp_path / method, method, t, None))
    for path, got in loaded(tmp_path / "linear").items():
        assert_close((1 - t) * a[path] + t * b[path], got, 1e-6, path)
    for path, got in loaded(tmp_path / "slerp").items():
        assert_close(formula(a[path], b[path], t), got, 1e-5, path)


def test_slerp_of_parallel_vectors_and_of_zeros_is_linear():
    a, zeros = np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((2, 3), np.float32)
    for b, want in ((a, a), (3 * a, 2 * a), (zeros, a / 2), (-a, zeros)):
        np.testing.assert_allclose(mix.slerp(a, b, 0.5), want, atol=1e-6)
    assert not mix.slerp(zeros, zeros, 0.5).any()


def test_what_cannot_be_mixed_is_refused_by_name(tmp_path):
    for name, cfg in {
        "a": DENSE,
        "wide": DENSE.replace(ffn_size=48),
        "deep": DENSE.replace(num_layers=3),
        "far": DENSE.replace(rope_theta=5e5),
    }.items():
        saved(tmp_path / name, cfg, 0)
    for other, words in {
        "wide": r"layers.0.mlp.w_down has the shape \[40, 24\] in .*/a, and has the shape \[48, 24\] in .*/wide; give models of one shape",
        "deep": "layers.2.attention.k_norm is missing in .*/a, and has the shape",
        "far": "rope_theta=10000.0 in .*/a, and 500000.0 in .*/far; give models of one kind",
        "nowhere": "--inputs=.*/nowhere does not exist",
    }.items():
        with pytest.raises(ValueError, match=words):
            run(mix.average([tmp_path / "a", tmp_path / other], tmp_path / "out", None, None))
    for call, words in (
        (lambda: mix.average([tmp_path / "a"], tmp_path / "out", None, None), "two models or more"),
        (lambda: mix.average([tmp_path / "a"] * 2, tmp_path / "out", [1, 0], None), "a number above 0 for each of the 2 models"),
        (lambda: mix.average([tmp_path / "a"] * 2, tmp_path / "out", [1], None), "for each of the 2 models"),
        (lambda: mix.average([tmp_path / "a"] * 2, tmp_path / "wide", None, None), "exists already"),
        (lambda: mix.merge([tmp_path / "a"] * 3, tmp_path / "out", "linear", 0.5, None), "merge takes two models, and 3 are given"),
    ):
        with pytest.raises(ValueError, match=words):
            run(call())
    assert not (tmp_path / "out").exists()


@pytest.mark.extended
def test_the_commands(tmp_path):
    a, b = saved(tmp_path / "a", DENSE, 0), saved(tmp_path / "b", DENSE, 1)
    command = [sys.executable, "-m", "experiments.convert"]
    for words in (["average", "--factors=3,1"], ["merge", "--method=linear", "--t=0.25"]):
        done = subprocess.run(
            [*command, words[0], "a", "b", f"--output={words[0]}", *words[1:]], cwd=tmp_path, capture_output=True, text=True, env=here()
        )
        assert done.returncode == 0, done.stderr
        for path, got in loaded(tmp_path / words[0]).items():
            assert_close(0.75 * a[path] + 0.25 * b[path], got, 1e-6, path)
    wrong = subprocess.run(
        [*command, "average", "a", "b", "--output=c", "--factors=x,1"], cwd=tmp_path, capture_output=True, text=True, env=here()
    )
    assert wrong.returncode == 2 and "--factors=x,1: give numbers" in wrong.stderr


def here():
    import os
    from pathlib import Path

    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
