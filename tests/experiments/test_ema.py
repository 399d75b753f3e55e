"""The moving average of the weights: its formula, what a run does with it, and a run that goes on. In layouts: tests/parallel."""

import json

import numpy as np
import pytest

from experiments import pretrain
from experiments.train import ema
from parallel.checkpoint.files import step_folder
from parallel.checkpoint.read import Reader
from parallel.trees import tree_paths
from qwen3 import hf
from tests.experiments.test_pretrain import make_text
from tests.experiments.test_resume import arrays, config_of, records, stopping_after
from tests.parallel import layouts

DECAY = 0.7
CASES = {"unrolled": {}, "scan": {"loop": "scan"}, "muon": {"optim": "muon"}, "in place": {"in_place": True}}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return make_text(tmp_path_factory.mktemp("ema") / "text")


@pytest.mark.extended(but=["unrolled", "in place"])
@pytest.mark.parametrize("name", CASES)
def test_the_average_is_the_formula_after_each_step(name):
    options = {**CASES[name], "ema": DECAY}
    cfg, _, _, program, state, mine = layouts.begun("dense", options)
    want = {path: w.asnumpy().astype(np.float64) for path, w in tree_paths(program.params(state))}
    for at in range(3):
        state, _ = program.step(state, layouts.batch_of(cfg, options, at, mine), layouts.LR, at)
        for path, w in tree_paths(program.params(state)):
            want[path] = DECAY * want[path] + (1 - DECAY) * w.asnumpy()
        got = {path: w.asnumpy() for path, w in tree_paths(program.params(ema.averaged(state)))}
        for path in want:
            np.testing.assert_allclose(got[path], want[path], rtol=2e-6, atol=1e-8, err_msg=path)


def test_the_average_changes_no_step():
    plain, averaging = (layouts.run("dense", {"ema": decay}) for decay in (0.0, DECAY))
    for key, value in plain.items():
        np.testing.assert_array_equal(averaging[key], value, err_msg=key)


def test_adapters_have_an_average_and_their_base_has_none():
    _, _, _, program, state, mine = layouts.begun("adapters", {"ema": DECAY})
    state, _ = program.step(state, layouts.batch_of(layouts.MODELS["adapters"], {}, 0, mine), layouts.LR, 0)
    names = {name for held in program.held(state) for name in held.names if name.startswith("ema/")}
    assert names and all(".lora." in name or "/lora." in name for name in names)


def test_a_run_evaluates_saves_and_resumes_its_average(text, tmp_path, monkeypatch, capsys):
    config = lambda: config_of(text, **{"train.ema_decay": 0.5, "train.save_hf": True, "train.eval_every": 2})
    pretrain.pretrain(config(), str(tmp_path / "whole"))
    assert "average    loss" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        stopping_after(3, patch)
        pretrain.pretrain(config(), str(tmp_path / "run"))
    pretrain.pretrain(config(), str(tmp_path / "run"))
    (got, _), (want, meta) = (arrays(step_folder(str(tmp_path / name), 6)) for name in ("run", "whole"))
    assert got.keys() == want.keys() and all(np.array_equal(got[name], want[name]) for name in want)
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    averages = {name.partition("/")[2] for name in want if name.startswith("ema/")}
    assert averages == {name.partition("/")[2] for name in want if name.startswith("params/")}
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    of_steps = {line["step"]: line for line in lines if "ema_eval_loss" in line}
    assert list(of_steps) == [0, 2, 4, 6] and of_steps[0]["ema_eval_loss"] == of_steps[0]["eval_loss"] != of_steps[6]["ema_eval_loss"]
    assert any("ema_final_loss" in line and "ema_final_bits_per_byte" in line for line in lines)
    _, params = hf.load(tmp_path / "whole" / "hf_ema", dtype="float32")
    for path, w in tree_paths(params):
        np.testing.assert_array_equal(w.asnumpy(), want[f"ema/{path}"], err_msg=path)
    assert not np.array_equal(hf.load(tmp_path / "whole" / "hf", dtype="float32")[1]["embed"].asnumpy(), want["ema/embed"])


def test_an_average_is_not_begun_in_the_middle(text, tmp_path):
    changes = {"train.save_hf": False, "train.steps": 2}
    pretrain.pretrain(config_of(text, **changes), str(tmp_path / "run"))
    with pytest.raises(ValueError, match="train.ema_decay=0.0 instead of 0.5"):
        pretrain.pretrain(config_of(text, **{**changes, "train.steps": 4, "train.ema_decay": 0.5}), str(tmp_path / "run"))
    assert not any(name.startswith("ema/") for name in Reader(step_folder(str(tmp_path / "run"), 2)).names)
