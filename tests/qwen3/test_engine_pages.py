"""The engine's paged cache: prompts that share blocks, rows that give their pages back, and how prompts share a batch."""

import mindspore as ms
import numpy as np
import pytest

from qwen3.cache import Blocks, Known, known_blocks
from qwen3.engine import Engine, Request
from tests.qwen3.test_engine import prompts, serve, tokens
from tests.tiny import DENSE, random_params

PAGE = 8


@pytest.fixture(scope="module")
def params():
    return random_params(DENSE)


def engine(params, slots=3, length=64, prefill_chunk=8, page=PAGE, **options):
    return Engine(params, DENSE, slots=slots, length=length, prefill_chunk=prefill_chunk, page=page, **options)


def heard(served):
    """All that the events of each request say."""
    return [[(event.token, event.logprob, event.finish_reason) for event in events] for events in served]


def unused(engine):
    """Whether no row has a page, and every page can be taken."""
    blocks = engine.cache.blocks
    return blocks.used() == 0 and blocks.available() == blocks.count


def test_prompts_that_begin_alike_read_what_they_share_once_and_keep_their_bits(params):
    shared = prompts(DENSE, (29,))[0]
    ends = [row for row in prompts(DENSE, (5, 1, 9, 3, 7, 2))]
    requests = [Request([*shared, *end], 6, logprobs=0) for end in ends]
    alone = engine(params, reuse=False)
    want = heard(serve(alone, requests))
    together = engine(params)
    assert heard(serve(together, requests)) == want
    first = len(shared) // PAGE * PAGE
    assert together.totals.reused_tokens >= first * (len(requests) - 1) > 0 == alone.totals.reused_tokens
    assert (
        together.totals.prefill_tokens + together.totals.reused_tokens
        == alone.totals.prefill_tokens
        == sum(len(r.prompt) for r in requests)
    )
    assert heard(serve(together, requests)) == want  # after all have ended, their blocks are still there
    assert unused(together) and unused(alone)


@pytest.mark.extended
def test_the_beginning_of_a_block_is_copied(params):
    """Also where the page that is copied is then the row's own, and only if the copy saves enough."""
    shared, ends = prompts(DENSE, (21,))[0], prompts(DENSE, (6, 7, 8))
    assert len({end[0] for end in ends}) == 3
    requests = [Request([*shared, *end], 4, logprobs=0) for end in ends]
    want = heard(serve(engine(params, reuse=False), requests))
    for tokens_of_cache in (None, 32):
        e = engine(params, slots=1, cache_tokens=tokens_of_cache)
        assert heard(serve(e, requests)) == want and unused(e)
        assert e.totals.reused_tokens == 2 * 21 and e.totals.prefill_tokens == 27 + 7 + 8
    e = engine(params, page=32)
    serve(e, [Request([*shared, *prompts(DENSE, (12,))[0]], 1), Request([*shared[:3], 1, 2], 1)])
    assert e.totals.reused_tokens == 0


@pytest.mark.extended
def test_samples_of_one_prompt_read_it_once(params):
    prompt = prompts(DENSE, (33,))[0]
    e = engine(params, slots=8)
    serve(e, [Request(prompt, 3, temperature=1.0, sample=i) for i in range(8)])
    assert e.totals.prefill_tokens == 33 + 7 * 1 and e.totals.reused_tokens == 7 * 32


def test_blocks_of_other_prompts_are_not_taken(params):
    """Equal blocks after other beginnings, and the block that has a prompt's last token."""
    a, b = prompts(DENSE, (8, 8))
    same = prompts(DENSE, (16,))[0]
    e = engine(params)
    serve(e, [Request([*a, *same], 2), Request([*b, *same], 2)])
    assert e.totals.reused_tokens == 0
    serve(e, [Request([*a, *same], 2)])
    assert e.totals.reused_tokens == 16  # of 24 tokens, as the last one's logits are wanted


@pytest.mark.extended
def test_rows_that_give_their_pages_back_end_with_the_same_texts(params):
    requests = [
        Request(p, 30, **more)
        for p, more in zip(prompts(DENSE, (20, 9, 14, 25)), ({}, {"temperature": 1.0, "seed": 3}, {"logprobs": 0}, {}))
    ]
    want = tokens(serve(engine(params), requests))
    for tokens_of_cache in (64, 80):
        e = engine(params, cache_tokens=tokens_of_cache)
        served = serve(e, requests, (4,))
        assert tokens(served) == want
        assert e.totals.preempted > 0 and unused(e)
        assert [events[-1].finish_reason for events in served] == ["length"] * 4


