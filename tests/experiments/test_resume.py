"""Runs of experiments.pretrain that are stopped, resumed, copied and refused: what a checkpoint keeps, and who may go on from it."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest

from experiments import pretrain
from experiments.layout import table
from experiments.train import checkpoints, finish, run_folder
from parallel.checkpoint import save
from parallel.checkpoint.files import CheckpointError, step_folder, steps
from parallel.checkpoint.read import Reader
from parallel.mesh import ONE_DEVICE
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


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"train.seed": 1}, "already holds a run with train.seed=0 instead of 1; give another folder, or the run's own config"),
        ({"data.held_out": 0.1}, "data.held_out=0.05 instead of 0.1"),
        ({"model_args.rope_theta": 5e5}, "model_args.rope_theta=None instead of 500000.0"),
        ({"optim.lr": 1.0}, "optim.lr=0.01 instead of 1.0.*with other optim keys, use another folder and --resume_from="),
        ({"train.log_every": 3, "parallel.micro_batches": 2}, "already holds a finished run of 6 steps; give another folder, or more"),
    ],
)
def test_a_folder_takes_only_its_own_run(changes, said, whole, text):
    before = (whole / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=said):
        pretrain.pretrain(config_of(text, **changes), str(whole))
    assert (whole / "metrics.jsonl").read_bytes() == before and steps(str(whole)) == [2, 4, 6]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"train.seed": 1}, "resume_from=.* was saved with train.seed=0 instead of 1; use the same, or --init_from="),
        ({"model_args.ffn_size": 64}, "model_args.ffn_size=48 instead of 64"),
        ({"optim.name": "lion"}, "optim.name='adamw' instead of 'lion'; use the same, or --init_from="),
        ({"resume_from": "nowhere"}, "resume_from=nowhere has no checkpoint; give the folder of a run that has saved one"),
        (
            {"resume_from": "", "init_from": "{}", "model_args.ffn_size": 64},
            r"another model: arrays .* of another shape: params/layers.0.mlp",
        ),
        (
            {"resume_from": "", "init_from": "{}", "model_args.num_layers": 3},
            r"missing: params/layers.2.*or --partial to load what matches",
        ),
        ({"resume_from": "", "init_from": "{}", "model_args.num_layers": 1}, r"unknown: params/layers.1"),
    ],
)
def test_another_runs_checkpoint_has_to_fit(changes, said, whole, text, tmp_path):
    changes = {"resume_from": str(whole), **{k: v.format(whole) if k == "init_from" else v for k, v in changes.items()}}
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        pretrain.pretrain(config_of(text, **changes), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_goes_on_elsewhere_with_all_or_with_the_weights_alone(whole, text, tmp_path, capsys):
    """From step 4 of the first run: with everything, it ends as that one; with part of the weights, it begins anew and says what is new."""
    half = step_folder(str(whole), 4)
    pretrain.pretrain(config_of(text, resume_from=half, **{"checkpoint.every": 0}), str(tmp_path / "all"))
    assert records(tmp_path / "all")[0]["step"] == 5
    assert records(tmp_path / "all") == [r for r in records(whole) if r["step"] > 4]
    (got, meta), (want, want_meta) = (arrays(step_folder(str(run), 6)) for run in (tmp_path / "all", whole))
    assert all(np.array_equal(got[name], want[name]) for name in want) and meta["loader"] == want_meta["loader"]
    bigger = {"model_args.ffn_size": 64, "init_from": str(whole), "partial": True, "train.steps": 1, "checkpoint.on_exit": False}
    pretrain.pretrain(config_of(text, **bigger), str(tmp_path / "part"))
    out = capsys.readouterr().out
    assert "step_000006; left out: 6 of another shape: params/layers.0.mlp.w_gate [32, 48] instead of [32, 64]" in out
    first, last = records(tmp_path / "part")[0], records(whole)[-1]
    assert first["step"] == 0 and first["eval_loss"] != last["final_loss"]


FULL = {"train.save_hf": True, "train.sample_tokens": 2}
PHASES = {  # where SIGTERM comes: what of the results is there then
    "evaluation": (finish.loader, "eval_batches", ()),
    "weights": (finish.hf, "save", ()),
    "report": (finish, "report", ("hf",)),
    "sample": (finish.generate, "generate", ("hf", "loss.png")),
    "mark": (finish.run_folder, "finish", ("hf", "loss.png", "sample.txt")),
}


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A run that nothing stopped, with all results."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    pretrain.pretrain(config_of(text, **FULL), str(folder))
    return folder


@pytest.mark.extended
@pytest.mark.parametrize("phase", [phase if phase == "sample" else pytest.param(phase, marks=pytest.mark.slow) for phase in PHASES])
def test_sigterm_while_a_run_finishes_ends_it_and_the_same_command_finishes(phase, finished, text, tmp_path, monkeypatch, capsys):
    (holder, name, there), run = PHASES[phase], tmp_path / "run"
    results = ("hf", "loss.png", "sample.txt", "finished.json")
    with monkeypatch.context() as patch:
        plain = getattr(holder, name)

        def signalled(*args, **options):
            if steps(str(run))[-1:] == [6]:  # the last checkpoint is written
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
            return plain(*args, **options)

        patch.setattr(holder, name, signalled)
        pretrain.pretrain(config_of(text, **FULL), str(run))
    out = capsys.readouterr().out
    assert f"stopped    by SIGTERM after step 6, which is saved in {step_folder(str(run), 6)}, before all results were written;" in out
    assert [name for name in results if (run / name).exists()] == list(there)
    assert not [path for path in run.iterdir() if path.name.startswith(".hf.")], "a half-written folder is left"
    pretrain.pretrain(config_of(text, **FULL), str(run))
    assert all((run / name).exists() for name in results) and (run / "sample.txt").read_text() == (finished / "sample.txt").read_text()
    assert records(run)[-1] == records(finished)[-1] and "final_loss" in records(run)[-1]
    for name in os.listdir(finished / "hf"):
        assert (run / "hf" / name).read_bytes() == (finished / "hf" / name).read_bytes(), name


def test_sigterm_while_the_last_checkpoint_is_written_is_noticed_before_the_results(text, tmp_path, monkeypatch, capsys):
    run, write = tmp_path / "run", save.checkpoint_store.write_part

    def signalled(folder, *args):
        if "000006" in str(folder):
            os.kill(os.getpid(), signal.SIGTERM)
        return write(folder, *args)

    monkeypatch.setattr(save.checkpoint_store, "write_part", signalled)
    monkeypatch.setattr(finish.run_folder, "finish", lambda *_: pytest.fail("the run finished"))
    pretrain.pretrain(config_of(text, **{"checkpoint.every": 0}), str(run))
    assert "stopped    by SIGTERM after step 6, which is saved in" in capsys.readouterr().out
    assert steps(str(run)) == [6] and "final_loss" not in records(run)[-1]


def test_an_error_while_a_run_finishes_stays_an_error(text, tmp_path, monkeypatch):
    monkeypatch.setattr(finish, "report", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretrain.pretrain(config_of(text), str(tmp_path / "run"))


def test_only_one_run_at_a_time_uses_a_folder(whole, text):
    with run_folder.locked(str(whole), ONE_DEVICE), pytest.raises(ValueError, match=f"process {os.getpid()} trains there now; wait for it"):
        pretrain.pretrain(config_of(text), str(whole))


def test_a_run_that_was_killed_before_it_saved_begins_again(whole, text, tmp_path):
    """With its folder as it is then; the records go aside. A finished run that is to be longer goes on."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints" / ".step_000002.abc0001.tmp").mkdir(parents=True)
    os.remove(run / "finished.json")
    with run_folder.locked(str(run), ONE_DEVICE):
        assert run_folder.own_step(str(run), config_of(text)) == 0
    assert (run / "metrics.before.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert not (run / "metrics.jsonl").exists() and os.listdir(run / "checkpoints") == []
    assert run_folder.own_step(str(whole), config_of(text, **{"train.steps": 8})) == 6


def test_a_run_with_more_steps_behind_it_than_it_should_have_is_refused(whole, text, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stopping_after(3, patch)
        pretrain.pretrain(config_of(text), str(run))
    message = "is of step 3, after the last of train.steps=2; ask for at least 3 steps"
    with pytest.raises(ValueError, match=message):
        pretrain.pretrain(config_of(text, **{"train.steps": 2}), str(run))
    with pytest.raises(ValueError, match="is of step 6, after the last of train.steps=4; ask for at least 6 steps"):
        pretrain.pretrain(config_of(text, **{"train.steps": 4, "resume_from": str(whole)}), str(tmp_path / "other"))
    assert not (run / "finished.json").exists()


@pytest.mark.extended
def test_a_run_whose_last_checkpoint_was_not_saved_is_not_finished(text, tmp_path, monkeypatch, capfd):
    run, config = tmp_path / "run", config_of(text, **{"checkpoint.on_error": "continue", "checkpoint.every": 3})
    with monkeypatch.context() as patch:
        write = save.checkpoint_store.write_part

        def full(folder, *args):
            if "000006" in str(folder):
                raise OSError(28, "No space left on device")
            return write(folder, *args)

        patch.setattr(save.checkpoint_store, "write_part", full)
        with pytest.raises(CheckpointError, match="the last checkpoint is not, and checkpoint.on_error=continue let the run go on"):
            pretrain.pretrain(config, str(run))
    assert "No space left" in capfd.readouterr().err
    assert steps(str(run)) == [3] and not (run / "finished.json").exists()
    pretrain.pretrain(config, str(run))  # the same command
    assert steps(str(run)) == [3, 6] and (run / "finished.json").exists()


@pytest.mark.parametrize(
    "key, pattern, said",
    [
        ("train.freeze_include", "embedd", "train.freeze_include: 'embedd' matches no parameter; did you mean 'embed'?"),
        ("train.freeze_include", "embed,laeyrs.*", "train.freeze_include: 'laeyrs.*' matches no parameter"),
        ("train.freeze_exclude", "layers.9.*", "train.freeze_exclude: 'layers.9.*' matches no parameter"),
    ],
)
def test_a_pattern_that_freezes_nothing_is_an_error(key, pattern, said, text, tmp_path):
    config = config_of(text, **{key: pattern})
    for act in (lambda: pretrain.pretrain(config, str(tmp_path / "run")), lambda: table.describe(config)):
        with pytest.raises(ValueError, match=said.replace("*", r"\*").replace("?", r"\?")):
            act()
