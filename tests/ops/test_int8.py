"""Matrices in 8 bits: their error, and each op on them against the product with the matrix that they stand for."""

import mindspore as ms
import numpy as np
import pytest

from ops import decode_attention, decode_mlp, embedding, grouped_matmul, int8, matmul
from parallel.graph.jit import jit
from tests.ops.kernels import call, same_for_any_threads, takes_views, tensors
from tests.ops.test_references import draw
from tests.tiny import assert_close, host

TOLERANCE = 1e-5
EPS = 1e-6
# rows, inputs, outputs: one and primes; groups of whole vectors, and others; more than 16 rows, whose kernel is another; several tiles
SIZES = [
    (1, 1, 1),
    (3, 7, 5),
    (1, 256, 300),
    (2, 131, 57),
    (4, 384, 131),
    (5, 40, 9),
    (16, 200, 33),
    (17, 96, 20),
    (67, 640, 131),
    (300, 17, 7),
]


def stored(*shape, group=int8.GROUP):
    """A random matrix in 8 bits, output first: (numbers, scale), and the floats that it stands for."""
    numbers, scale = int8.quantize(draw(*shape) / np.sqrt(shape[-1]), group)
    return numbers, scale, int8.dequantize(numbers, scale)


@pytest.mark.parametrize("inputs, group, each", [(1024, 128, 128), (24, 128, 24), (40, 16, 10), (131, 128, 131), (1216, 128, 76)])
def test_groups_divide_the_inputs(inputs, group, each):
    assert int8.group_of(inputs, group) == each


@pytest.mark.parametrize("shape", [(5, 7), (3, 256), (2, 4, 131), (1, 1)])
def test_the_error_is_at_most_half_a_step(shape):
    w = draw(*shape) * 10.0 ** draw(*shape[:-1], 1)
    numbers, scale = int8.quantize(w, 64)
    assert numbers.dtype == np.int8 and scale.dtype == np.float32 and numbers.min() >= -127
    each = int8.group_of(shape[-1], 64)
    largest = np.abs(w.reshape(*shape[:-1], -1, each)).max(-1)
    wide = np.repeat(largest, each, -1)
    assert (np.abs(w - int8.dequantize(numbers, scale)) <= wide / 254 * (1 + 1e-5)).all()
    np.testing.assert_allclose(scale, largest / 127, rtol=1e-6)


def test_zeros_stay_zeros():
    numbers, scale = int8.quantize(np.zeros((3, 8), np.float32))
    assert not numbers.any() and not scale.any() and not int8.dequantize(numbers, scale).any()


