"""The AscendC kernels of routing and of the cube, emulated, on the cases of the C++ ops: values and gradients, on 1 to 8 cores."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import ops

from ops import attention, grouped_matmul, routing
from ops.ascendc import attention as ascendc_attention
from ops.ascendc import build, clock
from ops.ascendc import grouped_matmul as ascendc_grouped_matmul
from ops.ascendc import routing as ascendc_routing
from tests.ops import test_attention as attention_cases
from tests.ops.emulated import call, cores
from tests.ops.kernels import agree, agree_in_scan, takes_views, tensors
from tests.ops.test_attention import SCALE, anything, cache, documents, formula, qkv
from tests.ops.test_grouped_matmul import GROUPS
from tests.ops.test_references import draw
from tests.ops.test_routing import CHOICES, probs_and_weight
from tests.parallel import test_context
from tests.tiny import assert_close, host

EAGER = {"ways": ("eager",)}
SLOW = pytest.mark.slow
CHIPS = [1, pytest.param(2, marks=SLOW), pytest.param(3, marks=SLOW), 8]
HALVES = {"float16": 2**-11, "bfloat16": 2**-8}


def slow_but(names, *fast):
    return [name if name in fast else pytest.param(name, marks=SLOW) for name in names]


# rows, experts, choices: one repeat has 64 experts, a list that is sorted 32; lists are merged by fours
ROUTERS = [(13, 7, 3), (70, 128, 8), (1, 1, 1), (100, 6, 2), (9, 300, 8), (3, 500, 40), (5, 33, 33), (20, 160, 64), (4, 64, 12)]


@pytest.mark.extended(but=("(70*-8",))
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("shape", [*ROUTERS[:2], *(pytest.param(shape, marks=SLOW) for shape in ROUTERS[2:])], ids=str)
def test_top_k(shape, chip):
    R, E, k = shape
    logits, bias = draw(R, E), draw(E)
    with cores(chip):
        for normalise in (False, True):
            both = tuple(make(k, normalise) for make in (routing.reference_top_k, ascendc_routing.ascendc_top_k))
            np.testing.assert_array_equal(*(host(op(ms.Tensor(logits))[1]) for op in both))
            agree(*(probs_and_weight(op, False) for op in both), [logits], **EAGER)
        biased = [
            make(k, True, biased=True)(*tensors(logits, bias))[1] for make in (routing.reference_top_k, ascendc_routing.ascendc_top_k)
        ]
        np.testing.assert_array_equal(*map(host, biased))


def test_equal_experts_are_chosen_in_order():
    logits = np.zeros((9, 130), np.float32)
    logits[:, 70] = 1
    expert = host(ascendc_routing.ascendc_top_k(4, True)(ms.Tensor(logits))[1])
    np.testing.assert_array_equal(expert, np.tile([70, 0, 1, 2], (9, 1)))
    logits = np.random.default_rng(0).integers(0, 3, (9, 300)).astype(np.float32)  # over all lists and both merges
    expert = host(ascendc_routing.ascendc_top_k(40, True)(ms.Tensor(logits))[1])
    np.testing.assert_array_equal(expert, np.argsort(-logits, 1, kind="stable")[:, :40])


def test_rows_without_probabilities_get_the_first_experts():
    """And take nothing from the others. NaN has either sign."""
    logits = draw(11, 70)
    expected = host(ascendc_routing.ascendc_top_k(3, True)(ms.Tensor(logits))[1]).copy()
    logits[1, 5], logits[2], logits[4, 0], logits[7, 69] = np.nan, -np.inf, np.inf, -np.float32(np.nan)
    _, expert, weight = map(host, ascendc_routing.ascendc_top_k(3, True)(ms.Tensor(logits)))
    expected[[1, 2, 4, 7]] = [0, 1, 2]
    np.testing.assert_array_equal(expert, expected)
    assert np.isnan(weight[[1, 2, 4, 7]]).all() and np.isfinite(np.delete(weight, [1, 2, 4, 7], 0)).all()


@pytest.mark.extended(but=("random-8",))
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("choice", slow_but(CHOICES, "random", "more_experts_than_assignments"))
def test_permute_and_combine(choice, chip):
    """The same rows, bit for bit, and the same sums of what comes back, with gradients."""
    expert, E = CHOICES[choice]
    x, weight = draw(len(expert), 5), draw(*expert.shape)
    with cores(chip):
        expected, found = (make(E, 1)(*tensors(x, expert)) for make in (routing.reference_permute, ascendc_routing.ascendc_permute))
        for a, b in zip(expected, found):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(host(a), host(b))

        def rows(make):
            permute = make(E, 1)
            return lambda x, expert: permute(x, expert)[0]

        def combine(make):
            op = make()
            return lambda y, weight, slot: op(y, slot, weight)

        agree(rows(routing.reference_permute), rows(ascendc_routing.ascendc_permute), [x], (expert,), **EAGER)
        y, slot = draw(expert.size, 1, 5), host(found[1])
        agree(combine(routing.reference_combine), combine(ascendc_routing.ascendc_combine), [y, weight], (slot,), **EAGER)


def test_weights_of_rows_that_block_reductions_sum():
    """The gradient of combine's weights is a sum over the columns of a row, here 1,024."""
    expert = CHOICES["random"][0]
    slot = np.argsort(np.argsort(expert.ravel(), kind="stable")).astype(np.int32)
    y, weight = draw(expert.size, 1, 1024), draw(*expert.shape)
    agree(
        lambda y, weight, slot: routing.reference_combine()(y, slot, weight),
        lambda y, weight, slot: ascendc_routing.ascendc_combine()(y, slot, weight),
        [y, weight],
        (slot,),
        **EAGER,
    )


