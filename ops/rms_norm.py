"""RMS norm over the last dim. Source: Zhang and Sennrich 2019; HF modeling_qwen3."""

import mindspore as ms
from mindspore import ops


def reference(eps):
    """x [..., n], w [n] -> [..., n] in x's dtype; the statistics are in float32."""
    mean, rsqrt, cast = ops.ReduceMean(keep_dims=True), ops.Rsqrt(), ops.Cast()

    def rms_norm(x, w):
        h = cast(x, ms.float32)
        h = h * rsqrt(mean(h * h, -1) + eps)
        return cast(h, x.dtype) * cast(w, x.dtype)

    return rms_norm
