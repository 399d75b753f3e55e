"""The feed-forward half of a layer for one token a row: the kernel against the reference, and against the kernels of its parts."""

import numpy as np
import pytest

from ops import decode_mlp, matmul, rms_norm, swiglu
from parallel.graph.jit import jit
from parallel.step import value_and_grad
from tests.ops.kernels import TOLERANCE, call, same_for_any_threads, takes_views, tensors
from tests.ops.test_references import draw
from tests.tiny import assert_close, host

EPS = 1e-6
SHAPES = [(1, 1, 1), (2, 9, 17), (5, 40, 33), (20, 24, 70), (3, 256, 700)]  # B, D, F; the last is cut over threads


def case(B, D, F):
    weights = draw(D, F) / np.sqrt(D), draw(D, F) / np.sqrt(D), draw(F, D) / np.sqrt(F)
    return tuple(x.astype(np.float32) for x in (draw(B, D), 1 + draw(D) / 4, *weights))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_matches_the_reference(shape, compiled):
    fused, args = decode_mlp.cpu(EPS), tensors(*case(*shape))

    def values(*args):
        return fused(*args)

    assert_close(decode_mlp.reference(EPS)(*args), (jit(values) if compiled else values)(*args), TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_its_numbers_are_those_of_the_kernels_of_its_parts(shape):
    B, *rest = shape
    x, w, w_gate, w_up, w_down = args = tensors(*case(min(B, 16), *rest))
    multiply, normed = matmul.cpu(), rms_norm.cpu(EPS)(x, w)
    expected = x + multiply(swiglu.cpu()(multiply(normed, w_gate), multiply(normed, w_up)), w_down)
    np.testing.assert_array_equal(host(expected), host(decode_mlp.cpu(EPS)(*args)))


@pytest.mark.parametrize("shape", SHAPES)
def test_any_number_of_threads_gives_the_same_bits(shape):
    same_for_any_threads("decode_mlp", "decode_mlp", [*case(*shape), np.float32(EPS)], [shape[:2]])


def test_a_token_decodes_alike_alone_and_in_a_batch():
    x, *rest = [*case(20, 24, 70), np.float32(EPS)]
    whole = call("decode_mlp", "decode_mlp", [x, *rest], [(20, 24)], 2)[-1]
    for b in range(20):
        np.testing.assert_array_equal(call("decode_mlp", "decode_mlp", [x[b : b + 1], *rest], [(1, 24)], 1)[-1], whole[b : b + 1])


def test_huge_and_missing_numbers_stay_in_their_rows():
    args = case(4, 24, 40)
    args[0][1, 3], args[0][2] = np.nan, 1e15
    expected, y = (host(form(EPS)(*tensors(*args))) for form in (decode_mlp.reference, decode_mlp.cpu))
    assert np.isnan(y[1]).all()
    for b in (0, 2, 3):
        assert_close(expected[b], y[b], TOLERANCE)


def test_views_are_taken():
    takes_views(decode_mlp.cpu(EPS), *case(5, 40, 33))


def test_differentiating_the_kernel_is_an_error():
    args, fused = tensors(*case(1, 8, 4)), decode_mlp.cpu(EPS)

    def total(params, *rest):
        return fused(params["x"], *rest).sum()

    with pytest.raises(RuntimeError, match="decode_mlp kernel has no gradient"):
        value_and_grad(total)({"x": args[0]}, *args[1:])


@pytest.mark.parametrize("form", [decode_mlp.reference, decode_mlp.cpu])
def test_what_does_not_fit_is_named(form):
    x, w, w_gate, w_up, w_down = case(2, 8, 6)
    with pytest.raises(ValueError, match=r"decode_mlp: w_down is \[8, 6\] and has to be \[F, D\] = \[6, 8\]"):
        form(EPS)(*tensors(x, w, w_gate, w_up, w_gate))
