"""Each op against its formula in numpy's float64, and its gradient against central differences of that formula."""

import mindspore as ms
import numpy as np
import pytest

from layers import loss as loss_layer
from ops import attention, cross_entropy, grouped_matmul, iota, rms_norm, rope, routing, swiglu
from parallel.sharding import Sharding
from tests.tiny import assert_close, host

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


SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]], np.int32)


def visible(segments):
    B, S = segments.shape
    out = np.zeros((B, S, S), bool)
    for b, s, t in np.ndindex(B, S, S):
        out[b, s, t] = t <= s and segments[b, s] == segments[b, t]
    return out


def test_document_mask_shows_the_earlier_tokens_of_ones_own_document():
    mask = host(attention.document_mask()(ms.Tensor(SEGMENTS), ms.Tensor(SEGMENTS)))
    assert mask.shape == (2, 1, 6, 6)
    np.testing.assert_array_equal(mask[:, 0], np.where(visible(SEGMENTS), 0, np.float32(attention.MASKED)))


def test_cache_mask_shows_slots_up_to_the_position():
    positions, k = np.array([[2, 3], [0, 1]], np.int32), draw(2, 1, 5, 4)
    mask = host(attention.cache_mask()(ms.Tensor(positions), ms.Tensor(k)))
    assert mask.shape == (2, 1, 2, 5)
    shown = np.arange(5) <= positions[..., None]
    np.testing.assert_array_equal(mask[:, 0], np.where(shown, 0, np.float32(attention.MASKED)))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_with_grouped_queries_and_a_document_mask(kv_heads):
    """Query head n reads kv head n // (N / K); the sum over keys is written out."""
    q, k, v = draw(2, 4, 6, 3), draw(2, kv_heads, 6, 3), draw(2, kv_heads, 6, 3)
    mask, shown = attention.document_mask()(ms.Tensor(SEGMENTS), ms.Tensor(SEGMENTS)), visible(SEGMENTS)

    def formula(q, k, v, _):
        k, v = np.repeat(k, 4 // kv_heads, 1), np.repeat(v, 4 // kv_heads, 1)
        scores = np.where(shown[:, None], np.einsum("bnsh,bnth->bnst", q, k) * 0.7, -np.inf)
        return np.einsum("bnst,bnth->bnsh", softmax(scores), v)

    check(attention.reference(0.7), formula, [q, k, v], (host(mask),))


def test_attention_over_a_longer_cache():
    """S queries against T > S keys; slots that the mask hides have no influence at all."""
    q, k, v = draw(1, 2, 2, 3), draw(1, 1, 7, 3), draw(1, 1, 7, 3)
    mask = attention.cache_mask()(ms.Tensor(np.array([[3, 4]], np.int32)), ms.Tensor(k))
    attend = attention.reference(0.5)
    before = host(attend(*map(ms.Tensor, (q, k, v)), mask))
    k[:, :, 5:], v[:, :, 5:] = 100, 100
    np.testing.assert_array_equal(host(attend(*map(ms.Tensor, (q, k, v)), mask)), before)
    scores = np.einsum("bnsh,bth->bnst", q, k[:, 0]) * 0.5 + host(mask)
    assert_close(np.einsum("bnst,bth->bnsh", softmax(scores), v[:, 0]), before, VALUE)


IDS = np.array([[3, 0, 6], [6, 2, 2]], np.int32)


def nll_formula(z, ids):
    return np.log(np.exp(z).sum(-1, keepdims=True)) - np.take_along_axis(z, ids.reshape(-1, 1), 1)


def test_negative_log_likelihood():
    check(loss_layer.build(7, Sharding(check=True)), nll_formula, [draw(6, 7)], (IDS,))


def test_pick_takes_one_column_a_row():
    check(cross_entropy.pick(), lambda z, ids: np.take_along_axis(z, ids[:, None], 1), [draw(6, 7)], (IDS.ravel(),))


def test_huge_logits_do_not_overflow():
    """The value is a difference of logits, and the gradient softmax minus one-hot, at any height."""
    z, nll = draw(6, 7) * 10, loss_layer.build(7, Sharding())
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
    mean = loss_layer.weighted_mean(Sharding(check=True))
    value, total = mean(ms.Tensor(x), ms.Tensor(w))
    assert float(total) == w.sum()
    grad = ms.grad(lambda x: mean(x, ms.Tensor(w))[0])(ms.Tensor(x))
    if w.sum():
        assert_close((x[:, 0] * w.ravel()).sum() / w.sum(), value, 1e-6)
        assert_close(w.reshape(-1, 1) / w.sum(), grad, 1e-6)
    else:
        assert float(value) == 0 and (host(grad) == 0).all()


def test_grouped_matmul():
    """A group without a block has a gradient of 0, and one with several has their sum."""
    group = np.array([2, 0, 2], np.int32)
    check(grouped_matmul.reference(), lambda x, w, group: x @ w[group], [draw(3, 2, 4), draw(4, 4, 5)], (group,))


def test_iota():
    for n in (1, 5):
        out = iota.reference()(n)
        assert out.dtype == ms.int32
        np.testing.assert_array_equal(host(out), np.arange(n))


def assignments(rows, k, experts, seed):
    """k different experts a row."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(experts)[:k] for _ in range(rows)]).astype(np.int32)


CHOICES = {
    "random": (assignments(13, 2, 6, 1), 6),
    "all": (assignments(5, 4, 4, 2), 4),
    "one_expert": (np.full((9, 1), 3, np.int32), 6),
    "last_expert": (np.full((9, 1), 5, np.int32), 6),
    "more_experts_than_assignments": (assignments(3, 2, 50, 3), 50),
    "one_token": (np.array([[4]], np.int32), 6),
    "one_expert_exists": (np.zeros((7, 1), np.int32), 1),
    "many": (assignments(200, 4, 16, 4), 16),
}


@pytest.mark.parametrize("limit", [1, 3, 4, 64])
@pytest.mark.parametrize("choice", CHOICES)
def test_routing_gives_every_assignment_a_slot_of_its_expert(choice, limit):
    check_plan(*CHOICES[choice], limit)


def test_routing_is_exact_where_float32_is_not():
    """Its sort keys run to experts * assignments, here 2 ** 25."""
    expert = np.argsort(np.random.default_rng(0).random((2**15, 128)), 1)[:, :8].astype(np.int32)
    check_plan(expert, 128, 64)


@pytest.mark.parametrize("factor", [None, 0.5, 1.0, 100.0])
@pytest.mark.parametrize("choice", ["random", "all", "one_expert", "last_expert", "many"])
def test_a_send_plan_puts_assignments_in_order_into_the_slots_of_their_shard(choice, factor):
    expert, experts = CHOICES[choice]
    (T, k), within = expert.shape, experts // 2
    slot, source, local, lost = map(host, routing.send_plan(experts, 2, factor)(ms.Tensor(expert)))
    capacity, flat, at = len(source) // 2, expert.ravel(), np.arange(T * k)
    assert capacity == (T * min(k, within) if factor is None else min(T * min(k, within), int(np.ceil(factor * T * k / 2))))
    for shard in range(2):
        there = at[flat // within == shard]
        kept, given_up = there[:capacity], there[capacity:]
        np.testing.assert_array_equal(slot[kept], shard * capacity + np.arange(len(kept)))
        np.testing.assert_array_equal(slot[given_up], 0)
        np.testing.assert_array_equal(lost.ravel()[there], np.arange(len(there)) >= capacity)
        part = slice(shard * capacity, (shard + 1) * capacity)
        empty = capacity - len(kept)
        np.testing.assert_array_equal(source[part], [*(kept // k), *[T] * empty])
        np.testing.assert_array_equal(local[part], [*(flat[kept] - shard * within), *[within] * empty])
    assert lost.sum() >= T * k - len(source)  # above 0 with a factor of 0.5


def check_plan(expert, experts, limit):
    T, k = expert.shape
    slot, source, group = map(host, routing.plan(experts, limit)(ms.Tensor(expert)))
    size = len(source) // len(group)
    assert len(slot) == T * k and len(source) == len(group) * size and 1 <= size <= limit
    assert len(np.unique(slot)) == T * k and 0 <= slot.min() and slot.max() < len(source)
    np.testing.assert_array_equal(source[slot], np.arange(T * k) // k)
    np.testing.assert_array_equal(group[slot // size], expert.ravel())
    np.testing.assert_array_equal(np.delete(source, slot), T)  # the rest is padding
    assert 0 <= group.min() and group.max() < experts
    for e in range(experts):  # an expert's tokens are in order, so a rerun adds them alike
        own = source[np.repeat(group == e, size)]
        assert (np.diff(own[own < T]) >= 0).all()
