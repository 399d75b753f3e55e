"""Cross-entropy: the same bits at every call, as a resumed run has made fewer of them."""

import mindspore as ms
import numpy as np
import pytest

from layers import embed, loss, op_table
from layers.bound_ops import BoundOps
from ops import cross_entropy, head_loss, matmul, registry
from parallel.graph.jit import jit
from parallel.sharding import Sharding
from tests import graphs
from tests.tiny import DENSE

ROWS, VOCAB = 1003, 77  # whatever the number of threads, their shares end with a part of a vector


@pytest.mark.parametrize("kernels", [registry.Kernels(), registry.Kernels(cross_entropy="cpu")], ids=["reference", "cpu"])
def test_a_loss_has_the_same_bits_whenever_it_is_taken(kernels):
    rng = np.random.default_rng(3)
    logits, targets = rng.normal(0, 3, (ROWS, VOCAB)).astype(np.float32), rng.integers(0, VOCAB, (1, ROWS)).astype(np.int32)
    op = BoundOps(DENSE.replace(vocab_size=VOCAB), Sharding(), kernels)

    def nats(logits, targets):
        return loss.nats_and_gap(op, logits, targets)[0]

    nll = jit(nats)
    calls = [nll(ms.Tensor(logits), ms.Tensor(targets)).asnumpy() for _ in range(25)]  # MindSpore tries thread counts in the first 15
    assert len({call.tobytes() for call in calls}) == 1
    z = logits.astype(np.float64)
    expected = np.log(np.exp(z).sum(1)) - z[np.arange(ROWS), targets[0]]
    np.testing.assert_allclose(calls[0][:, 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights, mean, total", [([0.25, 0, 0, 0], 3.0, 0.25), ([0.1, 0.3, 0, 0], 4.5, 0.4), ([0, 0, 0, 0], 0.0, 0.0)])
def test_weights_below_one_divide_the_loss_as_any_others(weights, mean, total):
    op = BoundOps(DENSE, Sharding(), registry.Kernels())
    x = ms.Tensor(np.array([[3.0], [5.0], [7.0], [11.0]], np.float32))
    found, weight = loss.weighted_mean(op, x, ms.Tensor(np.array([weights], np.float32)))
    np.testing.assert_allclose([float(found), float(weight)], [mean, total], rtol=1e-6)


def head(first, last):
    return embed.project_to_shard(VOCAB, last)(matmul.reference(transpose_b=True), first)


def head_in_chunks(first, last):
    take = head_loss.chunked(2, matmul.reference(transpose_b=True), cross_entropy.reference(), VOCAB, last)(first)

    def total(x, w):
        return take(x, w, ms.Tensor([0, 1, 2], ms.int32))[1]

    return total


@pytest.mark.parametrize("make, shards", [(head, 2), (head_in_chunks, 3), (head, 7)])
def test_ranks_compile_graphs_of_one_structure(make, shards):
    """Whether or not their shard of the vocabulary has padding: ranks whose graphs differ run collectives in different orders."""
    rows, last = -(-VOCAB // shards), op_table.start_of_last_shard(VOCAB, shards)
    with graphs.compiled() as found:
        for first in (0, last):
            jit(make(first, last))(ms.Tensor(np.ones((3, 4), np.float32)), ms.Tensor(np.ones((rows, 4), np.float32)))
    one, other = map(graphs.operators, found)
    assert one == other and any("MatMul" in name for name in one)
    assert any("Select" in name for name in one) == (shards != 7)
