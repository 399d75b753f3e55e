"""Each op against its formula in numpy's float64, and its gradient against central differences of that formula."""

import mindspore as ms
import numpy as np
import pytest

from layers import loss as loss_layer
from layers.bound_ops import BoundOps
from ops import iota, rms_norm, rope, swiglu
from parallel.sharding import Sharding
from tests.tiny import DENSE, FUSED, assert_close, host

VALUE, GRADIENT = 2e-6, 2e-5  # float32 sums of a few dozen terms; differences in float64 add 1e-9
rng = np.random.default_rng(0)


def draw(*shape):
    return rng.normal(0, 1, shape).astype(np.float32)


def numerical_gradient(f, x, step=1e-5):
    """Central differences of a scalar function of a float64 array."""
    grad = np.zeros(x.shape)
    for place in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[place] += step
        down[place] -= step
        grad[place] = (f(up) - f(down)) / (2 * step)
    return grad


def check(op, formula, inputs, constants=(), value_tolerance=VALUE, gradient_tolerance=GRADIENT):
    """op(*tensors) and formula(*float64 arrays) agree, and so do the gradients of a random weighting of the result."""
    wide = [x.astype(np.float64) for x in inputs]
    expected, fixed, n = formula(*wide, *constants), [ms.Tensor(c) for c in constants], len(inputs)
    out = op(*map(ms.Tensor, inputs), *fixed)
    assert out.dtype == ms.float32
    assert_close(expected, out, value_tolerance)
    weights = draw(*expected.shape)

    def weighted(*tensors):
        return (op(*tensors, *fixed) * ms.Tensor(weights)).sum()

    grads = ms.grad(weighted, tuple(range(n)))(*map(ms.Tensor, inputs))
    for i, grad in enumerate(grads if n > 1 else [grads]):

        def of_one(x, i=i):
            return (formula(*wide[:i], x, *wide[i + 1 :], *constants) * weights).sum()

        assert_close(numerical_gradient(of_one, wide[i]), grad, gradient_tolerance, f"gradient of input {i}")


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 4, 6)])
def test_rms_norm(shape):
    def formula(x, w):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * w

    check(rms_norm.reference(1e-3), formula, [draw(*shape), draw(shape[-1])])


def test_rms_norm_keeps_its_statistics_in_float32():
    """300 squared is above float16's largest number, and the mean of 4096 such squares far above."""
    x = ms.Tensor(np.full((2, 4096), 300), ms.float16)
    y = rms_norm.reference(1e-6)(x, ms.Tensor(np.full(4096, 2, np.float32)))
    assert y.dtype == ms.float16 and (host(y) == 2).all()


def angles(positions, half):
    angle = positions[:, :, None, None] * (0.3 ** np.arange(half))
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def test_rope_is_a_rotation_of_complex_pairs():
    """Component i and component i + H/2 are the real and imaginary part."""
    x, (cos, sin) = draw(2, 5, 3, 8), angles(np.stack([np.arange(5), np.arange(5) + 7]), 4)

    def formula(x, cos, sin):
        turned = (x[..., :4] + 1j * x[..., 4:]) * (cos + 1j * sin)
        return np.concatenate((turned.real, turned.imag), -1)

    check(rope.reference(), formula, [x], (cos, sin))
    y = host(rope.reference()(*map(ms.Tensor, (x, cos, sin))))
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


def test_rope_makes_products_depend_on_the_distance_alone():
    q, k, rotate = draw(1, 1, 1, 8), draw(1, 1, 1, 8), rope.reference()
    products = []
    for at in (3, 40):
        a, b = angles(np.array([[at]]), 4), angles(np.array([[at - 2]]), 4)
        products.append((host(rotate(*map(ms.Tensor, (q, *a)))) * host(rotate(*map(ms.Tensor, (k, *b))))).sum())
    assert_close(products[0], products[1], 1e-5)


def test_swiglu():
    check(swiglu.reference(), lambda gate, up: gate / (1 + np.exp(-gate)) * up, [draw(4, 6), draw(4, 6)])


IDS = np.array([[3, 0, 6], [6, 2, 2]], np.int32)


def nll_formula(z, ids):
    return np.log(np.exp(z).sum(-1, keepdims=True)) - np.take_along_axis(z, ids.reshape(-1, 1), 1)


def nats(sharding):
    op = BoundOps(DENSE.replace(vocab_size=7), sharding, FUSED)
    return lambda logits, targets: loss_layer.nats_and_gap(op, logits, targets)[0]


def test_negative_log_likelihood():
    check(nats(Sharding(check=True)), nll_formula, [draw(6, 7)], (IDS,))


def test_huge_logits_do_not_overflow():
    """The value is a difference of logits, and the gradient softmax minus one-hot, at any height."""
    z, nll = draw(6, 7) * 10, nats(Sharding())
    for height in (1e4, -1e4, 3e37):
        high = (z + np.float32(height) if abs(height) < 1e30 else np.where(z > 0, height, -height)).astype(np.float32)
        wide = high.astype(np.float64)
        rows = np.arange(6)
        expected = np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1)) + wide.max(1) - wide[rows, IDS.ravel()]
        assert_close(expected, host(nll(ms.Tensor(high), ms.Tensor(IDS)))[:, 0], 1e-6)
        one_hot = np.eye(7)[IDS.ravel()]

        def total(x):
            return nll(x, ms.Tensor(IDS)).sum()

        assert_close(softmax(wide) - one_hot, ms.grad(total)(ms.Tensor(high)), 1e-5)


@pytest.mark.parametrize("weights", [[[1, 0, 2], [0.5, 0, 0]], [[0, 0, 0], [0, 0, 0]]])
def test_weighted_mean(weights):
    x, w = draw(6, 1), np.array(weights, np.float32)
    op = BoundOps(DENSE, Sharding(check=True), FUSED)
    value, total = loss_layer.weighted_mean(op, ms.Tensor(x), ms.Tensor(w))
    assert float(total) == w.sum()
    grad = ms.grad(lambda x: loss_layer.weighted_mean(op, x, ms.Tensor(w))[0])(ms.Tensor(x))
    if w.sum():
        assert_close((x[:, 0] * w.ravel()).sum() / w.sum(), value, 1e-6)
        assert_close(w.reshape(-1, 1) / w.sum(), grad, 1e-6)
    else:
        assert float(value) == 0 and (host(grad) == 0).all()


def test_iota():
    for n in (1, 5):
        out = iota.reference()(n)
        assert out.dtype == ms.int32
        np.testing.assert_array_equal(host(out), np.arange(n))
