"""Training steps of tiny models in which every op that has an AscendC kernel runs it, emulated: the losses are those of the references."""

import numpy as np
import pytest

from ops.ascendc import build
from tests.experiments.test_train import DENSE, MOE, make_config, run

STEPS = 3


def losses(cfg, name):
    asked = {f"ops.{op}": name for op in build.families()}
    return np.array([float(m["loss"]) for m in run(cfg, make_config(**asked), steps=STEPS)[0]])


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [DENSE.replace(num_layers=1), MOE], ids=["dense", "moe"])
def test_a_model_of_ascendc_kernels_trains_as_one_of_references(cfg, monkeypatch):
    """Losses of some 4 nats to 5 digits. Adam's steps are of one size whatever the gradient's, so parameters say less."""
    expected, used, emulated = losses(cfg, "reference"), set(), build.emulated

    def noted(family):
        used.add(family)
        return emulated(family)

    monkeypatch.setattr(build, "emulated", noted)
    found = losses(cfg, "ascendc")
    decoding = {"paged_attention", "paged_write"}
    assert used == set(build.families()) - decoding - (set() if cfg.num_experts else {"grouped_matmul", "routing"})
    assert expected[-1] < expected[0] - 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-5)
