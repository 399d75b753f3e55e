"""Whole runs of experiments.pretrain on a little text: what they leave behind, and what bad input gets told."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest

from experiments import pretrain
from experiments.configs import common
from experiments.train import finish
from parallel.checkpoint.read import Reader
from parallel.trees import tree_paths
from qwen3 import generate, hf
from qwen3.model import forward
from qwen3.tokenizer import Tokenizer
from tests.tiny import DENSE, FUSED

ROOT = os.path.join(os.path.dirname(__file__), "..", "..")
SMALL = {"num_layers": 2, "hidden_size": 32, "head_dim": 16, "ffn_size": 48, "vocab_size": 320}


CHANGED = "steps batch_size seq_len log_every eval_every sample_tokens sample_prompt"  # train.* in make_config


def make_text(folder, files=12):
    folder.mkdir()
    for i in range(files):
        lines = [f"def function_{j}(x):\n    return x + {i * j}\n" for j in range(40)]
        (folder / f"part_{i}.py").write_text("\n".join(lines))
    return str(folder)


def make_config(path, **changes):
    c = common.get_config()
    c.data.path, c.data.vocab_size = path, 320
    c.model_args.update(SMALL)
    c.train.steps, c.train.batch_size, c.train.seq_len, c.train.log_every, c.train.eval_every = 6, 4, 32, 2, 3
    c.train.sample_tokens, c.train.sample_prompt, c.optim.lr, c.optim.warmup_steps = 8, "def ", 1e-2, 2
    c.update_from_flattened_dict(changes)
    return c


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = make_config(make_text(folder / "text"), **{"train.save_hf_every": 3, "checkpoint.every": 3})
    pretrain.pretrain(config, str(folder / "run"))
    return config, folder / "run"


@pytest.mark.extended
def test_weights_are_also_written_on_the_way(finished):
    _, run = finished
    assert os.listdir(run / "hf_steps") == ["step_000003"] and Tokenizer.load(str(run / "hf_steps" / "step_000003"))
    saved, (_, params) = Reader(str(run / "checkpoints" / "step_000003")), hf.load(str(run / "hf_steps" / "step_000003"))
    last = dict(tree_paths(hf.load(str(run / "hf"))[1]))
    for path, w in tree_paths(params):
        np.testing.assert_array_equal(w.asnumpy(), saved.read(f"params/{path}"))
        assert (w.asnumpy() != last[path].asnumpy()).any()


def test_a_run_leaves_its_config_metrics_curve_weights_and_sample(finished):
    config, run = finished
    saved = json.loads((run / "config.json").read_text())
    assert saved["train"] == config.train.to_dict() and len(saved["git_hash"] or "0" * 40) == 40
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4, 6]
    assert {"loss", "lr", "grad_norm", "tokens", "tokens_per_s", "step_time_s", "mfu"} <= set(lines[1])
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3, 6]
    assert "eval_loss" not in lines[-1] and {"final_bits_per_byte", "bigram_loss"} <= set(lines[-1])
    assert lines[-1]["final_loss"] < lines[0]["eval_loss"]
    assert lines[-1]["final_perplexity"] == pytest.approx(np.exp(lines[-1]["final_loss"]))
    assert all(
        line["perplexity"] == pytest.approx(np.exp(line["eval_loss"])) and line["bits_per_byte"] > 0
        for line in lines
        if "eval_loss" in line
    )
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert any("tfevents" in name for name in os.listdir(run / "tensorboard"))
    assert "def " in (run / "sample.txt").read_text()


def test_the_saved_folder_is_the_trained_model(finished):
    config, run = finished
    cfg, params = hf.load(str(run / "hf"))
    tokenizer = Tokenizer.load(str(run / "hf"))
    prompt = tokenizer.encode("def ")
    new = generate.generate(params, [prompt], cfg, 8, stop_ids=(tokenizer.eod_id,))[0]
    assert f"def |{tokenizer.decode(new)}\n" in (run / "sample.txt").read_text()
    assert cfg.eos_id == tokenizer.eod_id


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return np.array([line["loss"] for line in lines if "loss" in line])


@pytest.mark.slow
def test_without_a_compiler_a_run_uses_the_references_and_says_so(finished, tmp_path):
    """Nothing on PATH, and no kernel built before: the same losses."""
    config, run = finished
    (tmp_path / "bin").mkdir()
    env = {key: value for key, value in os.environ.items() if key != "CXX"}
    env.update(PATH=str(tmp_path / "bin"), XDG_CACHE_HOME=str(tmp_path / "cache"))
    keys = {f"model_args.{key}": value for key, value in SMALL.items()}
    for section, names in {"data": "path vocab_size", "train": CHANGED, "optim": "lr warmup_steps"}.items():
        keys.update((f"{section}.{name}", config[section][name]) for name in names.split())
    command = [sys.executable, "-m", "experiments.pretrain", "--config=experiments/configs/common.py", f"--workdir={tmp_path}/run"]
    command += [f"--config.{key}={value}" for key, value in keys.items()]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ops        reference, all of them (no g++ was found to build the C++ kernels with)" in done.stdout.splitlines()[:6]
    assert not list((tmp_path / "cache").rglob("*.so"))
    np.testing.assert_allclose(losses(run), losses(tmp_path / "run"), rtol=1e-5)
    assert (tmp_path / "run" / "sample.txt").read_text() == (run / "sample.txt").read_text()


def test_the_sample_is_made_with_the_runs_ops(tmp_path, monkeypatch):
    config, asked = make_config("", **{"ops.attention": "reference"}), []

    def generated(params, prompts, cfg, count, *, kernels, **options):
        asked.append(kernels)
        return [[1]]

    monkeypatch.setattr(finish.generate, "generate", generated)
    tokenizer = SimpleNamespace(encode=list, decode=str, eod_id=0, eos_id=0)
    finish.sample({}, DENSE, config, SimpleNamespace(tokenizer=tokenizer, held_questions=(), held_text=""), str(tmp_path))
    without = replace(FUSED, attention="reference", decode_attention="reference")  # which is made of it
    assert asked == [without] * 2  # greedy, and by temperature


def test_a_sample_is_printed_with_its_control_characters_escaped_and_written_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finish.generate, "generate", lambda *_, **__: [[1]])
    tokenizer = SimpleNamespace(encode=list, decode=lambda ids: "a\x1b[2J\r\n", eod_id=0, eos_id=0)
    data = SimpleNamespace(tokenizer=tokenizer, held_questions=(), held_text="")
    finish.sample({}, DENSE, make_config(""), data, str(tmp_path))
    assert "a\\x1b[2J\\r\n|a\\x1b[2J\\r\n" in capsys.readouterr().out
    assert b"a\x1b[2J\r\n|a" in (tmp_path / "sample.txt").read_bytes()


def test_transformers_opens_what_a_run_saved(finished):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    run = finished[1]
    cfg, params = hf.load(str(run / "hf"))
    ids = Tokenizer.load(str(run / "hf")).encode("def function_3(x):\n    return x + 4\n")
    assert transformers.AutoTokenizer.from_pretrained(str(run / "hf"))("def function_3(x):\n    return x + 4\n")["input_ids"] == ids
    with torch.no_grad():
        want = transformers.AutoModelForCausalLM.from_pretrained(str(run / "hf"))(torch.tensor([ids])).logits.numpy()
    got = forward(params, ms.Tensor(np.array([ids], np.int32)), cfg)[0].asnumpy()
    assert np.abs(got - want).max() < 2e-5 * np.abs(want).max()


def test_a_run_starts_from_saved_weights(finished, tmp_path):
    config, run = finished
    again = make_config(config.data.path, model=str(run / "hf"), init_from=str(run / "hf"))
    again.update_from_flattened_dict({"data.tokenizer": str(run / "hf"), "train.steps": 1, "train.sample_tokens": 0})
    again.model_args.update(dict.fromkeys(SMALL))
    pretrain.pretrain(again, str(tmp_path / "run"))
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert abs(first["eval_loss"] - last["final_loss"]) < 1e-4


def test_the_folder_of_another_run_is_not_written_over(finished):
    config, run = finished
    before = (run / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="already holds a finished run of 6 steps; give another folder"):
        pretrain.pretrain(config, str(run))
    assert (run / "metrics.jsonl").read_text() == before


def bad_text(tmp_path, name):
    """Paths that cannot be trained on."""
    path = tmp_path / name
    if name == "empty.txt":
        path.write_text("")
    elif name == "binary.bin.txt":
        path.write_bytes(b"\0\1\2" * 100)
    elif name == "latin.txt":
        path.write_bytes("caf\xe9 ".encode("latin-1") * 100)
    elif name == "empty_folder":
        path.mkdir()
    elif name == "short.txt":
        path.write_text("a\nb\n")
    return str(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.path": "missing.txt"}, "data.path=.*missing.txt does not exist; give a text file or folder"),
        ({"data.path": "empty.txt"}, "empty.txt is empty; give a file with text"),
        ({"data.path": "binary.bin.txt"}, "binary.bin.txt is not UTF-8 text; convert it"),
        ({"data.path": "latin.txt"}, "latin.txt is not UTF-8 text; convert it"),
        ({"data.path": "empty_folder"}, "empty_folder has no text file"),
        (
            {"model_args.vocab_size": 270},
            "data.vocab_size=320 has .* tokens, more than the model's 270; use --config.model_args.vocab_size=",
        ),
        ({"data.vocab_size": 10}, "vocab_size=10"),
        ({"data.tokenizer": "missing"}, "missing"),
        ({"data.held_out": 1.0}, "held_out=1.0 must be between 0 and 1"),
        ({"model": "qwen3-1b"}, "model='qwen3-1b' is neither a size nor a folder; did you mean"),
        ({"model_args.num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4; use 1, 2, 4"),
        ({"model_args.head_dim": 15}, "head_dim=15 must be even"),
        ({"model_args.compute_dtype": "bfloat16"}, "MindSpore has no bfloat16 matmul on CPU"),
        ({"model_args.param_dtype": "bfloat16"}, "param_dtype='bfloat16': training keeps weights in float32"),
        ({"model_args.num_experts": 8}, "num_experts=8 needs model_type=qwen3_moe"),
        ({"init_from": "missing"}, "missing"),
    ],
)
def test_bad_input_is_a_clear_error(changes, message, tmp_path):
    good = make_text(tmp_path / "good")
    changes = {key: bad_text(tmp_path, value) if key in ("data.path", "init_from") else value for key, value in changes.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pretrain.pretrain(make_config(**{"path": good, **changes}), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.train.stepz=3"], "there is no key 'train.stepz'; did you mean 'train.steps'?"),
        pytest.param(["--tp=2"], "start it with `python -m experiments.launch --nproc=2 -- ...`", marks=pytest.mark.slow),
        pytest.param([], "--workdir is missing", marks=pytest.mark.slow),
    ],
)
def test_the_command_line_prints_one_line_and_fails(arguments, message, tmp_path):
    command = [sys.executable, "-m", "experiments.pretrain", "--config=experiments/configs/tiny.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name, steps, margin", [("tiny", 400, 0.2), ("tiny_moe", 250, 0.0)])
def test_a_shipped_config_beats_the_bigram_model(name, steps, margin, tmp_path):
    command = [sys.executable, "-m", "experiments.pretrain", f"--config=experiments/configs/{name}.py", f"--workdir={tmp_path}/run"]
    subprocess.run([*command, f"--config.train.steps={steps}"], cwd=ROOT, check=True, capture_output=True)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["final_loss"] < last["bigram_loss"] - margin


@pytest.mark.extended
def test_evaluating_a_run_gives_the_held_out_loss_that_it_ended_with(finished, tmp_path):
    _, run = finished
    command = [sys.executable, "-m", "experiments.evaluate", f"--workdir={run}", f"--json={tmp_path}/out.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    found = json.loads((tmp_path / "out.json").read_text())["results"]["data"]
    names = {"loss": "final_loss", "perplexity": "final_perplexity", "bits_per_byte": "final_bits_per_byte"}
    assert found["values"] == {ours: pytest.approx(last[theirs], rel=1e-5) for ours, theirs in names.items()}
    assert "data  bits_per_byte" in done.stdout and "held out" in done.stdout
