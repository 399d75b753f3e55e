"""The head and cross-entropy's pieces in one op: the kernel against the reference, and bit for bit against the kernels of the two."""

import mindspore as ms
import numpy as np
import pytest

from ops import cross_entropy, head_loss, matmul
from parallel.step import value_and_grad
from tests.ops.kernels import agree, same_for_any_threads, takes_views, tensors
from tests.ops.test_references import draw
from tests.tiny import assert_trees_close, host

SHAPES = [(1, 3, 2), (7, 12, 5), (20, 33, 19), (65, 16, 300)]  # R, D, V


def case(R, D, V):
    """x, w, ids: the last id is in no column."""
    ids = np.arange(R).astype(np.int32) * 7 % V
    ids[-1] = V if R > 1 else 0
    return draw(R, D), draw(V, D), ids


def of_lse(op):
    """Of the three pieces what does not depend on `top`, whose gradient is left out."""

    def nll(x, w, ids):
        top, total, picked = op(x, w, ids)
        return ms.ops.log(total) + (top - picked) * 0.5, total * 0.1 - ms.ops.stop_gradient(total) * 0.1 + picked

    return nll


@pytest.mark.extended(but=("shape1", "shape2"))
@pytest.mark.parametrize("shape", SHAPES)
def test_it_matches_the_reference_with_its_gradients(shape):
    x, w, ids = case(*shape)
    ways = ("eager", "compiled") if shape == SHAPES[-1] else ("eager",)
    agree(of_lse(head_loss.reference()), of_lse(head_loss.cpu()), (x, w), (np.minimum(ids, shape[2] - 1),), ways=ways)


@pytest.mark.parametrize("compiled", [False, True])
def test_it_is_the_two_ops_bit_for_bit_step_after_step(compiled):
    """Also where a second loss of the same states reads its own logits, after those of the first have made room."""
    project, measure, fused = matmul.cpu(transpose_b=True), cross_entropy.cpu(), head_loss.cpu()

    def two(x, w, ids):
        return measure(0, project(x, w), ids)

    def loss_of(op):
        def loss(params, ids, others):
            total = (of_lse(op)(params["x"], params["w"], ids)[0] * params["x"][:, :1]).sum()
            return total + of_lse(op)(params["x"], params["w"], others)[0].sum()

        return value_and_grad(loss, compiled=compiled)

    grads = loss_of(two), loss_of(fused)
    for _ in range(3):
        x, w, ids = case(20, 33, 19)
        params = {"x": ms.Tensor(x), "w": ms.Tensor(w)}
        (a, da), (b, db) = (grad(params, *tensors(ids, ids[::-1].copy())) for grad in grads)
        assert_trees_close({"loss": a, **da}, {"loss": b, **db}, 0)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_any_number_of_threads_gives_the_same_bits(shape):
    (R, D, V), (x, w, ids), column = shape, case(*shape), (shape[0], 1)
    same_for_any_threads("head_loss", "head_loss", [x, w, ids], [(R, V), column, column, column])
    z, top = draw(R, V), draw(R, 1) + 3
    same_for_any_threads("head_loss", "head_loss_grad", [x, w, ids, z, top, draw(R, 1), draw(R, 1)], [(R, D), (V, D)])


def test_huge_and_missing_numbers_stay_in_their_rows():
    x, w, ids = case(20, 33, 19)
    x[3], x[5, 2] = x[3] * 1e18, np.nan
    assert np.isnan(host(head_loss.cpu()(*tensors(x, w, ids))[1])[5])
    rest = np.arange(20) != 5
    for a, b in zip(*(op(*tensors(x, w, ids)) for op in (head_loss.reference(), head_loss.cpu()))):
        np.testing.assert_allclose(host(a)[rest], host(b)[rest], rtol=1e-5, atol=1e-5)


def test_views_are_taken():
    x, w, ids = case(20, 33, 19)
    takes_views(head_loss.cpu(), x, w, ids)


@pytest.mark.parametrize("form", [head_loss.reference, head_loss.cpu])
def test_what_does_not_fit_is_named(form):
    x, w, ids = case(7, 12, 5)
    with pytest.raises(ValueError, match=r"head_loss: w is \[5, 11\] and has to be \[V, D\] = \[5, 12\]"):
        form()(*tensors(x, w[:, :11].copy(), ids))
    with pytest.raises(ValueError, match="head_loss: ids is float32 and has to be int32"):
        form()(*tensors(x, w, ids.astype(np.float32)))