@pytest.mark.parametrize("chip", [1, 8])
def test_rows_that_do_not_fit_at_once(chip):
    """Of 5,000 columns, in float16, which are copied as they are."""
    expert = CHOICES["random"][0]
    x = ms.Tensor(draw(len(expert), 5000), ms.float16)
    with cores(chip):
        expected, found = (make(6, 1)(x, ms.Tensor(expert)) for make in (routing.reference_permute, ascendc_routing.ascendc_permute))
        np.testing.assert_array_equal(host(expected[0]), host(found[0]))
        y, slot, weight = found[0], found[1], ms.Tensor(draw(*expert.shape))
        wide = routing.reference_combine()(y.astype(ms.float32), slot, weight)
        assert_close(wide, ascendc_routing.ascendc_combine()(y, slot, weight).astype(ms.float32), 1.01 * HALVES["float16"])


IN_ORDER = [name for name, (group, _, _) in GROUPS.items() if list(group) == sorted(group)]
PRODUCTS = [(300, 150, 131, 3), (40, 33, 70, 3), (500, 64, 96, 6)]  # rows, columns in and out, groups


def sorted_groups(rows, groups):
    return np.sort(np.random.default_rng(5).integers(0, groups, rows)).astype(np.int32)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", slow_but(IN_ORDER, IN_ORDER[0], IN_ORDER[-1]))
def test_grouped_matmul(name, chip):
    group, groups, b = GROUPS[name]
    inputs = [draw(len(group), b, 5), draw(groups, 5, 6)]
    with cores(chip):
        agree(grouped_matmul.cpu(), ascendc_grouped_matmul.ascendc(), inputs, (np.array(group, np.int32),), **EAGER)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("shape", [PRODUCTS[0], *(pytest.param(shape, marks=SLOW) for shape in PRODUCTS[1:])], ids=str)
def test_grouped_matmul_of_many_tiles(shape, chip):
    R, i, o, groups = shape
    with cores(chip):
        inputs, group = [draw(R, 1, i), draw(groups, i, o)], sorted_groups(R, groups)
        agree(grouped_matmul.cpu(), ascendc_grouped_matmul.ascendc(), inputs, (group,), **EAGER)


def test_groups_without_rows_get_a_gradient_of_zeros():
    x, w, group = draw(7, 1, 20), draw(4, 20, 30), np.array([1, 1, 1, 3, 3, 3, 3], np.int32)
    multiply = ascendc_grouped_matmul.ascendc()
    dw = host(ms.grad(lambda w: multiply(ms.Tensor(x), w, ms.Tensor(group)).sum())(ms.Tensor(w)))
    assert (dw[[0, 2]] == 0).all() and (dw[[1, 3]] != 0).all()


def test_infinities_stay_in_their_rows():
    x, w, group = draw(4, 1, 6), draw(2, 6, 9), np.array([0, 0, 1, 1], np.int32)
    multiply = ascendc_grouped_matmul.ascendc()
    expected = host(multiply(*tensors(x, w, group))).copy()
    x[1] = np.inf
    found = host(multiply(*tensors(x, w, group)))
    np.testing.assert_array_equal(found[[0, 2, 3]], expected[[0, 2, 3]])
    assert not np.isfinite(found[1]).any()


