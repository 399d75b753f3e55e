"""RMS norm over the last dim. Source: Zhang and Sennrich 2019; HF modeling_qwen3."""

import mindspore as ms
from mindspore import nn, ops

from ops.custom import kernel


def reference(eps):
    """x [..., n], w [n] -> [..., n] in x's dtype; the statistics are in float32."""
    mean, rsqrt, cast = ops.ReduceMean(keep_dims=True), ops.Rsqrt(), ops.Cast()

    def rms_norm(x, w):
        h = cast(x, ms.float32)
        h = h * rsqrt(mean(h * h, -1) + eps)
        return cast(h, x.dtype) * cast(w, x.dtype)

    return rms_norm


def reference_add(eps):
    """x, y [..., n], w [n] -> h = x + y, and its norm, both in x's dtype."""
    norm = reference(eps)

    def add_norm(x, y, w):
        h = x + y
        return h, norm(h, w)

    return add_norm


def cpu(eps):
    """The same as reference in one pass over memory, forward and backward; float32."""
    return _Norm(eps)


def cpu_add(eps):
    """The same as reference_add in one pass over memory, forward and backward; float32."""
    return _AddNorm(eps)


class _Norm(nn.Cell):
    def __init__(self, eps):
        super().__init__()
        self.eps = ms.Tensor(eps, ms.float32)
        self.forward = kernel("rms_norm", "rms_norm", 3, _like_x, _first)
        self.backward = kernel("rms_norm", "rms_norm_grad", 4, _x_and_w, _first_two)

    def construct(self, x, w):
        return self.forward(x, w, self.eps)

    def bprop(self, x, w, out, dout):
        return self.backward(x, w, self.eps, dout)


class _AddNorm(nn.Cell):
    def __init__(self, eps):
        super().__init__()
        self.eps = ms.Tensor(eps, ms.float32)
        self.forward = kernel("rms_norm", "rms_norm_add", 4, _two_like_x, _first_twice)
        self.backward = kernel("rms_norm", "rms_norm_add_grad", 5, _h_and_w, _first_two)

    def construct(self, x, y, w):
        return self.forward(x, y, w, self.eps)

    def bprop(self, x, y, w, out, dout):
        dx, dw = self.backward(out[0], w, self.eps, dout[1], dout[0])
        return dx, dx, dw


def _check(x, w):
    if len(x) == 0 or len(w) != 1 or x[-1] != w[0]:
        raise ValueError(f"rms_norm: x {tuple(x)} has to be [..., n], and w {tuple(w)} [n]")


def _like_x(x, w, eps):
    _check(x, w)
    return x


def _x_and_w(x, w, eps, dy):
    return x, w


def _two_like_x(x, y, w, eps):
    _check(x, w)
    if tuple(x) != tuple(y):
        raise ValueError(f"rms_norm: x {tuple(x)} and y {tuple(y)} have to be of one shape")
    return x, x


def _h_and_w(h, w, eps, dnormed, dh):
    return h, w


def _first(x, w, eps):
    return x


def _first_two(x, w, *rest):
    return x, w


def _first_twice(x, y, w, eps):
    return x, x