CHUNKED = [((1, 3, 2), 2), ((7, 12, 5), 3), ((20, 33, 19), 4), ((65, 16, 300), 2), ((7, 12, 5), 9)]  # shape, number of chunks


def in_chunks(count, vocab_size, first=0, of=(matmul.reference, cross_entropy.reference)):
    return head_loss.chunked(count, of[0](transpose_b=True), of[1](), vocab_size, last=first)(first)


@pytest.mark.extended(but=("shape1*", "shape4*"))
@pytest.mark.parametrize("shape, count", CHUNKED)
def test_chunks_match_the_reference_with_its_gradients(shape, count):
    x, w, ids = case(*shape)
    ways = ("eager", "compiled") if count == 4 else ("eager",)
    agree(of_lse(head_loss.reference()), of_lse(in_chunks(count, shape[2])), (x, w), (np.minimum(ids, shape[2] - 1),), ways=ways)


@pytest.mark.extended(but=("19-27", "38-21"))
@pytest.mark.parametrize("first, vocab_size", [(0, 19), (19, 38), (19, 27), (19, 19), (38, 21)])
def test_chunks_of_a_shard_leave_out_its_padding_and_the_targets_of_other_shards(first, vocab_size):
    """The shard has rows of the table from id `first` on; those from `vocab_size` on are padding, which may be all of them."""
    R, D, V = 20, 33, 19
    x, w, _ = case(R, D, V)
    ids, real = np.arange(R).astype(np.int32) * 3 % vocab_size, np.clip(vocab_size - first, 0, V)
    cotangents = ms.Tensor(draw(R, 1))

    def plain(x, w, ids):
        z = matmul.reference(transpose_b=True)(x, w)
        z = ms.ops.where(ms.Tensor(np.arange(V) < real), z, ms.Tensor(np.float32(-np.inf)))
        return cross_entropy.reference()(first, z, ids)

    def weighted(op):
        def parts(x, w, ids):
            top, total, picked = op(x, w, ids)
            return total * cotangents, picked, ms.ops.stop_gradient(top)

        return parts

    if real:
        agree(weighted(plain), weighted(in_chunks(4, vocab_size, first)), (x, w), (ids,), ways=("eager",))
        return
    top, total, picked = map(host, in_chunks(4, vocab_size, first)(*tensors(x, w, ids)))
    assert (top == -np.inf).all() and not total.any() and not picked.any()
    grads = ms.grad(lambda x, w: in_chunks(4, vocab_size, first)(x, w, ms.Tensor(ids))[1].sum(), (0, 1))(*tensors(x, w))
    assert not any(host(g).any() for g in grads)


def test_chunks_step_after_step_in_a_graph_with_the_kernels_of_a_cpu():
    of = matmul.cpu, cross_entropy.cpu

    def loss_of(op):
        def loss(params, ids):
            found = of_lse(op)(params["x"], params["w"], ids)[0]
            return (found * found).sum()

        return loss

    chunks = value_and_grad(loss_of(in_chunks(3, 19, of=of)), compiled=True)
    for _ in range(3):
        x, w, ids = case(20, 33, 19)
        params, ids = {"x": ms.Tensor(x), "w": ms.Tensor(w)}, np.minimum(ids, 18)
        (a, da), (b, db) = value_and_grad(loss_of(head_loss.reference()))(params, ms.Tensor(ids)), chunks(params, ms.Tensor(ids))
        assert_trees_close({"loss": a, **da}, {"loss": b, **db}, 1e-5)


def test_the_chunks_cover_every_column_once_and_keep_within_their_bytes():
    for count, rows, columns in [(0, 4096, 18_992), (0, 8192, 151_936), (0, 3, 5), (1, 9, 300), (7, 9, 300), (300, 9, 300), (999, 9, 300)]:
        bounds = head_loss.chunk_bounds(count, rows, columns)
        assert bounds[0][0] == 0 and bounds[-1][1] == columns and all(a[1] == b[0] for a, b in zip(bounds, bounds[1:]))
        widest = max(stop - start for start, stop in bounds)
        assert len(bounds) <= count or not count
        if not count:
            assert 4 * rows * widest <= head_loss.CHUNK_BYTES + 4 * rows * head_loss.COLUMNS
    assert len(head_loss.chunk_bounds(0, 4096, 18_992)) == 3 and len(head_loss.chunk_bounds(7, 9, 300)) == 7
