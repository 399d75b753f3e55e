"""Pre-training on several processes, from the command line; and what its ranks need of each other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.train import run_folder
from parallel import collectives
from parallel.mesh import Mesh
from tests import processes

ROOT = Path(__file__).parents[2]
SMALL = ["--config.train.steps=12", "--config.train.batch_size=8", "--config.train.seq_len=64", "--config.train.log_every=1"]
SMALL += ["--config.train.eval_every=0", "--config.train.eval_rows=8", "--config.data.max_bytes=200000", "--config.train.sample_tokens=4"]


def pretrain(folder, config, *layout, nproc=1):
    """metrics.jsonl by step, of a run on so many processes."""
    launch = ["experiments.launch", f"--nproc={nproc}", f"--log_dir={folder}/logs", "--"] if nproc > 1 else []
    command = [sys.executable, "-m", *launch, "experiments.pretrain", f"--config=experiments/configs/{config}.py", *SMALL]
    run = subprocess.run([*command, f"--workdir={folder}", *layout], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return run.stdout, {line["step"]: line["loss"] for line in lines if "loss" in line}, lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, axes, more",
    [
        ("tiny", "dp tp", ()),
        ("tiny_moe", "dp tp", ("--ep=2",)),
        ("tiny", "tp cp", ("--config.train.recompute=full",)),
        ("tiny_moe", "dp cp", ("--ep=4", "--config.parallel.cp_attention=ulysses")),
    ],
)
def test_a_launched_run_lies_on_the_curve_of_one_process(tmp_path, config, axes, more):
    (tmp_path / "one").mkdir()
    (tmp_path / "four").mkdir()
    _, want, want_end = pretrain(tmp_path / "one", config)
    out, got, got_end = pretrain(tmp_path / "four", config, *(f"--{axis}=2" for axis in axes.split()), *more, nproc=4)
    assert list(got) == list(want) == list(range(1, 13)) and want[12] < want[1]
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-4)  # rounding, over 12 steps of Adam
    assert got_end["final_loss"] == pytest.approx(want_end["final_loss"], rel=1e-4)
    assert f"4 ranks: {axes.replace(' ', ' 2 x ')} 2" in out and "held out" in out and (tmp_path / "four" / "hf" / "config.json").exists()
    assert {f"rank_{r}.log" for r in range(4)} <= set(os.listdir(tmp_path / "four" / "logs"))


@pytest.mark.slow
@pytest.mark.parametrize("config, nproc, layout", [("tiny", 2, ()), ("tiny_moe", 4, ("--dp=2", "--ep=2", "--zero=1"))])
def test_a_pipeline_lies_on_the_curve_of_one_process(tmp_path, config, nproc, layout):
    """With the same micro-batches, and evaluation on the way; rank 0, which does not see the loss, reports it."""
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    common = ("--micro_batches=2", "--config.train.eval_every=4")
    _, want, want_end = pretrain(tmp_path / "one", config, *common)
    out, got, got_end = pretrain(tmp_path / "many", config, "--pp=2", *common, *layout, nproc=nproc)
    assert list(got) == list(want) == list(range(1, 13)) and want[12] < want[1]
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-4)
    assert got_end["final_loss"] == pytest.approx(want_end["final_loss"], rel=1e-4)
    assert "pp 2, 2 stages, 1f1b" in out and (tmp_path / "many" / "hf" / "config.json").exists()


def folders():
    """In each of 2 processes: a folder that both see, then one that rank 1 has for itself; what each says of them."""
    rank, world = collectives.start()
    mesh = Mesh(dp=world, rank=rank)
    with run_folder.locked("shared", mesh):
        listed = str(sorted(os.listdir("shared")))
    if rank == 1:
        os.mkdir("elsewhere")
        os.chdir("elsewhere")
    try:
        with run_folder.locked("run", mesh):
            return {"said": "", "listed": listed}
    except ValueError as error:
        return {"said": str(error), "listed": listed}


@pytest.mark.extended
def test_a_rank_that_does_not_see_the_run_folder_says_so():
    first, second = processes.run("tests.experiments.test_pretrain_layouts:folders", 2)
    fix = "is not the folder of rank 0; give a folder that all nodes share"
    assert second["said"] == f"--workdir=run of rank 1 {fix}" and first["said"] == f"--workdir=run of 1 other ranks {fix}"
    assert first["listed"] == "['.lock', 'checkpoints']"  # no mark is left
