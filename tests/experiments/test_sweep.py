"""Sweeps: what they are made of, their processes, kills, failures and tables."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.sweep import jobs as sweep_jobs
from experiments.sweep import sweeps
from experiments.sweep import table as sweep_table
from experiments.sweep.sweeps import Run, chain, over, product, zipped
from experiments.watch.records import read_records

ROOT = Path(__file__).parents[2]
CONFIG = """
from experiments.configs import common
from experiments.sweep.sweeps import chain, over, product, zipped

def get_config():
    c = common.get_config()
    c.train.steps = 20
    return c

def sweep(add):
    add(product(over("optim.lr", [{rates}]), over("train.seed", range(2))))
"""


def names(every):
    return [run.name for run in sweeps.named(every)]


def test_lists_are_put_together():
    a, b = over("optim.lr", [1e-3, 3e-3]), over("train.seed", [0, 1])
    assert product(a, b) == [{"optim.lr": lr, "train.seed": s} for lr in (1e-3, 3e-3) for s in (0, 1)]
    assert zipped(a, b) == [{"optim.lr": 1e-3, "train.seed": 0}, {"optim.lr": 3e-3, "train.seed": 1}]
    assert chain(a, b) == [*a, *b]
    with pytest.raises(ValueError, match="optim.lr is set twice"):
        product(a, a)
    with pytest.raises(ValueError, match="lists of one length, and they have 2, 3"):
        zipped(a, over("train.seed", range(3)))


def test_a_run_is_named_by_what_differs():
    same = {"train.steps": 5}
    assert names([{**same, "optim.lr": 1e-3}, {**same, "optim.lr": 0.01}]) == ["lr=0.001", "lr=0.01"]
    assert names([{}, {"model_args.qk_norm": False}]) == ["base", "qk_norm=false"]
    assert names([{"lora.rank": 1, "a.rank": 1}, {"lora.rank": 2, "a.rank": 2}]) == ["lora.rank=1,a.rank=1", "lora.rank=2,a.rank=2"]
    assert names([{"parallel.stage_layers": (1, 2)}, {"parallel.stage_layers": (3,)}]) == ["stage_layers=_1,2_", "stage_layers=_3,_"]
    with pytest.raises(ValueError, match="has a run twice"):
        names([same, dict(same)])


def test_names_are_safe_short_and_different():
    every = [{"data.path": path} for path in ("../a b", "../a/b", "x" * 300, "x" * 301)]
    found = names(every)
    assert len(set(found)) == 4 and all(len(name) <= 100 and "/" not in name and " " not in name for name in found)


def test_values_come_back_from_the_command_line(tmp_path):
    overrides = {"optim.lr": 1e-5, "parallel.stage_layers": (2, 2), "parallel.pp": 2, "train.save_hf": False, "data.path": "a b"}
    sweep = sweep_jobs.Sweep("experiments/configs/tiny.py", str(tmp_path), "experiments.pretrain", ("--config.train.steps=7",), 2)
    config = sweep_jobs.command_line.resolved(sweep.target(Run("x", overrides)), 2)
    assert config.optim.lr == 1e-5 and tuple(config.parallel.stage_layers) == (2, 2) and config.train.save_hf is False
    assert config.data.path == "a b" and config.train.steps == 7


class Fake(sweep_jobs.Sweep):
    """Whose runs are fake_run.py's."""

    def command(self, run):
        config = json.dumps(sweep_jobs._config(self, run))
        return [sys.executable, "-m", "tests.experiments.fake_run", config, self.folder(run)]


def main(config, workdir, jobs):
    """A process of a sweep, for the tests that kill one."""
    runs = sweeps.load(config)
    failed = sweep_jobs.run_all(Fake(config, workdir, "experiments.pretrain", (), 1), runs, int(jobs))
    sweep_table.write(workdir, runs, ["eval_loss", "loss"], ["train.seed"])
    return failed


def start(config, workdir, jobs=1):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.experiments.test_sweep", config, workdir, str(jobs)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(rates="1e-3, 3e-3, 1e-2"))
    return str(path)


def tables(folder):
    return [(Path(folder) / name).read_text() for name in ("runs.csv", "summary.csv", "table.md")]


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_sweep_killed_in_the_middle_ends_with_the_table_of_one_that_was_not(tmp_path, config, number, code):
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    assert start(config, whole, 3).wait() == 0
    process, third = start(config, killed, 2), Path(killed) / "lr=0.003,seed=0" / "metrics.jsonl"
    while not third.exists() or len(read_records(third)) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    with pytest.raises(ValueError, match="another sweep is running there"):
        main(config, killed, 1)
    process.send_signal(number)
    assert process.wait() == code
    before = {path: path.stat().st_mtime_ns for path in Path(killed).glob("*/finished.json")}
    assert 1 <= len(before) < 6
    process = start(config, killed)
    text = process.communicate()[0]
    assert process.returncode == 0 and f"6 runs, {len(before)} of them finished before" in text
    assert tables(killed) == tables(whole)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # what was finished was left alone
    if number == signal.SIGTERM:
        assert all(len(read_records(path)) == 20 for path in Path(killed).glob("*/metrics.jsonl"))


