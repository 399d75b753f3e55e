"""Tasks that a run scores while it trains: on its own weights, in its own layout, and again where it goes on."""

import json

import numpy as np
import pytest

from experiments import pretrain
from experiments.configs import common
from experiments.evaluate import during, scoring, tasks
from experiments.layout import check as layout
from qwen3 import hf
from qwen3.tokenizer import Tokenizer
from tests.experiments.test_pretrain import make_text
from tests.experiments.test_resume import config_of, records, stopping_after
from tests.processes import run
from tests.tiny import DENSE

CHOICES = [{"context": "the", "choices": ["cat sat", "qqq zzz", "sat"], "answer": i % 3} for i in range(5)]
TEXTS = [{"text": "the cat sat on the mat"}, {"text": "a mat"}]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return make_text(tmp_path_factory.mktemp("tasks") / "text")


@pytest.fixture
def files(tmp_path):
    for name, lines in (("which", CHOICES), ("whole", TEXTS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"{tmp_path}/which.jsonl, {tmp_path}/whole.jsonl"


def of_tasks(folder):
    """{step: its metrics of tasks}."""
    return {line["step"]: {k: v for k, v in line.items() if k.startswith("task_")} for line in records(folder) if "task_which_acc" in line}


@pytest.mark.extended(but=["unroll"])
@pytest.mark.parametrize("loop", ["unroll", "scan"])
def test_a_run_has_the_scores_of_its_weights_at_each_evaluation(loop, text, files, tmp_path, monkeypatch):
    config = lambda: config_of(text, **{"train.eval_tasks": files, "train.eval_every": 2, "train.save_hf": True, "train.layer_loop": loop})
    pretrain.pretrain(config(), str(tmp_path / "whole"))
    found = of_tasks(tmp_path / "whole")
    assert list(found) == [0, 2, 4, 6] and found[0] != found[6]
    cfg, params = hf.load(tmp_path / "whole" / "hf", dtype="float32")
    scorer = scoring.build(params, cfg, Tokenizer.load(tmp_path / "whole" / "tokenizer"), batch_size=4, length=48)
    for task in during.read(files):
        for metric, value in tasks.run(scorer, task)[0].items():
            assert found[6][f"task_{task.name}_{metric}"] == pytest.approx(value, rel=1e-5), metric
    with monkeypatch.context() as patch:
        stopping_after(3, patch)
        pretrain.pretrain(config(), str(tmp_path / "run"))
    pretrain.pretrain(config(), str(tmp_path / "run"))
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_what_cannot_be_scored_is_refused(files, tmp_path):
    for given, words in (("nowhere.jsonl", "nowhere.jsonl does not exist"), (f"{files},{files}", "two files are named which")):
        with pytest.raises(ValueError, match=f"train.eval_tasks: {words}"):
            during.read(given)
    (tmp_path / "bad.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="bad.jsonl, line 1: give the keys"):
        during.read(f"{tmp_path}/bad.jsonl")
    for section, key, value in (("parallel", "pp", 2), ("parallel", "cp", 2), ("prefer", "loss", "dpo")):
        config = common.get_config()
        config.train.eval_tasks, config[section][key] = files, value
        with pytest.raises(ValueError, match=f"train.eval_tasks with {section}.{key}={value} is not supported"):
            layout.check(config, DENSE, value if section == "parallel" else 1)


@pytest.mark.slow
def test_four_ranks_have_the_scores_of_one(text, files, tmp_path):
    changes = {"train.eval_tasks": files, "train.steps": 4, "train.batch_size": 4}
    pretrain.pretrain(config_of(text, **changes), str(tmp_path / "one"))
    runs = tmp_path / "runs.json"
    runs.write_text(json.dumps([[str(tmp_path / "four"), {**changes, "parallel.dp": 2, "parallel.tp": 2, "parallel.zero": 3}]]))
    run("tests.experiments.resume_worker:main", 4, str(text), str(runs))
    one, four = of_tasks(tmp_path / "one"), of_tasks(tmp_path / "four")
    assert list(one) == list(four) == [0, 3, 4]
    for step in one:
        np.testing.assert_allclose([four[step][name] for name in one[step]], list(one[step].values()), rtol=1e-4)
