"""The attention half of a layer for one token a row: the kernel against the reference, and against the kernels of its parts."""

import mindspore as ms
import numpy as np
import pytest

from ops import decode_attention, matmul, paged_attention, paged_write, rms_norm, rope
from ops.pages import slots_and_lengths
from parallel.graph.jit import jit
from parallel.step import value_and_grad
from tests.ops.kernels import TOLERANCE, call, same_for_any_threads, tensors
from tests.ops.test_references import draw
from tests.tiny import assert_close, host

EPS, SCALE = 1e-6, 0.3
SHAPES = [  # B, D, T, N, K, H: the last but one with more heads a kv head than a tile has rows, the last cut over threads
    (1, 1, 1, 1, 1, 2),
    (3, 40, 11, 6, 2, 10),
    (20, 33, 5, 3, 1, 6),
    (2, 16, 130, 16, 1, 64),
    (5, 264, 9, 32, 8, 32),
]
PAGES = ["a page a row", 1, 4, 16, 96]  # slots of a page


def case(B, D, T, N, K, H, C="a page a row"):
    """The op's arguments. Positions: at the last slot, at the first, in no slot after or before the cache, and others. With a number C each
    row has pages of so many slots, here and there, and no page for slots after its position; what it does not see is NaN."""
    scale = 1 / np.sqrt(D)
    weights = draw(D, N * H) * scale, draw(D, K * H) * scale, draw(D, K * H) * scale, draw(N * H, D) / np.sqrt(N * H)
    at = np.array([T - 1, 0, T, -1, *range(1, 1 + B)], np.int32)[:B] if B > 4 else np.arange(T - 1, T - 1 - B, -1, dtype=np.int32)
    angles, table = draw(B, 1, 1, H // 2), np.arange(B)[:, None]
    caches = [draw(B, T, K, H), draw(B, T, K, H)]
    if C != "a page a row":
        caches, table = in_pages(caches, at, T, C)
    arrays = draw(B, D), 1 + draw(D) / 4, *weights, 1 + draw(H) / 4, 1 + draw(H) / 4, np.cos(angles), np.sin(angles)
    return (*(np.asarray(x, np.float32) for x in arrays), *(np.asarray(x, np.int32) for x in (at[:, None], table)), *caches)


def in_pages(caches, at, T, C):
    """(caches in pages of C slots, their table)"""
    B, M = len(at), -(-T // C)
    table = np.random.default_rng(1).permutation(B * M + 2)[: B * M].reshape(B, M)
    paged = [np.full((B * M + 2, C, *cache.shape[2:]), np.nan, np.float32) for cache in caches]
    for b, t in np.ndindex(B, T):
        for cache, pages in zip(caches, paged):
            if t < at[b]:
                pages[table[b, t // C], t % C] = cache[b, t]
    needed = np.where((at < 0) | (at >= T), 0, at // C + 1)  # a row past the end has none, and sees nothing
    return paged, np.where(np.arange(M) < needed[:, None], table, -1)


def in_ops(eps, scale):
    """The same in the C++ kernels of the ops one by one."""
    norm, turn, write, multiply = rms_norm.cpu(eps), rope.cpu_norm(eps), paged_write.cpu(), matmul.cpu()
    attend, places = paged_attention.cpu(scale), slots_and_lengths()

    def decode(x, w, wq, wk, wv, wo, q_norm, k_norm, cos, sin, at, table, k_cache, v_cache):
        B, (_, C, K, H) = len(x), k_cache.shape
        q, k, v = (multiply(norm(x, w), m).reshape(B, 1, -1, H) for m in (wq, wk, wv))
        slot, length = places(table, at.reshape(B), C)
        k_cache = write(k_cache, turn(k, k_norm, cos, sin).reshape(B, K, H), slot)
        v_cache = write(v_cache, v.reshape(B, K, H), slot)
        o = attend(turn(q, q_norm, cos, sin).reshape(B, -1, H), k_cache, v_cache, table, length)
        return x + multiply(o.reshape(B, -1), wo), k_cache, v_cache

    return decode


@pytest.mark.extended(but=("shape1-16-True", "shape2-4-*", "shape4-a page a row-True", "shape3-96-False"))
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("C", PAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_matches_the_reference_and_writes_into_the_caches_it_is_given(shape, C, compiled):
    fused, args = decode_attention.cpu(EPS, SCALE), case(*shape, C)

    def values(*args):
        return fused(*args)

    given = tensors(*args)
    expected, found = decode_attention.reference(EPS, SCALE)(*tensors(*args)), (jit(values) if compiled else values)(*given)
    assert_close(expected[0], found[0], TOLERANCE, "y")
    for a, b, c in zip(expected[1:], found[1:], given[-2:]):
        np.testing.assert_array_equal(np.isnan(host(a)), np.isnan(host(b)))
        assert_close(np.nan_to_num(host(a)), np.nan_to_num(host(b)), TOLERANCE)
        np.testing.assert_array_equal(host(b), host(c))


@pytest.mark.parametrize("C", ["a page a row", 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_its_numbers_are_those_of_the_kernels_of_its_parts(shape, C):
    """Bit for bit, for as many rows as the kernel of few rows takes."""
    B, D, T, N, K, H = shape
    args = case(min(B, 16), D, T, N, K, H, C)
    for a, b in zip(in_ops(EPS, SCALE)(*tensors(*args)), decode_attention.cpu(EPS, SCALE)(*tensors(*args))):
        np.testing.assert_array_equal(host(a), host(b))


def test_pages_of_whole_blocks_of_keys_change_no_bit():
    """The kernel takes 64 keys at a time."""
    shape, C = (3, 24, 200, 4, 2, 8), 64
    args = case(*shape)
    paged, table = in_pages(args[-2:], args[10][:, 0], 200, C)
    whole = call("decode_attention", "decode_attention", [*args, np.float32(EPS), np.float32(SCALE)], [(3, 24)], 1)[-1]
    cut = call(
        "decode_attention",
        "decode_attention",
        [*args[:11], table.astype(np.int32), *paged, np.float32(EPS), np.float32(SCALE)],
        [(3, 24)],
        1,
    )
    np.testing.assert_array_equal(whole, cut[-1])


@pytest.mark.parametrize("shape", SHAPES)
def test_any_number_of_threads_gives_the_same_bits(shape):
    inputs = [*case(*shape), np.float32(EPS), np.float32(SCALE)]
    same_for_any_threads("decode_attention", "decode_attention", inputs, [(shape[0], shape[1])])


def test_a_token_decodes_alike_alone_and_in_a_batch():
    args = case(20, 33, 5, 3, 1, 6)
    whole = call("decode_attention", "decode_attention", [*args, np.float32(EPS), np.float32(SCALE)], [(20, 33)], 2)
    for b in range(20):
        row = [x[b : b + 1] if i in (0, 8, 9, 10, 11) else x for i, x in enumerate(args)]
        alone = call("decode_attention", "decode_attention", [*row, np.float32(EPS), np.float32(SCALE)], [(1, 33)], 1)
        np.testing.assert_array_equal(alone[-1], whole[-1][b : b + 1])


def test_huge_and_missing_numbers_stay_in_their_rows():
    args = case(5, 24, 6, 4, 2, 8)
    args[0][1, 3], args[0][2, 0], args[0][3] = np.nan, np.inf, 1e15
    y, *_ = decode_attention.cpu(EPS, SCALE)(*tensors(*args))
    expected, *_ = decode_attention.reference(EPS, SCALE)(*tensors(*args))
    assert np.isnan(host(y)[1:3]).any(1).all()
    for b in (0, 3, 4):
        assert_close(host(expected)[b], host(y)[b], TOLERANCE)


def test_views_are_read_and_written_where_they_lie():
    args = case(3, 40, 11, 6, 2, 10)
    backwards = [ms.Tensor(np.ascontiguousarray(x.T)).T for x in args]
    for a, b in zip(decode_attention.cpu(EPS, SCALE)(*tensors(*args)), decode_attention.cpu(EPS, SCALE)(*backwards)):
        np.testing.assert_array_equal(host(a), host(b))


def test_differentiating_the_kernel_is_an_error():
    args, fused = tensors(*case(1, 8, 4, 2, 1, 4)), decode_attention.cpu(EPS, SCALE)

    def total(params, *rest):
        return fused(params["x"], *rest)[0].sum()

    with pytest.raises(RuntimeError, match="decode_attention kernel works in place and has no gradient"):
        value_and_grad(total)({"x": args[0]}, *args[1:])


@pytest.mark.parametrize("form", [decode_attention.reference, decode_attention.cpu])
def test_what_does_not_fit_is_named(form):
    args = dict(enumerate(case(2, 8, 4, 2, 1, 4)))
    for wrong, message in (
        ({3: draw(8, 5)}, r"wk is \[8, 5\] and has to be \[D, K\*H\] = \[8, 4\]"),
        ({10: np.zeros((2, 2), np.int32)}, r"at is \[2, 2\] and has to be \[B, 1\]"),
        ({2: draw(8, 6), 5: draw(6, 8)}, "H has to divide Q, and they are 4 and 6"),
    ):
        with pytest.raises(ValueError, match=f"decode_attention: {message}"):
            form(EPS, SCALE)(*tensors(*{**args, **wrong}.values()))
