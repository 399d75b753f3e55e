"""Generation: host and device loops give the same tokens, stop where they should, and draw what (seed, step, row) say."""

import numpy as np
import pytest

from ops.registry import Kernels, choose
from parallel.random import hash_uniform
from qwen3 import generate
from qwen3.cache import init_cache
from tests.tiny import DENSE, KINDS, assert_close, documents, random_params

PLAIN, FUSED = Kernels(), choose({}, "CPU", "float32")
DRAWN = {"temperature": 1.0, "top_k": 30, "top_p": 0.95, "seed": 3}
COUNT = 11  # with chunks of 4: the first token, two whole chunks and a part of one


SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(generate, "CHUNK", 4)


def prompts(cfg, lengths=(7, 3, 5)):
    return [row.tolist() for row in documents(cfg, lengths)]


@pytest.mark.extended
@pytest.mark.parametrize(
    "kind, options", [("dense", {}), *(pytest.param(kind, DRAWN, marks=() if kind == "moe" else SLOW) for kind in KINDS)]
)
def test_loops_on_the_device_and_on_the_host_give_the_same_tokens(kind, options):
    """Also with stop ids: of rows that stop in different chunks, of one at once, and of all, after which no more is computed."""
    cfg, params = KINDS[kind], random_params(KINDS[kind])
    every = generate.generate(params, prompts(cfg), cfg, COUNT, kernels=PLAIN, **options)
    assert [len(row) for row in every] == [COUNT] * 3
    assert every == generate.generate(params, prompts(cfg), cfg, COUNT, kernels=FUSED, **options)
    for count in (1, 2, 5):
        assert [row[:count] for row in every] == generate.generate(params, prompts(cfg), cfg, count, kernels=FUSED, **options)
    never = cfg.vocab_size
    for stop in ((every[0][0], never, never), (every[1][5], every[0][-1], never), tuple(row[8] for row in every), (never, never, never)):
        upto = [next((i for i, token in enumerate(row) if token in stop), COUNT) for row in every]
        for kernels in (PLAIN, FUSED):
            found = generate.generate(params, prompts(cfg), cfg, COUNT, kernels=kernels, stop_ids=stop, **options)
            assert found == [row[:n] for row, n in zip(every, upto)]


@pytest.mark.extended
def test_the_device_loop_ends_when_the_last_row_has_stopped(monkeypatch):
    cfg, params = DENSE, random_params(DENSE)
    every = generate.generate(params, prompts(cfg), cfg, 30, **DRAWN)
    stop = tuple(row[13] for row in every)
    last = max(next(i for i, token in enumerate(row) if token in stop) for row in every)
    taken, plain = [], generate.decode_loop

    def noted(*args):
        decode = plain(*args)

        def counted(*args):
            out = decode(*args)
            taken.append(int(out[3]))
            return out

        return counted

    monkeypatch.setattr(generate, "decode_loop", noted)
    generate.generate(params, prompts(cfg), cfg, 30, stop_ids=stop, **DRAWN)
    assert sum(taken) == last and 0 < last % 4 and 4 < last < 26  # within a chunk, and not in the first


def test_rows_of_a_batch_are_what_they_are_alone():
    cfg, params = DENSE, random_params(DENSE)
    together = generate.generate(params, prompts(cfg), cfg, 20)
    assert together == [generate.generate(params, [row], cfg, 20)[0] for row in prompts(cfg)]


def test_draws_depend_on_seed_step_and_row_alone():
    logits = np.random.default_rng(0).normal(0, 1, (5, 300)).astype(np.float32)
    options = {"temperature": 1.0, "top_p": 0.99}
    ids = generate.sample(logits, seed=7, step=4, **options)
    np.testing.assert_array_equal(ids[:2], generate.sample(logits[:2], seed=7, step=4, **options))
    assert any(np.any(ids != generate.sample(logits, seed=s, step=t, **options)) for s, t in ((8, 4), (7, 5)))
    for row, token in enumerate(ids):
        ranked = np.argsort(-logits[row], kind="stable")
        upto = np.cumsum(np.exp(logits[row][ranked].astype(np.float64)))
        upto = upto[: np.searchsorted(upto, 0.99 * upto[-1]) + 1]
        assert token == ranked[np.searchsorted(upto, hash_uniform(7, np.uint32(4), row) * upto[-1], side="right")]


@pytest.mark.extended
def test_a_step_goes_on_from_the_cache_that_the_last_one_returned():
    """In place and not, the cache that comes back holds the same."""
    cfg, params = DENSE, random_params(DENSE)
    both = [generate.prefill(params, prompts(cfg), cfg, 16, kernels) for kernels in (PLAIN, FUSED)]
    for step in range(3):
        tokens, at = np.array([4, 5, 6], np.int32) + step, np.array([7, 3, 5], np.int32) + step
        both = [generate.decode_step(params, cache, tokens, at, cfg, kernels) for (_, cache), kernels in zip(both, (PLAIN, FUSED))]
        assert_close(both[0][0], both[1][0], 1e-5)
        for a, b in zip(both[0][1], both[1][1]):
            assert_close(a[0], b[0], 1e-5)
            assert_close(a[1], b[1], 1e-5)


def test_arrays_of_a_new_cache_are_all_different():
    cache = init_cache(DENSE, 2, 8)
    places = {array.data_ptr() for pair in cache for array in pair}
    assert len(places) == 2 * DENSE.num_layers and cache[0][0].shape == (2, 8, DENSE.num_kv_heads, DENSE.head_dim)


def test_mistakes_are_named():
    cfg, params = DENSE, random_params(DENSE)
    for wrong, message in (({"top_p": 0}, "top_p=0"), ({"temperature": -1}, "temperature=-1"), ({"min_p": 3}, "min_p=3")):
        for kernels in (PLAIN, FUSED):
            with pytest.raises(ValueError, match=f"sampling: .*{message}"):
                generate.generate(params, [[1]], cfg, 3, kernels=kernels, **wrong)
    with pytest.raises(ValueError, match="max_new_tokens=0 must be at least 1"):
        generate.generate(params, [[1]], cfg, 0)
    with pytest.raises(ValueError, match="every prompt needs at least one token"):
        generate.generate(params, [[1], []], cfg, 2)
