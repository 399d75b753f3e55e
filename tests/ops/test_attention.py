"""Attention: the reference and the C++ kernel against float64, and the kernel in all shapes against the reference."""

import json
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from mindspore import ops

from ops import attention
from parallel.graph.jit import jit
from parallel.step import value_and_grad
from tests.ops.kernels import agree, agree_in_scan, call, same_for_any_threads, takes_views, tensors
from tests.ops.test_references import check, draw
from tests.tiny import assert_close, host

SCALE = 0.3
KINDS = {"reference": attention.reference, "cpu": attention.cpu}


def documents(B, S, T):
    """Rows of documents with ids that fall and come back, S queries at the end of T tokens: segment, key segment, order, key order."""
    rng = np.random.default_rng(3)
    key_segment = np.stack([np.array([9, -4, 0, 9, 7])[np.sort(rng.integers(0, 5, T))] for _ in range(B)])
    order = np.tile(np.arange(T), (B, 1))
    return _ints(key_segment[:, -S:], key_segment, order[:, -S:], order)


def anything(B, S, T):
    """Segments and orders without any order, in which many queries see no key."""
    rng = np.random.default_rng(4)
    ids = np.array([-(2**31), -1, 0, 5, 2**31 - 1])
    segment, key_segment = ids[rng.integers(0, 5, (B, S))], ids[rng.integers(0, 3, (B, T))]
    return _ints(segment, key_segment, rng.integers(-T // 2, T, (B, S)), rng.integers(0, T, (B, T)))


def cache(B, T, at):
    """One query a row, at position at[b], over slots of which the later ones are unused."""
    return _ints(np.ones((B, 1)), np.ones((B, T)), np.reshape(at, (B, 1)), np.tile(np.arange(T), (B, 1)))


def _ints(*arrays):
    return tuple(np.ascontiguousarray(a, np.int32) for a in arrays)


def qkv(B, S, T, N, K, H):
    return [draw(B, S, N, H), draw(B, T, K, H), draw(B, T, K, H)]


def formula(q, k, v, segment, key_segment, order, key_order):
    """o_BSNH, lse_BSN, with the sum over keys written out."""
    G = q.shape[2] // k.shape[2]
    scores = np.einsum("bsnh,btnh->bnst", q, np.repeat(k, G, 2)) * SCALE
    seen = (key_segment[:, None] == segment[:, :, None]) & (key_order[:, None] <= order[:, :, None])
    top = np.where(seen[:, None], scores, -np.inf).max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    p = np.where(seen[:, None], np.exp(np.minimum(scores - top, 0)), 0)
    total = p.sum(-1, keepdims=True)
    o = np.einsum("bnst,btnh->bsnh", p / np.where(total, total, 1), np.repeat(v, G, 2))
    lse = np.where(total, np.log(np.where(total, total, 1)) + top, attention.MASKED)
    return o, lse[..., 0].transpose(0, 2, 1)


def test_the_formula_hides_what_it_should():
    """Four queries of two documents, one of which sees nothing."""
    q, k = np.zeros((1, 4, 1, 1)), np.zeros((1, 3, 1, 1))
    v = np.array([1.0, 10.0, 100.0]).reshape(1, 3, 1, 1)
    o, lse = formula(q, k, v, *_ints([[1, 1, 2, 3]], [[1, 1, 2]], [[0, 1, 5, 5]], [[0, 1, 2]]))
    np.testing.assert_allclose(o.ravel(), [1, 5.5, 100, 0])
    np.testing.assert_allclose(lse.ravel(), [0, np.log(2), 0, attention.MASKED])


# cumulative lengths of the documents of two rows of 9 tokens; one a row; one a token in the first; tokens after the last end
ENDS = {
    "documents": [[2, 3, 7, 9], [4, 4, 9, 9]],
    "one": [[9], [9]],
    "each": [list(range(10)), [9] * 10],
    "rest": [[2, 5], [0, 8]],
}


def one_by_one(q, k, v, ends):
    """Attention to each document on its own, in float64."""
    out, S = np.zeros(q.shape), q.shape[1]
    for b, row in enumerate(ends):
        bounds = [0, *row, S]
        for first, last in zip(bounds[:-1], bounds[1:]):
            if last > first:
                order = np.arange(last - first)[None]
                mask = _ints(np.ones_like(order), np.ones_like(order), order, order)
                out[b, first:last] = formula(*(x[b : b + 1, first:last].astype(np.float64) for x in (q, k, v)), *mask)[0][0]
    return out


@pytest.mark.extended(but=("documents*", "rest*"))
@pytest.mark.parametrize("kind", ["reference_packed", "cpu_packed"])
@pytest.mark.parametrize("ends", ENDS)
def test_documents_given_by_their_cumulative_lengths(ends, kind):
    ends = np.array(ENDS[ends], np.int32)
    check(getattr(attention, kind)(SCALE), one_by_one, qkv(2, 9, 9, 2, 1, 3), (ends,))


@pytest.mark.extended
def test_cumulative_lengths_in_a_graph():
    inputs, ends = qkv(2, 9, 9, 4, 2, 5), np.array(ENDS["documents"], np.int32)
    agree(attention.reference_packed(SCALE), attention.cpu_packed(SCALE), inputs, (ends,), ways=("compiled",))
    for wrong, message in (
        (ends.astype(np.int64), "ends is int64 and has to be int32"),
        (ends[:1], r"ends is \[1, 4\] and has to be \[B, D\]"),
    ):
        with pytest.raises(ValueError, match=f"attention: {message}"):
            attention.cpu_packed(SCALE)(*tensors(*inputs, wrong))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_float64_and_its_differences(kind, kv_heads):
    for mask in (documents(2, 5, 5), anything(2, 3, 6)):
        shape = mask[0].shape + (mask[1].shape[1], 4, kv_heads, 3)
        check(KINDS[kind](SCALE), lambda *x: formula(*x)[0], qkv(*shape), mask)


@pytest.mark.parametrize("shape", [(2, 3, 6, 4, 2, 3), (1, 1, 7, 2, 1, 5)], ids=str)
def test_the_gradient_of_both_the_result_and_its_lse(shape):
    """Their product: its gradient has a part from each. A query that sees no key has neither."""
    attend = attention.cpu_with_lse(SCALE)

    def both(*x):
        o, lse = attend(*x)
        return o * ops.ExpandDims()(lse, 3)

    def product(*x):
        o, lse = formula(*x)
        return o * lse[..., None]

    check(both, product, qkv(*shape), anything(*shape[:3]))


def test_a_query_that_sees_no_key_gets_0_and_gives_none():
    mask = anything(2, 70, 90)
    unseen = formula(*qkv(2, 70, 90, 4, 2, 8), *mask)[1][..., 0] == attention.MASKED
    assert 10 < unseen.sum() < 100
    for factory in KINDS.values():
        attend = factory(SCALE)

        def total(*x, attend=attend):
            return attend(*x, *tensors(*mask)).sum()

        inputs = tensors(*qkv(2, 70, 90, 4, 2, 8))
        assert (host(attend(*inputs, *tensors(*mask)))[unseen] == 0).all()
        assert (host(ms.grad(total)(*inputs))[unseen] == 0).all()


# B, S, T, N, K, H: tiles are of 32 rows (queries x heads that share keys) and 64 to 256 keys, lanes 4 to 16, a register tile 6 or 8 rows
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 7, 7, 4, 2, 3),
    (1, 67, 131, 6, 2, 17),
    (2, 129, 257, 8, 2, 48),
    (3, 33, 33, 2, 2, 130),
    (1, 40, 300, 160, 2, 16),  # more heads a key than a tile has rows
    (1, 300, 150, 7, 7, 31),
    (2, 130, 130, 8, 1, 32),
    (2, 256, 256, 8, 4, 32),
    (9, 3, 300, 4, 4, 64),
    (1, 40, 2100, 2, 1, 24),  # above 2048 keys a tile has 64 rows
]


