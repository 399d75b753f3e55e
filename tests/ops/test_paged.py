"""Attention over a paged KV cache, and writes into it: the references and the C++ kernels against numpy."""

import mindspore as ms
import numpy as np
import pytest

from ops import paged_attention, paged_write
from ops.pages import slots_and_lengths
from parallel.graph.jit import jit
from parallel.step import value_and_grad
from tests.ops.kernels import TOLERANCE, call, same_for_any_threads, tensors
from tests.tiny import assert_close, host

SCALE = 0.3
FORMS = {"reference": paged_attention.reference, "cpu": paged_attention.cpu}
PACKED = {"reference": paged_attention.reference_packed, "cpu": paged_attention.cpu_packed}
WRITES = {"reference": paged_write.reference, "cpu": paged_write.cpu}
# N, K, H, P, C, M and the lengths of rows: none, one token, whole pages, a part of a page, all that the table has room for
CASES = {
    "one": (1, 1, 4, 1, 1, 1, [1]),
    "pages of 16": (4, 2, 16, 20, 16, 5, [0, 1, 16, 80, 37]),
    "odd": (6, 3, 10, 9, 7, 4, [28, 5, 0]),
    "long": (8, 1, 32, 20, 64, 9, [576, 130]),
    "large pages": (4, 4, 8, 6, 128, 2, [129, 256, 3]),
}


