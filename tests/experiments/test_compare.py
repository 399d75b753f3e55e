"""Runs beside each other: what is read of them, and what is written."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import compare
from experiments.sweep import compare_page
from experiments.watch import records

ROOT = Path(__file__).parents[2]


def write(folder, lines, config=None):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def step(n, loss, **more):
    return {"step": n, "loss": loss, "tokens_seen": 100.0 * n, "step_time_s": 36.0, "expert_load": [[1.0, 2.0]], **more}


def test_metrics_lie_along_steps_tokens_and_hours(tmp_path):
    """Every second step is logged; an evaluation lies where the last step before it does."""
    run = write(tmp_path / "a", [{"step": 0, "eval_loss": 9.0}, step(2, 5), {"step": 3, "eval_loss": 6}, step(4, 4.5), step(6, 4)])
    for axis, x, held_out in (("step", [2, 4, 6], [0, 3]), ("tokens", [200, 400, 600], [0, 200]), ("time", [0.02, 0.04, 0.06], [0, 0.02])):
        found = records.series(run, ["loss", "eval_loss", "absent"], axis)
        assert list(found) == ["loss", "eval_loss"]
        np.testing.assert_allclose(found["loss"], [x, [5, 4.5, 4]])
        np.testing.assert_allclose(found["eval_loss"], [held_out, [9, 6]])


def test_steps_done_twice_count_once_and_the_later_ones(tmp_path):
    """Two restarts from earlier checkpoints, and a line that is not whole."""
    lines = [step(n, n) for n in range(1, 8)] + [step(n, 10 + n) for n in range(5, 7)] + [step(n, 20 + n) for n in range(6, 9)]
    run = write(tmp_path / "a", [*lines, '{"step": 9, "los'])
    x, loss = records.series(run, ["loss"])["loss"]
    assert x.tolist() == [1, 2, 3, 4, 5, 6, 7, 8] and loss.tolist() == [1, 2, 3, 4, 15, 26, 27, 28]
    hours, _ = records.series(run, ["loss"], "time")["loss"]
    np.testing.assert_allclose(hours, np.arange(1, 9) / 100)


@pytest.mark.parametrize("odd", ['{"step": 3, "loss": NaN}\n', '{"step": 3, "loss": [1]}\n', "not json\n", "3\n"])
def test_lines_that_the_fast_reader_refuses_are_read_all_the_same(tmp_path, odd):
    run = write(tmp_path / "a", [step(1, 1.5), odd, step(4, 2)])
    x, loss = records.series(run, ["loss"])["loss"]
    assert x.tolist() == [1, 4] and loss.tolist() == [1.5, 2]


def test_smoothing_is_the_mean_of_the_last_ones_and_thinning_keeps_the_ends():
    values = np.arange(10.0) ** 2
    np.testing.assert_allclose(records.smoothed(values, 3), [values[max(0, i - 2) : i + 1].mean() for i in range(10)])
    np.testing.assert_array_equal(records.smoothed(values, 1), values)
    x, kept = records.thinned(np.arange(1000), np.arange(1000), 7)
    assert len(x) == 7 and x[0] == 0 and x[-1] == 999 and (x == kept).all()


def test_smoothing_leaves_evaluations_as_they_are(tmp_path):
    """There are few of them, and the mean of the last five would lie far above the last."""
    lines = [{"step": 0, "eval_loss": 9.0}]
    for n in range(1, 11):
        lines += [step(n, 10.0 - n)] + [{"step": n, "eval_loss": 10.0 - n}] * (n % 5 == 0)
    run, out = write(tmp_path / "a", lines), tmp_path / "out"
    command = [sys.executable, "-m", "experiments.compare", run, "--smooth=5", f"--output={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    curves = data_of((out / "compare.html").read_text())["curves"]
    assert curves["eval_loss"]["a"] == [[0, 5, 10], [9, 5, 0]] and curves["loss"]["a"][1][-1] == 2
    assert done.stdout.splitlines()[1].split() == ["a", "0.0000", "0.0000"]


def data_of(page):
    """The data that the script of a page draws."""
    start = page.index("const data = ") + len("const data = ")
    return json.loads(page[start : page.index(";\n", start)])


def test_a_page_and_pictures_are_written(tmp_path):
    a = write(tmp_path / "sweep" / "lr=1", [step(1, 2.0), step(2, 1.0)], {"optim": {"lr": 1}, "train": {"seed": 0}})
    b = write(
        tmp_path / "sweep" / "<b>&", [step(1, 3.0), {"step": 1, "eval_loss": 2.5}], {"optim": {"lr": "</script>"}, "train": {"seed": 0}}
    )
    out = tmp_path / "out"
    command = [sys.executable, "-X", "importtime", "-m", "experiments.compare", a, b, f"--output={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not re.search(r"\| +mindspore$", done.stderr, re.MULTILINE)  # it takes seconds to load
    assert [line.split() for line in done.stdout.splitlines()[:3]] == [
        ["run", "loss", "eval_loss"],
        ["lr=1", "1.0000"],
        ["<b>&", "3.0000", "2.5000"],
    ]
    assert "optim.lr: " in done.stdout and "train.seed" not in done.stdout
    assert sorted(path.name for path in out.iterdir()) == ["compare.html", "eval_loss.png", "loss.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in out.glob("*.png"))
    page = (out / "compare.html").read_text()
    assert page.count("</script>") == 1 and "<b>" not in page and "&lt;b&gt;&amp;" in page and "http" not in page
    data = data_of(page)
    assert data["curves"]["loss"] == {"lr=1": [[1, 2], [2, 1]], "<b>&": [[1], [3]]} and data["names"] == ["lr=1", "<b>&"]


def test_what_is_not_a_number_is_a_gap():
    page = compare_page.page({"loss": {"a": (np.array([1.0, 2]), np.array([np.inf, 1 / 3]))}}, {"k": ["@DATA@"]}, ["a"], "step", 5)
    assert '{"loss":{"a":[[1.0,2.0],[null,0.333333]]}}' in page and "<td>@DATA@</td>" in page and "the mean of 5" in page


@pytest.mark.extended
def test_all_that_a_sweep_writes_may_be_given(tmp_path):
    """As `runs/lr/*`, with its logs and tables, or as the sweep's folder."""
    sweep = tmp_path / "lr"
    for name in ("lr=1", "lr=2"):
        write(sweep / name, [step(1, 2.0)], {"optim": {"lr": name}})
    (sweep / "lr=3").mkdir()  # not begun
    (sweep / "logs").mkdir()
    (sweep / "table.md").write_text("")
    every = sorted(map(str, sweep.iterdir()))
    for given, left_out in ((every, ["logs", "lr=3", "table.md"]), ([str(sweep)], [])):
        command = [sys.executable, "-m", "experiments.compare", *given, f"--output={tmp_path / 'out'}", "--metric=loss"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        if left_out:
            assert (
                lines.pop(0)
                == f"left out {', '.join(str(sweep / name) for name in left_out)}: no folder of a run or of a sweep has this name"
            )
        assert [line.split() for line in lines[:3]] == [["run", "loss"], ["lr=1", "2.0000"], ["lr=2", "2.0000"]]


@pytest.mark.extended
def test_mistakes_are_named(tmp_path):
    a = write(tmp_path / "a", [step(1, 2.0)])
    for arguments, message in (
        ([], "nothing to compare"),
        ([str(tmp_path / "none")], "has no metrics.jsonl; give the folder of a run, its --workdir, or of a sweep"),
        ([a, "--metric=lss"], "--metric=lss: none of the runs has it"),
        ([a, a], "is given twice"),
    ):
        done = subprocess.run([sys.executable, "-m", "experiments.compare", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr


def test_many_values_are_counted():
    assert compare.values_of([3, 10, 2, 2]) == "2, 3, 10"
    assert compare.values_of(range(100)).endswith("7, ... (100 in all)")


def test_runs_that_differ_in_their_seed_alone_have_one_colour_and_a_band(tmp_path):
    for lr, seed, losses in ((1, 0, (4, 2)), (1, 1, (6, 3)), (2, 0, (5, 5))):
        lines = [step(10 * (i + 1), loss) for i, loss in enumerate(losses)]
        write(tmp_path / "s" / f"lr={lr},seed={seed}", lines, {"optim": {"lr": lr}, "train": {"seed": seed}})
    command = [sys.executable, "-m", "experiments.compare", str(tmp_path / "s"), "--metric=loss", f"--output={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / "out" / "compare.html").read_text()
    data = data_of(page)
    assert data["groups"] == [0, 0, 1] and data["bands"] == {"loss": {"0": [[10, 20], [5, 2.5], [4, 2], [6, 3]]}}
    assert "Runs that differ in train.seed alone have one colour" in page
    lines = {name: tuple(map(np.array, line)) for name, line in data["curves"]["loss"].items()}
    axes = compare_page.draw(lines, "loss", "tokens", dict(zip(data["names"], data["groups"])), 20).axes[0]
    assert [line.get_label() for line in axes.lines] == ["lr=1,seed=0 and 1 other seeds: mean and range", "lr=2,seed=0"]
    assert axes.get_ylabel() == "loss, mean of 20" and axes.get_xlabel() == "tokens seen" and len(axes.collections) == 1


def test_bands_lie_where_all_seeds_have_points():
    lines = {"a": (np.array([1.0, 3, 5]), np.array([1.0, 3, 5])), "b": (np.array([2.0, 4]), np.array([0.0, 2]))}
    ((x, mean, low, high),) = compare_page.bands(lines, {"a": 0, "b": 0}).values()
    assert x.tolist() == [2, 3, 4] and low.tolist() == [0, 1, 2] and high.tolist() == [2, 3, 4] and mean.tolist() == [1, 2, 3]
    assert compare_page.bands(lines, {"a": 0, "b": 1}) == {}


def test_runs_of_one_config_keep_their_colours():
    assert compare_page.groups({}, ["a", "b"]) == {"a": 0, "b": 1}
    assert compare_page.groups({"train.seed": [0, 1]}, ["a", "b"]) == {"a": 0, "b": 0}


TICKS = """
const found = [ticks(0, 400, 8), ticks(2.37, 6.81, 6), ticks(0.0012, 0.0019, 6), ...[[2.4, 6.3], [0.03, 6]].map((pair) => {
  const [low, high] = pair.map(Math.log10);
  return powers(low, high).map((y) => Number((10 ** y).toPrecision(6)));
})];
console.log(JSON.stringify(found));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to run the page's script")
def test_ticks_are_round_numbers_inside_the_picture():
    functions = compare_page.PAGE[compare_page.PAGE.index("function ticks") : compare_page.PAGE.index("function draw()")]
    out = subprocess.run(["node", "-e", functions + TICKS], capture_output=True, text=True, check=True).stdout
    x, y, small, near, far = json.loads(out)
    assert x == [0, 50, 100, 150, 200, 250, 300, 350, 400] and y == [3, 4, 5, 6] and small == [0.0012, 0.0014, 0.0016, 0.0018]
    assert near == [3, 4, 5, 6] and far == [0.05, 0.1, 0.2, 0.5, 1, 2, 5]
