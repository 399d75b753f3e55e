"""Rows by id and their dense gradient, reference and C++."""

import mindspore as ms
import numpy as np
import pytest

from ops import embedding
from parallel.graph.jit import jit
from tests.ops.kernels import agree, call, same_for_any_threads, takes_views
from tests.ops.test_references import check, draw
from tests.tiny import assert_close, host

KINDS = {"reference": (embedding.reference, embedding.reference_part), "cpu": (embedding.cpu, embedding.cpu_part)}
BOTH = pytest.mark.parametrize("kind", KINDS)
SHAPES = [(1, 1, 1), (3, 5, 1), (2, 7, 40), (300, 67, 29), (1000, 131, 263)]  # V, D, R; some with threads, some with more ids than rows


def ids_of(V, R, low=0, seed=4):
    return np.random.default_rng(seed).integers(low, V, R).astype(np.int32)


def part_from(take, first):
    def run(w, ids):
        return take(first, w, ids)

    return run


@BOTH
def test_matches_float64_and_its_differences(kind):
    """Ids that come twice have the sum, rows that no id names have none."""
    whole, part = KINDS[kind]
    ids = np.array([3, 0, 3, 4], np.int32)
    check(whole(), lambda w, ids: w[ids], [draw(5, 3)], (ids,))
    ids = np.array([9, 6, 5, 11, 9, -100, 10], np.int32)

    def rows(w, ids):
        mine = (ids >= 6) & (ids < 11)
        return w[(ids - 6) * mine] * mine[:, None]

    check(part_from(part(), 6), rows, [draw(5, 3)], (ids,))


@pytest.mark.extended(but=("(3*", "(2*"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape):
    V, D, R = shape
    ways = ("eager", "compiled") if shape in SHAPES[-2:] else ("eager",)
    agree(embedding.reference(), embedding.cpu(), [draw(V, D)], (ids_of(V, R),), ways=ways)
    pair = (part_from(make(), 5) for make in (embedding.reference_part, embedding.cpu_part))
    agree(*pair, [draw(V, D)], (ids_of(5 + 2 * V, R, -3),), ways=ways)


@BOTH
def test_first_may_be_a_tensor(kind):
    take, w, ids = KINDS[kind][1](), draw(4, 3), np.array([7, 3, 4, 8], np.int32)
    expected = np.stack((w[3], np.zeros(3), w[0], np.zeros(3)))
    for run in (take, jit(take)):
        np.testing.assert_array_equal(host(run(ms.Tensor(4, ms.int32), ms.Tensor(w), ms.Tensor(ids))), expected)


@BOTH
def test_one_id_in_every_place(kind):
    """A sum of 5,000 float32 in the order of the ids."""
    take, ids, dy = KINDS[kind][0](), np.full(5000, 2, np.int32), np.abs(draw(5000, 3))
    dw = host(ms.grad(lambda w: (take(w, ms.Tensor(ids)) * ms.Tensor(dy)).sum())(ms.Tensor(draw(4, 3))))
    assert_close(dy.astype(np.float64).sum(0), dw[2], 5e-5)
    assert (dw[[0, 1, 3]] == 0).all()


@pytest.mark.parametrize("wrong", [-1, 4, 2**31 - 1])
def test_an_id_out_of_range_is_an_error(wrong, capfd):
    """Not so in the reference: MindSpore counts -1 from the end. MindSpore's error has a number alone, so the words are printed."""
    take, ids = embedding.cpu(), np.array([0, 3, wrong, 1], np.int32)
    for run in (take, jit(take)):
        with pytest.raises(RuntimeError, match="is 3"):
            run(ms.Tensor(draw(4, 3)), ms.Tensor(ids)).asnumpy()
        assert f"token id {wrong} is outside the vocabulary of 4; is the tokenizer that of the model?" in capfd.readouterr().err


def test_no_ids_at_all():
    w, ids = draw(4, 3), np.zeros(0, np.int32)
    *_, dw = call("embedding", "embedding_grad", [w, ids, np.zeros((0, 3), np.float32)], [(4, 3)], 2)
    assert (dw == 0).all()
    call("embedding", "embedding", [w, ids], [(0, 3)], 2)


def test_views():
    takes_views(embedding.cpu(), draw(4, 7), np.array([3, 0, 3], np.int32))


def test_bits_do_not_depend_on_threads():
    V, D, R = 1000, 131, 3001
    w, ids, dy = draw(V, D), ids_of(V // 10, R), draw(R, D)
    ids[::3] = 17  # one row has a third of the work
    same_for_any_threads("embedding", "embedding", [w, ids], [(R, D)])
    same_for_any_threads("embedding", "embedding_part", [w, ids - 5], [(R, D)])
    same_for_any_threads("embedding", "embedding_grad", [w, ids, dy], [(V, D)])
