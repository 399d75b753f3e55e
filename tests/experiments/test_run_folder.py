"""What a run's folder holds besides its checkpoints: a file that is not as it was written is told of by name, before anything is done."""

import json
import os
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from experiments.configs import common
from experiments.evaluate import evaluation
from experiments.sweep import table
from experiments.sweep.sweeps import Run
from experiments.train import run_folder
from experiments.watch.metrics import Writer
from experiments.watch.records import series
from tests.parallel.test_checkpoint_disk import Disk

DEEP = b"[" * 100_000
BAD_CONFIG = [b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b"{", b"{}", b'{"train": 3}', b'{"train": {}, "optim": [], "data": {}}', DEEP]
BAD_FINISHED = [b"[]", b"null", b"{}", b'{"step": "6"}', b'{"step": true}', b'{"step": 1.5}', b'{"step": -1}', b"\xff", DEEP]


def folder_of(tmp_path, config=None, checkpoint=True):
    """A run's folder with its config, and the name of a checkpoint."""
    (tmp_path / "checkpoints" / "step_000002").mkdir(parents=True) if checkpoint else None
    (tmp_path / "config.json").write_bytes(json.dumps(run_folder.to_dict(common.get_config())).encode() if config is None else config)
    return str(tmp_path)


@pytest.mark.parametrize("content", BAD_CONFIG)
def test_a_config_that_is_none_is_named(content, tmp_path):
    folder, config = folder_of(tmp_path, content), ConfigDict(common.get_config())
    for read in (
        lambda: run_folder.own_step(folder, config),
        lambda: run_folder.saved_config(folder),
        lambda: evaluation.own_data(config, folder),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{folder}/config.json ")):
            read()


@pytest.mark.parametrize("name", ["config.json", "finished.json"])
def test_a_pipe_is_not_waited_for(name, tmp_path):
    folder = folder_of(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=re.escape(f"{folder}/{name} is no regular file")):
        run_folder.own_step(folder, common.get_config())


@pytest.mark.parametrize("content", BAD_FINISHED)
def test_a_mark_of_the_end_that_says_no_step_is_named(content, tmp_path):
    folder = folder_of(tmp_path)
    assert run_folder.own_step(folder, common.get_config()) == 2
    (tmp_path / "finished.json").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{folder}/finished.json ")):
        run_folder.own_step(folder, common.get_config())


def test_checkpoints_without_a_config_are_not_trained_over(tmp_path):
    folder = folder_of(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="holds checkpoints, and no config.json.*put it back, or use another folder with --resume_from="):
        run_folder.own_step(folder, common.get_config())


def test_lines_of_metrics_without_a_step_are_passed_over_and_other_bytes_are_named(tmp_path):
    lines = [b'{"loss": 3}', b"[1]", b"3", b'{"step": "a", "loss": 1}', b"half", b'{"step": 1, "loss": 2.5}', b'{"step": 2}', b'{"st']
    (tmp_path / "r").mkdir()
    path = tmp_path / "r" / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines))
    assert table._row(str(tmp_path), Run("r", {}), [], ["loss"]) == ["r", "unfinished", 2, 2.5]
    with Writer(str(tmp_path / "r"), 1) as writer:
        assert writer.records == [{"step": 1, "loss": 2.5}]
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n')
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2 is not text; remove the line, or move the file away")):
        Writer(str(tmp_path / "r"), 1)


@pytest.mark.parametrize("content", [b"\x93\x00\xff\xfe\n", b'{"step": 1, "loss": 2}\n{"step": 2, "loss": "\xff"}\n', bytes(range(256))])
def test_metrics_that_are_not_text_are_named_where_runs_are_compared(content, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    said = r"(, line \d is not text| has no line with a step); remove"
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/metrics.jsonl") + said):
        series(str(tmp_path), ["loss"])
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": NaN}\n{"step": 2, "loss": 3.0}\n{"step": 3, "lo')
    assert series(str(tmp_path), ["loss"])["loss"][1].tolist()[-1] == 3.0


class Tokens:
    def save(self, folder):
        folder = Path(folder)
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{}")


def test_a_run_that_has_begun_has_its_tokenizer_and_its_config_on_disk(tmp_path, monkeypatch):
    """Also after a loss of power, in every state in which the disk may be."""
    (tmp_path / "run").mkdir()
    disk = Disk(tmp_path / "run", monkeypatch)
    run_folder.begin(str(tmp_path / "run"), common.get_config(), Tokens())
    disk.safe = True
    disk.scan()
    assert any(safe for _, safe in disk.states)
    for state, safe in disk.states:
        assert state.get("tokenizer", {"tokenizer.json": b"{}"}) == {"tokenizer.json": b"{}"}
        assert not safe or ("tokenizer" in state and state["config.json"])
