"""The C++ SwiGLU against the reference and float64."""

import mindspore as ms
import numpy as np
import pytest

from ops import swiglu
from tests.ops.kernels import agree, agree_in_scan, same_for_any_threads, takes_views
from tests.ops.test_references import check, draw
from tests.tiny import assert_close, host

SHAPES = [(1,), (17,), (3, 5, 7), (131, 263)]  # the last with threads


def formula(gate, up):
    return gate / (1 + np.exp(-gate)) * up


def test_matches_float64_and_its_differences():
    check(swiglu.cpu(), formula, [draw(4, 7), draw(4, 7)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape):
    ways = ("eager", "compiled") if shape == SHAPES[-1] else ("eager",)
    agree(swiglu.reference(), swiglu.cpu(), [draw(*shape) * 3, draw(*shape)], ways=ways)


def test_gradients_inside_a_handwritten_backward():
    def layer(act):
        def run(x, w):
            return x + act(x * w, x)

        return run

    agree_in_scan(layer(swiglu.reference()), layer(swiglu.cpu()), draw(9, 24), draw(3, 24), ())


def test_every_height_of_the_gate():
    """Down to where exp(-gate) is not finite; the gradient is within the same tolerance of its own size there, or vanishes."""
    gate = np.concatenate((np.linspace(-120, 120, 4801), [-3e38, -1e10, 0, -0.0, 1e10, 3e38])).astype(np.float32)
    up, act = np.ones_like(gate), swiglu.cpu()
    wide = np.maximum(gate.astype(np.float64), -700)
    s = 1 / (1 + np.exp(-wide))
    y, d_gate = host(act(ms.Tensor(gate), ms.Tensor(up))), host(ms.grad(lambda g: act(g, ms.Tensor(up)).sum())(ms.Tensor(gate)))
    normal = gate > -80  # below, float32 has no digits left
    np.testing.assert_allclose(y[normal], (wide * s)[normal], rtol=1e-6)
    assert np.abs(y[~normal]).max() < 1e-32 and np.abs(d_gate[~normal]).max() < 1e-32
    assert_close((s * (1 + wide * (1 - s)))[normal], d_gate[normal], 1e-6)


def test_a_nan_stays_where_it_is():
    gate = draw(40)
    gate[17] = np.nan
    y = host(swiglu.cpu()(ms.Tensor(gate), ms.Tensor(draw(40))))
    assert np.isnan(y[17]) and np.isfinite(np.delete(y, 17)).all()


def test_views():
    takes_views(swiglu.cpu(), draw(6, 7), draw(6, 7))


def test_bits_do_not_depend_on_threads():
    shape = (131, 263)
    gate, up, dy = draw(*shape), draw(*shape), draw(*shape)
    same_for_any_threads("swiglu", "swiglu", [gate, up], [shape])
    same_for_any_threads("swiglu", "swiglu_grad", [gate, up, dy], [shape, shape])
