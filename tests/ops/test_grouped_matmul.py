"""Grouped products: the reference against numpy, and the C++ ones against the reference and float64."""

import mindspore as ms
import numpy as np
import pytest

from ops import grouped_matmul
from tests.ops.kernels import agree, call, same_for_any_threads, takes_views
from tests.ops.test_references import check, draw
from tests.tiny import assert_close, host

IMPLEMENTATIONS = {"reference": grouped_matmul.reference, "cpu": grouped_matmul.cpu}
GROUPS = {  # (group of each block, groups, rows of a block)
    "sorted": ([0, 0, 1, 3, 3, 3], 4, 2),
    "any order, runs of several blocks": ([2, 0, 0, 2, 2, 0, 1], 4, 3),
    "one group has all": ([1] * 5, 3, 1),
    "the last has all": ([4] * 7, 5, 1),
    "one block": ([0], 1, 1),
    "one row each": (list(range(7)), 7, 1),
    "many rows": ([0] * 300 + [1] * 5 + [2] * 263, 3, 1),  # more than one tile of rows
}


def formula(x, w, group):
    return x @ w[group]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_block_is_multiplied_by_the_matrix_of_its_group(implementation):
    """A group without a block has a gradient of 0, and one with several has their sum."""
    group = np.array([2, 0, 2], np.int32)
    check(IMPLEMENTATIONS[implementation](), formula, [draw(3, 2, 4), draw(4, 4, 5)], (group,))


@pytest.mark.extended(but=("sizes0*", "sizes1-sorted", "sizes1-one row each", "sizes2-any*"))
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("sizes", [(1, 1), (7, 13), (131, 257)])
def test_it_matches_the_reference(name, sizes):
    (group, groups, b), (i, o) = GROUPS[name], sizes
    inputs, group = [draw(len(group), b, i), draw(groups, i, o)], np.array(group, np.int32)
    ways = ("eager", "compiled") if i == 7 else ("eager",)
    agree(grouped_matmul.reference(), grouped_matmul.cpu(), inputs, (group,), ways=ways)
    assert_close(formula(*(x.astype(np.float64) for x in inputs), group), call_forward(*inputs, group), 1e-5)


def call_forward(x, w, group, threads=2):
    return call("grouped_matmul", "grouped_matmul", [x, w, group], [(*x.shape[:2], w.shape[2])], threads)[-1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_blocks_without_a_group_give_zeros_and_no_gradient(implementation):
    """Their rows are zeros, and nothing is made of their results."""
    x, w, group = draw(4, 2, 5), draw(3, 5, 6), np.array([0, 2, 3, 3], np.int32)
    x[2:] = 0
    f, used = IMPLEMENTATIONS[implementation](), ms.Tensor(np.array([1, 1, 0, 0], np.float32).reshape(4, 1, 1))

    def weighted(x, w):
        return (f(x, w, ms.Tensor(group)) * used * 2).sum()

    y = host(f(*map(ms.Tensor, (x, w, group))))
    assert_close(x[:2] @ w[group[:2]], y[:2], 1e-5)
    assert (y[2:] == 0).all()
    dx, dw = map(host, ms.grad(weighted, (0, 1))(ms.Tensor(x), ms.Tensor(w)))
    assert (dx[2:] == 0).all() and (dw[1] == 0).all()
    assert_close(2 * x[1].sum(0)[:, None] * np.ones(6), dw[2], 1e-5)


def test_no_block_is_read_twice_or_left_out_when_a_group_has_many_runs():
    """Alternating groups: 40 runs, whose products are added up in dw."""
    group = (np.arange(40) % 3).astype(np.int32)
    agree(grouped_matmul.reference(), grouped_matmul.cpu(), [draw(40, 3, 33), draw(3, 33, 70)], (group,))


def test_infinities_stay_in_their_rows():
    x, w, group = draw(4, 1, 6), draw(2, 6, 9), np.array([0, 0, 1, 1], np.int32)
    expected = call_forward(x, w, group)
    x[1] = np.inf
    found = call_forward(x, w, group)
    np.testing.assert_array_equal(found[[0, 2, 3]], expected[[0, 2, 3]])
    assert not np.isfinite(found[1]).any()


@pytest.mark.parametrize("shape", [(700, 1, 64, 96), (6, 100, 130, 257)])
def test_threads_change_no_bit(shape):
    n, b, i, o = shape
    group = np.sort(np.random.default_rng(0).integers(0, 5, n)).astype(np.int32)
    x, w, dy = draw(n, b, i), draw(5, i, o), draw(n, b, o)
    same_for_any_threads("grouped_matmul", "grouped_matmul", [x, w, group], [(n, b, o)])
    same_for_any_threads("grouped_matmul", "grouped_matmul_dx", [dy, w, group], [(n, b, i)])
    same_for_any_threads("grouped_matmul", "grouped_matmul_dw", [x, w, group, dy], [w.shape])


def test_views():
    takes_views(grouped_matmul.cpu(), draw(3, 2, 4), draw(4, 4, 5), np.array([2, 0, 2], np.int32))


def test_groups_that_do_not_exist_are_refused():
    x, w, group = draw(3, 2, 4), draw(4, 4, 5), np.array([2, 0, 2], np.int32)
    for wrong in (group + 3, group - 1):
        with pytest.raises(RuntimeError):
            host(grouped_matmul.cpu()(*map(ms.Tensor, (x, w, wrong))))


def test_blocks_of_one_row_are_not_padded():
    assert (grouped_matmul.reference_block(64), grouped_matmul.cpu_block(64)) == (64, 1)