@pytest.mark.extended
def test_a_request_waits_for_pages_and_a_row_ends_where_the_cache_does(params):
    first, second = prompts(DENSE, (30, 20))
    e = engine(params, cache_tokens=40)
    served = serve(e, [Request(first, 99), Request(second, 4)])
    assert [len(events) for events in served] == [40 - 30 + 1, 4] and unused(e)
    assert e.length == 40
    with pytest.raises(ValueError, match="prompt of 41 tokens is longer than the cache of 40"):
        e.submit(Request([1] * 41))


@pytest.mark.extended
@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_cancelled_requests_leak_no_page(params, count):
    """Half of them, waiting, while they are read, and while they decode, where pages are short."""
    rng, e = np.random.default_rng(0), engine(params, slots=6, cache_tokens=160, prefill_chunk=16)
    shared, numbers, ended = prompts(DENSE, (16,))[0], [], set()
    for _ in range(count):
        prompt = [*shared[: rng.integers(0, 17)], *rng.integers(1, DENSE.vocab_size, rng.integers(1, 20)).tolist()]
        numbers.append(e.submit(Request(prompt, int(rng.integers(1, 12)))))
    cancelled = set(rng.permutation(numbers)[: count // 2].tolist())
    left = sorted(cancelled)
    while e.busy():
        ended |= {event.id for event in e.step(int(rng.integers(1, 5))) if event.finish_reason}
        for number in [n for n in left if n in ended or n < max(ended, default=0) + 8][:3]:
            e.cancel(number)
            left.remove(number)
    assert set(numbers) - cancelled <= ended and len(cancelled - ended) > count // 8
    assert unused(e) and not e._waiting


def steps_to_first_token(e, number):
    for step in range(1, 1000):
        if any(event.id == number for event in e.step(1)):
            return step


def test_a_short_prompt_does_not_wait_for_a_long_one_nor_does_it_stop_it(params):
    long = np.random.default_rng(0).integers(1, DENSE.vocab_size, 500).tolist()
    e = engine(params, length=512, prefill_chunk=32, reads=1)
    idle = steps_to_first_token(e, e.submit(Request([1, 2, 3, 4], 1)))
    first, short = e.submit(Request(long, 1)), e.submit(Request([1, 2, 3, 4], 1))
    assert steps_to_first_token(e, short) <= idle + 3
    steps = 1
    while not any(event.id == first for event in e.step(1)):  # short prompts without end
        e.submit(Request([5, 6, 7, steps % 50 + 1] * 8, 1))
        steps += 1
    assert steps <= 500 // 8 + 1


def test_a_batch_has_a_share_of_the_first_prompt_and_then_the_shortest(params):
    e = engine(params, slots=4, prefill_chunk=16, reuse=False)
    for size in (40, 20, 3, 9):
        e.submit(Request([1] * size, 1))
    e._admit()
    assert [(row.id, count) for _, row, count in e._parts(16)] == [(2, 3), (3, 9), (0, 4)]
    assert e._fitting(0) == 0 and e._fitting(3) == e._fitting(500) == 16
    wide = engine(params, prefill_chunk=256)
    assert [wide._fitting(n) for n in (1, 16, 17, 32, 33, 100, 128, 129, 256, 1000)] == [32, 32, 32, 32, 64, 64, 64, 256, 256, 256]


@pytest.mark.extended
@pytest.mark.parametrize("chunk", [16, 40])
def test_the_size_of_batches_changes_no_bit(params, chunk):
    requests = [Request(p, 5, logprobs=1) for p in prompts(DENSE, (40, 3, 17, 26, 9))]
    want = heard(serve(engine(params), requests))
    assert heard(serve(engine(params, prefill_chunk=chunk), requests)) == want


@pytest.mark.extended
def test_a_row_that_fails_leaves_no_known_blocks_of_its_own(params):
    """Its earlier blocks are finite, and stay; the one with the bad token does not, and no later row sees it."""
    embedding = params["embed"].asnumpy().copy()
    embedding[60] = np.nan
    poisoned, cfg = {**params, "embed": ms.Tensor(embedding), "lm_head": params["embed"]}, DENSE.replace(tie_embeddings=False)
    good = [i for i in prompts(DENSE, (30,))[0] if i != 60]
    e = Engine(poisoned, cfg, slots=2, length=64, prefill_chunk=8, page=PAGE)
    want = tokens(serve(e, [Request(good, 5)]))
    e = Engine(poisoned, cfg, slots=2, length=64, prefill_chunk=8, page=PAGE)
    (bad,) = serve(e, [Request([*good[:20], 60, *good[20:]], 5)])
    assert [event.finish_reason for event in bad] == ["error"] and unused(e)
    assert tokens(serve(e, [Request(good, 5), Request(good[:9], 2)]))[:1] == want
    assert e.totals.reused_tokens >= 16


# Blocks alone


def test_blocks_are_found_by_all_that_is_before_them_and_by_their_tokens():
    a, b = known_blocks([1, 2, 3, 4, 5, 6, 7], 2), known_blocks([9, 2, 3, 4, 5, 6, 7], 2)
    assert len(a) == 3 and len(known_blocks([1, 2, 3, 4, 5, 6], 2)) == 2 and known_blocks([1], 2) == []
    assert not {x.digest for x in a} & {x.digest for x in b}
    blocks = Blocks(4)
    pages = blocks.take(3)
    for page, block in zip(pages, a):
        blocks.know(page, block)
    assert blocks.find(a) == pages and blocks.find(b) == [] and blocks.find(a[1:]) == pages[1:]
    assert blocks.find([Known(a[0].digest, b"other tokens with the same digest")]) == []


def test_the_beginning_of_a_block_is_found_by_what_is_before_it():
    blocks, a, b = Blocks(4), known_blocks([1, 2, 3, 4, 5, 6, 7], 3), known_blocks([1, 2, 3, 4, 5, 9, 9], 3)
    assert blocks.find_part(b"", [1, 2]) == (None, 0)
    first, second = blocks.take(2)
    blocks.know(first, a[0])
    blocks.know(second, a[1])
    assert blocks.find_part(b"", [1, 2, 5]) == (first, 2) and blocks.find_part(b"", [1, 2, 3]) == (first, 3)
    assert blocks.find_part(b[0].digest, [4, 5, 9]) == (second, 2) and blocks.find_part(b[0].digest, [7])[1] == 0
    assert blocks.find_part(b[1].digest, [7]) == (None, 0) and blocks.find_part(b"", [])[1] == 0
    blocks.release([first, second])
    blocks.take(3)
    assert blocks.find_part(b[0].digest, [4, 5, 9]) == (None, 0) and blocks.find_part(b"", [1, 2]) == (first, 2)


def test_pages_that_were_not_used_for_longest_are_taken_first_and_the_end_of_a_prompt_before_its_beginning():
    blocks, a, b = Blocks(5), known_blocks([1] * 5, 2), known_blocks([2] * 7, 2)
    of_a, of_b = blocks.take(2), blocks.take(3)
    for pages, known in ((of_a, a), (of_b, b)):
        for page, block in zip(pages, known):
            blocks.know(page, block)
    blocks.release(of_b)
    blocks.release(of_a)
    blocks.share(of_b[:1])
    blocks.release(of_b[:1])
    assert blocks.available() == 5 and blocks.used() == 0
    assert blocks.take(4) == [of_b[2], of_b[1], of_a[1], of_a[0]] and blocks.evicted == 4
    assert blocks.find(b) == of_b[:1] and blocks.find(a) == []
    assert blocks.take(2) is None and blocks.take(1) == of_b[:1]


def test_a_page_is_free_when_its_last_user_ends():
    blocks = Blocks(2)
    (page,) = blocks.take(1)
    block = known_blocks([1, 2, 3], 2)[0]
    blocks.know(page, block)
    blocks.share([page])
    blocks.release([page])
    assert blocks.used() == 1 and blocks.find([block]) == [page]
    other = blocks.take(1)
    blocks.know(other[0], block)  # read twice; the first one stays the one that is found
    blocks.release(other)
    blocks.release([page])
    assert blocks.find([block]) == [page] and blocks.take(2) == [*other, page]
