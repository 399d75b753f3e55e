"""Token embedding, and the head that computes logits from the residual stream with its own matrix or, if tied, the embedding's."""

import mindspore as ms
from mindspore import ops

from ops import cross_entropy
from ops.registry import pick
from parallel.specs import ParamSpec, normal

cast = ops.Cast()


def specs(cfg):
    """Returns the ParamSpec [V, D] of the embedding, and of an untied head."""
    return ParamSpec((cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"), normal(cfg.initializer_range))


def score_specs(cfg):
    """Returns the ParamSpec [D, num_labels] of the head of a model with labels."""
    return ParamSpec((cfg.hidden_size, cfg.num_labels), ("embed", "one"), normal(cfg.initializer_range))


def lookup(take):
    """Returns rows(w, ids): the kernel `take` of ops/embedding.py in float32, so that gradients of a token are summed in float32."""

    def rows(w, ids):
        return take(cast(w, ms.float32), ids)

    return rows


def lookup_in_shard(kernels):
    """Returns make(take, first) -> rows(w, ids) for a shard of the table: zeros for ids that are not in [first, first + rows of w)."""

    def make(_, first):
        take = pick(kernels, "embedding", "part")()

        def rows(w, ids):
            return take(first, cast(w, ms.float32), ids)

        return rows

    return make


def lookup_int8_in_shard(kernels):
    """Returns make(take, first) -> rows(w int8 [V, D], ids, scale) for a shard of a table in 8 bits; see lookup_in_shard."""

    def make(_, first):
        take = pick(kernels, "embedding", "int8_part")()

        def rows(w, ids, scale):
            return take(first, w, ids, scale)

        return rows

    return make


def project(matmul):
    """Returns logits(x_RD, w_VD) -> [R, V] float32. matmul(x, w) computes x w^T."""

    def logits(x, w):
        return cast(matmul(x, cast(w, x.dtype)), ms.float32)

    return logits


def project_to_shard(vocab_size, last):
    """Returns make(matmul, first) -> logits(x, w) for a shard of the vocabulary. Columns past the vocabulary are padding and get -inf.
    last: the token id at which the last shard starts."""
    masked = cross_entropy.without_logits_of_padding(vocab_size, last)

    def make(matmul, first):
        def logits(x, w):
            return masked(cast(matmul(x, cast(w, x.dtype)), ms.float32), first, 0)

        return logits

    return make


def project_int8(matmul):
    """Returns logits(x_RD, w int8 [V, D], scale [V, G]) -> [R, V] float32."""

    def logits(x, w, scale):
        return cast(matmul(x, w, scale), ms.float32)

    return logits


def project_int8_to_shard(vocab_size, last):
    """Returns make(matmul, first) -> logits(x, w, scale) for a shard of the vocabulary; see project_to_shard."""
    masked = cross_entropy.without_logits_of_padding(vocab_size, last)

    def make(matmul, first):
        def logits(x, w, scale):
            return masked(cast(matmul(x, w, scale), ms.float32), first, 0)

        return logits

    return make


def without_padding(vocab_size):
    """Returns f(logits) -> the logits without the columns of padding."""

    def columns(logits):
        return logits[:, :vocab_size]

    return columns