@pytest.mark.parametrize("dtype", HALVES)
def test_grouped_matmul_in_half_precision(dtype):
    """Products of exact inputs are summed in float32, and rounded once."""
    kind, group = getattr(ms, dtype), sorted_groups(300, 3)
    x, w = ms.Tensor(draw(300, 1, 150), kind), ms.Tensor(draw(3, 150, 131), kind)
    multiply = ascendc_grouped_matmul.ascendc()
    wide = [host(a.astype(ms.float32)).astype(np.float64) for a in (x, w)]
    assert_close(
        np.einsum("nbi,nio->nbo", wide[0], wide[1][group]), multiply(x, w, ms.Tensor(group)).astype(ms.float32), 1.01 * HALVES[dtype]
    )
    dw = ms.grad(lambda w: multiply(x, w, ms.Tensor(group)).astype(ms.float32).sum())(w)
    expected = np.stack([np.repeat(wide[0][group == g].sum((0, 1))[:, None], 131, 1) for g in range(3)])
    assert dw.dtype == kind
    assert_close(expected, dw.astype(ms.float32), 1.01 * HALVES[dtype])


# B, S, T, N, K, H: tiles are of 128 queries and 64 keys; heads of more than 128 are results in two panels
SHAPES = [*attention_cases.SHAPES, (1, 40, 300, 4, 2, 16), (1, 130, 130, 2, 1, 128)]
SHAPES += [(1, 140, 140, 2, 1, 256), (2, 70, 200, 4, 2, 144), (1, 65, 33, 2, 2, 200)]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("mask", [documents, anything])
@pytest.mark.parametrize("shape", slow_but(SHAPES, (2, 7, 7, 4, 2, 3), (1, 67, 131, 6, 2, 17)), ids=str)
def test_attention(shape, mask, chip):
    """Among them queries that see no key, whose result and gradients are 0."""
    if mask is documents and shape[1] > shape[2]:
        pytest.skip("documents has the queries at the end of the keys")
    with cores(chip):
        agree(attention.cpu(SCALE), ascendc_attention.ascendc(SCALE), qkv(*shape), mask(*shape[:3]), **EAGER)


@pytest.mark.parametrize("size", [16, pytest.param(130, marks=SLOW)])
@pytest.mark.parametrize("chip", CHIPS)
def test_attention_in_order_skips_later_keys(chip, size):
    segment, _, order, _ = documents(1, 200, 200)
    mask = (segment, segment, order, order)
    with cores(chip):
        agree(attention.cpu(SCALE), ascendc_attention.ascendc(SCALE, in_order=True), qkv(1, 200, 200, 4, 2, size), mask, **EAGER)


LENGTHS = [[70, 71, 200, 650], [300, 300, 640, 700]]  # of 700 tokens: several spans of keys, and tiles and spans of one document


@pytest.mark.parametrize("chip", [*CHIPS, pytest.param(24, marks=SLOW)])
@pytest.mark.parametrize("size", [16, pytest.param(130, marks=SLOW)])
def test_attention_to_documents_given_by_their_cumulative_lengths(size, chip):
    rows, tokens = (1, 700) if size == 16 and chip < 24 else (2, 700)
    ends = np.array(LENGTHS[:rows], np.int32)
    with cores(chip):
        agree(attention.cpu_packed(SCALE), ascendc_attention.ascendc_packed(SCALE), qkv(rows, tokens, tokens, 2, 1, size), (ends,), **EAGER)


