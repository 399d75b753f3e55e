"""Continuous batching: the tokens of transformers and of `generate`, whatever runs beside them; seeds, stops, refusals, memory."""

import gc
import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

from ops.registry import Kernels
from qwen3 import hf
from qwen3.engine import Engine, Request
from qwen3.generate import generate
from qwen3.model import forward
from tests.tiny import DENSE, KINDS, documents, random_params

GOLDEN = Path(__file__).parents[1] / "golden"
CONTINUATIONS = json.loads((GOLDEN / "continuations.json").read_text())
USUAL = ("dense_tied", "qwen2_bias", "moe_norm")
LENGTHS = (7, 3, 25, 1, 12, 5, 8)
DRAWN = {"temperature": 1.0, "top_k": 30, "top_p": 0.95, "seed": 3}
COUNT = 9


@pytest.fixture(scope="module")
def params():
    return random_params(DENSE)


def prompts(cfg, lengths=LENGTHS):
    return [row.tolist() for row in documents(cfg, lengths)]


def engine(params, cfg=DENSE, slots=3, **options):
    """Of few slots and narrow chunks, so that prompts take several and requests wait; one shape for all tests, which share its graphs."""
    return Engine(params, cfg, slots=slots, length=64, prefill_chunk=8, **options)


def serve(engine, requests, most=(32,)):
    """Each request's events, in the order of the requests. most: of the steps, in turn."""
    numbers, events, at = [engine.submit(request) for request in requests], {}, 0
    while engine.busy():
        for event in engine.step(most[at % len(most)]):
            events.setdefault(event.id, []).append(event)
        at += 1
    return [events.get(number, []) for number in numbers]


def tokens(served):
    return [[event.token for event in events] for events in served]


@pytest.mark.extended(but=("dense_tied",))
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in USUAL else pytest.mark.slow) for name in CONTINUATIONS])
def test_greedy_tokens_are_those_of_transformers(name):
    """Of prompts of mixed lengths, more of them than slots."""
    cfg, params = hf.load(GOLDEN / "hf" / name)
    cases = CONTINUATIONS[name]
    served = serve(engine(params, cfg), [Request(case["prompt"], len(case["greedy"])) for case in cases])
    assert tokens(served) == [case["greedy"] for case in cases]
    assert {events[-1].finish_reason for events in served} == {"length"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTINUATIONS)
def test_continuations_come_from_their_script(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.golden.make_continuations import continuations

    assert continuations(GOLDEN / "hf" / name) == CONTINUATIONS[name]


@pytest.mark.parametrize("kind", ["dense", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "dense")])
@pytest.mark.parametrize("kernels", [None, pytest.param(Kernels(), marks=pytest.mark.slow)], ids=["fused", "reference"])
def test_samples_are_those_of_generate(kind, kernels):
    """Drawn, on the device and on the host: sample number b is row b of a batch of one prompt."""
    cfg, params = KINDS[kind], random_params(KINDS[kind])
    prompt = prompts(cfg)[0]
    rows = generate(params, [prompt] * 4, cfg, COUNT, **DRAWN)
    requests = [Request(prompt, COUNT, sample=b, **DRAWN) for b in range(4)]
    assert tokens(serve(engine(params, cfg, kernels=kernels), requests)) == rows
    on_host = serve(engine(params, cfg, kernels=kernels), [Request(prompt, COUNT, sample=b, logprobs=0, **DRAWN) for b in range(4)])
    assert tokens(on_host) == rows


def test_neither_order_nor_neighbours_change_a_bit(params):
    """With as many slots: of one request, its tokens and the probabilities of each."""
    requests = [Request(p, 5 + i, seed=i, temperature=1.0, top_p=0.9, logprobs=2) for i, p in enumerate(prompts(DENSE))]
    alone = [serve(engine(params), [request])[0] for request in requests]
    for order, most in ((range(7), (32,)), ((4, 0, 6, 2, 1, 5, 3), (1, 7, 3))):
        served = serve(engine(params), [requests[i] for i in order], most)
        for i, events in zip(order, served):
            assert [(e.token, e.logprob, e.top_logprobs) for e in events] == [(e.token, e.logprob, e.top_logprobs) for e in alone[i]]
            assert len(events) == 5 + i
    other_seed = serve(engine(params), [Request(requests[2].prompt, 7, seed=99, temperature=1.0, top_p=0.9)])
    assert tokens(other_seed) != tokens([alone[2]])


@pytest.mark.extended
def test_draws_are_distributed_as_the_model_says(params):
    """The first token, drawn on the host, and the second, drawn on the device: chi squared of 300 samples, cut to the 4 likeliest."""
    n, k, prompt = 300, 4, [5, 9, 2]
    served = tokens(serve(engine(params, slots=8), [Request(prompt, 2, temperature=0.8, top_k=k, seed=1, sample=i) for i in range(n)]))
    first = [row[0] for row in served]
    usual = max(set(first), key=first.count)
    for drawn, before in ((first, prompt), ([b for a, b in served if a == usual], [*prompt, usual])):
        logits = forward(params, ms.Tensor([before], ms.int32), DENSE)[0].asnumpy()[0, -1].astype(np.float64) / 0.8
        kept = np.argsort(-logits)[:k]
        p = np.exp(logits[kept] - logits[kept].max())
        expected = p / p.sum() * len(drawn)
        observed = np.array([drawn.count(token) for token in kept])
        assert observed.sum() == len(drawn) > 50
        likely = expected > 5
        assert (((observed - expected) ** 2 / expected)[likely]).sum() < 2 * k + 10  # chance alone gives more once in a thousand times


