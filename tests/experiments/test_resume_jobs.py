"""Jobs of several processes that are stopped or killed and started again, on packed and blended data: minutes, so all of it is slow."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from parallel.checkpoint.files import clean, step_folder, steps
from parallel.checkpoint.read import Reader
from tests.experiments.test_pretrain_data import BLEND, SMALL, folder  # noqa: F401, a fixture
from tests.experiments.test_resume import records

ROOT = Path(__file__).parents[2]
STEPS, ROWS, KILLS = 120, 8, 12


def start(data, run, *layout, nproc=2, launcher=(), main=("experiments.pretrain",)):
    keys = {
        **{f"model_args.{key}": value for key, value in SMALL.items()},
        "data.path": BLEND.format(data),
        "data.tokenizer": data / "tokenizer",
    }
    keys |= {"train.steps": STEPS, "train.batch_size": ROWS, "train.seq_len": 32, "train.log_every": 1, "train.eval_every": 100}
    keys |= {"train.eval_rows": 8, "train.sample_tokens": 0, "train.save_hf": False, "checkpoint.every": 3, "optim.warmup_steps": 20}
    keys |= {"optim.eps": 1e-5}  # at 1e-8 rounding alone moves parameters
    launch = ["experiments.launch", f"--nproc={nproc}", f"--log_dir={run}.logs", *launcher, "--"] if nproc > 1 else []
    command = [sys.executable, "-m", *launch, *main, f"--workdir={run}", *layout]
    command += [f"--config.{key}={value}" for key, value in keys.items()]
    command.insert(command.index(f"--workdir={run}"), "--config=experiments/configs/tiny.py")
    with open(f"{run}.out", "ab") as out:
        return subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(job, run, code=0):
    assert job.wait(600) == code, Path(f"{run}.out").read_text()[-3000:]


def latest(run):
    return max([0, *steps(str(run))])


def wait_beyond(job, run, step):
    deadline = time.monotonic() + 300
    while latest(run) <= step and job.poll() is None:
        assert time.monotonic() < deadline, Path(f"{run}.out").read_text()[-3000:]
        time.sleep(0.02)


def ranks_of(launcher):
    """The process numbers of a launcher's children."""
    return [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def through(folder, tmp_path_factory):  # noqa: F811
    run = tmp_path_factory.mktemp("through") / "run"
    finish(start(folder, run, "--dp=2"), run)
    return run


@pytest.mark.slow
def test_jobs_killed_at_random_moments_end_as_one_that_was_not(through, folder, tmp_path):  # noqa: F811
    run, rng, kinds = tmp_path / "run", random.Random(5), []
    for number in range(KILLS):
        before = latest(run)
        job = start(folder, run, "--dp=2")
        wait_beyond(job, run, before)
        time.sleep(rng.uniform(0, 0.8))
        kinds.append("one" if number % 2 else "all")
        victims = ranks_of(job)
        if job.poll() is None:
            os.kill(rng.choice(victims[1:]) if kinds[-1] == "one" and len(victims) > 1 else job.pid, signal.SIGKILL)
        job.wait(60)
        while any(Path(f"/proc/{pid}").exists() for pid in victims):  # they die with the launcher
            time.sleep(0.05)
        assert latest(run) >= before
        assert Reader(step_folder(str(run), latest(run))).verify() == []
    assert latest(run) < STEPS, "the run was over before all kills"
    finish(start(folder, run, "--dp=2"), run)
    assert records(run) == records(through)
    meta = Reader(step_folder(str(run), STEPS)).meta
    assert meta["loader"]["sample"] == STEPS * ROWS and meta == Reader(step_folder(str(through), STEPS)).meta
    clean(str(run))
    assert all(name.startswith("step_") for name in os.listdir(run / "checkpoints"))


@pytest.mark.slow
@pytest.mark.parametrize("layout, nproc", [(("--tp=2",), 2), (("--dp=2", "--tp=2", "--zero=2"), 4), ((), 1)])
def test_a_job_stopped_by_sigterm_goes_on_in_another_layout(layout, nproc, through, folder, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    job = start(folder, run, "--dp=2")
    wait_beyond(job, run, 20)
    job.terminate()
    finish(job, run, 128 + signal.SIGTERM)
    stopped = latest(run)
    assert f"stopped    after step {stopped}, by SIGTERM; saved in" in Path(f"{run}.out").read_text()
    assert records(run)[-1]["step"] == stopped < STEPS
    finish(start(folder, run, *layout, nproc=nproc), run)
    got, want = (([r for r in records(r_) if "loss" in r]) for r_ in (run, through))
    assert [r["step"] for r in got] == list(range(1, STEPS + 1))
    for a, b in zip(got, want, strict=True):
        assert a["lr"] == b["lr"] and a["tokens"] == b["tokens"] and a["tokens_seen"] == b["tokens_seen"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    assert json.loads((run / "finished.json").read_text()) == {"step": STEPS}


@pytest.mark.slow
@pytest.mark.parametrize("fewer", [False, True])
def test_a_job_that_loses_a_rank_starts_again_by_itself(through, folder, tmp_path, fewer):  # noqa: F811
    """With as many ranks, and on one data rank less; it ends as a job that lost none."""
    run, mark = tmp_path / "run", tmp_path / "lost"
    launcher = ["--restarts=2", *(["--restart_nproc=1"] if fewer else [])]
    job = start(folder, run, "--dp=-1", launcher=launcher, main=["tests.experiments.lost_rank", "50", str(mark)])
    finish(job, run)
    said = Path(f"{run}.out").read_text()
    assert mark.exists() and said.count("restart    1 of 2") == 1 and "SIGKILL" in said
    (got, want) = ({line["step"]: line for line in records(each)} for each in (run, through))
    assert list(got) == list(want)
    losses = [[line["loss"] for line in lines.values() if "loss" in line] for lines in (got, want)]
    assert losses[0] == (losses[1] if not fewer else pytest.approx(losses[1], rel=1e-4))
