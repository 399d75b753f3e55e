"""Token embedding, and the head that turns the residual stream into logits (its own matrix, or the embedding's)."""

import mindspore as ms
from mindspore import ops

from parallel.spec import ParamSpec, normal

cast = ops.Cast()


def specs(cfg):
    """The [V, D] matrix of the embedding, and of an untied head."""
    return ParamSpec((cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"), normal(cfg.initializer_range))


def build(cfg, sharding):
    """embed(w_VD, tokens_BS) -> x_RD in the compute dtype; head(w_VD, x_RD) -> logits_RV in float32."""
    dtype = getattr(ms, cfg.compute_dtype)
    reshape = ops.Reshape()
    take = sharding.op(ops.Gather(), "vocab embed, tokens -> tokens>rows embed", kind="contraction", call=_take)
    project = sharding.op(ops.MatMul(transpose_b=True), "rows>tokens embed, vocab embed -> tokens vocab", kind="contraction", call=_project)

    def embed(w, tokens):
        return cast(take(w, reshape(tokens, (-1,))), dtype)

    def head(w, x):
        return project(x, w)

    return embed, head


def _take(gather, w, ids):
    return gather(cast(w, ms.float32), ids, 0)  # float32, so that a token's gradients are summed in it


def _project(matmul, x, w):
    return cast(matmul(x, cast(w, x.dtype)), ms.float32)
