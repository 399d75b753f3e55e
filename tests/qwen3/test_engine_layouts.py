"""Generation on several processes: the tokens of transformers and of one process, the same on every rank."""

import json

import numpy as np
import pytest

from tests.processes import run
from tests.qwen3.engine_layouts import LAYOUTS, int8_logits, tokens, with_adapters
from tests.qwen3.test_engine import CONTINUATIONS
from tests.tiny import assert_close

pytestmark = pytest.mark.extended

USUAL = ("tp2",)
GROUPS = [
    (2, USUAL),
    pytest.param((2, ("dp2 ep2", "tp2, drawn", "tp2, biases", "tp2, experts", "dp2")), marks=pytest.mark.slow),
    pytest.param((2, ("pp2", "pp2, drawn", "pp2, mixed layers")), marks=pytest.mark.slow),
    pytest.param((2, ("tp2, int8", "pp2, int8", "dp2 ep2, int8", "tp2, experts, int8")), marks=pytest.mark.slow),
    pytest.param((2, ("tp2, guesses", "pp2, guesses", "dp2 ep2, guesses")), marks=pytest.mark.slow),
    pytest.param((4, ("tp4 of 2 kv heads", "dp2 tp2 ep2", "dp2 tp2")), marks=pytest.mark.slow),
    pytest.param((4, ("pp2 tp2", "pp2 dp2 ep2")), marks=pytest.mark.slow),
]


def test_every_layout_is_in_a_group():
    assert sorted(LAYOUTS) == sorted(
        name for group in GROUPS for name in (group[1] if isinstance(group, tuple) and group[0] == 2 else group.values[0][1])
    )


@pytest.mark.extended
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_tokens_are_those_of_transformers_on_every_rank(group):
    nproc, names = group
    ranks = run("tests.qwen3.engine_layouts:main", nproc, json.dumps(names))
    for name in names:
        model, _, options = LAYOUTS[name]
        int8 = name.endswith("int8")
        want = tokens(model, {}, options, int8=int8) if options or int8 else [case["greedy"] for case in CONTINUATIONS[model]]
        for rank in ranks:
            np.testing.assert_array_equal(rank[name], want, err_msg=name)


@pytest.mark.extended
def test_weights_in_8_bits_give_the_logits_of_one_process():
    one = int8_logits({})
    for rank in run("tests.qwen3.engine_layouts:main_int8", 2):
        for name, logits in one.items():
            assert_close(logits, rank[name], 2e-6, name)


@pytest.mark.slow
def test_rows_choose_their_adapters_on_several_ranks():
    one = with_adapters({})
    for rank in run("tests.qwen3.engine_layouts:main_adapters", 2, json.dumps(["tp", "pp"])):
        for axis in ("tp", "pp"):
            np.testing.assert_array_equal(rank[axis], one, err_msg=axis)
