"""The attention half of a layer for one token a row: the kernel against the reference, and against the kernels of its parts."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import ops

from ops import attention, cache_write, decode_attention, matmul, rms_norm, rope
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


def case(B, D, T, N, K, H):
    """The op's arguments. Positions: at the last slot, at the first, in no slot after or before the cache, and others."""
    scale = 1 / np.sqrt(D)
    weights = draw(D, N * H) * scale, draw(D, K * H) * scale, draw(D, K * H) * scale, draw(N * H, D) / np.sqrt(N * H)
    at = np.array([T - 1, 0, T, -1, *range(1, 1 + B)], np.int32)[:B, None] if B > 4 else np.arange(T - 1, T - 1 - B, -1, np.int32)[:, None]
    angles = draw(B, 1, 1, H // 2)
    caches = draw(B, T, K, H), draw(B, T, K, H)
    arrays = draw(B, D), 1 + draw(D) / 4, *weights, 1 + draw(H) / 4, 1 + draw(H) / 4, np.cos(angles), np.sin(angles), at, *caches
    return tuple(np.asarray(x, np.int32 if x is at else np.float32) for x in arrays)


def in_ops(eps, scale):
    """The same in the C++ kernels of the ops one by one."""
    norm, turn, write, multiply = rms_norm.cpu(eps), rope.cpu_norm(eps), cache_write.cpu(), matmul.cpu()
    attend = attention.cpu(scale)

    def decode(x, w, wq, wk, wv, wo, q_norm, k_norm, cos, sin, at, k_cache, v_cache):
        B, T, _, H = k_cache.shape
        q, k, v = (multiply(norm(x, w), m).reshape(B, 1, -1, H) for m in (wq, wk, wv))
        k_cache, v_cache = write(k_cache, turn(k, k_norm, cos, sin), at), write(v_cache, v, at)
        slots = ms.Tensor(np.tile(np.arange(T, dtype=np.int32), (B, 1)))
        o = attend(turn(q, q_norm, cos, sin), k_cache, v_cache, ops.ones_like(at), ops.ones_like(slots), at, slots)
        return x + multiply(o.reshape(B, -1), wo), k_cache, v_cache

    return decode


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_matches_the_reference_and_writes_into_the_caches_it_is_given(shape, compiled):
    fused, args = decode_attention.cpu(EPS, SCALE), case(*shape)

    def values(*args):
        return fused(*args)

    given = tensors(*args)
    expected, found = decode_attention.reference(EPS, SCALE)(*tensors(*args)), (jit(values) if compiled else values)(*given)
    for name, a, b in zip(("y", "k", "v"), expected, found):
        assert_close(a, b, TOLERANCE, name)
    for a, b in zip(expected[1:], given[-2:]):
        assert_close(a, b, TOLERANCE, "given")


@pytest.mark.parametrize("shape", SHAPES)
def test_its_numbers_are_those_of_the_kernels_of_its_parts(shape):
    """Bit for bit, but that attention's has another way for many heads a kv head."""
    B, D, T, N, K, H = shape
    args = case(min(B, 16), D, T, N, K, H)
    for a, b in zip(in_ops(EPS, SCALE)(*tensors(*args)), decode_attention.cpu(EPS, SCALE)(*tensors(*args))):
        assert_close(a, b, 0 if N // K <= 4 else TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_any_number_of_threads_gives_the_same_bits(shape):
    inputs = [*case(*shape), np.float32(EPS), np.float32(SCALE)]
    same_for_any_threads("decode_attention", "decode_attention", inputs, [(shape[0], shape[1])])


def test_a_token_decodes_alike_alone_and_in_a_batch():
    args = case(20, 33, 5, 3, 1, 6)
    whole = call("decode_attention", "decode_attention", [*args, np.float32(EPS), np.float32(SCALE)], [(20, 33)], 2)
    for b in range(20):
        row = [x[b : b + 1] if i in (0, 8, 9, 10, 11, 12) else x for i, x in enumerate(args)]
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
