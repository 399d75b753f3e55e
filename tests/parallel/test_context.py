"""Which tokens of a row each context parallel rank has, and attention to keys in parts."""

import mindspore as ms
import numpy as np
import pytest

from ops import attention
from parallel.context import ring as ring_attention
from parallel.context import split as context
from parallel.context.ring import _join
from parallel.mesh import Mesh
from parallel.sharding import Sharding
from tests.ops.kernels import tensors
from tests.ops.test_attention import SCALE, anything, documents, qkv
from tests.tiny import assert_close, host

SHAPES = [(2, 1), (4, 1), (2, 2), (4, 4), (4, 2), (6, 3)]  # cp, ulysses


def ranks(cp, ulysses):
    return [Mesh(cp=cp, ulysses=ulysses, rank=rank) for rank in range(cp)]


@pytest.mark.parametrize("cp, ulysses", SHAPES)
@pytest.mark.parametrize("length", [24, 25, 7])
def test_ranks_have_each_token_once_and_padding_has_no_weight(cp, ulysses, length):
    batch = {"tokens": 1 + np.arange(2 * length, dtype=np.int32).reshape(2, -1), "loss_weights": np.ones((2, length), np.float32)}
    parts = [context.cut(mesh, batch) for mesh in ranks(cp, ulysses)]
    assert {part["tokens"].shape for part in parts} == {(2, context.padded(ranks(cp, ulysses)[0], length) // cp)}
    tokens, weights = (np.concatenate([part[key] for part in parts], 1) for key in batch)
    assert sorted(tokens[tokens > 0]) == list(range(1, 2 * length + 1)) and weights.sum() == 2 * length
    np.testing.assert_array_equal(weights > 0, tokens > 0)


@pytest.mark.parametrize("cp, ulysses", [*SHAPES, (8, 2), (8, 4), (12, 6)])
def test_rows_are_padded_no_further_than_they_have_to_be(cp, ulysses):
    """Two equal chunks for each group of a ring, and in each group equal parts for its neighbours."""
    ring, mesh = cp // ulysses, ranks(cp, ulysses)[0]

    def divides(total):
        return total % cp == 0 and (ring == 1 or total % (2 * ring) == 0)

    for length in range(1, 100):
        assert context.padded(mesh, length) == next(total for total in range(length, 10 * cp * length + 1) if divides(total))


def test_a_ring_is_in_zigzag_and_ulysses_in_order():
    row = {"tokens": np.arange(16)[None]}
    assert [context.cut(mesh, row)["tokens"][0].tolist() for mesh in ranks(4, 1)] == [
        [0, 1, 14, 15],
        [2, 3, 12, 13],
        [4, 5, 10, 11],
        [6, 7, 8, 9],
    ]
    assert np.concatenate([context.cut(mesh, row)["tokens"][0] for mesh in ranks(4, 4)]).tolist() == list(range(16))
    neighbours = [context.cut(mesh, row)["tokens"][0].tolist() for mesh in ranks(4, 2)]
    assert neighbours == [[0, 1, 2, 3], [12, 13, 14, 15], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize("ring", [2, 4])
def test_each_rank_of_a_ring_sees_as_many_keys(ring):
    places = context.order(64, ring).reshape(ring, -1) + 1
    assert len(set(places.sum(1))) == 1


@pytest.mark.parametrize("ids, documents", [([1, 1, 2, 2, 2, 3], 3), ([1] * 6, 1), ([1, 2, 3, 4, 5, 6], 6), ([1, 1, 1, 2, 0, 0], 3)])
def test_a_row_with_more_documents_than_attention_was_compiled_for_is_refused(ids, documents):
    """Padding is a document, also that which a layout adds."""
    batch, added = {"segment_ids": np.array([[1] * 6, ids], np.int32)}, 0 if ids[-1] == 0 else 1
    for mesh, count in ((Mesh(), documents), (Mesh(cp=4), documents + added)):
        context.check_documents(mesh, max(count, 2), batch)
        context.check_documents(mesh, 0, batch)
        if count > 2:
            with pytest.raises(ValueError, match=f"row 1 .* has {count} documents, .* use data.max_documents={count} or more"):
                context.check_documents(mesh, count - 1, batch)


@pytest.mark.extended(but=("2",))
@pytest.mark.parametrize("ring", [1, 2, 4])
def test_lengths_say_of_each_token_of_a_ring_which_keys_it_sees(ring):
    """Rows of random documents, among them of one token and of a whole row, on every rank: the own keys by the ends of documents, those
    that arrive by how many queries and keys meet."""
    rng, S = np.random.default_rng(ring), 8 * ring
    for _ in range(20):
        ids = 1 + np.cumsum(rng.random((2, S)) < rng.choice([0.02, 0.3, 0.9]), 1)
        ids[1, S - rng.integers(1, S) :] = 0
        order = context.order(S, ring)
        sees = (ids[:, order][:, :, None] == ids[:, order][:, None]) & (order[None, :, None] >= order[None, None])
        for rank in range(ring):
            sharding = Sharding(Mesh(cp=ring, rank=rank), documents=S + 1)
            found = host(ring_attention.lengths(sharding, "span")(ms.Tensor(ids[:, order].astype(np.int32))))
            assert found.shape == (2, ring_attention.count_lengths(sharding, "span"))
            np.testing.assert_array_equal(seen_by(found, S, rank, ring), sees[:, rank * 8 : (rank + 1) * 8])


def seen_by(lengths, ends, rank, ring):
    """bool [B, 8, 8 * ring]: which keys each query of a rank sees, by the lengths alone."""
    out = np.zeros((len(lengths), 8, 8 * ring), bool)
    for row, numbers in zip(out, lengths):
        document = (numbers[:ends, None] <= np.arange(8)).sum(0)
        row[:, rank * 8 : (rank + 1) * 8] = (document[:, None] == document) & (np.arange(8)[:, None] >= np.arange(8))
        for step in range(1, ring):
            source, (queries, keys) = (rank - step) % ring, numbers[ends + 2 * step - 2 : ends + 2 * step]
            first, last = (0, source * 8 + 4) if source < rank else (4, source * 8 + 8)
            row[first : first + queries, last - keys : last] = True
    return out


PARTS = [("reference", attention.reference_parts), ("cpu", attention.cpu_parts)]


@pytest.mark.parametrize("make", [make for _, make in PARTS], ids=[name for name, _ in PARTS])
@pytest.mark.parametrize("mask", [documents, anything])
def test_parts_of_the_keys_give_attention_to_all(make, mask):
    """Among them parts in which a query sees no key, and queries that see none at all."""
    (q, k, v), ints = qkv(2, 12, 24, 4, 2, 8), mask(2, 12, 24)
    do = np.random.default_rng(5).normal(0, 1, q.shape).astype(np.float32)
    forward, backward = make(SCALE)
    q_, do_, zero = ms.Tensor(q), ms.Tensor(do), ms.Tensor(np.zeros(q.shape[:3], np.float32))
    parts, joined, join = [slice(i, i + 8) for i in (0, 8, 16)], None, _join()
    segment, key_segment, order, key_order = ints

    def of(part):
        keys = (k[:, part], v[:, part], segment, key_segment[:, part], order, key_order[:, part])
        return [q_, *(ms.Tensor(np.ascontiguousarray(x)) for x in keys)]

    for part in parts:
        found = forward(*of(part))
        joined = found if joined is None else join(*joined, *found)
    want, grads = whole(q, k, v, ints, do)
    assert_close(want, joined[0], 2e-6)
    shares = [[host(x) for x in backward(*of(part), *joined, do_, zero)] for part in parts]
    assert_close(grads[0], sum(share[0] for share in shares), 5e-6)
    for i in (1, 2):
        assert_close(grads[i], np.concatenate([share[i] for share in shares], 1), 5e-6)


def whole(q, k, v, ints, do):
    """Attention to all keys at once, and its gradients, by the reference."""
    attend, inputs, ints = attention.reference(SCALE), tensors(q, k, v), tensors(*ints)

    def weighted(q, k, v):
        return (attend(q, k, v, *ints) * ms.Tensor(do)).sum()

    return attend(*inputs, *ints), [host(g) for g in ms.grad(weighted, (0, 1, 2))(*inputs)]
