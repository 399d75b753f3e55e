"""The checkpoint benchmark, on a small state: what it measures is there, and fits together."""

import os

import pytest

from experiments.bench.checkpoint import bench_checkpoint


def test_saving_is_measured_in_turns_with_copies_of_as_many_bytes(tmp_path):
    figures = bench_checkpoint(0.02, 2, str(tmp_path))
    assert figures["bytes"] == pytest.approx(2e7, rel=0.5) and figures["arrays"] >= 2 and os.listdir(tmp_path) == []
    for what in ("copy", "save", "restore"):
        assert figures[f"{what}_gb_per_s"] == pytest.approx(figures["bytes"] / 1e9 / figures[f"{what}_s"])
    assert figures["step_blocked_s"] > 0 and figures["save_vs_copy"] > 0
