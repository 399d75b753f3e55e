"""The pieces of cross-entropy, reference and C++, against float64: sums over the vocabulary or a part of it, and the picked logit."""

import mindspore as ms
import numpy as np
import pytest

from ops import cross_entropy
from parallel.graph.jit import jit
from tests.ops.kernels import agree, same_for_any_threads, takes_views
from tests.ops.test_references import check, draw, softmax
from tests.tiny import assert_close, host

FACTORIES = {"reference": cross_entropy.reference, "cpu": cross_entropy.cpu}
BOTH = pytest.mark.parametrize("kind", FACTORIES)
NEVER = np.float32(-np.inf)
# blocks are of 1,024 columns; the last two have threads
SHAPES = [(1, 1), (3, 1), (1, 17), (2, 1023), (2, 1024), (3, 1025), (37, 997), (5, 5003)]


def from_first(measure, first):
    def run(z, ids):
        return measure(first, z, ids)

    return run


def lse_of(measure):
    """(first, z, ids) -> log(sum(exp(z))) and picked, both [R, 1]."""

    def run(first, z, ids):
        top, total, at = measure(first, z, ids)
        return total.log() + top, at

    return run


def ids_around(R, V, first, seed=3):
    """Ids before, among and after the columns."""
    return np.random.default_rng(seed).integers(first - V - 1, first + 2 * V + 1, R).astype(np.int32)


def log_sum_exp(z):
    top = z.max(1, keepdims=True)
    return top + np.log(np.exp(z - top).sum(1, keepdims=True))


def picked(z, ids, first):
    at = ids - first
    mine = (at >= 0) & (at < z.shape[1])
    return np.where(mine, z[np.arange(len(z)), at * mine], 0)[:, None]


@BOTH
@pytest.mark.parametrize("i", [1, 2])
def test_matches_float64_and_its_differences(kind, i):
    """For the gradient the largest logit is a constant: here one that does not change."""
    measure, ids, z = FACTORIES[kind](), np.array([4, 10, 3, 11, -100, 7], np.int32), draw(6, 7)
    top = z.max(1, keepdims=True).astype(np.float64)
    np.testing.assert_array_equal(host(measure(4, ms.Tensor(z), ms.Tensor(ids))[0]), top.astype(np.float32))

    def one(z, ids):
        return measure(4, z, ids)[i]

    check(one, lambda z, ids: picked(z, ids, 4) if i == 2 else np.exp(z - top).sum(1, keepdims=True), [z], (ids,))


