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