def test_stops_end_a_row_and_let_the_next_one_in(params):
    plain = tokens(serve(engine(params), [Request(p, 30) for p in prompts(DENSE)]))
    stops = [(row[n], 60) for row, n in zip(plain, (0, 3, 12, 29, 6, 1, 20))]
    served = serve(engine(params), [Request(p, 30, stop_ids=stop) for p, stop in zip(prompts(DENSE), stops)], (32, 5))
    for row, stop, events in zip(plain, stops, served):
        upto = next((i for i, token in enumerate(row) if token in stop), 29)
        assert [e.token for e in events] == row[: upto + 1]
        assert [e.finish_reason for e in events] == [None] * upto + ["stop"]


@pytest.mark.extended(but=("True",))
@pytest.mark.parametrize("by_host", [False, True])
def test_a_row_that_stops_lets_the_next_one_in_before_the_others_are_done(params, by_host):
    """Where others wait, a round of decoding ends with the first row that stops; else it goes on until the last one has."""
    more = {"logprobs": 0} if by_host else {}
    first, second, third = prompts(DENSE)[:3]
    (plain,) = tokens(serve(engine(params), [Request(second, 30)]))
    at = next(i for i in range(2, 9) if plain[i] not in plain[:i])
    for waiting, stays in ((True, True), (False, False)):
        e = engine(params, slots=2)
        long = e.submit(Request(first, 40, **more))
        short = e.submit(Request(second, 30, stop_ids=(plain[at],), **more))
        while len(e._decoding()) < 2:  # both prompts are read
            e.step(1)
        third_id = e.submit(Request(third, 3, **more)) if waiting else None
        events = e.step(32)
        ended = [event.id for event in events].index(short) if waiting else 0
        assert [event.finish_reason for event in events if event.id == short][-1] == "stop" and ended >= 0
        after_stop = sum(event.id == long for event in events[[i for i, x in enumerate(events) if x.id == short][-1] :])
        assert (after_stop <= 1) == stays, after_stop
        if waiting:
            assert third_id in [event.id for event in e.step(1)]


@pytest.mark.parametrize("by_host", [False, True])
def test_a_row_at_its_limit_lets_the_next_one_in_before_the_others_are_done(params, by_host):
    more = {"logprobs": 0} if by_host else {}
    first, second, third = prompts(DENSE)[:3]
    e = engine(params, slots=2)
    long, short = e.submit(Request(first, 40, **more)), e.submit(Request(second, 6, **more))
    while len(e._decoding()) < 2:  # both prompts are read
        e.step(1)
    third_id = e.submit(Request(third, 3, **more))
    ids = [event.id for event in e.step(32)]
    assert ids.count(long) <= 6 and short in ids and third_id in [event.id for event in e.step(1)]


def test_a_row_ends_where_the_cache_does(params):
    long, full = prompts(DENSE, (60, 64))
    served = serve(engine(params), [Request(long, 100), Request(full, 100)])
    assert [len(events) for events in served] == [5, 1]  # the last token needs no place
    assert all(events[-1].finish_reason == "length" for events in served)
    assert tokens(served)[0] == generate(params, [long], DENSE, 5)[0]


def test_a_cancelled_request_has_no_events_and_leaves_no_trace(params):
    requests = [Request(p, COUNT) for p in prompts(DENSE)]
    want = tokens(serve(engine(params), requests))
    e = engine(params)
    numbers = [e.submit(request) for request in requests]
    e.cancel(numbers[6])  # waiting
    found = {number: [event.token for event in e.step(1) if event.id == number] for number in numbers[:1]}
    e.cancel(numbers[0])  # running
    e.cancel(99)
    after = {number: [] for number in numbers}
    while e.busy():
        for event in e.step():
            after[event.id].append(event.token)
    assert found[numbers[0]] and not after[numbers[0]] and not after[numbers[6]]
    assert all(after[numbers[i]] == want[i][-len(after[numbers[i]]) :] and len(after[numbers[i]]) >= COUNT - 2 for i in range(1, 6))


def test_log_probabilities_and_penalty_are_their_formulas(params):
    prompt = prompts(DENSE)[4]
    (events,) = serve(engine(params), [Request(prompt, COUNT, repetition_penalty=1.7, logprobs=3)])
    seen = list(prompt)
    for event in events:
        logits = forward(params, ms.Tensor([seen], ms.int32), DENSE)[0].asnumpy()[0, -1].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum())
        assert event.logprob == pytest.approx(logprobs[event.token], abs=1e-4)
        assert [i for i, _ in event.top_logprobs] == np.argsort(-logits)[:3].tolist()
        assert [x for _, x in event.top_logprobs] == pytest.approx(np.sort(logprobs)[::-1][:3], abs=1e-4)
        penalised = logits.copy()
        for i in set(seen):
            penalised[i] = penalised[i] / 1.7 if penalised[i] > 0 else penalised[i] * 1.7
        assert event.token == penalised.argmax()
        seen.append(event.token)
    assert tokens([events]) != tokens(serve(engine(params), [Request(prompt, COUNT)]))


