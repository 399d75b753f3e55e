"""Speculation by prompt lookup: the tokens are those without it, also drawn ones, and neighbours change no bit."""

import numpy as np
import pytest

from ops.registry import Kernels
from qwen3.engine import Engine, Request
from qwen3.lookup import Lookup
from tests.qwen3.test_engine import prompts, serve, tokens
from tests.tiny import DENSE, KINDS, random_params

COUNT = 24


@pytest.fixture(scope="module")
def params():
    return random_params(DENSE)


def engine(params, cfg=DENSE, slots=3, speculate=4, **options):
    return Engine(params, cfg, slots=slots, length=96, prefill_chunk=8, page=8, speculate=speculate, **options)


def repeating(lengths=(7, 3, 12, 5)):
    """Prompts that say everything twice, so that something is guessed."""
    return [[*p, *p, *p[:2]] for p in prompts(DENSE, lengths)]


def all_of(e, requests, most=(32,)):
    return [[(x.token, x.logprob, x.top_logprobs, x.finish_reason) for x in events] for events in serve(e, requests, most)]


def test_greedy_texts_are_those_without_speculation(params):
    requests = [Request(p, COUNT) for p in repeating()]
    want = tokens(serve(engine(params, speculate=0), requests))
    for most in ((32,), (1, 3)):
        e = engine(params)
        assert tokens(serve(e, requests, most)) == want
        assert 0 < e.totals.right_tokens < e.totals.guessed_tokens
        assert e.totals.decode_tokens == len(requests) * (COUNT - 1) and e.cache.blocks.used() == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernels", [None, Kernels()], ids=["fused", "reference"])
def test_texts_of_every_kind_of_model_are_those_without_speculation(kind, kernels):
    cfg, params = KINDS[kind], random_params(KINDS[kind])
    requests = [Request(p, COUNT) for p in repeating()]
    e = engine(params, cfg, kernels=kernels)
    assert tokens(serve(e, requests)) == tokens(serve(engine(params, cfg, kernels=kernels, speculate=0), requests))
    assert e.totals.guessed_tokens > 0


def test_drawn_texts_are_those_of_their_seed(params):
    requests = [Request(p, COUNT, temperature=0.3, top_p=0.95, seed=i) for i, p in enumerate(repeating())]
    e = engine(params)
    assert tokens(serve(e, requests)) == tokens(serve(engine(params, speculate=0), requests))
    assert 0 < e.totals.right_tokens < e.totals.guessed_tokens


@pytest.mark.extended
def test_tokens_after_a_guess_are_distributed_as_the_model_says(params):
    """Chi squared: of the token that was guessed, and of the one after it where the guess was right."""
    n, k = 400, 4
    (near,) = _distributions(params, [[5, 9, 2]], k)
    (follow,) = _distributions(params, [[5, 9, 2, max(near, key=near.get)]], k)
    pairs = [(one, two) for one in near for two in follow]
    texts = [[2, one, two, 5, 9, 2] for one, two in pairs]  # after `one` it guesses `two`
    first, second = _distributions(params, texts, k), _distributions(params, [[*t, t[1]] for t in texts], k)
    best = max(range(len(pairs)), key=lambda i: first[i].get(pairs[i][0], 0) * min(second[i].get(pairs[i][1], 0), 0.5))
    prompt, (one, two) = texts[best], pairs[best]
    e = engine(params, slots=8)
    served = tokens(serve(e, [Request(prompt, 3, temperature=1.0, top_k=k, seed=1, sample=i) for i in range(n)]))
    guessed = [row[1] for row in served if row[0] == one]
    assert len(guessed) > 50 and 0.1 < np.mean([token == two for token in guessed]) < 0.9
    assert e.totals.guessed_tokens >= len(guessed) and e.totals.right_tokens >= guessed.count(two) // 2
    assert _chi_squared(guessed, second[best]) < 2 * k + 10  # chance alone gives more once in a thousand times
    right = [row[2] for row in served if row[:2] == [one, two]]
    (third,) = _distributions(params, [[*prompt, one, two]], k)
    assert len(right) > 20 and _chi_squared(right, third) < 2 * k + 10


