"""The manual lowering of each layer's ops on 4 processes against one process: results, and the gradient of every operand."""

import functools

import numpy as np
import pytest

from parallel.sharding import Sharding
from tests.parallel.manual_worker import LAYOUTS, H, K, R, checks, cut, differentiated, sharding_of
from tests.processes import run
from tests.tiny import assert_close

TOLERANCE = 2e-6  # float32 sums of dozens of terms, in another order
OF_PARTS = 5e-6  # attention to the keys of each rank of a ring, joined with weights that are exponentials, as in test_context.py
CASES = [(layout, name) for layout, (*_, names) in LAYOUTS.items() for name in names]


def tolerance(name):
    return OF_PARTS if name == "context" else TOLERANCE


@pytest.fixture(scope="module")
def ranks():
    return run("tests.parallel.manual_worker:main", 4)


@functools.cache
def on_one_device(name, kv_repeat):
    """(results, gradients) of global arrays. Of a kv head that is there several times, each copy has a cotangent, and they add up."""
    check = checks(1)[name]
    p, ws = checks(kv_repeat)[name].inputs()
    folded = [fold(w, kv_repeat) if "kv_heads" in dims else w for w, (_, dims) in zip(ws, check.results)]
    ys, grads = differentiated(check, Sharding(), p, folded, compiled=False)
    return [copies(y, kv_repeat) if "kv_heads" in dims else y for y, (_, dims) in zip(ys, check.results)], grads


def fold(w, n):
    return w.reshape(R, K, n, H).sum(2).reshape(R, K * H)


def copies(y, n):
    return np.repeat(y.reshape(R, K, 1, H), n, 2).reshape(R, K * n * H)


def expected(layout, name):
    """The check, what one device has, and the ranks' shardings."""
    kv_repeat = LAYOUTS[layout][0].get("kv_repeat", 1)
    return checks(kv_repeat)[name], on_one_device(name, kv_repeat), [sharding_of(layout, rank) for rank in range(4)]


@pytest.mark.extended
@pytest.mark.parametrize("layout, name", CASES)
def test_results_are_those_of_one_device(ranks, layout, name):
    check, (ys, _), shardings = expected(layout, name)
    for i, (y, (_, dims)) in enumerate(zip(ys, check.results)):
        for rank, sharding in enumerate(shardings):
            assert_close(cut(sharding, y, dims), ranks[rank][f"{layout}.{name}.{i}"], tolerance(name), f"result {i} on rank {rank}")


@pytest.mark.extended
@pytest.mark.parametrize("layout, name", CASES)
def test_gradients_are_those_of_one_device(ranks, layout, name):
    """Summed over the data ranks that hold the same operand, as sharding.py says; all ranks' sums are looked at."""
    check, (_, grads), shardings = expected(layout, name)
    for operand, (_, dims) in check.operands.items():
        own = {atom for dim in dims for atom in shardings[0].atoms(dim)}
        partial = [atom for atom in shardings[0].data_atoms if atom not in own]
        for rank, sharding in enumerate(shardings):
            found = sum(ranks[other][f"{layout}.{name}.{operand}"] for other in sharding.mesh.members(partial))
            assert_close(cut(sharding, grads[operand], dims), found, tolerance(name), f"{operand} on rank {rank}")
