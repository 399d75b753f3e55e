"""MindSpore's kernels for Ascend as implementations of our ops.

Nothing here runs them: their documented formulas take their places, so that masks, layouts, casts and gradients of the mapping are compared
with the references. tests/parallel/test_shard_lowering.py compiles them.
"""

import mindspore as ms
import numpy as np
import pytest

from ops import attention, grouped_matmul, rms_norm, rope, routing, swiglu
from ops import documents as documents_op
from tests.ops import ascend
from tests.ops.kernels import agree, tensors
from tests.ops.test_attention import ENDS, _ints, anything, cache, documents, qkv
from tests.ops.test_grouped_matmul import GROUPS
from tests.ops.test_references import angles, draw
from tests.ops.test_routing import CHOICES, chosen, combine, probs_and_weight
from tests.tiny import assert_close, host

EAGER = {"ways": ("eager",)}


@pytest.fixture(autouse=True)
def formulas(monkeypatch):
    for module in (attention, grouped_matmul, rms_norm, rope, routing, swiglu):
        for name in vars(ascend):
            if hasattr(module, name) and isinstance(vars(ascend)[name], type):
                monkeypatch.setattr(module, name, vars(ascend)[name])
    monkeypatch.setattr(attention, "HALF", ("float32",))  # so that nothing is rounded


def test_the_formulas_give_the_examples_of_their_documentation():
    y, scale = ascend.RmsNorm(1e-6)(*tensors(np.array([[1, 2, 3]], np.float32), np.ones(3, np.float32)))
    assert_close([[0.46290997, 0.92581993, 1.3887299]], y, 1e-6)
    assert_close([[0.46290997]], scale, 1e-6)
    x = np.array([[-0.12, 0.123, 31.122], [2.1223, 4.1212121217, 0.3123]], np.float32)
    assert_close([[-0.11970687, 0.2690224, 9.7194]], ascend.Swiglu()(ms.Tensor(x), 0), 1e-5)
    tokens = np.repeat(np.array([[1], [7], [2], [1], [2], [3]], np.float32), 3, 1)
    rows, slot = ascend.MoeTokenPermute()(*tensors(tokens, np.array([5, 0, 3, 1, 2, 4], np.int32)), None, False)
    np.testing.assert_array_equal(host(rows)[:, 0], [7, 1, 2, 2, 3, 1])
    np.testing.assert_array_equal(host(slot), [5, 0, 3, 1, 2, 4])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", [documents, anything])
def test_attention(mask, kv_heads):
    """Among them queries that see no key, for which the kernel promises nothing."""
    shape = (2, 13, 29)
    agree(attention.reference(0.3), attention.vendor(0.3), qkv(*shape, 4, kv_heads, 16), mask(*shape), **EAGER)


def test_attention_over_a_cache():
    shape = (4, 1, 20)
    agree(attention.reference(0.3), attention.vendor(0.3), qkv(*shape, 4, 2, 16), cache(4, 20, [0, 19, 7, 25]), **EAGER)


def test_attention_in_order_skips_later_keys():
    """And sees the documents all the same."""
    segment, _, order, _ = documents(2, 19, 19)
    mask = (segment, segment, order, order)
    agree(attention.reference(0.3, in_order=True), attention.vendor(0.3, in_order=True), qkv(2, 19, 19, 4, 2, 16), mask, **EAGER)