def test_other_documents_are_skipped():
    """By the emulator's clock, a row of 48 documents takes a part of the time of a row of one."""
    time = {}
    for count in (1, 48):
        family, name, inputs, outputs, attrs, _ = clock.attention(1, 6144, 1, 2)
        segment = (np.arange(6144, dtype=np.int32) * count // 6144)[None]
        inputs = [*inputs[:3], segment, segment, *inputs[5:]]
        time[count] = clock.predict(build.emulated(family), name, inputs, outputs, attrs, cores=2)["seconds"]
    assert time[48] < time[1] / 2.5


def test_attention_over_a_cache():
    shape = (4, 1, 20)
    agree(attention.reference(SCALE), ascendc_attention.ascendc(SCALE), qkv(*shape, 4, 2, 16), cache(4, 20, [0, 19, 7, 25]), **EAGER)


def test_editing_a_document_leaves_the_others_bits_alone():
    mask, (q, k, v) = documents(1, 90, 90), qkv(1, 90, 90, 4, 2, 32)
    attend, other = ascendc_attention.ascendc(SCALE), mask[0][0] != 0
    before = host(attend(*tensors(q, k, v, *mask))).copy()
    for x in (q, k, v):
        x[:, ~other] = draw(*x[:, ~other].shape) * 50
    after = host(attend(*tensors(q, k, v, *mask)))
    assert 0 < other.sum() < 90
    np.testing.assert_array_equal(before[:, other], after[:, other])
    assert (before[:, ~other] != after[:, ~other]).mean() > 0.9


def test_large_scores_do_not_overflow():
    q, k, v = qkv(1, 90, 90, 4, 2, 16)
    mask, q, k = documents(1, 90, 90), q * 100, k * 100
    expected, _ = formula(*(x.astype(np.float64) for x in (q, k, v)), *mask)
    assert_close(expected, ascendc_attention.ascendc(SCALE)(*tensors(q, k, v, *mask)), 5e-3)


@pytest.mark.parametrize("mask", [documents, anything])
def test_parts_of_the_keys_join_as_in_a_ring(mask):
    test_context.test_parts_of_the_keys_give_attention_to_all(ascendc_attention.ascendc_parts, mask)


PARTS = [(2, 30, 17, 4, 2, 16), (1, 150, 70, 2, 1, 130), (2, 3, 9, 2, 2, 5)]


@pytest.mark.parametrize("shape", slow_but(PARTS, PARTS[0]), ids=str)
def test_parts_of_ring_attention(shape):
    """A part's results, and its gradients from o and lse of all keys; the lse of queries which see a key in it."""
    mask, inputs = anything(*shape[:3]), qkv(*shape)
    (forward, backward), (own_forward, own_backward) = attention.reference_parts(SCALE), ascendc_attention.ascendc_parts(SCALE)
    o, lse = forward(*tensors(*inputs, *mask))
    own_o, own_lse = own_forward(*tensors(*inputs, *mask))
    sees = host(lse) > attention.MASKED / 2
    assert 0 < sees.sum() and (host(own_lse)[~sees] < attention.MASKED / 2).all()
    assert_close(o, own_o, 1e-5)
    assert_close(host(lse)[sees], host(own_lse)[sees], 1e-5)
    of_all = lse + ms.Tensor(np.where(sees, np.abs(draw(*lse.shape)), 0).astype(np.float32))  # other parts' keys add to it
    given = (*tensors(*inputs, *mask), o * 0.7, of_all, *tensors(draw(*o.shape), draw(*lse.shape)))
    for name, a, b in zip("qkv", backward(*given), own_backward(*given)):
        assert_close(a, b, 1e-5, name)


@pytest.mark.parametrize("size", [64, pytest.param(256, marks=SLOW)])
@pytest.mark.parametrize("dtype", HALVES)
def test_attention_in_half_precision(dtype, size):
    """Scores are made of exact inputs and softmax is in float32; weights are rounded for the product with v, and the result: 2 roundings.
    Gradients have ds too, and delta of a rounded result: 4 roundings of terms that partly cancel, and so 8 of the largest gradient."""
    kind, mask = getattr(ms, dtype), documents(2, 150, 150)
    inputs = [ms.Tensor(x, kind) for x in qkv(2, 150, 150, 4, 2, size)]
    wide = [x.astype(ms.float32) for x in inputs]
    attend = ascendc_attention.ascendc(SCALE)
    expected, _ = formula(*(host(x).astype(np.float64) for x in wide), *mask)
    assert_close(expected, attend(*inputs, *tensors(*mask)).astype(ms.float32), 2 * HALVES[dtype])
    reference = attention.cpu(SCALE)
    wanted = ms.grad(lambda *x: reference(*x, *tensors(*mask)).sum(), (0, 1, 2))(*wide)
    given = ms.grad(lambda *x: attend(*x, *tensors(*mask)).astype(ms.float32).sum(), (0, 1, 2))(*inputs)
    for name, a, b in zip("qkv", wanted, given):
        assert b.dtype == kind
        assert_close(a, b.astype(ms.float32), 8 * HALVES[dtype], name)


@pytest.mark.parametrize("size", [16, pytest.param(144, marks=SLOW)])
def test_bits_do_not_depend_on_the_number_of_cores(size):
    q, k, v = qkv(1, 300, 300, 8, 4, size)
    inputs, outputs = [q, k, v, *documents(1, 300, 300)], (q.shape, (1, 8, 300))
    found = []
    for chip in (1, 3, 8, 24):
        o, lse, *grads = (np.empty(shape, np.float32) for shape in (*outputs, q.shape, k.shape, v.shape))
        with cores(chip):
            assert call(build.emulated("attention"), "qwen_attention", inputs, [o, lse], [SCALE, 0]) == ""
            assert (
                call(build.emulated("attention"), "qwen_attention_grad", [*inputs, o, lse, np.cos(o), np.sin(lse)], grads, [SCALE, 0]) == ""
            )
        found.append((o, lse, *grads))
    for other in found[1:]:
        for a, b in zip(found[0], other):
            np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def experts(of):
    """A layer of experts by the ops of one implementation: x [T, D], w [E, D, D], of which the first columns choose."""
    top_k, permute, multiply, combine, choose = *of, ops.MatMul(transpose_b=True)

    def layer(x, w):
        _, expert, weight = top_k(choose(x, w[:, :, 0]))
        rows, slot, group = permute(x, expert)
        return x + combine(multiply(rows, w, group), slot, weight)

    return layer


@pytest.mark.slow
def test_routing_and_products_inside_a_handwritten_backward():
    E, k = 5, 2
    reference = routing.reference_top_k(k, True), routing.reference_permute(E, 1), grouped_matmul.reference(), routing.reference_combine()
    found = ascendc_routing.ascendc_top_k(k, True), ascendc_routing.ascendc_permute(E, 1)
    found += ascendc_grouped_matmul.ascendc(), ascendc_routing.ascendc_combine()
    agree_in_scan(experts(reference), experts(found), draw(21, 8), 0.5 * draw(3, E, 8, 8), ())


@pytest.mark.slow
def test_views():
    """As the C++ ops take them; groups in order, blocks of one row."""
    takes_views(ascendc_grouped_matmul.ascendc(), draw(4, 2, 4), draw(4, 4, 5), np.array([0, 2, 2, 3], np.int32))
    takes_views(ascendc_routing.ascendc_top_k(2, True), draw(6, 4))
    takes_views(ascendc_routing.ascendc_permute(6, 1), draw(13, 4), CHOICES["random"][0])
    takes_views(ascendc_routing.ascendc_combine(), draw(6, 4), np.array([0, 6, 2, 3], np.int32), draw(2, 2))


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 3, 13), pytest.param((131, 4, 257), marks=SLOW)], ids=str)
def test_a_slot_past_the_last_row_adds_nothing(shape):
    """As in the C++ op's test; of the gradients, that of the weights: rows in no slot have none."""
    (R, k, D), rng = shape, np.random.default_rng(0)
    slot = rng.permutation(R * k + 3)[: R * k].astype(np.int32)
    slot[:: 10 if R > 1 else 2] = R * k + 3
    y = ms.Tensor(draw(R * k + 3, 1, D))

    def of(combine):
        return lambda weight, slot: combine(y, slot, weight)

    agree(of(routing.reference_combine()), of(ascendc_routing.ascendc_combine()), [draw(R, k)], (slot,), **EAGER)


def test_what_the_kernels_cannot_do_is_refused():
    with pytest.raises(ValueError, match="ops.routing=ascendc makes blocks of one row, not of 64; use --config.ops.grouped_matmul=ascendc"):
        ascendc_routing.ascendc_permute(6, 64)
    half = [ms.Tensor(x, ms.float16) for x in qkv(1, 3, 3, 2, 1, 16)]
    mask = tensors(*documents(1, 3, 3))
    with pytest.raises(ValueError, match=r"attention: segment is \[1, 2\] and has to be \[B, S\] = \[1, 3\]"):
        ascendc_attention.ascendc(0.3)(*half, mask[0][:, :2], *mask[1:])
    inputs = [*qkv(1, 3, 3, 2, 1, 257), *documents(1, 3, 3)]
    outputs = [np.empty((1, 3, 2, 257), np.float32), np.empty((1, 2, 3), np.float32)]
    message = call(build.emulated("attention"), "qwen_attention", inputs, outputs, [SCALE, 0])
    assert message == "QwenAttention: its tiling function refuses these shapes: a head has up to 256 elements"
