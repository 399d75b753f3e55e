"""Writing into a KV cache: the functional form and the one in place, against a loop in numpy."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import ops

from ops import cache_write
from parallel.graph.jit import jit
from parallel.step import value_and_grad
from tests.ops.kernels import call, tensors
from tests.tiny import assert_close, host

SHAPES = [(1, 1, 1, 1, 1), (2, 7, 1, 3, 5), (3, 11, 5, 2, 8), (1, 64, 13, 1, 32), (16, 32, 1, 4, 32)]  # B, T, S, K, H
FORMS = {"reference": cache_write.reference, "cpu": cache_write.cpu}


def case(B, T, S, K, H, seed=0):
    """cache_BTKH, new_BSKH, at_BS: slots of a row all different, some of them outside."""
    rng = np.random.default_rng(seed)
    at = np.stack([rng.permutation(np.arange(-2, T + 3))[:S] for _ in range(B)]).astype(np.int32)
    at[0, 0] = T - 1 if T - 1 not in at[0] else at[0, 0]
    return rng.normal(0, 1, (B, T, K, H)).astype(np.float32), rng.normal(0, 1, (B, S, K, H)).astype(np.float32), at


def caller(form, compiled):
    write = FORMS[form]()

    def call_it(cache, new, at):
        return write(cache, new, at)

    return jit(call_it) if compiled else call_it


def written(cache, new, at):
    out = cache.copy()
    for b, s in np.ndindex(*at.shape):
        if 0 <= at[b, s] < cache.shape[1]:
            out[b, at[b, s]] = new[b, s]
    return out


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_new_rows_are_in_their_slots_and_others_unchanged(form, shape, compiled):
    write, (cache, new, at) = caller(form, compiled), case(*shape)
    for i in range(2):  # the second values are read anew
        np.testing.assert_array_equal(written(cache + i, new - i, at), host(write(*tensors(cache + i, new - i, at))))


def test_slots_outside_are_dropped():
    cache, new, _ = case(1, 3, 4, 2, 2)
    at = np.array([[-1, 3, 2**31 - 1, -(2**31)]], np.int32)
    for form in FORMS.values():
        np.testing.assert_array_equal(cache, host(form()(*tensors(cache, new, at))))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_kernel_changes_the_cache_it_is_given_and_the_reference_does_not(compiled):
    for form, changes in (("reference", False), ("cpu", True)):
        write, (cache, new, at) = caller(form, compiled), case(2, 7, 2, 3, 5)
        given = ms.Tensor(cache)
        found = write(given, *tensors(new, at))
        np.testing.assert_array_equal(host(found) if changes else cache, host(given))
        assert np.any(host(found) != cache)


def test_reads_of_the_result_come_after_the_write_in_a_graph():
    write, total = cache_write.cpu(), ops.ReduceSum()

    def twice(cache, new, at):
        first = write(cache, new, at)
        sum_of_first = total(first)
        second = write(ops.depend(first, sum_of_first), new * 2, at)
        return sum_of_first, total(second)

    new, at, run = np.ones((2, 1, 1, 3), np.float32), np.array([[1], [7]], np.int32), jit(twice)
    for _ in range(20):
        sums = run(*tensors(np.zeros((2, 4, 1, 3), np.float32), new, at))
        assert [float(x) for x in sums] == [3, 6]


def test_a_loop_in_a_graph_writes_into_the_cache_of_its_caller():
    write = cache_write.cpu()

    def fill(cache, new, at, steps):
        i = ops.ZerosLike()(steps)
        while i < steps:
            i = ops.depend(i + 1, write(cache, new + i, at + i))
        return i

    cache = ms.Tensor(np.zeros((1, 6, 1, 2), np.float32))
    assert int(jit(fill)(cache, *tensors(np.ones((1, 1, 1, 2), np.float32), np.array([[1]], np.int32)), ms.Tensor(4, ms.int32))) == 4
    np.testing.assert_array_equal([0, 1, 2, 3, 4, 0], host(cache)[0, :, 0, 0])


def test_rows_of_integers_are_written_too():
    ids, at = np.arange(6, dtype=np.int32).reshape(1, 3, 1, 2), np.array([[2]], np.int32)
    new = np.full((1, 1, 1, 2), 2**31 - 1, np.int32)
    np.testing.assert_array_equal(written(ids, new, at), host(cache_write.cpu()(*tensors(ids, new, at))))


def test_views_are_read_where_they_lie():
    cache, new, at = case(2, 7, 3, 3, 5)
    backwards = [ms.Tensor(np.ascontiguousarray(x.T)).T for x in (cache, new, at)]
    assert not any(x.is_contiguous() for x in backwards)
    np.testing.assert_array_equal(written(cache, new, at), host(cache_write.cpu()(*backwards)))


@pytest.mark.parametrize("shape", [(3, 11, 5, 2, 8), (4, 300, 128, 4, 64)])  # the second is cut over threads
def test_any_number_of_threads_writes_the_same(shape):
    cache, new, at = case(*shape)
    for threads in (1, 2, 3, 7):
        out = call("cache_write", "cache_write", (cache, new, at, np.zeros(1, np.int32)), (), threads)[0]
        np.testing.assert_array_equal(written(cache, new, at), out)


def test_nan_stays_in_its_slot():
    cache, new, at = case(1, 5, 1, 2, 2)
    for form in FORMS.values():
        np.testing.assert_array_equal(written(cache, new * np.nan, at), host(form()(*tensors(cache, new * np.nan, at))))


def test_gradient_of_the_reference():
    cache, new, at = case(2, 5, 3, 2, 3)
    weights = np.cos(np.arange(cache.size, dtype=np.float32)).reshape(cache.shape)
    write = cache_write.reference()

    def weighted(params, at, weights):
        return (write(params["cache"], params["new"], at) * weights).sum()

    for compiled in (False, True):
        params = {"cache": ms.Tensor(cache), "new": ms.Tensor(new)}
        _, grads = value_and_grad(weighted, compiled=compiled)(params, *tensors(at, weights))
        hit = written(np.zeros_like(cache), np.ones_like(new), at)
        assert_close(weights * (1 - hit), grads["cache"], 1e-6)
        expected = np.zeros_like(new)
        for b, s in np.ndindex(*at.shape):
            if 0 <= at[b, s] < cache.shape[1]:
                expected[b, s] = weights[b, at[b, s]]
        assert_close(expected, grads["new"], 1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_differentiating_the_kernel_is_an_error(compiled):
    write, (cache, new, at) = cache_write.cpu(), case(1, 4, 1, 1, 2)

    def total(params, cache, at):
        return write(cache, params["new"], at).sum()

    with pytest.raises(RuntimeError, match="cache_write kernel works in place and has no gradient"):
        value_and_grad(total, compiled=compiled)({"new": ms.Tensor(new)}, *tensors(cache, at))
