"""Token embedding, and the head that turns the residual stream into logits (its own matrix, or the embedding's)."""

import mindspore as ms
from mindspore import ops

from ops import iota
from ops.registry import pick
from parallel.spec import ParamSpec, normal

cast = ops.Cast()
NEVER = float("-inf")  # the logit of padding


def specs(cfg):
    """The [V, D] matrix of the embedding, and of an untied head."""
    return ParamSpec((cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"), normal(cfg.initializer_range))


def build(cfg, sharding, kernels):
    """embed(w_VD, tokens_BS) -> x_RD in the compute dtype; head(w_VD, x_RD) -> logits_RV in float32.

    Where the vocabulary is split, each rank has the logits of its part; those of padding are -inf.
    """
    dtype, V = getattr(ms, cfg.compute_dtype), cfg.vocab_size
    reshape = ops.Reshape()
    take = lookup(cfg, sharding, kernels, "embed")
    dims = "rows>tokens embed, vocab embed -> tokens vocab"
    project = pick(kernels, "matmul")(transpose_b=True)
    project = sharding.op(project, dims, kind="contraction", call=_project, part=("vocab", V, _project_part(V)), dtype=ms.float32)

    def embed(w, tokens):
        return cast(take(w, reshape(tokens, (-1,))), dtype)

    def head(w, x):
        return project(x, w)

    return embed, head


def lookup(cfg, sharding, kernels, width):
    """take(w [V, width], ids_R) -> float32 [rows, width]"""
    dims, take, part = f"vocab {width}, tokens -> tokens>rows {width}", pick(kernels, "embedding")(), pick(kernels, "embedding", "part")()
    return sharding.op(take, dims, kind="contraction", call=_take, part=("vocab", cfg.vocab_size, _take_part(part)), dtype=ms.float32)


def _take(take, w, ids):
    return take(cast(w, ms.float32), ids)  # float32, so that a token's gradients are summed in it


def _take_part(take_part):
    """The rows of ids in [first, first + V / ranks), and zeros for the others."""

    def take(_, first, w, ids):
        return take_part(first, cast(w, ms.float32), ids)

    return take


def _project(matmul, x, w):
    return cast(matmul(x, cast(w, x.dtype)), ms.float32)


def _project_part(vocab_size):
    less, count, select = ops.Less(), iota.reference(), ops.Select()

    def project(matmul, first, x, w):
        logits = _project(matmul, x, w)
        real = ops.BroadcastTo(logits.shape)(less(count(w.shape[0]) + first, vocab_size))
        return select(real, logits, ops.OnesLike()(logits) * NEVER)

    return project


def whole(cfg, sharding):
    """f(logits_RV) -> [tokens, V], of the whole vocabulary on every rank."""

    def cut(logits):
        return logits[:, : cfg.vocab_size]

    return sharding.op(cut, "tokens vocab>whole_vocab -> tokens whole_vocab", kind="kernel", sizes={"whole_vocab": cfg.vocab_size})
