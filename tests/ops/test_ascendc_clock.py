"""The emulator's clock: published times of public kernels are predicted, and a run for its time alone takes as long as one with numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from ops.ascendc import build, clock, measure
from tests.ops.test_references import draw

SOURCE = Path(__file__).parent / "published.cc"
HALF, ALL = "float16", 8192 * 8192


def copies(kernel, rows, columns, blocks):
    matrix = (12288, 12288), HALF
    return _published(kernel, [matrix], [((1,), HALF)], [rows, columns, 12288, blocks])


def addition(buffers, piece, blocks):
    array = (ALL,), HALF
    return _published("addition", [array, array], [array], [buffers, piece, ALL, blocks])


def _published(kernel, inputs, outputs, attrs):
    return clock.predict(build.built("published", f'#include "{SOURCE}"\n', (SOURCE,)), kernel, inputs, outputs, attrs)


def product(n):
    square = ((n, n), HALF), ((1, n, n), HALF), np.array([n], np.int32)
    return clock.predict(build.emulated("grouped_matmul"), "qwen_grouped_matmul", list(square), [((n, n), HALF)])


def attention(queries, keys):
    family, name, inputs, outputs, attrs, _ = clock.attention(1, keys, 1, heads=1, in_order=0)
    q, lse, order = ((1, queries, 1, 128), "bfloat16"), ((1, 1, queries), "float32"), np.full((1, queries), keys, np.int32)
    inputs = [q, *inputs[1:3], np.ones((1, queries), np.int32), inputs[4], order, inputs[6]]
    return clock.predict(build.emulated(family), name, inputs, [q, lse], attrs)


def of_pipe(made, pipe):
    """The time of one pipe of a core, as if it were the run's."""
    return {"seconds": made["seconds"] * made["pipes"][pipe]["mean"]}


SLOW = pytest.mark.slow
# Microseconds in the cores, without the launch, measured on A2 (910B). [copy], [add], [matmul], [arch] and [fa]: see ops/emulator/clock.h.
# The product and attention are our kernels: of the same sizes as the published ones and built like them, but not the same.
FIGURES = {
    "copies into UB, 64 x 1024 [copy]": (lambda: copies("copies", 64, 1024, 48), 202.7, SLOW),
    "copies into UB, 64 x 64 [copy]": (lambda: copies("copies", 64, 64, 48), 220.8, SLOW),
    "copies into UB, 1 x 64 [copy]": (lambda: copies("copies", 1, 64, 48), 548.2, SLOW),
    "copies into L1, 64 x 64 [copy]": (lambda: copies("copies_to_l1", 64, 64, 24), 283.5, SLOW),
    "copies into L1, 64 x 256 [copy]": (lambda: copies("copies_to_l1", 64, 256, 24), 214.5, ()),
    "addition, one core, 4096 at a time [add]": (lambda: addition(1, 4096, 1), 6909.1, SLOW),
    "addition, 4096 at a time [add]": (lambda: addition(1, 4096, 48), 297.1, SLOW),
    "addition, 16384 at a time [add]": (lambda: addition(1, 16384, 48), 261.5, ()),
    "addition, 16256, two buffers [add]": (lambda: addition(2, 16256, 48), 257.6, SLOW),
    "its vector unit [add]": (lambda: of_pipe(addition(1, 16384, 48), "vector core vector"), 12.85, ()),
    "product of 6144^3 [arch]": (lambda: product(6144), 1506.0, ()),
    "product of 8192^3 [matmul]": (lambda: product(8192), 3636.9, SLOW),
    "its cube [matmul]": (lambda: of_pipe(product(8192), "cube core cube"), 3082.2, SLOW),
    "its loads into L0 [matmul]": (lambda: of_pipe(product(8192), "cube core MTE1"), 2553.1, SLOW),
    "attention, 4,096 x 4,096 [fa]": (lambda: attention(4096, 4096), 88.9, ()),
    "attention, 16,384 x 16,384 [fa]": (lambda: attention(16384, 16384), 909.1, SLOW),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=figure[2]) for name, figure in FIGURES.items()])
def test_published_times_are_predicted_within_a_quarter(name):
    run, published, _ = FIGURES[name]
    assert abs(1e6 * run()["seconds"] / published - 1) < 0.25


def small_attention():
    length = 300
    q, k, v = draw(1, length, 2, 32), draw(1, length, 1, 32), draw(1, length, 1, 32)
    segment, order = np.sort(np.arange(length) % 3).astype(np.int32)[None], np.arange(length, dtype=np.int32)[None]
    outputs = [np.empty_like(q), np.empty((1, 2, length), np.float32)]
    return "attention", "qwen_attention", [q, k, v, segment, segment, order, order], outputs, [0.3, 1]


def small_permute():
    x, expert = draw(70, 40), np.argsort(draw(70, 6), 1)[:, :2].astype(np.int32)
    outputs = [np.empty((140, 1, 40), np.float32), np.empty(140, np.int32), np.empty(140, np.int32)]
    return "routing", "qwen_permute", [x, expert], outputs, [6]


@pytest.mark.parametrize("case", [small_attention, small_permute])
def test_a_run_for_its_time_alone_takes_as_long_as_one_with_numbers(case):
    family, name, inputs, outputs, attrs = case()
    runs = [clock.predict(build.emulated(family), name, inputs, outputs, attrs, 2, mode) for mode in (clock.TIMED, clock.TIME_ALONE)]
    assert runs[0] == runs[1] and runs[0]["cycles"] > 0


def test_a_trace_shows_what_each_pipe_did_and_the_critical_path_is_all_of_the_time(tmp_path):
    family, name, inputs, outputs, attrs = small_attention()
    made = clock.predict(build.emulated(family), name, inputs, outputs, attrs, 2, trace=tmp_path / "trace.json")
    assert sum(made["path"].values()) == pytest.approx(1, abs=0.01)
    events = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
    ends = [e["ts"] + e["dur"] for e in events]
    assert max(ends) == pytest.approx(1e6 * made["seconds"], rel=0.02)
    pipes = {}
    for e in events:
        pipes.setdefault((e["pid"], e["tid"]), []).append(e["ts"])
    assert len(pipes) > 10 and all(begins == sorted(begins) for begins in pipes.values())


CASES = clock.cases(clock.SMALL)
QUICK = ("permute", "gradient of RMS norm", "attention, 2 x 150, causal")


@pytest.mark.parametrize("title", [title if title in QUICK else pytest.param(title, marks=SLOW) for title in CASES])
def test_an_operator_is_compared_with_the_emulator(title, monkeypatch):
    """As `python -m ops.ascendc.measure` does it on a chip. Here MindSpore runs the emulated kernel, and one number of it is changed."""
    assert measure._near(title, CASES[title])
    run = measure._run

    def changed(*args):
        found = run(*args)
        found[-1].ravel()[0] += 1 + np.abs(found[-1]).max()
        return found

    monkeypatch.setattr(measure, "_run", changed)
    assert not measure._near(title, CASES[title])
