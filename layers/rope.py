"""Rotary position embedding, default and YaRN. Source: Su et al. 2021; Peng et al. 2023; HF modeling_rope_utils."""

import math

import mindspore as ms
import numpy as np
from mindspore import ops

from ops.rearrange import rearrange


def inv_freq(cfg):
    """Returns (float32 [H/2] radians per position, factor on cos and sin) for cfg.rope_theta and cfg.rope_scaling."""
    half = np.arange(0, cfg.head_dim, 2, dtype=np.float64) / cfg.head_dim
    plain = 1.0 / cfg.rope_theta**half
    y = cfg.rope_scaling
    if y is None:
        return plain.astype(np.float32), 1.0

    def dim_of(rotations):  # the dim that makes this number of full turns over the original length
        return cfg.head_dim * math.log(y.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))

    low, high = dim_of(y.beta_fast), dim_of(y.beta_slow)
    if y.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, cfg.head_dim - 1)
    ramp = np.clip((np.arange(cfg.head_dim // 2) - low) / (max(high - low, 0.001)), 0, 1)
    return (plain / y.factor * ramp + plain * (1 - ramp)).astype(np.float32), _attention_factor(y)


def _attention_factor(y):
    def scale(mscale):
        return 0.1 * mscale * math.log(y.factor) + 1.0 if y.factor > 1 else 1.0

    if y.attention_factor is not None:
        return y.attention_factor
    return scale(y.mscale) / scale(y.mscale_all_dim) if y.mscale and y.mscale_all_dim else scale(1.0)


def angles(cfg):
    """Returns angles(positions_BS) -> cos, sin [B, S, 1, H/2] float32."""
    freq, factor = inv_freq(cfg)
    freq = ms.Tensor(freq.reshape(1, 1, 1, -1))
    cos, sin, cast = ops.Cos(), ops.Sin(), ops.Cast()

    def turn(positions):
        angle = rearrange(cast(positions, ms.float32), "batch seq -> batch seq 1 1", {}) * freq
        return cos(angle) * factor, sin(angle) * factor

    return turn
