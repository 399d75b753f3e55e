"""Collectives on 4 processes against numpy, forward and backward, eager and compiled; one run makes all results."""

import mindspore as ms
import numpy as np
import pytest

from parallel import collectives
from parallel.mesh import Mesh
from tests.parallel.collectives_worker import KINDS, MODES, cases, in_default_tests, result_shape
from tests.processes import run

pytestmark = pytest.mark.extended


def everyone(x, n):
    return [x] * n


def total(xs):
    return np.sum(xs, 0, xs[0].dtype)


def psum(xs):
    return everyone(total(xs), len(xs))


def joined(xs, dim):
    return everyone(np.concatenate(xs, dim), len(xs))


def parts(x, n, dim):
    return np.split(x, n, dim)


def own_parts(xs, dim):
    return [parts(x, len(xs), dim)[i] for i, x in enumerate(xs)]


def all_to_all(xs, split_dim, concat_dim):
    return [np.concatenate([parts(x, len(xs), split_dim)[i] for x in xs], concat_dim) for i in range(len(xs))]


def ppermute(xs, pairs):
    source = {b: a for a, b in pairs}
    return [xs[source[i]] if i in source else np.zeros_like(x) for i, x in enumerate(xs)]


# op -> the results of a group's ranks, from the list of their inputs
FORWARD = {
    "psum": psum,
    "pvary": lambda xs: xs,
    "pmax": lambda xs: everyone(np.max(xs, 0), len(xs)),
    "all_gather": lambda xs, dim, grad: joined(xs, dim),
    "reduce_scatter": lambda xs, dim: parts(total(xs), len(xs), dim),
    "split": own_parts,
    "all_to_all": all_to_all,
    "ppermute": ppermute,
    "broadcast": lambda xs, root: everyone(xs[root], len(xs)),
}
# op -> their gradients, from the list of their cotangents
BACKWARD = {
    "psum": lambda gs: gs,
    "pvary": psum,
    "pmax": lambda gs: [np.zeros_like(g) for g in gs],
    "all_gather": lambda gs, dim, grad: parts(total(gs), len(gs), dim) if grad == "scatter" else own_parts(gs, dim),
    "reduce_scatter": joined,
    "split": joined,
    "all_to_all": lambda gs, split_dim, concat_dim: all_to_all(gs, concat_dim, split_dim),
    "ppermute": lambda gs, pairs: ppermute(gs, [(b, a) for a, b in pairs]),
    "broadcast": lambda gs, root: [total(gs) if i == root else np.zeros_like(g) for i, g in enumerate(gs)],
}


@pytest.fixture(scope="module")
def results():
    return run("tests.parallel.collectives_worker:main", 4, "fast")


@pytest.fixture(scope="module")
def slow_results():
    return run("tests.parallel.collectives_worker:main", 4, "slow")


EVERY = [
    pytest.param(case, mode, marks=() if in_default_tests(case, mode) else pytest.mark.slow, id=f"{case}-{mode}")
    for case in cases()
    for mode in MODES
]


def assert_ranks(request, case, mode, what, rule, arrays):
    """What each rank has is what `rule` makes of its group's arrays, to the bit."""
    results, key = request.getfixturevalue("results" if in_default_tests(case, mode) else "slow_results"), f"{case}.{mode}.{what}"
    for group in case.groups:
        expected = rule[KINDS[case.kind][0]]([arrays[rank] for rank in group], **case.options)
        for rank, reference in zip(group, expected):
            found = results[rank][key]
            assert found.dtype == reference.dtype
            np.testing.assert_array_equal(found, reference, f"rank {rank}")


@pytest.mark.parametrize("case, mode", EVERY)
def test_results_are_numpys(request, case, mode):
    assert_ranks(request, case, mode, "value", FORWARD, case.inputs)


@pytest.mark.parametrize("case, mode", [each for each in EVERY if each.values[0].dtype == "float32"])
def test_gradients_are_numpys(request, case, mode):
    assert_ranks(request, case, mode, "grad", BACKWARD, case.weights(result_shape(case)))


ONE_RANK = {
    "psum": {},
    "pvary": {},
    "pmax": {},
    "all_gather": {"dim": 1},
    "reduce_scatter": {"dim": 1},
    "split": {"dim": 1},
    "all_to_all": {"split_dim": 0, "concat_dim": 1},
    "ppermute": {"pairs": [(0, 0)]},
    "broadcast": {},
}


@pytest.mark.parametrize("op", ONE_RANK)
def test_on_one_rank_it_is_the_identity(op):
    x = ms.Tensor(np.ones((2, 3), np.float32))
    for axes in ((), ("tp",), ("dp", "cp", "ep")):
        assert getattr(collectives, op)(Mesh(pp=2, rank=1), axes, **ONE_RANK[op])(x) is x


def test_axes_are_outermost_first():
    with pytest.raises(AssertionError, match="are not outermost first"):
        collectives.psum(Mesh(dp=2, tp=2, rank=1), ("tp", "dp"))


@pytest.mark.parametrize("pairs", [[(0, 1), (0, 2)], [(0, 2), (1, 2)]])
def test_no_place_sends_or_receives_twice(pairs):
    with pytest.raises(AssertionError):
        collectives.ppermute(Mesh(dp=4), ("dp",), pairs)


@pytest.mark.parametrize("n", [2, 4, 6, 8, 10])
def test_ranks_that_exchange_two_by_two_meet_in_the_same_round(n):
    rounds = [collectives._rounds(n, at) for at in range(n)]
    for at, others in enumerate(rounds):
        assert sorted([at, *others]) == list(range(n))
        assert all(rounds[other][number] == at for number, other in enumerate(others))