def _distributions(params, texts, k):
    """For each text {token: probability} of the next token, of the k likeliest."""
    found = []
    for (event,) in serve(engine(params, speculate=0), [Request(text, 1, logprobs=k) for text in texts]):
        p = np.exp([logprob for _, logprob in event.top_logprobs])
        found.append(dict(zip((token for token, _ in event.top_logprobs), p / p.sum())))
    return found


def _chi_squared(drawn, probability):
    assert set(drawn) <= set(probability)
    expected = np.array(list(probability.values())) * len(drawn)
    observed = np.array([drawn.count(token) for token in probability])
    return float(((observed - expected) ** 2 / expected)[expected > 5].sum())


@pytest.mark.extended
def test_neighbours_and_places_in_line_change_no_bit(params):
    """Also of rows that gave their pages back, and of those that are steered."""
    kinds = (
        {},
        {"temperature": 0.7, "seed": 4},
        {"repetition_penalty": 1.2},
        {"frequency_penalty": 0.2, "min_tokens": 3, "stop_ids": (7, 30)},
    )
    requests = [Request(p, COUNT, logprobs=2, **kind) for p, kind in zip(repeating(), kinds)]
    alone = [all_of(engine(params), [request])[0] for request in requests]
    for order, most, room in (((0, 1, 2, 3), (32,), None), ((3, 1, 0, 2), (1, 4), None), ((0, 1, 2, 3), (5,), 80)):
        e = engine(params, cache_tokens=room)
        assert all_of(e, [requests[i] for i in order], most) == [alone[i] for i in order]
        assert (e.totals.preempted > 0) == (room is not None) and e.cache.blocks.used() == 0


@pytest.mark.extended
def test_a_text_ends_where_it_would_end_without_guesses(params):
    plain = tokens(serve(engine(params, speculate=0), [Request(p, COUNT) for p in repeating()]))
    requests = [Request(p, COUNT, stop_ids=(row[n],)) for p, row, n in zip(repeating(), plain, (20, 9, 3, 15))]
    want = all_of(engine(params, speculate=0), requests)
    assert all_of(engine(params), requests) == want and {events[-1][3] for events in want} == {"stop"}
    cut = all_of(engine(params, cache_tokens=40), [Request(repeating()[0], 99)])[0]
    assert cut[-1][3] == "length" and len(cut) == 40 - 16 + 1


def test_a_negative_number_of_guesses_is_refused(params):
    with pytest.raises(ValueError, match="speculate=-1 must be 0 or more"):
        engine(params, speculate=-1)


# Lookup alone


def test_a_draft_is_what_came_after_the_last_tokens_most_lately():
    text = Lookup([1, 2, 3, 4, 9, 2, 3, 5, 7, 2, 3], 4)
    assert text.draft(9) == [5, 7, 2, 3] and text.draft(1) == [5] and text.draft(0) == []
    for token in (4, 9, 2):  # the four last tokens count before the two last
        text.take(token)
    assert text.draft(2) == [3, 5]
    assert Lookup([1, 2, 3], 4).draft(4) == [] == Lookup([1], 4).draft(4) == Lookup([], 4).draft(4)


def test_a_text_that_repeats_itself_is_guessed_to_go_on():
    assert Lookup([8, 1, 2, 1, 2], 5).draft(5) == [1, 2, 1, 2, 1]


def test_wrong_guesses_make_the_next_draft_shorter():
    text = Lookup([1, 2, 3, 4, 5, 6, 7, 8, 1, 2], 6)
    lengths = []
    for drafted, right in ((6, 0), (1, 1), (6, 2), (5, 5), (0, 0)):
        text.learn(drafted, right)
        lengths.append(len(text.draft(9)))
    assert lengths == [1, 6, 5, 6, 6]
