"""Trackers: what they get, that a resumed run goes on with the same ones, and that their failures end no run. W&B and MLflow are the real
libraries, where they are installed."""

import glob
import json
import os
import time

import pytest

from experiments import flags, pretrain
from experiments.configs import common
from experiments.watch import trackers
from experiments.watch.metrics import Writer
from tests.experiments.test_pretrain import make_text
from tests.experiments.test_resume import config_of, records, stopping_after


def watch(names):
    config = common.get_config()
    config.watch.trackers = names
    return config.watch


class Planted:
    """A tracker that keeps what it gets, and fails in the methods that `fails` names."""

    library, fails, seen = "json", (), None

    def __init__(self, workdir, project, config, known):
        self.fail("open")
        self.id = known or f"id{len(Planted.seen)}"
        Planted.seen.append((self.id, config["train.steps"]))

    def fail(self, where):
        if where in self.fails:
            raise ConnectionError(f"no server\nfor {where}")

    def log(self, step, numbers):
        self.fail("log")
        Planted.seen.append((self.id, step, numbers))

    def close(self):
        self.fail("close")
        Planted.seen.append((self.id, "closed"))


@pytest.fixture
def planted(monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "planted", Planted)
    monkeypatch.setattr(Planted, "seen", [])
    return Planted


@pytest.mark.parametrize(
    "text, said", [("wandb,tensorbord", "'tensorbord' is no tracker; use some of wandb,mlflow"), ("wandb,wandb", "'wandb' stands twice")]
)
def test_a_wrong_name_is_refused(text, said):
    config = common.get_config()
    config.watch.trackers = text
    with pytest.raises(ValueError, match=said):
        flags.check(config)


def test_a_library_that_is_not_installed_is_told_before_training(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(planted, "library", "there_is_no_such_library")
    with pytest.raises(ValueError, match=r"planted is not installed; pip install -e '.\[trackers\]'"):
        pretrain.pretrain(config_of(make_text(tmp_path / "text"), **{"watch.trackers": "planted"}), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.extended
def test_a_resumed_run_goes_on_with_its_tracker_run(planted, tmp_path, monkeypatch):
    config = config_of(make_text(tmp_path / "text"), **{"watch.trackers": "planted"})
    with monkeypatch.context() as patch:
        stopping_after(3, patch)
        pretrain.pretrain(config, str(tmp_path / "run"))
    pretrain.pretrain(config, str(tmp_path / "run"))
    assert {entry[0] for entry in planted.seen} == {"id0"} and planted.seen.count(("id0", "closed")) == 2
    got = [(step, numbers.get("loss")) for _, step, numbers in (entry for entry in planted.seen if len(entry) == 3)]
    assert got == [(record["step"], record.get("loss")) for record in records(tmp_path / "run")]


def test_a_run_that_starts_anew_gets_a_new_tracker_run(planted, tmp_path):
    first, second, third = (trackers.Trackers(str(tmp_path), watch("planted"), {"train": {"steps": 1}}, begun) for begun in (0, 0, 5))
    ids = [opened.open["planted"].id for opened in (first, second, third)]
    assert ids[0] != ids[1] == ids[2]


@pytest.mark.parametrize("where", ["open", "log", "close"])
def test_a_tracker_that_fails_is_left_out_with_one_warning(where, planted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(planted, "fails", (where,))
    sent = trackers.Trackers(str(tmp_path), watch("planted"), {"train": {"steps": 2}})
    with Writer(str(tmp_path), trackers=sent) as writer:
        for step in (1, 2):
            writer.write(step, {"loss": 1.0})
    assert [record["step"] for record in records(tmp_path)] == [1, 2]
    said = capsys.readouterr().err
    assert said == "warning: planted failed, and the run goes on without it: ConnectionError: no server\n"


@pytest.mark.parametrize("damage", ["", "[1]", '{"planted": 3}'])
def test_a_damaged_list_of_ids_begins_new_tracker_runs(damage, planted, tmp_path):
    (tmp_path / trackers.IDS).write_text(damage)
    trackers.Trackers(str(tmp_path), watch("planted"), {"train": {"steps": 2}}, begun=1)
    assert json.loads((tmp_path / trackers.IDS).read_text()) == {"planted": "id0"}


def two_starts(folder, name):
    """Steps 1 and 2, and after a restart from step 2 the step 3, of a run with a tracker."""
    for begun, steps in ((0, (1, 2)), (2, (3,))):
        time.sleep(1.1 if begun else 0)  # W&B names the folder of a start by its second
        sent = trackers.Trackers(str(folder), watch(name), {"train": {"steps": 3}, "optim": {"lr": 0.5}}, begun)
        with Writer(str(folder), begun, sent) as writer:
            for step in steps:
                writer.write(step, {"loss": 1.0 / step, "grad_norm/layers.0": 2.0, "expert_load": [1, 2]})
    return json.loads((folder / trackers.IDS).read_text())[name]


def test_mlflow_has_the_run_in_the_runs_folder(tmp_path, monkeypatch, capsys):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    number = two_starts(tmp_path, "mlflow")
    client = mlflow.MlflowClient(tracking_uri=f"file://{tmp_path}/mlruns")
    (run,) = client.search_runs([client.get_experiment_by_name("qwen3").experiment_id])
    assert run.info.run_id == number and run.info.status == "FINISHED" and run.data.params["optim.lr"] == "0.5"
    history = client.get_metric_history(number, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert set(run.data.metrics) == {"loss", "grad_norm/layers.0"} and "warning" not in capsys.readouterr().err


def wandb_records(path):
    """The records of a short .wandb file. Each has a checksum of 4 bytes, its length in 2, the kind in 1 (1 = whole), and its bytes."""
    from wandb.proto import wandb_internal_pb2

    with open(path, "rb") as file:
        data = file.read()
    place = 7  # after the file's head
    assert len(data) < 32768, "longer files have blocks"
    while place < len(data):
        size = int.from_bytes(data[place + 4 : place + 6], "little")
        assert data[place + 6] == 1
        yield wandb_internal_pb2.Record.FromString(data[place + 7 : place + 7 + size])
        place += 7 + size


def test_wandb_writes_offline_runs_of_one_id(tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    number, found, runs = two_starts(tmp_path, "wandb"), [], []
    wandb.teardown()  # ends its process, which may hold the end of a file
    for path in sorted(glob.glob(f"{tmp_path}/wandb/offline-run-*/*.wandb"), key=os.path.getmtime):
        for record in wandb_records(path):
            if record.HasField("run"):
                runs.append((record.run.run_id, record.run.project))
            if record.HasField("history"):
                items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                found.append((items["_step"], items["loss"], "expert_load" in items))
    assert set(runs) == {(number, "qwen3")} and len(runs) >= 2
    assert found == [(1, 1.0, False), (2, 0.5, False), (3, pytest.approx(1 / 3), False)]
    assert "warning" not in capsys.readouterr().err
