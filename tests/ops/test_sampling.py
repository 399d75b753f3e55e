"""Sampling: the formula against a loop over candidates, and the kernel against the formula."""

import mindspore as ms
import numpy as np
import pytest

from ops import sampling
from parallel.graph.jit import jit
from parallel.random import hash_uniform
from tests.ops.kernels import call, tensors
from tests.tiny import host

OPTIONS = {
    "greedy": {},
    "plain": {"temperature": 1.0},
    "top_k": {"temperature": 1.0, "top_k": 7},
    "top_k_of_many": {"temperature": 1.3, "top_k": 900},
    "top_p": {"temperature": 1.0, "top_p": 0.9},
    "min_p": {"temperature": 0.5, "min_p": 0.05},
    "usual": {"temperature": 0.7, "top_k": 20, "top_p": 0.95},
    "all": {"temperature": 0.9, "top_k": 500, "top_p": 0.8, "min_p": 0.01},
    "hot": {"temperature": 100.0, "top_p": 0.5},
    "cold": {"temperature": 1e-6},
}
SIZES = (1, 2, 7, 64, 255, 257, 1009, 8192)
uniform = hash_uniform  # in (0, 1), from a seed, a key and places


def one_by_one(logits, u, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0):
    """Candidates in order of rank, one after the other."""
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    if temperature == 0:
        return ranked[0]
    weights = [np.exp((float(logits[i]) - float(logits[ranked[0]])) / temperature) for i in ranked]
    kept, total, seen = [], sum(weights), 0.0
    for i, w in zip(ranked, weights):
        if seen >= top_p * total or w < min_p * weights[0]:
            break
        kept.append((i, w))
        seen += w
    goal, passed = u * seen, 0.0
    for i, w in kept:
        passed += w
        if passed > goal:
            return i
    return kept[-1][0]


def rows(V, scale, seed=0):
    """Six rows [6, V]: normal; many equal; half of them -inf; all equal; in falling and in rising order."""
    x = (np.random.default_rng(seed).normal(0, 1, (6, V)) * scale).astype(np.float32)
    x[1] = np.round(x[1])
    x[2, 1::2] = -np.inf
    x[3] = x[3, 0]
    x[4], x[5] = -np.sort(-x[4]), np.sort(x[5])
    return x


def both(x, u, options):
    kernel = host(sampling.cpu()(*tensors(x, u, options)))
    assert kernel.dtype == np.int32 and kernel.shape == u.shape
    return sampling.reference()(x, u, options), kernel


@pytest.mark.parametrize("name", OPTIONS)
def test_the_formula_is_that_of_one_candidate_after_the_other(name):
    for V in (1, 5, 257):
        x, u = rows(V, 2.0), uniform(1, np.uint32(V), np.arange(6))
        expected = [one_by_one(row, draw, **OPTIONS[name]) for row, draw in zip(x, u)]
        np.testing.assert_array_equal(expected, sampling.reference()(x, u, sampling.options(6, **OPTIONS[name])))


@pytest.mark.extended(but=("greedy", "usual", "all"))
@pytest.mark.parametrize("name", OPTIONS)
def test_the_kernel_chooses_the_token_of_the_formula(name):
    for V in SIZES:
        for scale in (0.01, 1.0, 30.0):
            for seed in range(4):
                x, u = rows(V, scale, seed), uniform(seed, np.uint32(V), np.arange(6))
                np.testing.assert_array_equal(*both(x, u, sampling.options(6, **OPTIONS[name])), err_msg=f"{V} {scale} {seed}")


def test_the_kernel_chooses_the_token_of_the_formula_in_qwens_vocabulary():
    for name, options in OPTIONS.items():
        x, u = rows(151_936, 3.0)[:3], uniform(0, np.uint32(5), np.arange(3))
        np.testing.assert_array_equal(*both(x, u, sampling.options(3, **options)), err_msg=name)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "greedy"])
def test_draws_spread_over_tokens_as_their_probabilities(name):
    """Evenly spaced u: each token comes up in proportion to its weight among those kept, give or take one."""
    n, logits = 4000, rows(301, 1.0)[0]
    u = ((np.arange(n) + 0.5) / n).astype(np.float32)
    options = {**OPTIONS[name], "top_k": min(OPTIONS[name].get("top_k", 0), 150)}
    ranked = np.argsort(-logits, kind="stable")[: options["top_k"] or None]
    p = np.exp((logits[ranked].astype(np.float64) - logits.max()) / options["temperature"])
    cut = np.cumsum(p) - p < options.get("top_p", 1) * p.sum()
    p = np.where(cut & (p >= options.get("min_p", 0)), p, 0)
    expected = np.zeros(301)
    expected[ranked] = p / p.sum() * n
    for ids in both(np.tile(logits, (n, 1)), u, sampling.options(n, **options)):
        assert np.abs(np.bincount(ids, minlength=301) - expected).max() < 1.01


