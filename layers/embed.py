"""Token embedding, and the head that turns the residual stream into logits (its own matrix, or the embedding's)."""

import mindspore as ms
from mindspore import ops

from ops import iota
from ops.registry import pick
from parallel.specs import ParamSpec, normal

cast = ops.Cast()
NEVER = float("-inf")  # the logit of padding


def specs(cfg):
    """The [V, D] matrix of the embedding, and of an untied head."""
    return ParamSpec((cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"), normal(cfg.initializer_range))


def lookup(take):
    """take, a kernel of ops/embedding.py, in float32, so that the gradients of a token are summed in it."""

    def rows(w, ids):
        return take(cast(w, ms.float32), ids)

    return rows


def lookup_in_shard(kernels):
    """Returns make(take, first) -> rows(w, ids), with zeros for the ids that are not in [first, first + rows of w)."""

    def make(_, first):
        take = pick(kernels, "embedding", "part")()

        def rows(w, ids):
            return take(first, cast(w, ms.float32), ids)

        return rows

    return make


def project(matmul):
    """x_RD, w_VD -> logits_RV in float32."""

    def logits(x, w):
        return cast(matmul(x, cast(w, x.dtype)), ms.float32)

    return logits


def project_to_shard(vocab_size):
    """Returns make(matmul, first) -> logits(x, w), in which the columns past the vocabulary, which are padding, are -inf."""
    less, count, select = ops.Less(), iota.reference(), ops.Select()

    def make(matmul, first):
        def logits(x, w):
            z = cast(matmul(x, cast(w, x.dtype)), ms.float32)
            real = ops.BroadcastTo(z.shape)(less(count(w.shape[0]) + first, vocab_size))
            return select(real, z, ops.OnesLike()(z) * NEVER)

        return logits

    return make


def without_padding(vocab_size):
    """Returns f(logits) -> the columns of the vocabulary."""

    def columns(logits):
        return logits[:, :vocab_size]

    return columns
