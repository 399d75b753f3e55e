"""Rotary embedding of half-split pairs. Source: Su et al. 2021; HF modeling_qwen3 (rotate_half)."""

from mindspore import ops


def reference():
    """x_BSNH, cos and sin [B, S, 1, H/2] float32 -> x_BSNH in x's dtype; the turn is in float32."""
    split, concat, cast = ops.Split(-1, 2), ops.Concat(-1), ops.Cast()

    def rotate(x, cos, sin):
        a, b = split(cast(x, cos.dtype))
        return cast(concat((a * cos - b * sin, b * cos + a * sin)), x.dtype)

    return rotate