def test_a_matrix_is_quantised_in_blocks_of_any_size(monkeypatch):
    w = draw(50, 64)
    whole = int8.quantize(w, 16)
    monkeypatch.setattr(int8, "BLOCK_ELEMENTS", 100)
    for a, b in zip(whole, int8.quantize(w, 16)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("implementation", ["reference_int8", "cpu_int8"])
@pytest.mark.parametrize("m, k, n", SIZES)
def test_products_are_those_of_the_floats(m, k, n, implementation):
    x, (numbers, scale, w) = draw(m, k), stored(n, k)
    multiply = getattr(matmul, implementation)()
    expected = x.astype(np.float64) @ w.T.astype(np.float64)
    assert_close(expected, multiply(*tensors(x, numbers, scale)), TOLERANCE)


@pytest.mark.parametrize("implementation", ["reference_int8", "cpu_int8"])
def test_a_compiled_product_is_the_eager_one(implementation):
    args, multiply = tensors(draw(3, 96), *stored(10, 96)[:2]), getattr(matmul, implementation)()

    def product(x, w, scale):
        return multiply(x, w, scale)

    assert_close(multiply(*args), jit(product)(*args), TOLERANCE)


@pytest.mark.parametrize("k, n, group", [(256, 517, 64), (384, 1100, 128), (131, 33, 131)])
def test_a_token_decodes_alike_in_batches_of_up_to_16(k, n, group):
    x, (w, scale, _) = draw(16, k), stored(n, k, group=group)
    whole = call("matmul", "matmul_int8", [x, w, scale], [(16, n)], 2)[-1]
    for rows in range(1, 16):
        part = slice(16 - rows, 16) if rows % 2 else slice(0, rows)
        np.testing.assert_array_equal(call("matmul", "matmul_int8", [x[part], w, scale], [(rows, n)], 1 + rows % 2)[-1], whole[part])


@pytest.mark.parametrize("m, k, n", [(3, 256, 1300), (40, 384, 700), (2, 37, 90)])
def test_any_number_of_threads_gives_the_same_bits(m, k, n):
    same_for_any_threads("matmul", "matmul_int8", [draw(m, k), *stored(n, k)[:2]], [(m, n)])


def test_huge_and_missing_numbers_stay_in_their_rows():
    x, (numbers, scale, w) = draw(20, 64), stored(10, 64)
    x[2, 3], x[4, 1] = np.inf, np.nan
    for rows in (slice(0, 20), slice(0, 6)):
        y = host(matmul.cpu_int8()(*tensors(x[rows], numbers, scale)))
        ok = np.isfinite(x[rows]).all(1)
        assert not np.isfinite(y[~ok]).any()
        assert_close(x[rows][ok] @ w.T, y[ok], TOLERANCE)


@pytest.mark.parametrize("implementation", ["reference_int8", "cpu_int8"])
@pytest.mark.parametrize("blocks, b, i, o", [(5, 1, 40, 33), (40, 1, 128, 20), (3, 4, 7, 5), (2, 40, 96, 130)])
def test_each_block_is_multiplied_with_the_matrix_of_its_expert(blocks, b, i, o, implementation):
    E = 4
    x, (numbers, scale, w) = draw(blocks, b, i), stored(E, o, i)
    group = np.sort(np.random.default_rng(0).integers(0, E + 1, blocks)).astype(np.int32)
    x[group == E] = 0
    y = getattr(grouped_matmul, implementation)()(*tensors(x, numbers, group, scale))
    expected = np.stack([block @ (w[g].T if g < E else np.zeros((i, o))) for block, g in zip(x.astype(np.float64), group)])
    assert_close(expected, y, TOLERANCE)


@pytest.mark.parametrize("implementation", ["reference_int8", "cpu_int8"])
def test_rows_of_a_table_are_those_of_its_floats(implementation):
    numbers, scale, w = stored(11, 40, group=8)
    ids = np.array([3, 0, 10, 3], np.int32)
    np.testing.assert_allclose(host(getattr(embedding, implementation)()(*tensors(numbers, ids, scale))), w[ids], rtol=1e-6)
    part = getattr(embedding, f"{implementation}_part")()(8, *tensors(numbers[8:], ids, scale[8:]))
    np.testing.assert_allclose(host(part), np.where((ids >= 8)[:, None], w[ids], 0), rtol=1e-6)


def mlp_case(B, D, F):
    gate, up, down = stored(F, D), stored(F, D), stored(D, F)
    floats = draw(B, D), (1 + draw(D) / 4).astype(np.float32)
    return [*floats, gate[0], up[0], down[0], gate[1], up[1], down[1]], [*floats, *(np.ascontiguousarray(w[2].T) for w in (gate, up, down))]


@pytest.mark.parametrize("B, D, F", [(1, 24, 40), (3, 128, 384), (20, 64, 70)])
def test_the_feed_forward_half_is_that_of_the_floats(B, D, F):
    args, floats = mlp_case(B, D, F)
    expected = decode_mlp.reference(EPS)(*tensors(*floats))
    for form in (decode_mlp.reference_int8, decode_mlp.cpu_int8):
        assert_close(expected, form(EPS)(*tensors(*args)), TOLERANCE)
    same_for_any_threads("decode_mlp", "decode_mlp_int8", [*args, np.float32(EPS)], [(B, D)])


def attention_case(B, D, N, K, H, at, C=3, M=3):
    """(Arguments with weights in 8 bits, arguments with the floats that these stand for). Rows have M pages of C tokens, in any order."""
    q, k, v, o = (stored(*shape) for shape in ((N * H, D), (K * H, D), (K * H, D), (D, N * H)))
    start, angle, at = (draw(B, D), 1 + draw(D) / 4), draw(B, 1, 1, H // 2), np.array(at, np.int32)[:, None]
    table, pages = np.random.default_rng(5).permutation(B * M).reshape(B, M).astype(np.int32), (B * M, C, K, H)
    rest = 1 + draw(H) / 4, 1 + draw(H) / 4, np.cos(angle), np.sin(angle), at, table, draw(*pages), draw(*pages)
    start, rest = ([x.astype(np.float32) if x.dtype.kind == "f" else x for x in part] for part in (start, rest))
    floats = [np.ascontiguousarray(w[2].T) for w in (q, k, v, o)]
    return [*start, q[0], k[0], v[0], o[0], *rest, q[1], k[1], v[1], o[1]], [*start, *floats, *rest]


@pytest.mark.extended(but=("*cpu_int8", "3-*-False-*"))
@pytest.mark.parametrize("implementation", ["reference_int8", "cpu_int8"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("B, D, N, K, H", [(1, 24, 4, 2, 8), (3, 128, 4, 2, 32), (2, 40, 2, 1, 6)])
def test_the_attention_half_is_that_of_the_floats(B, D, N, K, H, compiled, implementation):
    args, floats = attention_case(B, D, N, K, H, range(3, 3 + B))
    step = getattr(decode_attention, implementation)(EPS, H**-0.5)

    def decode(x, norm, wq, wk, wv, wo, q_norm, k_norm, cos, sin, at, table, k, v, q_scale, k_scale, v_scale, o_scale):
        return step(x, norm, wq, wk, wv, wo, q_norm, k_norm, cos, sin, at, table, k, v, q_scale, k_scale, v_scale, o_scale)

    expected = decode_attention.reference(EPS, H**-0.5)(*tensors(*floats))
    for a, b in zip(expected, (jit(decode) if compiled else decode)(*tensors(*args))):
        assert_close(a, b, TOLERANCE)


def test_views_are_taken():
    args, _ = mlp_case(5, 256, 384)
    takes_views(decode_mlp.cpu_int8(EPS), *args)
    takes_views(matmul.cpu_int8(), draw(6, 40), *stored(7, 40, group=8)[:2])


def test_what_does_not_fit_is_named():
    x, (numbers, scale, _) = draw(2, 40), stored(7, 40, group=8)
    for form in (matmul.reference_int8, matmul.cpu_int8):
        with pytest.raises(ValueError, match=r"matmul: w is float32 and has to be int8"):
            form()(*tensors(x, numbers.astype(np.float32), scale))
        with pytest.raises(ValueError, match=r"matmul: G has to divide I, and they are 3 and 40"):
            form()(*tensors(x, numbers, scale[:, :3].copy()))
        with pytest.raises(ValueError, match=r"matmul: scale is \[6, 5\] and has to be \[O, G\] = \[7, 5\]"):
            form()(*tensors(x, numbers, scale[:6].copy()))


def test_differentiating_a_kernel_is_an_error():
    args = tensors(draw(2, 8), *stored(3, 8)[:2])

    def total(x):
        return matmul.cpu_int8()(x, *args[1:]).sum()

    with pytest.raises(RuntimeError, match="weights in 8 bits has no gradient; use ops.matmul=reference"):
        ms.grad(total)(args[0])
