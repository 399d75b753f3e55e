"""Runs of experiments.pretrain that are stopped, resumed, copied and refused: what a checkpoint keeps, and who may go on from it."""

import json
import os
import signal

import numpy as np
import pytest

from experiments import checkpoints, pretrain
from parallel.checkpoint_files import step_folder, steps
from parallel.checkpoint_read import Reader
from tests.experiments.test_pretrain import make_config, make_text

TIMES = ("step_time_s", "tokens_per_s", "mfu")
QUICK = {"train.save_hf": False, "train.sample_tokens": 0, "train.log_every": 1, "checkpoint.every": 2, "train.seq_len": 48}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return make_text(tmp_path_factory.mktemp("resume") / "text")


def config_of(text, **changes):
    return make_config(text, **{**QUICK, **changes})


def records(run):
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def stopping_after(step, monkeypatch):
    """SIGTERM comes while this step is computed."""
    ask = checkpoints.Saving.after_step

    def after_step(self, state, done, tokens):
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return ask(self, state, done, tokens)

    monkeypatch.setattr(checkpoints.Saving, "after_step", after_step)


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    pretrain.pretrain(config_of(text), str(folder))
    return folder


def arrays(folder):
    reader = Reader(str(folder))
    return {name: reader.read(name) for name in reader.names}, reader.meta


def test_a_stopped_and_resumed_run_is_bit_for_bit_the_one_that_went_through(whole, text, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stopping_after(3, patch)
        pretrain.pretrain(config_of(text), str(run))
    assert "stopped    after step 3, by SIGTERM; saved in" in capsys.readouterr().out
    assert steps(str(run)) == [2, 3] and records(run)[-1]["step"] == 3
    with open(run / "metrics.jsonl", "a") as file:  # as a killed process leaves it that got further than its checkpoint
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    pretrain.pretrain(config_of(text), str(run))
    assert "step_000003, step 3" in capsys.readouterr().out
    assert records(run) == records(whole)
    (got, meta), (want, want_meta) = arrays(step_folder(str(run), 6)), arrays(step_folder(str(whole), 6))
    assert got.keys() == want.keys() and all(np.array_equal(got[name], want[name]) for name in want)
    assert meta == want_meta and meta["step"] == 6 and meta["loader"]["sample"] == 24
