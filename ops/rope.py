"""Rotary embedding of half-split pairs. Source: Su et al. 2021; HF modeling_qwen3 (rotate_half)."""

import mindspore as ms
from mindspore import nn, ops

from ops import rms_norm
from ops.custom import kernel


def reference():
    """x_BSNH, cos and sin [B, S, 1, H/2] float32 -> x_BSNH in x's dtype; the turn is in float32."""
    split, concat, cast = ops.Split(-1, 2), ops.Concat(-1), ops.Cast()

    def rotate(x, cos, sin):
        a, b = split(cast(x, cos.dtype))
        return cast(concat((a * cos - b * sin, b * cos + a * sin)), x.dtype)

    return rotate


def reference_norm(eps):
    """x_BSNH, w_H, cos, sin -> the RMS norm of each head, turned."""
    norm, rotate = rms_norm.reference(eps), reference()

    def norm_rotate(x, w, cos, sin):
        return rotate(norm(x, w), cos, sin)

    return norm_rotate


def cpu():
    """The same as reference in one pass over memory, forward and backward; float32. The gradients of cos and sin are 0."""
    return _Rotate()


def cpu_norm(eps):
    """The same as reference_norm in one pass over memory, forward and backward; float32. The gradients of cos and sin are 0."""
    return _NormRotate(eps)


class _Rotate(nn.Cell):
    def __init__(self):
        super().__init__()
        self.forward = kernel("rope", "rope", 3, _like_x, _first)
        self.backward = kernel("rope", "rope_grad", 3, _like_x, _first)
        self.zeros_like = ops.ZerosLike()

    def construct(self, x, cos, sin):
        return self.forward(x, cos, sin)

    def bprop(self, x, cos, sin, out, dout):
        return self.backward(dout, cos, sin), self.zeros_like(cos), self.zeros_like(sin)


class _NormRotate(nn.Cell):
    def __init__(self, eps):
        super().__init__()
        self.eps = ms.Tensor(eps, ms.float32)
        self.forward = kernel("rope", "rope_norm", 5, _normed_like_x, _first_of_five)
        self.backward = kernel("rope", "rope_norm_grad", 6, _x_and_w, _first_two)
        self.zeros_like = ops.ZerosLike()

    def construct(self, x, w, cos, sin):
        return self.forward(x, w, cos, sin, self.eps)

    def bprop(self, x, w, cos, sin, out, dout):
        dx, dw = self.backward(x, w, cos, sin, self.eps, dout)
        return dx, dw, self.zeros_like(cos), self.zeros_like(sin)


def _like_x(x, cos, sin):
    if len(x) != 4 or x[3] % 2 or tuple(cos) != (x[0], x[1], 1, x[3] // 2) or tuple(sin) != tuple(cos):
        raise ValueError(f"rope: x {tuple(x)} has to be [B, S, N, H], H even, and cos {tuple(cos)} and sin {tuple(sin)} [B, S, 1, H/2]")
    return x


def _normed_like_x(x, w, cos, sin, eps):
    if tuple(w) != tuple(x[3:]):
        raise ValueError(f"rope: x {tuple(x)} has to be [B, S, N, H], and w {tuple(w)} [H]")
    return _like_x(x, cos, sin)


def _first(x, cos, sin):
    return x


def _first_of_five(x, w, cos, sin, eps):
    return x


def _x_and_w(x, w, cos, sin, eps, dy):
    return x, w


def _first_two(x, w, cos, sin, eps, dy):
    return x, w
