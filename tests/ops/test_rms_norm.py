"""The C++ RMS norm, alone and after a sum, against the reference and float64."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import ops

from ops import rms_norm
from tests.ops.kernels import TOLERANCE, agree, agree_in_scan, same_for_any_threads, takes_views
from tests.ops.test_references import check, draw
from tests.tiny import assert_close, host

EPS = 1e-3
SHAPES = [(1, 1), (3, 1), (1, 17), (5, 16), (2, 3, 37), (263, 131)]  # the last: threads, and parts of unequal size


def formula(x, w):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * w


def test_matches_float64_and_its_differences():
    check(rms_norm.cpu(EPS), formula, [draw(2, 3, 7), draw(7)])


def test_sum_and_norm_match_float64_and_its_differences():
    """Both results, whose gradients meet in h."""
    fused = rms_norm.cpu_add(EPS)

    def both(x, y, w):
        return np.concatenate((x + y, formula(x + y, w)))

    def joined(x, y, w):
        return ops.concat(fused(x, y, w))

    check(joined, both, [draw(3, 7), draw(3, 7), draw(7)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape):
    ways = ("eager", "compiled") if shape == SHAPES[-1] else ("eager",)
    x, y, w = draw(*shape), draw(*shape), draw(shape[-1])
    eps = EPS if shape[-1] > 1 else 1.0  # the norm of one number is its sign, but for eps, and the gradient 0: all digits cancel
    agree(rms_norm.reference(eps), rms_norm.cpu(eps), [x, w], ways=ways)
    agree(rms_norm.reference_add(eps), rms_norm.cpu_add(eps), [x, y, w], ways=ways)


@pytest.mark.extended
def test_gradients_inside_a_handwritten_backward():
    def twice(fused):
        add_norm, norm = fused

        def layer(x, w):
            h, n = add_norm(x, ops.Tanh()(x), w)
            return h + norm(n, w)

        return layer

    eps = 1e-6
    pairs = [(rms_norm.reference_add(eps), rms_norm.reference(eps)), (rms_norm.cpu_add(eps), rms_norm.cpu(eps))]
    agree_in_scan(*map(twice, pairs), draw(9, 24), draw(4, 24), ())


def test_one_tensor_as_the_gradient_of_both_summands():
    """Also where they come from different ops, are one array, or are results of the op itself."""

    def thrice(op):
        def run(a, b, w):
            h, n = op(a * 3, b, w)
            h, n = op(h, n, w)
            return op(h, h, w)

        return run

    agree(thrice(rms_norm.reference_add(EPS)), thrice(rms_norm.cpu_add(EPS)), [draw(6, 11), draw(6, 11), draw(11)])


@pytest.mark.extended
def test_only_one_of_the_two_results_is_used():
    x, y, w = draw(4, 8), draw(4, 8), draw(8)

    def one_of(op, i):
        def run(x, y, w):
            return op(x, y, w)[i]

        return run

    for i in range(2):
        agree(one_of(rms_norm.reference_add(EPS), i), one_of(rms_norm.cpu_add(EPS), i), [x, y, w])


@pytest.mark.parametrize("scale", [0, 1e-25, 1e-12, 1e15])
def test_extreme_values(scale):
    """Zeros, and squares that vanish beside eps or are near the largest float32; the reference's gradient loses digits there."""
    x, w, dy = draw(5, 40) * np.float32(scale), draw(40), draw(5, 40)
    y, (dx, dw) = value_and_gradient(rms_norm.cpu(EPS), x, w, dy)
    x, w, dy = (a.astype(np.float64) for a in (x, w, dy))
    r = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    assert_close(formula(x, w), y, TOLERANCE)
    # dx is across x, a difference of two terms of the size of dy * w * r, of which both have an error
    assert np.abs(dy * w * r - x * r**3 * (dy * w * x).mean(-1, keepdims=True) - host(dx)).max() < TOLERANCE * np.abs(dy * w * r).max()
    assert_close((dy * x * r).sum(0), dw, TOLERANCE)


def value_and_gradient(op, x, w, dy):
    """op(x, w), and the gradients of the sum of its product with dy."""
    dy = ms.Tensor(dy)
    return op(ms.Tensor(x), ms.Tensor(w)), ms.grad(lambda x, w: (op(x, w) * dy).sum(), (0, 1))(ms.Tensor(x), ms.Tensor(w))


def test_a_nan_stays_in_its_row():
    x = draw(3, 40)
    x[1, 17] = np.nan
    y = host(rms_norm.cpu(EPS)(ms.Tensor(x), ms.Tensor(draw(40))))
    assert np.isnan(y[1]).all() and np.isfinite(y[[0, 2]]).all()


def test_views():
    takes_views(rms_norm.cpu(EPS), draw(6, 7), draw(7))
    takes_views(rms_norm.cpu_add(EPS), draw(6, 7), draw(6, 7), draw(7))


def test_bits_do_not_depend_on_threads():
    x, y, w, eps, shape = draw(263, 131), draw(263, 131), draw(131), np.float32(EPS), (263, 131)
    same_for_any_threads("rms_norm", "rms_norm", [x, w, eps], [shape])
    same_for_any_threads("rms_norm", "rms_norm_add", [x, y, w, eps], [shape, shape])
    same_for_any_threads("rms_norm", "rms_norm_grad", [x, w, eps, y], [shape, (131,)])
    same_for_any_threads("rms_norm", "rms_norm_add_grad", [x, w, eps, y, y + 1], [shape, (131,)])
