"""Attention's probabilities, for notebooks: a layer does not return them, so they are computed from its own q and k."""

import mindspore as ms
import numpy as np

from layers.attention import project
from qwen3 import model


def attention_maps(params, tokens, cfg, *, positions=None, segment_ids=None):
    """tokens_BS int32 -> float32 [L, B, N, S, T] in numpy: the share of each head's attention that each token gives to each token.

    positions_BS and segment_ids_BS as for qwen3.model.forward; rows of tokens in segment 0 (padding) are of no meaning. On one device, in
    eager mode, and with all maps in memory: for short rows. It knows of no option that changes attention's softmax.
    """
    op, (B, S) = model.build(cfg).op, tokens.shape
    positions = ms.Tensor(np.tile(np.arange(S, dtype=np.int32), (B, 1))) if positions is None else positions
    segment_ids = ms.ops.ones_like(tokens) if segment_ids is None else segment_ids
    rows, x, maps = model.rows_of(cfg, op, positions, segment_ids, None), model.embed(cfg, op, params, tokens), []
    segments = segment_ids.asnumpy()
    seen = np.tri(S, dtype=bool) & (segments[:, None, :, None] == segments[:, None, None, :])
    for p, own in zip(params["layers"], op.of_layer):
        q, k, _ = project(own.cfg, own, p["attention"], model.attention_input(own.cfg, own, p, x), rows)
        maps.append(_probabilities(q.asnumpy().astype(np.float32), k.asnumpy().astype(np.float32), seen))
        x, _, _ = model.layer(own.cfg, own, p, x, rows, None)
    return np.stack(maps)


def _probabilities(q_BSNH, k_BTKH, seen_B1ST):
    k_BTNH = np.repeat(k_BTKH, q_BSNH.shape[2] // k_BTKH.shape[2], axis=2)
    logits = np.einsum("bsnh,btnh->bnst", q_BSNH, k_BTNH) * np.float32(q_BSNH.shape[-1] ** -0.5)
    logits = np.where(seen_B1ST, logits, -np.inf)
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
