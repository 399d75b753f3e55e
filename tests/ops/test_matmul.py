"""Products of rows and weights: both implementations against float64, the C++ one in all shapes against MindSpore's."""

import numpy as np
import pytest

from ops import matmul
from tests.ops.kernels import agree, agree_in_scan, call, same_for_any_threads, takes_views
from tests.ops.test_references import check, draw
from tests.tiny import assert_close

IMPLEMENTATIONS = {"reference": matmul.reference, "cpu": matmul.cpu}
# rows, inner, out: 1 and primes; up to 16 rows, whose kernel is another; more than a tile; out above a run of few rows
SIZES = [
    (1, 1, 1),
    (3, 7, 5),
    (1, 8, 300),
    (2, 131, 257),
    (4, 5, 1031),
    (5, 16, 9),
    (8, 1030, 65),
    (16, 70, 33),
    (17, 9, 20),
    (31, 19, 200),
    (67, 31, 131),
    (300, 17, 70),
    (521, 3, 2053),
]
KERNELS = {  # of a [m, k] and b [k, n]: how each is stored
    "matmul": (False, False),
    "matmul_nt": (False, True),
    "matmul_tn": (True, False),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_is_the_product_and_has_its_gradients(implementation):
    check(IMPLEMENTATIONS[implementation](), np.matmul, [draw(3, 4), draw(4, 5)])
    check(IMPLEMENTATIONS[implementation](transpose_b=True), lambda x, w: x @ w.T, [draw(3, 4), draw(5, 4)])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("transpose_b", [False, True])
def test_it_matches_the_reference(transpose_b, sizes):
    m, k, n = sizes
    x, w = draw(m, k), draw(n, k) if transpose_b else draw(k, n)
    ways = ("eager", "compiled") if sizes in SIZES[10:12] else ("eager",)
    agree(matmul.reference(transpose_b), matmul.cpu(transpose_b), (x, w), ways=ways)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sizes", SIZES)
def test_any_number_of_threads_gives_the_same_bits(kernel, sizes):
    m, k, n = sizes
    turned_a, turned_b = KERNELS[kernel]
    a, b = draw(*((k, m) if turned_a else (m, k))), draw(*((n, k) if turned_b else (k, n)))
    same_for_any_threads("matmul", kernel, [a, b], [(m, n)])
    a64, b64 = (x.astype(np.float64).T if turned else x.astype(np.float64) for x, turned in ((a, turned_a), (b, turned_b)))
    assert_close(a64 @ b64, call("matmul", kernel, [a, b], [(m, n)], 2)[-1], 1e-6)


@pytest.mark.parametrize("kernel", ["matmul", "matmul_nt"])
@pytest.mark.parametrize("k, n", [(131, 517), (72, 1100), (5, 3)])
def test_a_token_decodes_alike_in_batches_of_up_to_16(kernel, k, n):
    x, w = draw(16, k), draw(n, k) if kernel == "matmul_nt" else draw(k, n)
    whole = call("matmul", kernel, [x, w], [(16, n)], 2)[-1]
    for rows in range(1, 16):
        first = 16 - rows if rows % 2 else 0
        part = slice(first, first + rows)
        np.testing.assert_array_equal(call("matmul", kernel, [x[part], w], [(rows, n)], 1 + rows % 2)[-1], whole[part])


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_to_sum_gives_zeros(kernel):
    turned_a, turned_b = KERNELS[kernel]
    for m in (2, 9):
        a, b = np.zeros((0, m) if turned_a else (m, 0), np.float32), np.zeros((3, 0) if turned_b else (0, 3), np.float32)
        assert (call("matmul", kernel, [a, b], [(m, 3)], 2)[-1] == 0).all()


def test_huge_and_missing_numbers_pass_through():
    x, w = draw(20, 8), draw(8, 10)
    x[2, 3], x[4, 1] = np.inf, np.nan
    for rows in (slice(0, 20), slice(0, 6), slice(2, 5)):  # by OpenBLAS, and as few rows
        y = call("matmul", "matmul", [x[rows], w], [(rows.stop - rows.start, 10)], 2)[-1]
        ok = np.isfinite(x[rows]).all(1)
        assert np.isinf(y[2 - rows.start]).all() and np.isnan(y[4 - rows.start]).all()
        assert_close(x[rows][ok] @ w, y[ok], 1e-6)


def test_views_are_taken():
    takes_views(matmul.cpu(), draw(6, 5), draw(5, 7))
    takes_views(matmul.cpu(True), draw(6, 5), draw(7, 5))


@pytest.mark.extended
def test_gradients_inside_a_handwritten_backward():
    def layer(multiply):
        def run(x, w):
            return x + multiply(x, w)

        return run

    agree_in_scan(layer(matmul.reference()), layer(matmul.cpu()), draw(9, 8), 0.3 * draw(3, 8, 8), ())