def test_of_equal_logits_the_lower_id_comes_first():
    x = np.zeros((1, 600), np.float32)
    x[0, [3, 500]] = 1
    for options in (
        {},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 1.0, "top_k": 300, "top_p": 1e-9},
    ):
        for u in (1e-7, 0.999):
            assert [int(ids[0]) for ids in both(x, np.array([u], np.float32), sampling.options(1, **options))] == [3, 3]
    third = sampling.options(1, 1.0, top_k=3)
    assert {int(ids[0]) for ids in both(x, np.array([1 - 1e-6], np.float32), third)} == {0}


def test_a_draw_on_the_border_of_two_tokens_is_the_second():
    """As an interval of u belongs to a token with its lower end: of 600 equal ones, 0.5 is where the token 300 begins."""
    x, u = np.zeros((1, 600), np.float32), np.full(1, 0.5, np.float32)
    for options, token in (({}, 300), ({"top_k": 100}, 50), ({"top_k": 500}, 250), ({"top_p": 0.5}, 150)):
        assert [int(ids[0]) for ids in both(x, u, sampling.options(1, 1.0, **options))] == [token, token]


def test_a_draw_rounded_to_one_is_the_last_token_that_is_kept():
    x, u = np.zeros((1, 600), np.float32), np.ones(1, np.float32)
    x[0, 400:] = -np.inf
    for options, last in (({}, 399), ({"top_k": 5}, 4), ({"top_p": 0.5}, 199), ({"min_p": 0.5}, 399)):
        assert [int(ids[0]) for ids in both(x, u, sampling.options(1, 1.0, **options))] == [last, last]


def test_tokens_at_minus_infinity_are_never_drawn():
    x = np.full((2000, 400), -np.inf, np.float32)
    x[:, [7, 390]] = np.random.default_rng(0).normal(0, 1, (2000, 2))
    u = uniform(0, np.uint32(0), np.arange(2000))
    for options in OPTIONS.values():
        for ids in both(x, u, sampling.options(2000, **options)):
            assert set(ids) <= {7, 390}


def test_rows_have_options_of_their_own():
    x, u = rows(1009, 2.0), uniform(3, np.uint32(0), np.arange(6))
    options = np.concatenate([sampling.options(1, **OPTIONS[name]) for name in list(OPTIONS)[:6]])
    expected, found = both(x, u, options)
    np.testing.assert_array_equal(expected, found)
    assert [one_by_one(r, d, **OPTIONS[n]) for r, d, n in zip(x, u, OPTIONS)] == found.tolist()


def test_extreme_logits():
    x = np.array([[3e38, -3e38, 3e38], [1e-45, 0, -1e-45], [-3e38, -3e38, -2.9e38]], np.float32)
    for options in OPTIONS.values():
        for u in (0.2, 0.9):
            np.testing.assert_array_equal(*both(x, np.full(3, u, np.float32), sampling.options(3, **options)))


def test_it_compiles_and_takes_views():
    x, u = rows(257, 2.0), uniform(0, np.uint32(1), np.arange(6))
    options, sample = sampling.options(6, **OPTIONS["usual"]), sampling.cpu()

    def choose(logits, u, options):
        return sample(logits * 1, u, options)

    expected, run = sampling.reference()(x, u, options), jit(choose)
    for shift in (0, 1):  # a shift of all logits changes nothing; the second values are read anew
        np.testing.assert_array_equal(expected, host(run(*tensors(x + shift, u, options))))
    np.testing.assert_array_equal(expected, host(sample(*(ms.Tensor(np.ascontiguousarray(a.T)).T for a in (x, u, options)))))


def test_any_number_of_threads_chooses_the_same():
    x, u = rows(8192, 2.0), uniform(0, np.uint32(2), np.arange(6))
    for name in ("usual", "top_p"):
        options = sampling.options(6, **OPTIONS[name])
        for threads in (1, 2, 3, 7):
            ids = call("sampling", "sampling", (x, u, options, np.zeros(6, np.int32)), (), threads)[3]
            np.testing.assert_array_equal(sampling.reference()(x, u, options), ids)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(bad, temperature):
    x, u, options = rows(300, 1.0)[:2], np.full(2, 0.5, np.float32), sampling.options(2, temperature)
    x[1, 299] = bad
    with pytest.raises(ValueError, match="the largest logit of a row"):
        sampling.reference()(x, u, options)
    with pytest.raises(RuntimeError, match=r"sampling\) is 3"):
        host(sampling.cpu()(*tensors(x, u, options)))


def test_a_row_without_any_token_is_refused():
    x, u, options = np.full((1, 5), -np.inf, np.float32), np.full(1, 0.5, np.float32), sampling.options(1)
    with pytest.raises(ValueError, match="the largest logit of a row is -inf"):
        sampling.reference()(x, u, options)
    with pytest.raises(RuntimeError, match=r"sampling\) is 3"):
        host(sampling.cpu()(*tensors(x, u, options)))


WRONG = [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 2}, {"temperature": np.nan}]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="sampling: temperature="):
        sampling.options(1, **wrong)
    row = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **wrong}
    with pytest.raises(RuntimeError, match=r"sampling\) is 4"):
        host(sampling.cpu()(*tensors(rows(5, 1.0)[:1], np.ones(1, np.float32), np.array([list(row.values())]))))
