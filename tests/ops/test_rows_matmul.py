"""Products in which a row has the same bits in any batch: against float64, and a row alone against it among others."""

import mindspore as ms
import numpy as np
import pytest

from ops import rows_matmul
from parallel.graph.jit import jit
from parallel.step import value_and_grad
from tests.ops.kernels import TOLERANCE, call, tensors
from tests.tiny import assert_close

# rows, inner, columns: edges of tiles, panels, and depths; one that is worth threads; an empty sum
SHAPES = [(1, 1, 1), (7, 3, 17), (40, 257, 33), (100, 600, 129), (300, 520, 96), (3, 0, 5)]


def case(m, k, n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1, (m, k)).astype(np.float32), rng.normal(0, 1, (k, n)).astype(np.float32)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_product(shape, transposed):
    a, b = case(*shape)
    given = tensors(a, np.ascontiguousarray(b.T) if transposed else b)
    for form in (rows_matmul.reference, rows_matmul.cpu) if min(shape) else (rows_matmul.cpu,):
        assert_close(a.astype(np.float64) @ b, form(transposed)(*given), TOLERANCE)


@pytest.mark.parametrize("name", ["rows_matmul", "rows_matmul_nt"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if min(shape)])
def test_a_row_has_the_same_bits_in_any_batch_and_with_any_number_of_threads(shape, name):
    """Also as one of the few rows of decoding, which another kernel computes."""
    a, b = case(*shape)
    b = b if name == "rows_matmul" else np.ascontiguousarray(b.T)
    m, n = len(a), shape[2]
    whole = call("rows_matmul", name, [a, b], [(m, n)], 2)[-1]
    for some in {1, min(m, 16), min(m, 17), m}:
        order = np.random.default_rng(some).permutation(m)[:some]
        for threads in (1, 3):
            found = call("rows_matmul", name, [a[order], b], [(some, n)], threads)[-1]
            np.testing.assert_array_equal(whole[order].view(np.uint32), found.view(np.uint32))
    few = call("matmul", name.removeprefix("rows_"), [a[:16], b], [(min(m, 16), n)], 1)[-1]
    np.testing.assert_array_equal(whole[:16], few)


def test_it_runs_in_a_graph_and_has_no_gradient():
    a, b = case(20, 9, 5)
    multiply = rows_matmul.cpu()

    def total(params, x):
        return multiply(x, params["w"]).sum()

    def values(x, w):
        return multiply(x, w)

    assert_close(a.astype(np.float64) @ b, jit(values)(*tensors(a, b)), TOLERANCE)
    with pytest.raises(RuntimeError, match="rows_matmul kernel is for inference and has no gradient"):
        value_and_grad(total)({"w": ms.Tensor(b)}, ms.Tensor(a))