def case(N, K, H, P, C, M, lengths, seed=0):
    """(q, k, v, table, length). Pages of rows differ; what no row sees is NaN, and so is no page: -1."""
    rng = np.random.default_rng(seed)
    B = len(lengths)
    pages, table = rng.permutation(P), np.full((B, M), -1, np.int32)
    k, v = (np.full((P, C, K, H), np.nan, np.float32) for _ in range(2))
    for b, length in enumerate(lengths):
        used = -(-length // C)
        table[b, :used], pages = pages[:used], pages[used:]
        for t in range(length):
            k[table[b, t // C], t % C], v[table[b, t // C], t % C] = rng.normal(0, 1, (2, K, H))
    return rng.normal(0, 1, (B, N, H)).astype(np.float32), k, v, table, np.array(lengths, np.int32)


def formula(q, k, v, table, length, scale=SCALE):
    """In float64, a row and head at a time."""
    (_, N, _), (_, C, K, _), out = q.shape, k.shape, np.zeros(q.shape)
    for b, n in np.ndindex(*q.shape[:2]):
        at = [(table[b, t // C], t % C) for t in range(length[b])]
        if at:
            pages, slots = np.transpose(at)
            keys, values = (x[pages, slots, n // (N // K)].astype(np.float64) for x in (k, v))
            scores = keys @ q[b, n].astype(np.float64) * scale
            weights = np.exp(scores - scores.max())
            out[b, n] = weights @ values / weights.sum()
    return out


def compiled(fn):
    def call_it(*args):
        return fn(*args)

    return jit(call_it)


def agrees_with(formula, attend, given, way):
    found = (compiled(attend) if way == "compiled" else attend)(*tensors(*given))
    assert_close(formula(*given), found, TOLERANCE)


@pytest.mark.extended(but=("*cpu*", "*eager"))
@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_a_row_attends_to_its_pages(name, form, way):
    agrees_with(formula, FORMS[form](SCALE), case(*CASES[name]), way)


def test_which_pages_a_row_has_changes_nothing():
    q, k, v, table, length = case(*CASES["pages of 16"])
    order = np.random.default_rng(3).permutation(len(k))
    moved = np.where(table < 0, table, np.argsort(order)[table]).astype(np.int32)
    attend = paged_attention.cpu(SCALE)
    before, after = attend(*tensors(q, k, v, table, length)), attend(*tensors(q, k[order], v[order], moved, length))
    np.testing.assert_array_equal(host(before), host(after))


def test_any_number_of_threads_gives_the_same_bits():
    given = case(8, 4, 64, 30, 64, 12, [700, 1, 768])
    same_for_any_threads("paged_attention", "paged_attention", [*given, np.float32(SCALE)], [given[0].shape])


def test_large_scores_do_not_overflow():
    q, k, v, table, length = case(*CASES["long"])
    for form in FORMS.values():
        assert_close(formula(q * 100, k * 100, v, table, length), form(SCALE)(*tensors(q * 100, k * 100, v, table, length)), 1e-3)


def test_a_page_that_is_not_in_the_cache_is_refused():
    for wrong in (9, -1):
        q, k, v, table, length = case(*CASES["odd"])
        table[0, 3] = wrong
        with pytest.raises(RuntimeError):
            host(paged_attention.cpu(SCALE)(*tensors(q, k, v, table, length)))
    q, k, v, table, length = case(*CASES["odd"])
    with pytest.raises(RuntimeError):
        host(paged_attention.cpu(SCALE)(*tensors(q, k, v, table, length + 1)))


@pytest.mark.parametrize("form", FORMS)
def test_what_does_not_fit_is_named(form):
    q, k, v, table, length = case(*CASES["odd"])
    for wrong, message in (
        ((q, k, v, table, length[:2]), r"length is \[2\] and has to be \[B\] = \[3\]"),
        ((q[:, :5], k, v, table, length), "K has to divide N, and they are 3 and 5"),
    ):
        with pytest.raises(ValueError, match=f"paged_attention: {message}"):
            FORMS[form](SCALE)(*tensors(*wrong))


def test_the_reference_is_differentiated_and_the_kernel_is_not():
    q, k, v, table, length = case(*CASES["odd"])

    def total(make):
        attend = make(SCALE)

        def of_q(params, *rest):
            return attend(params["q"], *rest).sum()

        return of_q

    rest = tensors(np.nan_to_num(k), np.nan_to_num(v), table, length)
    step = 1e-2 * np.cos(np.arange(q.size, dtype=np.float32)).reshape(q.shape)
    _, grads = value_and_grad(total(paged_attention.reference))({"q": ms.Tensor(q)}, *rest)
    slope = (formula(q + step, k, v, table, length).sum() - formula(q - step, k, v, table, length).sum()) / 2
    assert abs((host(grads["q"]) * step).sum() - slope) < 1e-4
    with pytest.raises(RuntimeError, match="paged_attention kernel is for decoding and has no gradient"):
        value_and_grad(total(paged_attention.cpu))({"q": ms.Tensor(q)}, *rest)


# the first position and the number of queries of each row, in the order in which they are packed; None: as many tokens of no row
READ = {
    "one": ((1, 1, 4, 1, 1, 1), [(0, 0, 1)]),
    "whole prompts": ((4, 2, 16, 20, 16, 5), [(0, 0, 37), (2, 0, 16), (1, 0, 1), (None, 0, 5)]),
    "chunks": ((4, 2, 16, 20, 16, 5), [(None, 0, 1), (1, 30, 50), (0, 15, 3), (2, 7, 1), (None, 0, 2)]),
    "odd": ((6, 3, 10, 9, 7, 4), [(2, 3, 24), (0, 27, 1)]),
    "two parts of one row": ((4, 1, 8, 9, 4, 4), [(0, 0, 5), (1, 0, 3), (0, 5, 6)]),
    "many query heads": ((40, 1, 24, 12, 16, 6), [(0, 60, 7), (1, 0, 70)]),
    "long": ((8, 1, 32, 20, 64, 9), [(0, 500, 76), (1, 0, 130)]),
    "large pages": ((4, 4, 8, 6, 128, 2), [(0, 126, 4), (1, 200, 56)]),
}


def packed_case(sizes, reads, seed=0):
    """(q, k, v, table, row, position) of packed queries. Rows have the tokens up to their last query."""
    N, K, H, P, C, M = sizes
    B = 1 + max(row for row, _, _ in reads if row is not None)
    lengths = [max((first + count for row, first, count in reads if row == b), default=0) for b in range(B)]
    _, k, v, table, _ = case(N, K, H, P, C, M, lengths, seed)
    row = np.concatenate([np.full(count, -1 if b is None else b) for b, _, count in reads]).astype(np.int32)
    position = np.concatenate([np.arange(first, first + count) if b is not None else np.full(count, -1) for b, first, count in reads])
    q = np.random.default_rng(seed + 1).normal(0, 1, (len(row), N, H)).astype(np.float32)
    return q, k, v, table, row, position.astype(np.int32)


def packed_formula(q, k, v, table, row, position):
    """Each query as the one query of a row."""
    return formula(q, k, v, table[np.maximum(row, 0)], np.where(row < 0, 0, position + 1))


@pytest.mark.extended(but=("*cpu*", "*eager"))
@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("name", READ)
def test_packed_queries_attend_to_the_pages_of_their_rows(name, form, way):
    agrees_with(packed_formula, PACKED[form](SCALE), packed_case(*READ[name]), way)


@pytest.mark.parametrize("name", READ)
def test_a_packed_query_has_the_same_bits_alone_and_among_others(name):
    """The kernel takes the queries of a row together where they are next to each other."""
    q, k, v, table, row, position = packed_case(*READ[name])
    scale = np.float32(SCALE)
    together = call("paged_attention", "paged_attention_packed", [q, k, v, table, row, position, scale], [q.shape], 1)[-1]
    order = np.random.default_rng(2).permutation(len(q))
    mixed = [q[order], k, v, table, row[order], position[order], scale]
    np.testing.assert_array_equal(together[order], call("paged_attention", "paged_attention_packed", mixed, [q.shape], 2)[-1])
    for r in (0, len(q) // 2, len(q) - 1):
        alone = [q[r : r + 1], k, v, table, row[r : r + 1], position[r : r + 1], scale]
        found = call("paged_attention", "paged_attention_packed", alone, [(1, *q.shape[1:])], 1)[-1]
        np.testing.assert_array_equal(together[r : r + 1], found)


@pytest.mark.parametrize("form", PACKED)
def test_what_is_not_finite_stays_in_its_row(form):
    """NaN in all tokens of row 0; queries of no row are 0 beside it."""
    q, k, v, table, row, position = packed_case(*READ["chunks"])
    want = packed_formula(q, k, v, table, row, position)
    for cache in (k, v):
        cache[table[0][table[0] >= 0]] = np.nan
    found = host(PACKED[form](SCALE)(*tensors(q, k, v, table, row, position)))
    assert np.isnan(found[row == 0]).all() and (row == -1).any()
    np.testing.assert_allclose(found[row != 0], want[row != 0], rtol=1e-5, atol=1e-6)


def test_packed_queries_without_pages_are_refused():
    given = packed_case(*READ["odd"])
    for at, wrong in ((3, 9), (3, -1), (4, 3), (5, 99)):
        changed = [x.copy() for x in given]
        changed[at].flat[-1 if at > 3 else 8] = wrong
        with pytest.raises(RuntimeError):
            host(paged_attention.cpu_packed(SCALE)(*tensors(*changed)))


def test_differentiating_the_kernel_of_packed_queries_is_an_error():
    q, *rest = tensors(*packed_case(*READ["odd"]))
    attend = paged_attention.cpu_packed(SCALE)

    def total(params, *rest):
        return attend(params["q"], *rest).sum()

    with pytest.raises(RuntimeError, match="paged_attention kernel of prompts has no gradient"):
        value_and_grad(total)({"q": q}, *rest)


@pytest.mark.parametrize("C", [1, 4])
def test_places_in_pages_are_those_of_the_table(C):
    table = np.array([[4, 2, -1], [0, -1, -1], [-1, -1, -1], [3, 1, 5]], np.int32)
    for position in range(-2, 3 * C + 2):
        slot, length = (host(x) for x in slots_and_lengths()(*tensors(table, np.full(4, position, np.int32)), C))
        for b in range(4):
            page = table[b, position // C] if 0 <= position < 3 * C else -1
            assert slot[b] == (page * C + position % C if page >= 0 else -1)
            assert length[b] == min(max(position + 1, 0), C * (table[b] >= 0).sum())


def writes(P, C, K, H, R, seed=0):
    """(cache, new, slot): slots that all differ, some of them outside."""
    rng = np.random.default_rng(seed)
    slot = rng.permutation(np.arange(-2, P * C + 3))[:R].astype(np.int32)
    slot[0] = P * C - 1 if P * C - 1 not in slot else slot[0]
    return rng.normal(0, 1, (P, C, K, H)).astype(np.float32), rng.normal(0, 1, (R, K, H)).astype(np.float32), slot


def written(cache, new, slot):
    out = cache.copy().reshape(-1, *cache.shape[2:])
    for r, s in enumerate(slot):
        if 0 <= s < len(out):
            out[s] = new[r]
    return out.reshape(cache.shape)


WRITTEN = [(1, 1, 1, 1, 1), (3, 7, 2, 5, 6), (5, 16, 1, 8, 60), (4, 64, 4, 64, 3)]


@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("form", WRITES)
@pytest.mark.parametrize("shape", WRITTEN)
def test_new_rows_are_in_their_slots_and_others_unchanged(form, shape, way):
    write, (cache, new, slot) = WRITES[form](), writes(*shape)
    run = compiled(write) if way == "compiled" else write
    for i in range(2):  # the second values are read anew
        np.testing.assert_array_equal(written(cache + i, new - i, slot), host(run(*tensors(cache + i, new - i, slot))))


def test_the_kernel_changes_the_cache_it_is_given_and_the_reference_does_not():
    for form, changes in (("reference", False), ("cpu", True)):
        cache, new, slot = writes(3, 7, 2, 5, 6)
        given = ms.Tensor(cache)
        found = WRITES[form]()(given, *tensors(new, slot))
        np.testing.assert_array_equal(host(found) if changes else cache, host(given))


def test_nan_stays_in_its_slot():
    cache, new, slot = writes(3, 7, 2, 5, 6)
    new[1] = np.nan
    for form in WRITES.values():
        np.testing.assert_array_equal(written(cache, new, slot), host(form()(*tensors(cache, new, slot))))


def test_any_number_of_threads_writes_the_same():
    cache, new, slot = writes(40, 64, 4, 64, 900)
    for threads in (1, 2, 7):
        out = call("paged_write", "paged_write", (cache, new, slot, np.zeros(1, np.int32)), (), threads)[0]
        np.testing.assert_array_equal(written(cache, new, slot), out)


def decoding_step(attend, write):
    """Returns a step that writes the new token of each row and attends to all of them, as one graph."""

    def step(q, k, v, table, length, new_k, new_v, slot):
        return attend(q, write(k, new_k, slot), write(v, new_v, slot), table, length + 1)

    return jit(step)


def test_a_step_of_decoding_writes_and_then_attends():
    q, k, v, table, length = case(4, 2, 16, 20, 16, 5, [3, 16, 37])
    k, v = np.nan_to_num(k), np.nan_to_num(v)
    table[1, 1] = next(p for p in range(20) if p not in table)
    page = table[np.arange(3), length // 16]
    slot = (page * 16 + length % 16).astype(np.int32)
    new_k, new_v = (np.random.default_rng(i).normal(0, 1, (3, 2, 16)).astype(np.float32) for i in (1, 2))
    expected = formula(q, written(k, new_k, slot), written(v, new_v, slot), table, length + 1)
    for name in FORMS:
        step = decoding_step(FORMS[name](SCALE), WRITES[name]())
        assert_close(expected, step(*tensors(q, k, v, table, length, new_k, new_v, slot)), TOLERANCE)
