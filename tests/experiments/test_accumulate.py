"""The sum of micro-batches' gradients, by results of a graph and in place."""

import mindspore as ms
import numpy as np
import pytest

from experiments.train.accumulate import RunningSum
from parallel.graph.jit import jit

GRADIENTS = tuple(np.random.default_rng(0).standard_normal(shape).astype(np.float32) for shape in ((2, 3), (4,)))


@pytest.mark.parametrize("in_place", [False, True])
def test_each_step_sums_its_own_gradients_alone(in_place):
    total, gradients = RunningSum(GRADIENTS, in_place), tuple(map(ms.Tensor, GRADIENTS))
    add = total.add

    def graph(share, arrays, gradients):
        return share + 0, add(share, arrays, gradients)

    graph = jit(graph)
    for _ in range(2):
        total.start()
        for share in (0.5, 1.5):
            _, added = graph(ms.Tensor(share, ms.float32), total.arrays, gradients)
            total.take(added)
        for found, g in zip(total.arrays, GRADIENTS):
            np.testing.assert_array_equal(found.asnumpy(), np.float32(0.5) * g + np.float32(1.5) * g)
    spoilt = tuple(ms.Tensor(np.full_like(g, np.nan)) for g in GRADIENTS)
    total.take(graph(ms.Tensor(1.0, ms.float32), total.arrays, spoilt)[1])
    total.start()
    assert all((found.asnumpy() == 0).all() for found in total.arrays)
