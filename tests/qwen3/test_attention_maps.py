"""Attention's probabilities: with them and the values, attention's own output."""

import numpy as np
import pytest

from layers.attention import attention, project
from qwen3 import model
from qwen3.attention_maps import attention_maps
from tests.tiny import DENSE, QWEN2, assert_close, packed_batch, random_params


@pytest.mark.parametrize("cfg", [DENSE, QWEN2], ids=["dense", "qwen2"])
def test_maps_mix_the_values_to_the_output_of_attention(cfg):
    """In packed rows, of which a document sees no other."""
    params, batch = random_params(cfg), packed_batch(cfg)
    given = {"positions": batch["positions"], "segment_ids": batch["segment_ids"]}
    maps, op = attention_maps(params, batch["tokens"], cfg, **given), model.build(cfg).op
    segments = batch["segment_ids"].asnumpy()
    assert maps.shape == (cfg.num_layers, segments.shape[0], cfg.num_heads, segments.shape[1], segments.shape[1])
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)
    other = segments[:, :, None] != segments[:, None, :]
    assert maps.max() > 0.5 and not maps[np.broadcast_to((other | ~np.tri(segments.shape[1], dtype=bool))[None, :, None], maps.shape)].any()

    rows, x = model.rows_of(cfg, op, batch["positions"], batch["segment_ids"], None), model.embed(cfg, op, params, batch["tokens"])
    for p, probabilities in zip(params["layers"], maps):
        h = model.attention_input(cfg, op, p, x)
        v_BTNH = np.repeat(project(cfg, op, p["attention"], h, rows)[2].asnumpy(), cfg.num_heads // cfg.num_kv_heads, axis=2)
        mixed = np.einsum("bnst,btnh->bsnh", probabilities, v_BTNH).reshape(x.shape[0], -1) @ p["attention"]["wo"].asnumpy()
        own, valid = attention(cfg, op, p["attention"], h, rows, None)[0].asnumpy(), segments.reshape(-1) > 0
        assert_close(own[valid], mixed[valid], 1e-5)
        x = model.layer(cfg, op, p, x, rows, None)[0]