def test_a_step_reads_and_decodes_side_by_side(params):
    """A row that runs is not kept waiting by a long prompt that is read."""
    e = engine(params)
    first = e.submit(Request([1, 2, 3], 60))
    e.step(1)
    e.submit(Request(prompts(DENSE, (60,))[0], 4))
    events = e.step()  # 4 chunks of 8 tokens, not all of the prompt
    assert [event.id for event in events] == [first] * 4


def test_requests_leave_nothing_behind(params):
    """Nor do they make arrays of a cache anew; what a process takes in the long run, the benchmark measures."""
    e = engine(params)
    places = {array.data_ptr() for pair in e.cache.arrays for array in pair}
    requests = [Request(p, 4, logprobs=n, repetition_penalty=r) for p in prompts(DENSE) for n, r in ((None, 1), (2, 1.1))]
    serve(e, requests)
    e.cancel(e.submit(requests[0]))
    gc.collect()
    assert not [x for x in gc.get_objects() if type(x).__module__ == "qwen3.engine" and type(x).__name__ in ("_Row", "Event")]
    assert places == {array.data_ptr() for pair in e.cache.arrays for array in pair}
    assert not e.busy() and e.submit(requests[0]) == len(requests) + 1


@pytest.mark.parametrize("kind", ["dense", pytest.param("moe", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kernels", [None, pytest.param(Kernels(), marks=pytest.mark.slow)], ids=["fused", "reference"])
def test_a_row_without_finite_logits_fails_alone(kind, kernels):
    """At its prompt or at a token that is decoded, on the device or on the host; a later request in its slot is not touched."""
    poisoned, cfg = random_params(KINDS[kind]), KINDS[kind].replace(tie_embeddings=False)
    embedding = poisoned["embed"].asnumpy().copy()
    poisoned["lm_head"] = ms.Tensor(embedding.copy())
    embedding[60] = np.nan
    poisoned["embed"] = ms.Tensor(embedding)
    good = [[i for i in prompt if i != 60] for prompt in prompts(DENSE)[:4]]
    clean = {**poisoned, "embed": ms.Tensor(np.nan_to_num(embedding))}
    want = tokens(serve(engine(clean, cfg, kernels=kernels), [Request(p, COUNT) for p in good]))
    assert not any(60 in row for row in want)
    for more in ({}, {"logprobs": 0}):
        e = engine(poisoned, cfg, kernels=kernels)
        bad = [Request([5, 60, 7], COUNT, **more)]
        served = serve(e, [*bad, Request(good[0], COUNT), Request(good[1], COUNT), *bad, Request(good[2], COUNT), Request(good[3], COUNT)])
        assert [events[-1].finish_reason for events in served] == ["error", "length", "length", "error", "length", "length"]
        assert tokens(served[1:3] + served[4:]) == want
        e = engine(poisoned, cfg, kernels=kernels)
        number, other = e.submit(Request(good[0], COUNT, **more)), e.submit(Request(good[1], COUNT))
        while len(e._decoding()) < 2:
            e.step(1)
        next(row for _, row in e._decoding() if row.id == number).token = 60  # as if it had been drawn
        found = []
        while e.busy():
            found += e.step()
        assert [(event.id, event.finish_reason) for event in found if event.finish_reason] == [(number, "error"), (other, "length")]
        assert [event.token for event in found if event.id == other] == want[1][-len([1 for event in found if event.id == other]) :]


WRONG = [
    (dict(prompt=[]), "prompt is empty"),
    (dict(prompt=[1] * 65), "prompt of 65 tokens is longer than the cache of 64"),
    (dict(prompt=[61]), "ids outside the vocabulary of 61"),
    (dict(prompt=[-1]), "ids outside the vocabulary of 61"),
    (dict(max_new_tokens=0), "max_new_tokens=0 must be 1 or more"),
    (dict(temperature=-1), "temperature=-1"),
    (dict(top_p=0), "top_p=0"),
    (dict(repetition_penalty=0), "repetition_penalty=0 must be above 0"),
    (dict(logprobs=-1), "logprobs=-1 must be 0 or more"),
    (dict(logprobs=99), "logprobs=99 is more than the 61 tokens"),
]


@pytest.mark.parametrize("options, message", WRONG)
def test_requests_that_cannot_be_served_are_refused_by_name(params, options, message):
    e = engine(params)
    with pytest.raises(ValueError, match=message):
        e.submit(Request(**{"prompt": [1], **options}))
    assert not e.busy()


def test_an_engine_without_room_is_refused():
    with pytest.raises(ValueError, match="engine: slots=0 must be 1 or more"):
        engine({}, slots=0)
