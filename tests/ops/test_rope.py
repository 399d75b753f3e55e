"""The C++ rotary embedding, alone and after an RMS norm of the heads, against the reference and float64."""

import mindspore as ms
import numpy as np
import pytest

from ops import rope
from parallel.step import value_and_grad
from tests.ops.kernels import agree, agree_in_scan, same_for_any_threads, takes_views
from tests.ops.test_references import check, draw
from tests.tiny import host

EPS = 1e-3
# H/2 of 16, 32 and 64 have loops of their own; the last ones: threads, and parts of unequal size
SHAPES = [(1, 1, 1, 2), (2, 3, 5, 6), (1, 5, 3, 32), (2, 2, 1, 64), (1, 3, 2, 128), (3, 37, 7, 34), (2, 41, 8, 32)]


def angles(shape):
    B, S, _, H = shape
    angle = np.random.default_rng(2).uniform(-9, 9, (B, S, 1, H // 2))
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def turned(x, cos, sin):
    a, b = np.split(x, 2, -1)
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)


def normed_and_turned(x, w, cos, sin):
    return turned(x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * w, cos, sin)


def test_matches_float64_and_its_differences():
    x, w = draw(2, 3, 2, 6), draw(6)
    check(rope.cpu(), turned, [x], angles(x.shape))
    check(rope.cpu_norm(EPS), normed_and_turned, [x, w], angles(x.shape))


@pytest.mark.extended(but=("(1, 1*", "(2, 3*", "(1, 3*"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape):
    ways = ("eager", "compiled") if shape in SHAPES[-2:] else ("eager",)
    x, w, fixed = draw(*shape), draw(shape[-1]), angles(shape)
    eps = EPS if shape[-1] > 2 else 1.0  # the norm of two numbers keeps an angle only, and most digits of its gradient cancel
    agree(rope.reference(), rope.cpu(), [x], fixed, ways=ways)
    agree(rope.reference_norm(eps), rope.cpu_norm(eps), [x, w], fixed, ways=ways)


def test_gradients_inside_a_handwritten_backward():
    shape = (2, 5, 3, 8)

    def layer(norm_rotate, rotate):
        def run(x, w, cos, sin):
            return x + rotate(norm_rotate(x, w, cos, sin), cos, sin)

        return run

    fused = layer(rope.cpu_norm(EPS), rope.cpu())
    agree_in_scan(layer(rope.reference_norm(EPS), rope.reference()), fused, draw(*shape), draw(3, 8), angles(shape))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_angles_get_gradients_of_zero(compiled):
    x, w, (cos, sin) = draw(2, 3, 2, 6), draw(6), angles((2, 3, 2, 6))
    inputs = {"cos": ms.Tensor(cos), "sin": ms.Tensor(sin)}
    rotate, norm_rotate = rope.cpu(), rope.cpu_norm(EPS)

    def total(p, x, w):
        return (rotate(x, p["cos"], p["sin"]) * 2 + norm_rotate(x, w, p["cos"], p["sin"])).sum()

    _, grads = value_and_grad(total, compiled=compiled)(inputs, ms.Tensor(x), ms.Tensor(w))
    assert all(grads[k].shape == cos.shape and (host(grads[k]) == 0).all() for k in inputs)


@pytest.mark.parametrize("scale", [0, 1e-25, 1e12])
def test_extreme_values(scale):
    shape = (2, 3, 2, 40)
    x, w = draw(*shape) * np.float32(scale), draw(40)
    agree(rope.reference(), rope.cpu(), [x], angles(shape), ways=("eager",))
    agree(rope.reference_norm(EPS), rope.cpu_norm(EPS), [x, w], angles(shape), ways=("eager",))


def test_views():
    x, (cos, sin) = draw(2, 3, 4, 6), angles((2, 3, 4, 6))
    takes_views(rope.cpu(), x, cos, sin)
    takes_views(rope.cpu_norm(EPS), x, draw(6), cos, sin)


@pytest.mark.parametrize("shape", [(3, 37, 7, 34), (2, 41, 8, 32)], ids=str)
def test_bits_do_not_depend_on_threads(shape):
    x, dy, w, (cos, sin), eps = draw(*shape), draw(*shape), draw(shape[-1]), angles(shape), np.float32(EPS)
    same_for_any_threads("rope", "rope", [x, cos, sin], [shape])
    same_for_any_threads("rope", "rope_grad", [x, cos, sin], [shape])
    same_for_any_threads("rope", "rope_norm", [x, w, cos, sin, eps], [shape])
    same_for_any_threads("rope", "rope_norm_grad", [x, w, cos, sin, eps, dy], [shape, shape[-1:]])
