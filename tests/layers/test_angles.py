"""Rotary frequencies of YaRN: those that transformers gave, in every spelling of its options."""

import json
from pathlib import Path

import numpy as np
import pytest

from layers.rope import inv_freq
from qwen3.config import Qwen3Config
from tests.golden.make_peers import ROTARY, YARN
from tests.tiny import DENSE

STORED = json.loads((Path(__file__).parents[1] / "golden" / "peers" / "yarn.json").read_text())


@pytest.mark.parametrize("number", range(len(YARN)))
def test_yarn_frequencies_and_factor_are_those_that_transformers_gave(number):
    rope = {"rope_type": "yarn", "rope_theta": 1e4, **YARN[number]}
    usual = {key: value for key, value in DENSE.to_hf().items() if key not in ROTARY}
    found, factor = inv_freq(Qwen3Config.from_hf({**usual, **ROTARY, "num_key_value_heads": 2, "rope_parameters": rope}))
    np.testing.assert_allclose(found, STORED[number][0], rtol=2e-6)
    assert factor == pytest.approx(STORED[number][1], rel=1e-12)


def test_the_options_of_yarn_each_change_something():
    """So that none can be dropped, or taken for another, unnoticed. Of mscale alone transformers takes no notice."""
    same = json.dumps(STORED[YARN.index({**YARN[0], "mscale": 0.7})])
    assert same == json.dumps(STORED[0]) and len({json.dumps(found) for found in STORED}) == len(STORED) - 1