def test_a_mask_hides_what_is_of_another_segment_or_later():
    """Four queries of two documents, one of which sees nothing, so nothing is hidden from it."""
    mask = tensors(*_ints([[1, 1, 2, 3]], [[1, 1, 2]], [[0, 1, 5, 5]], [[0, 1, 2]]))
    hidden, sees = attention.vendor_mask()(*mask)
    assert hidden.shape == (1, 1, 4, 3) and hidden.dtype == ms.bool_
    np.testing.assert_array_equal(host(hidden)[0, 0], [[0, 1, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(host(sees), [[1, 1, 1, 0]])
    in_order, none = attention.vendor_mask(in_order=True)(*mask)
    assert none is None
    np.testing.assert_array_equal(host(in_order)[0, 0], [[0, 1, 1], [0, 0, 1], [1, 1, 0], [1, 1, 1]])


@pytest.mark.extended
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("ends", ENDS)
def test_attention_by_the_lengths_of_documents(ends, kv_heads):
    """Among them documents of one token, none, and all; rows of fewer documents than lengths."""
    ends = np.array(ENDS[ends], np.int32)
    agree(attention.reference_packed(0.3), attention.vendor_packed(0.3), qkv(2, 9, 9, 4, kv_heads, 16), (ends,), **EAGER)


@pytest.mark.extended(but=("rest-4",))
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("ends", ENDS)
def test_attention_by_lengths_in_parts(ends, kv_heads):
    """Results, log-sum-exp and gradients, where the kernel's own statistics lie document by document."""
    found, expected = (make(0.3)[0] for make in (attention.vendor_spans, attention.reference_spans))
    agree_in_parts(expected, found, qkv(2, 9, 9, 4, kv_heads, 16), np.array(ENDS[ends], np.int32))


@pytest.mark.extended
@pytest.mark.parametrize("meets", [[[3, 2], [0, 1]], [[7, 5], [7, 1]], [[1, 5], [2, 3]]], ids=str)
def test_attention_of_a_document_across_two_places(meets):
    """Some, none and all of the queries meet some or all of the keys."""
    found, expected = (make(0.3)[1] for make in (attention.vendor_spans, attention.reference_spans))
    agree_in_parts(expected, found, qkv(2, 7, 5, 4, 2, 16), np.array(meets, np.int32))


def agree_in_parts(expected, found, inputs, lengths):
    """forward and backward of both. The backward gets the log-sum-exp of more keys than the forward had, as in a ring."""
    q, k, v, lengths = tensors(*inputs, lengths)
    (o, lse), (o_, lse_) = expected[0](q, k, v, lengths), found[0](q, k, v, lengths)
    assert_close(o, o_, 1e-5)
    assert_close(np.maximum(host(lse), -1e3), np.maximum(host(lse_), -1e3), 1e-5)
    assert ((host(lse) == attention.MASKED) == (host(lse_) == attention.MASKED)).all()
    do, lse = ms.Tensor(draw(*q.shape)), ms.Tensor(np.where(host(lse) == attention.MASKED, -200, host(lse) + 0.5).astype(np.float32))
    zeros = ms.Tensor(np.zeros(lse.shape, np.float32))
    for a, b in zip(expected[1](q, k, v, lengths, o, lse, do, zeros), found[1](q, k, v, lengths, o, lse, do, zeros)):
        assert_close(a, b, 1e-5)


def test_more_documents_or_tokens_than_a_call_takes_are_refused():
    q = ms.Tensor(np.zeros((8, 4, 1, 16), np.float32))
    with pytest.raises(ValueError, match="8 rows of up to 129 documents, and MindSpore's kernel takes 1024 .* data.max_documents=128"):
        attention.vendor_packed(0.3)(q, q, q, ms.Tensor(np.full((8, 128), 4, np.int32)))
    with pytest.raises(ValueError, match="4 rows of 300000 tokens, and MindSpore's kernel takes 1048576"):
        documents_op.lengths()(ms.Tensor(np.zeros((4, 2), np.int32)), 300_000)


@pytest.mark.parametrize("shape", [(1, 17), (2, 3, 37)], ids=str)
def test_rms_norm(shape):
    x, y, w = draw(*shape), draw(*shape), draw(shape[-1])
    agree(rms_norm.reference(1e-3), rms_norm.vendor(1e-3), [x, w], **EAGER)
    agree(rms_norm.reference_add(1e-3), rms_norm.vendor_add(1e-3), [x, y, w], **EAGER)


def test_weights_in_float32_are_cast_inside_and_their_gradients_back():
    x, w = ms.Tensor(draw(4, 8), ms.float16), ms.Tensor(draw(8))
    for norm in (rms_norm.vendor(1e-3), lambda x, w: rms_norm.vendor_add(1e-3)(x, x, w)[1]):
        assert norm(x, w).dtype == ms.float16
        assert ms.grad(lambda w, norm=norm: norm(x, w).astype(ms.float32).sum())(w).dtype == ms.float32
    x, w, group = ms.Tensor(draw(3, 1, 4), ms.float16), ms.Tensor(draw(2, 4, 5)), ms.Tensor([0, 1, 1], ms.int32)
    assert ms.grad(lambda w: grouped_matmul.vendor()(x, w, group).astype(ms.float32).sum())(w).dtype == ms.float32


def test_rope():
    turns = angles(np.stack([np.arange(5), np.arange(5) + 7]), 4)
    agree(rope.reference(), rope.vendor(), [draw(2, 5, 3, 8)], turns, **EAGER)
    agree(rope.reference_norm(1e-3), rope.vendor_norm(1e-3), [draw(2, 5, 3, 8), draw(8)], turns, **EAGER)
    half = ms.Tensor(draw(2, 5, 3, 8), ms.float16)
    expected, found = (kind()(half, *map(ms.Tensor, turns)) for kind in (rope.reference, rope.vendor))
    np.testing.assert_array_equal(host(expected), host(found))  # both turn in float32


def test_swiglu():
    agree(swiglu.reference(), swiglu.vendor(), [draw(3, 5, 7), draw(3, 5, 7)], **EAGER)


@pytest.mark.parametrize("name", [name for name, (group, _, _) in GROUPS.items() if group == sorted(group)])
def test_grouped_matmul(name):
    group, groups, b = GROUPS[name]
    inputs = [draw(len(group), b, 5), draw(groups, 5, 6)]
    agree(grouped_matmul.reference(), grouped_matmul.vendor(), inputs, (np.array(group, np.int32),), **EAGER)


@pytest.mark.parametrize("b", [1, 3])
def test_blocks_without_a_group_give_zeros_and_no_gradient(b):
    x, w, group = draw(4, b, 5), draw(3, 5, 6), ms.Tensor([0, 0, 3, 3], ms.int32)
    x[2:] = 0
    np.testing.assert_array_equal(host(grouped_matmul.group_ends()(group, 3, b)), [2 * b, 2 * b, 4 * b])
    op, used = grouped_matmul.vendor(), ms.Tensor(np.array([1, 1, 0, 0], np.float32).reshape(4, 1, 1))
    assert (host(op(*tensors(x, w), group))[2:] == 0).all()
    _, dw = map(host, ms.grad(lambda x, w: (op(x, w, group) * used).sum(), (0, 1))(*tensors(x, w)))
    assert_close(x.sum((0, 1))[:, None] * np.ones(6), dw[0], 1e-5)
    assert (dw[1:] == 0).all()


@pytest.mark.extended(but=("random", "one_token"))
@pytest.mark.parametrize("choice", ["random", "all", "one_expert", "more_experts_than_assignments", "one_token", "many"])
def test_permute_and_combine(choice):
    """To and fro: the rows that the plan of one-row blocks gives, and the same sums of what comes back."""
    expert, E = CHOICES[choice]
    x, weight = draw(len(expert), 5), draw(*expert.shape)
    expected, found = (make(E, 1)(*tensors(x, expert)) for make in (routing.reference_permute, routing.vendor_permute))
    for a, b in zip(expected, found):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(host(a), host(b))

    def rows(make):
        permute = make(E, 1)
        return lambda x, expert: permute(x, expert)[0]

    agree(rows(routing.reference_permute), rows(routing.vendor_permute), [x], (expert,), **EAGER)
    slot = host(found[1])
    y = draw(slot.size, 1, 5)
    agree(combine("reference"), combine("vendor"), [y, weight], (slot,), **EAGER)


@pytest.mark.parametrize("normalise", [False, True])
def test_top_k(normalise):
    logits = draw(13, 7)
    vendor, reference = (make(3, normalise) for make in (routing.vendor_top_k, routing.reference_top_k))
    np.testing.assert_array_equal(host(vendor(ms.Tensor(logits))[1]), chosen(logits)[1])
    agree(*(probs_and_weight(op, False) for op in (reference, vendor)), [logits], **EAGER)


def test_what_a_kernel_cannot_do_is_refused():
    with pytest.raises(ValueError, match="ops.routing=vendor has no bias"):
        routing.vendor_top_k(2, True, biased=True)
    with pytest.raises(ValueError, match="ops.routing=vendor makes blocks of one row, not of 64; use --config.ops.grouped_matmul=vendor"):
        routing.vendor_permute(6, 64)
    assert grouped_matmul.vendor_block(64) == 1


def test_wrong_shapes_and_types_are_refused(monkeypatch):
    monkeypatch.setattr(attention, "HALF", ("bfloat16", "float16"))
    args = tensors(*qkv(1, 3, 3, 2, 1, 16), *documents(1, 3, 3))
    with pytest.raises(ValueError, match="attention: q is float32 and has to be bfloat16 or float16"):
        attention.vendor(0.3)(*args)
    half = [x.astype(ms.float16) for x in args[:3]]
    with pytest.raises(ValueError, match=r"attention: segment is \[1, 2\] and has to be \[B, S\] = \[1, 3\]"):
        attention.vendor(0.3)(*half, args[3][:, :2], *args[4:])
    x, w = ms.Tensor(draw(4, 8)), ms.Tensor(draw(7))
    for op, given, message in (
        (rms_norm.vendor(1e-6), (x, w), "rms_norm: w is"),
        (rms_norm.vendor_add(1e-6), (x, x[:2], w), "rms_norm: y is"),
        (rope.vendor(), (x, x, x), "rope: x is"),
        (swiglu.vendor(), (x, x[:2]), "swiglu: up is"),
        (grouped_matmul.vendor(), (x, x, x), "grouped_matmul: x is"),
        (routing.vendor_top_k(9, True), (x,), "routing: E is 8 and has to be at least 9"),
        (routing.vendor_permute(6, 1), (x, x), "routing: expert is float32 and has to be int32"),
        (routing.vendor_combine(), (x, w, x), "routing: slot is"),
    ):
        with pytest.raises(ValueError, match=message):
            op(*given)
