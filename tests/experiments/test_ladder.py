"""The ladder: sizes of its rungs, the curve through their losses, and predictions that are made before a rung is trained."""

import json
import math

import numpy as np
import pytest

from experiments.ladder import __main__ as ladder_main
from experiments.ladder import fit, rungs
from experiments.sweep import jobs
from experiments.sweep.sweeps import Run

SIZES = (20_000, 60_000, 150_000, 400_000)


def planted(n):
    return 2.0 + 1.5 * (np.asarray(n) / 1e5) ** -0.3


def test_a_planted_curve_is_found_and_predicts_the_next_size():
    found = fit.predict(SIZES[:-1], planted(SIZES[:-1]), SIZES[-1], noise=0.0)
    assert (found["E"], found["A"], found["alpha"]) == pytest.approx((2.0, 1.5, 0.3), rel=1e-6)
    assert found["loss"] == pytest.approx(planted(SIZES[-1]), rel=1e-9)


def test_the_band_is_wider_with_more_noise_and_holds_the_best_curve():
    bands = [fit.predict(SIZES[:-1], planted(SIZES[:-1]), SIZES[-1], noise) for noise in (0.0, 0.01, 0.03)]
    widths = [band["high"] - band["low"] for band in bands]
    assert widths[0] < widths[1] < widths[2]
    assert all(band["low"] < band["loss"] < band["high"] for band in bands[1:])


def test_losses_that_do_not_fall_are_refused():
    with pytest.raises(ValueError, match="do not fall with the sizes .*; train the rungs longer"):
        fit.predict(SIZES, (3.0, 3.1, 3.2, 3.3), 1_000_000, 0.0)


@pytest.mark.parametrize(
    "ladder, why",
    [
        ("Ladder(depths=(1, 2, 3))", "depths=.* must be 4 or more whole numbers"),
        ("Ladder(depths=(1, 2, 4, 3))", "in increasing order"),
        ("Ladder(depths=(1, 2, 3, 4), width_per_depth=40)", "width_per_depth=40 must be a multiple of head_dim=16"),
        ("Ladder(depths=(1, 2, 3, 4), rows=0)", "rows=0 must be above 0"),
        ("None", "has no LADDER"),
    ],
)
def test_a_ladder_that_cannot_be_built_is_refused(ladder, why, tmp_path):
    path = tmp_path / "config.py"
    path.write_text(f"from experiments.ladder.rungs import Ladder\n\nLADDER = {ladder}\n")
    with pytest.raises(ValueError, match=why):
        rungs.load(str(path))


def test_the_depth_gives_width_heads_and_the_base_width_of_mup():
    ladder = rungs.Ladder((2, 3, 4, 5), width_per_depth=32, head_dim=16, rows=4)
    found = rungs.overrides(ladder, 5)
    sizes = {key.removeprefix("model_args."): value for key, value in found.items() if key.startswith("model_args.")}
    assert sizes == dict(num_layers=5, hidden_size=160, num_heads=10, num_kv_heads=10, head_dim=16, ffn_size=480)
    assert found["train.mup_base_width"] == 64 and found["train.batch_size"] == 4


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """A sweep whose runs have the planted loss at once. Returns (sweep, what was on the disk when each run began)."""
    seen = {}
    sweep = jobs.Sweep("config.py", str(tmp_path), "experiments.pretrain", (), 1)

    def run_all(sweep, runs, parallel_jobs):
        (run,) = runs
        folder = tmp_path / run.name
        predictions = tmp_path / ladder_main.PREDICTIONS
        seen[run.name] = json.loads(predictions.read_text()) if predictions.exists() else {}
        folder.mkdir(exist_ok=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "final_loss": float(planted(run.overrides["size"])) * 1.01}) + "\n")
        (folder / "finished.json").write_text("{}")
        return []

    monkeypatch.setattr(jobs, "run_all", run_all)
    return sweep, seen


def climbed(sweep, sizes=SIZES):
    rows = []
    for size in sizes:
        run = Run(f"size={size}", {"train.steps": 1, "size": size})
        rows.append(ladder_main.climb(sweep, run, size, rows, 0.01))
    return rows


def test_a_prediction_is_on_the_disk_before_its_rung_is_trained_and_stays(trained):
    sweep, seen = trained
    rows = climbed(sweep)
    last = f"size={SIZES[-1]}"
    assert [bool(seen[f"size={size}"]) for size in SIZES] == [False, False, False, True]
    assert seen[last][last] == rows[-1]["prediction"] and not any("prediction" in row for row in rows[:-1])
    assert math.isclose(rows[-1]["error"], 0.0, abs_tol=1e-6)  # all losses are 1 % above the planted ones
    assert climbed(sweep)[-1] == rows[-1]


def test_a_rung_that_was_trained_before_its_prediction_is_refused(trained):
    sweep, _ = trained
    climbed(sweep)
    ladder_main.os.remove(ladder_main.os.path.join(sweep.workdir, ladder_main.PREDICTIONS))
    with pytest.raises(ValueError, match="is finished, and predictions.json lacks it; remove that folder"):
        climbed(sweep)