MORE = ((1, 300, 150, 7, 7, 31), (2, 130, 130, 8, 1, 32))  # of the same tiles and lanes as others


@pytest.mark.extended(but=("(1, 67*", "(2, 7,*", "(3,*", "(2, 256*"))
@pytest.mark.parametrize("mask", [documents, anything])
@pytest.mark.parametrize("shape", [pytest.param(shape, marks=pytest.mark.slow if shape in MORE else ()) for shape in SHAPES], ids=str)
def test_matches_the_reference(shape, mask):
    if mask is documents and shape[1] > shape[2]:
        pytest.skip("documents has the queries at the end of the keys")
    ways = ("eager", "compiled") if shape in SHAPES[3:4] else ("eager",)
    agree(attention.reference(SCALE), attention.cpu(SCALE), qkv(*shape), mask(*shape[:3]), ways=ways)


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (6, 3), (8, 2), (8, 1), (11, 1)], ids=str)
@pytest.mark.parametrize("slots, size", [(1, 16), (15, 8), (16, 32), (65, 33), (200, 32), (203, 64)], ids=str)
def test_one_query_a_row_over_a_cache(slots, size, heads):
    N, K = heads
    mask = cache(4, slots, [0, slots - 1, slots // 2, slots + 5])
    q, k, v = qkv(4, 1, slots, N, K, size)
    expected, lse = formula(*(x.astype(np.float64) for x in (q, k, v)), *mask)
    found = attention.cpu_with_lse(SCALE)(*tensors(q, k, v, *mask))
    assert_close(expected, found[0], 2e-6)
    assert_close(lse, found[1], 2e-6)
    k[0, 1:], v[0, 1:] = 1e4, -1e4  # unused slots have no influence
    np.testing.assert_array_equal(host(attention.cpu(SCALE)(*tensors(q, k, v, *mask)))[0], host(found[0])[0])


@pytest.mark.extended
def test_gradients_inside_a_handwritten_backward():
    def layer(attend):
        def run(x, w, segment, order):
            y = x * w
            return x + attend(y, y, y, segment, segment, order, order)

        return run

    segment, _, order, _ = documents(2, 21, 21)
    x, w = draw(2, 21, 3, 8), 0.5 * draw(3, 8)  # larger ones make scores of some 50 in the last layer, whose rounding alone is 1e-5
    agree_in_scan(layer(attention.reference(SCALE)), layer(attention.cpu(SCALE)), x, w, (segment, order))


def test_parts_of_the_keys_join_by_their_lse():
    q, k, v = qkv(2, 30, 50, 4, 2, 16)
    segment, key_segment, order, key_order = anything(2, 30, 50)
    whole = attention.cpu_with_lse(SCALE)(*tensors(q, k, v, segment, key_segment, order, key_order))
    parts = []
    for cut in (slice(0, 17), slice(17, 50)):
        x = (q, k[:, cut], v[:, cut], segment, key_segment[:, cut], order, key_order[:, cut])
        parts.append([host(y).astype(np.float64) for y in attention.cpu_with_lse(SCALE)(*tensors(*x))])
    lses = np.stack([lse for _, lse in parts])
    weights = np.exp(lses - np.logaddexp.reduce(lses))
    joined = sum(w[..., None] * o for w, (o, _) in zip(weights, parts))
    assert_close(joined, whole[0], 1e-6)


def test_editing_a_document_leaves_the_others_bits_alone():
    mask, (q, k, v) = documents(1, 200, 200), qkv(1, 200, 200, 4, 2, 32)
    attend, other = attention.cpu(SCALE), mask[0][0] != 0
    before = host(attend(*tensors(q, k, v, *mask))).copy()
    for x in (q, k, v):
        x[:, ~other] = draw(*x[:, ~other].shape) * 50
    after = host(attend(*tensors(q, k, v, *mask)))
    assert 0 < other.sum() < 200
    np.testing.assert_array_equal(before[:, other], after[:, other])
    assert (before[:, ~other] != after[:, ~other]).mean() > 0.9


def test_large_scores_do_not_overflow():
    """Scores of 1e4 are multiples of 0.001 in float32, so weights are right to 0.002 times their number's spread."""
    q, k, v = qkv(1, 90, 90, 4, 2, 16)
    mask = documents(1, 90, 90)
    q, k = q * 100, k * 100
    expected, lse = formula(*(x.astype(np.float64) for x in (q, k, v)), *mask)
    assert 1e4 < np.abs(lse).max() < 1e5
    found = attention.cpu_with_lse(SCALE)(*tensors(q, k, v, *mask))
    assert_close(expected, found[0], 5e-3)
    assert_close(lse, found[1], 1e-6)
    gradients = [_gradients(kind(SCALE), (q, k, v), mask) for kind in KINDS.values()]
    # One key has nearly all the weight of most queries, so what reaches the scores is a difference of two equal sums of 16 products: its
    # rounding, times a key of up to 100 times 5, is all there is of it, and the most by which two right answers differ.
    rounding = 16 * np.finfo(np.float32).eps * SCALE * np.abs(v).max() * max(np.abs(q).max(), np.abs(k).max())
    for name, a, b in zip("qk", *gradients):
        assert np.isfinite(b).all() and np.abs(a - b).max() <= 2e-2 * np.abs(a).max() + 90 * rounding, name
    assert_close(gradients[0][2], gradients[1][2], 2e-2)


def _gradients(attend, inputs, mask):
    """Of the sum of all elements of the result, which weigh 1, with respect to q, k and v."""

    def total(inputs, mask):
        return attend(*inputs, *mask).sum()

    return [host(g) for g in value_and_grad(total)(tensors(*inputs), tensors(*mask))[1]]


def test_all_scores_far_below_0():
    """The softmax sees differences alone: q, k and a k shifted along q by -1e4 give one result."""
    q, k, v = np.full((1, 40, 1, 2), 100, np.float32), draw(1, 40, 1, 2), draw(1, 40, 1, 2)
    mask, attend = documents(1, 40, 40), attention.cpu(1.0)
    k = np.round(k * 8) / 8  # so that the shifted k is exact
    for shift in (-500, 500):
        expected = attention.reference(1.0)(*tensors(q, k + np.float32(shift), v, *mask))
        assert_close(expected, attend(*tensors(q, k + np.float32(shift), v, *mask)), 1e-5)
        assert_close(attend(*tensors(q, k, v, *mask)), attend(*tensors(q, k + np.float32(shift), v, *mask)), 1e-5)


@pytest.mark.parametrize("queries", [1, 40])
def test_a_nan_is_not_swallowed(queries):
    q, k, v = qkv(2, queries, 40, 2, 1, 16)
    q[0, 0, 0, 3] = np.nan
    mask = _ints(np.ones((2, queries)), np.ones((2, 40)), np.full((2, queries), 40), np.zeros((2, 40)))
    o, lse = map(host, attention.cpu_with_lse(SCALE)(*tensors(q, k, v, *mask)))
    assert np.isnan(o[0, 0, 0]).all() and np.isnan(lse[0, 0, 0])
    assert np.isnan(o).sum() == 16 and np.isnan(lse).sum() == 1


@pytest.mark.parametrize("shape", [(2, 300, 300, 4, 2, 24), (1, 700, 700, 1, 1, 32), (4, 1, 3000, 4, 2, 32)], ids=str)
def test_the_same_bits_for_any_number_of_threads(shape):
    """Also with more threads than kv heads, whose tasks wait for each other."""
    for mask in (documents(*shape[:3]), anything(*shape[:3])):
        inputs = (*qkv(*shape), *mask, np.array([SCALE], np.float32))
        same_for_any_threads("attention", "attention", inputs, (shape[:2] + shape[3:4] + shape[5:], shape[:2] + shape[3:4]))
        o, lse = call("attention", "attention", inputs, (inputs[0].shape, inputs[0].shape[:3]), 2)[-2:]
        backward = (*inputs, o, lse, draw(*o.shape), draw(*lse.shape))
        same_for_any_threads("attention_grad", "attention_grad", backward, [x.shape for x in inputs[:3]])


def test_takes_views():
    takes_views(attention.cpu(SCALE), *qkv(2, 40, 40, 4, 2, 16), *documents(2, 40, 40))
    takes_views(attention.cpu(SCALE), *qkv(3, 2, 40, 4, 2, 16), *anything(3, 2, 40))


def test_half_precision_in_the_reference():
    """Products in float16, softmax in float32: 2 ** -11 for each rounding of q, p and the result."""
    mask, x = documents(2, 40, 40), qkv(2, 40, 40, 4, 2, 16)
    found = attention.reference(SCALE)(*(ms.Tensor(y, ms.float16) for y in x), *tensors(*mask))
    assert found.dtype == ms.float16
    assert_close(formula(*(y.astype(np.float64) for y in x), *mask)[0], host(found).astype(np.float32), 3e-3)


MEMORY = """
import json
import mindspore as ms, numpy as np
from ops import attention

def status_mib(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(key)) / 1024

def run(length):
    order = ms.Tensor(np.arange(length)[None], ms.int32)
    ones = ms.Tensor(np.ones((1, length)), ms.int32)
    q, k, v = (ms.Tensor(np.ones((1, length, heads, 64), np.float32)) for heads in (2, 1, 1))
    attend = attention.cpu(0.125)
    grads = ms.grad(lambda q, k, v: attend(q, k, v, ones, ones, order, order).sum(), (0, 1, 2))(q, k, v)
    assert all(np.isfinite(g.asnumpy()).all() for g in grads)
    return status_mib("VmHWM")

run(64)
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")  # the peak begins anew
start = status_mib("VmRSS")
print(json.dumps([run(length) - start for length in (4096, 8192)]))
"""


@pytest.mark.extended
def test_memory_is_linear_in_length():
    """The scores of 2 heads at length 8192 would be 512 MiB; inputs, results and gradients are 25 MiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    half, whole = json.loads(done.stdout.splitlines()[-1])
    assert 0 < half and whole < 2.5 * half and whole < 40, (half, whole)


def test_compiled_once_for_all_segments():
    """Segments and orders are inputs, not constants of the graph."""
    attend, x = jit(attention.cpu(SCALE)), qkv(2, 20, 20, 4, 2, 8)
    for mask in (documents(2, 20, 20), anything(2, 20, 20)):
        expected = formula(*(y.astype(np.float64) for y in x), *mask)[0]
        assert_close(expected, attend(*tensors(*x, *mask)), 2e-6)


@pytest.mark.parametrize("block", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 11, None))])
def test_the_largest_logits_are_found_block_by_block(block):
    """Those of padding, of segment 0, are none; the last block is not whole."""
    q, k, _ = (x.astype(np.float32) for x in qkv(2, 6, 11, 4, 2, 3))
    masks = documents(2, 6, 11)
    segment, key_segment, order, key_order = masks
    z = np.einsum("bsnh,btnh->bsnt", q, np.repeat(k, 2, 2)) * SCALE
    sees = (segment[:, :, None] == key_segment[:, None]) & (key_order[:, None] <= order[:, :, None]) & (segment > 0)[:, :, None]
    want = np.where(sees[:, :, None], z, attention.MASKED).max(-1)
    largest = attention.largest_logits(SCALE, block)
    found = jit(largest)(*map(ms.Tensor, (q, k, *masks)))
    assert (want < attention.MASKED / 2).any() and (want > 0).any()
    np.testing.assert_allclose(host(found), want, rtol=1e-5, atol=1e-6)  # sums of three products that may be near 0