@pytest.mark.extended(but=("(3, 1)", "(1, 17)", "(3, 1025)"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape):
    for first in (0, 5):
        ways = ("eager", "compiled") if shape == SHAPES[-1] and first else ("eager",)
        z, ids = draw(*shape) * 4, ids_around(*shape, first)
        agree(*(from_first(make(), first) for make in FACTORIES.values()), [z], (ids,), ways=ways)


@BOTH
def test_first_may_be_a_tensor(kind):
    measure, z, ids = FACTORIES[kind](), draw(6, 7), np.array([4, 10, 3, 11, -100, 7], np.int32)
    for run in (measure, jit(measure)):
        top, total, at = run(ms.Tensor(4, ms.int32), ms.Tensor(z), ms.Tensor(ids))
        assert top.shape == total.shape == at.shape == (6, 1)
        np.testing.assert_array_equal(host(at), picked(z, ids, 4).astype(np.float32))
        assert_close(log_sum_exp(z.astype(np.float64)), total.log() + top, 1e-6)


def test_rising_and_falling_logits():
    """The largest so far changes in every block, or never again."""
    z = np.linspace(-3e4, 3e4, 5000, dtype=np.float32)
    z = np.stack((z, z[::-1], np.random.default_rng(0).permutation(z)))
    lse, _ = lse_of(cross_entropy.cpu())(0, ms.Tensor(z), ms.Tensor(np.zeros(3, np.int32)))
    assert_close(log_sum_exp(z.astype(np.float64)), lse, 1e-6)


@BOTH
def test_a_vocabulary_of_qwen3(kind):
    """151,936 terms: sums of float32 in one run would lose 1e-5."""
    z, ids = draw(3, 151_936) * 2, np.array([0, 77_777, 151_935], np.int32)
    lse, at = lse_of(FACTORIES[kind]())(0, ms.Tensor(z), ms.Tensor(ids))
    assert_close(log_sum_exp(z.astype(np.float64)), lse, 1e-6)
    np.testing.assert_array_equal(host(at), picked(z, ids, 0))


@BOTH
@pytest.mark.parametrize("height", [1e4, -1e4, 3e37])
def test_huge_logits(kind, height):
    z = draw(6, 1500) * 10
    z = (z + np.float32(height) if abs(height) < 1e30 else np.where(z > 0, height, -height)).astype(np.float32)
    measure, ids, wide = lse_of(FACTORIES[kind]()), np.arange(6, dtype=np.int32), z.astype(np.float64)
    assert_close(log_sum_exp(wide), measure(0, ms.Tensor(z), ms.Tensor(ids))[0], 1e-6)
    grad = ms.grad(lambda z: measure(0, z, ms.Tensor(ids))[0].sum())(ms.Tensor(z))
    assert_close(softmax(wide), grad, 1e-5)


@BOTH
def test_the_digits_of_huge_logits(kind):
    z = (draw(6, 1500) * 10 + 1e4).astype(np.float32)
    ids, measure, wide = np.arange(6, dtype=np.int32), FACTORIES[kind](), z.astype(np.float64)

    def nll(z):
        top, total, at = measure(0, z, ms.Tensor(ids))
        return (total.log() + (top - at)).sum()

    assert_close((log_sum_exp(wide) - picked(wide, ids, 0)).sum(), nll(ms.Tensor(z)), 1e-6)
    one_hot = np.eye(1500)[:6]
    assert_close(softmax(wide) - one_hot, ms.grad(nll)(ms.Tensor(z)), 1e-5)


@BOTH
@pytest.mark.parametrize("V", [5, 2100])
def test_padding_and_rows_of_nothing_but_padding(kind, V):
    """-inf has neither part in a sum nor a gradient; a row of it has a sum of 0 and no gradient, not NaN."""
    z = draw(4, V)
    z[1], z[2, : V // 2], z[3, V // 2 :] = NEVER, NEVER, NEVER
    measure, ids = FACTORIES[kind](), ms.Tensor(np.full(4, -1, np.int32))
    top, total, at = map(host, measure(0, ms.Tensor(z), ids))
    assert top[1] == NEVER and total[1] == 0 and (at == 0).all()
    rest = [0, 2, 3]
    assert_close(log_sum_exp(z[rest].astype(np.float64)), np.log(total[rest]) + top[rest], 1e-6)
    grad = host(ms.grad(lambda z: (measure(0, z, ids)[1] * 3).sum())(ms.Tensor(z)))
    assert (grad[1] == 0).all() and (grad[~np.isfinite(z)] == 0).all()
    assert_close(3 * np.exp(z[rest] - top[rest]), grad[rest], 1e-5)


@BOTH
def test_parts_of_a_vocabulary_make_the_whole(kind):
    """As ranks do: with gradients through the sum over parts, of which one is nothing but padding."""
    measure, V, part = FACTORIES[kind](), 10, 4
    z, ids = draw(7, V), np.array([0, 3, 4, 7, 8, 9, 5], np.int32)
    padded = np.concatenate((z, np.full((7, 3 * part + part - V), NEVER)), 1)

    def nll(padded):
        found = [measure(i * part, padded[:, i * part : (i + 1) * part], ms.Tensor(ids)) for i in range(4)]
        top = ms.ops.stop_gradient(ms.ops.concat([top for top, _, _ in found], 1).max(1, keepdims=True))
        total = sum(total * (ms.ops.stop_gradient(part) - top).exp() for part, total, _ in found)
        return (total.log() + top - sum(at for _, _, at in found)).sum()

    wide = z.astype(np.float64)
    assert_close((log_sum_exp(wide) - picked(wide, ids, 0)).sum(), nll(ms.Tensor(padded)), 1e-6)
    grad = host(ms.grad(nll)(ms.Tensor(padded)))
    assert_close(softmax(wide) - np.eye(V)[ids], grad[:, :V], 1e-5)
    assert (grad[:, V:] == 0).all()


@BOTH
def test_a_nan_stays_in_its_row(kind):
    z = draw(3, 3000)
    z[1, 2500], z[2, :1024] = np.nan, NEVER
    z[2, 1024:], z[2, 100] = NEVER, np.nan
    lse = host(lse_of(FACTORIES[kind]())(0, ms.Tensor(z), ms.Tensor(np.zeros(3, np.int32)))[0])
    assert np.isfinite(lse[0]) and np.isnan(lse[1:]).all()


def test_views():
    ids = np.array([2, 6, 9, -1], np.int32)
    takes_views(from_first(cross_entropy.cpu(), 2), draw(4, 7), ids)


def test_bits_do_not_depend_on_threads():
    R, V = 37, 2501
    z, at, column = draw(R, V), ids_around(R, V, 0), (R, 1)
    same_for_any_threads("cross_entropy", "cross_entropy", [z, at], [column] * 3)
    same_for_any_threads("cross_entropy", "cross_entropy_grad", [z, at, draw(*column), draw(*column), draw(*column)], [(R, V)])