def test_a_failed_run_is_reported_and_keeps_no_other_from_running(tmp_path, config, capfd):
    Path(config).write_text(CONFIG.format(rates="1.0, 1e-3"))
    folder = str(tmp_path / "sweep")
    assert main(config, folder, 2) == ["lr=1.0,seed=0", "lr=1.0,seed=1"]
    text = capfd.readouterr().out
    assert text.count("FAILED") == 2 and "error: it diverged" in text
    rows = list(csv.DictReader(open(os.path.join(folder, "runs.csv"))))
    assert [(row["run"], row["status"], row["step"]) for row in rows] == [
        ("lr=1.0,seed=0", "unfinished", "4"),
        ("lr=1.0,seed=1", "unfinished", "4"),
        ("lr=0.001,seed=0", "finished", "20"),
        ("lr=0.001,seed=1", "finished", "20"),
    ]
    failed, fine = csv.DictReader(open(os.path.join(folder, "summary.csv")))
    assert failed["runs"] == "0" and failed["loss mean"] == "" and fine["runs"] == "2"
    losses = [0.15 + 1e-3, 0.15 + 1e-3 + 0.01]
    assert float(fine["loss mean"]) == pytest.approx(sum(losses) / 2) and float(fine["loss spread"]) == pytest.approx(0.01 / 2**0.5)
    assert float(fine["eval_loss spread"]) == pytest.approx(0, abs=1e-12)


def test_what_is_wrong_is_said_before_anything_starts(tmp_path, config):
    folder = str(tmp_path / "sweep")
    Path(config).write_text(CONFIG.format(rates="1e-3, -1.0"))
    with pytest.raises(ValueError, match="run lr=-1.0,seed=0: optim.lr=-1.0 must be above 0"):
        main(config, folder, 1)
    assert not os.path.exists(folder)
    Path(config).write_text(CONFIG.replace('"optim.lr"', '"optim.rate"').format(rates="1e-3"))
    with pytest.raises(ValueError, match="there is no key 'optim.rate'"):
        main(config, folder, 1)
    Path(config).write_text("from experiments.configs.common import get_config\n")
    with pytest.raises(ValueError, match="has no sweep"):
        main(config, folder, 1)


def test_a_folder_of_another_sweep_is_not_mixed_with_this_one(tmp_path, config):
    folder = str(tmp_path / "sweep")
    Path(config).write_text(CONFIG.format(rates="1e-3"))
    assert main(config, folder, 2) == []
    Path(config).write_text(CONFIG.format(rates="1e-3").replace("return c", "c.train.batch_size = 8\n    return c"))
    with pytest.raises(ValueError, match="already holds a run with train.batch_size=16 instead of 8"):
        main(config, folder, 2)
    Path(config).write_text(CONFIG.format(rates="1e-3, 1e-2"))  # more of the same goes on
    assert main(config, folder, 2) == []


@pytest.mark.slow
def test_a_sweep_of_real_runs_killed_in_the_middle_has_the_table_of_one_that_was_not(tmp_path):
    config = tmp_path / "config.py"
    sizes = "c.train.batch_size, c.train.seq_len, c.model_args.num_layers = 4, 32, 1"
    watched = "c.checkpoint.every, c.train.log_every, c.train.sample_tokens = 2, 1, 0"
    text = CONFIG.format(rates="1e-3, 3e-3, 1e-2")
    config.write_text(text.replace("    return c", f"    {sizes}\n    {watched}\n    return c"))
    command = [sys.executable, "-m", "experiments.sweep", f"--config={config}"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert subprocess.run([*command, f"--workdir={whole}"], cwd=ROOT).returncode == 0
    for at in (1, 4):
        process, path = subprocess.Popen([*command, f"--workdir={killed}"], cwd=ROOT), sorted(whole.glob("lr=*"))[at].name
        while not (killed / path / "checkpoints" / "step_000006").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
        process.wait()
    assert subprocess.run([*command, f"--workdir={killed}"], cwd=ROOT).returncode == 0
    assert tables(killed) == tables(whole)


if __name__ == "__main__":
    sys.exit(1 if main(*sys.argv[1:]) else 0)
