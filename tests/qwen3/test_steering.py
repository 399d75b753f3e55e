"""Penalties, biases and least lengths, by their formulas and in the engine."""

import numpy as np
import pytest

from qwen3.engine import Engine, Request
from qwen3.steering import GuideError, Steering, steered
from tests.tiny import DENSE, random_params


def test_logits_are_changed_by_the_formulas_in_their_order():
    """The repetition penalty counts the prompt too, the others the answer alone."""
    request = Request(
        [1, 2],
        stop_ids=(6,),
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias=((3, 10.0), (4, -100.0)),
        min_tokens=4,
    )
    steering, logits = Steering(request, 8), np.array([1, 2, -2, 3, 4, 5, 6, -1], np.float32)
    for token in (2, 5, 5):
        steering.take(token)
    want = [1, 2 / 2, -2 * 2 - 0.5 - 0.25, 3 + 10, 4 - 100, 5 / 2 - 0.5 - 2 * 0.25, -np.inf, -1]
    np.testing.assert_array_equal(steering.adjust(logits, 3), np.array(want, np.float32))
    assert steering.adjust(logits, 4)[6] == 6 and logits[6] == 6  # the given logits stay


def test_only_what_steers_is_chosen_on_the_host():
    assert not steered(Request([1])) and not Request([1]).needs_logits
    for options in (
        {"presence_penalty": 0.1},
        {"frequency_penalty": -1},
        {"logit_bias": ((1, 0.0),)},
        {"min_tokens": 1},
        {"guide": Fails()},
    ):
        assert steered(Request([1], **options)) and Request([1], **options).needs_logits


class Fails:
    """A guide that has no third token, or no token at all."""

    def __init__(self, at=2):
        self.left = at

    def start(self):
        return Fails(self.left)

    def allowed(self, size):
        return np.full(size, self.left > 0)

    def take(self, token):
        self.left -= 1
        if self.left < 0:
            raise GuideError("too many")


@pytest.fixture(scope="module")
def engine():
    return Engine(random_params(DENSE), DENSE, slots=3, length=64, prefill_chunk=8)


def run(engine, requests):
    numbers, events = [engine.submit(request) for request in requests], {}
    while engine.busy():
        for event in engine.step():
            events.setdefault(event.id, []).append(event)
    return [events[number] for number in numbers]


def test_the_engine_steers_each_row_by_its_own_options(engine):
    """And the row beside them has its own tokens."""
    free = Request([3, 4, 5], 12)
    (alone,) = run(engine, [free])
    first = alone[0].token
    biased = Request([3, 4, 5], 12, logit_bias=((9, 1000.0),))
    varied = Request([3, 4, 5], 12, presence_penalty=1000.0)
    longer = Request([3, 4, 5], 12, stop_ids=(first,), min_tokens=5)
    got = run(engine, [free, biased, varied, longer])
    tokens = [[event.token for event in events] for events in got]
    assert tokens[0] == [event.token for event in alone]
    assert set(tokens[1]) == {9} and len(set(tokens[2])) == 12
    assert len(tokens[3]) >= 5 and first not in tokens[3][:4]


def test_a_guide_without_a_next_token_ends_its_text_alone(engine):
    free = Request([3, 4, 5], 8)
    (alone,) = run(engine, [free])
    for at in (0, 2):
        failed, other = run(engine, [Request([6, 7], 8, guide=Fails(at)), free])
        assert [event.finish_reason for event in failed] == [None] * at + ["guide"]
        assert [(event.token, event.finish_reason) for event in other] == [(event.token, event.finish_reason) for event in alone]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"presence_penalty": float("nan")}, "presence_penalty=nan must be a number"),
        ({"logit_bias": ((1, float("inf")),)}, "logit_bias"),
        ({"logit_bias": ((10**6, 1.0),)}, "logit_bias has ids outside the vocabulary"),
        ({"min_tokens": 9}, "min_tokens=9 must be from 0 to max_new_tokens=8"),
    ],
)
def test_options_out_of_range_are_refused(engine, options, words):
    with pytest.raises(ValueError, match=words):
        engine.submit(Request([1], 8, **options))
