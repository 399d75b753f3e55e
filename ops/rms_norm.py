"""RMS norm over the last dim. Source: Zhang and Sennrich 2019; HF modeling_qwen3."""

import mindspore as ms
from mindspore import nn, ops
from mindspore.ops.auto_generate import AddRmsNorm, RmsNorm, RmsNormGrad

from ops.custom import kernel
from ops.signature import check

ARGUMENTS, SUMMED = "x ... n; w n", "x ... n; y same ... n; w n"


def reference(eps):
    """Returns rms_norm(x [..., n], w [n]) -> [..., n] in the dtype of x. The statistics are in float32."""
    mean, rsqrt, cast = ops.ReduceMean(keep_dims=True), ops.Rsqrt(), ops.Cast()
    require = check("rms_norm", ARGUMENTS)

    def rms_norm(x, w):
        require((x.shape, w.shape), (x.dtype, w.dtype))
        h = cast(x, ms.float32)
        h = h * rsqrt(mean(h * h, -1) + eps)
        return cast(h, x.dtype) * cast(w, x.dtype)

    return rms_norm


def reference_add(eps):
    """Returns add_norm(x [..., n], y [..., n], w [n]) -> (h = x + y, rms_norm(h, w)), both in the dtype of x."""
    norm, require = reference(eps), check("rms_norm", SUMMED)

    def add_norm(x, y, w):
        require((x.shape, y.shape, w.shape), (x.dtype, y.dtype, w.dtype))
        h = x + y
        return h, norm(h, w)

    return add_norm


def vendor(eps):
    """Returns rms_norm by MindSpore's kernel, which rounds once, after the product with w."""
    norm, cast, require = RmsNorm(eps), ops.Cast(), check("rms_norm", ARGUMENTS)

    def rms_norm(x, w):
        require((x.shape, w.shape), (x.dtype, w.dtype))
        return norm(x, cast(w, x.dtype))[0]

    return rms_norm


def vendor_add(eps):
    """Returns add_norm by MindSpore's kernel, which rounds the norm once, after the product with w."""
    add_norm, cast, require = _VendorAddNorm(eps), ops.Cast(), check("rms_norm", SUMMED)

    def add_rms_norm(x, y, w):
        require((x.shape, y.shape, w.shape), (x.dtype, y.dtype, w.dtype))
        h, normed, _ = add_norm(x, y, cast(w, x.dtype))
        return h, normed

    return add_rms_norm


class _VendorAddNorm(nn.Cell):
    """Returns (h = x + y, its norm, the scale of the norm). MindSpore's own gradient ignores the cotangent of h (docs/mindspore.md)."""

    def __init__(self, eps):
        super().__init__()
        self.eps, self.forward, self.backward, self.cast = eps, AddRmsNorm(), RmsNormGrad(), ops.Cast()

    def construct(self, x, y, w):
        normed, scale, h = self.forward(x, y, w, self.eps)
        return h, normed, scale

    def bprop(self, x, y, w, out, dout):
        dh, dw = self.backward(dout[1], out[0], out[2], w)
        dh = dh + dout[0]
        return dh, dh, self.cast(dw, w.dtype)


def vendor_missing(use):
    return ""


def cpu(eps):
    """Returns rms_norm as a float32 C++ kernel with one pass over memory in the forward and one in the backward."""
    return _Norm(eps)


def cpu_add(eps):
    """Returns add_norm as a float32 C++ kernel with one pass over memory in the forward and one in the backward."""
    return _AddNorm(eps)


class _Norm(nn.Cell):
    def __init__(self, eps):
        super().__init__()
        self.eps = ms.Tensor(eps, ms.float32)
        self.forward = kernel("rms_norm", "rms_norm", f"{ARGUMENTS}; eps", _first, _first)
        self.backward = kernel("rms_norm", "rms_norm_grad", 4, _x_and_w, _first_two)

    def construct(self, x, w):
        return self.forward(x, w, self.eps)

    def bprop(self, x, w, out, dout):
        return self.backward(x, w, self.eps, dout)


class _AddNorm(nn.Cell):
    def __init__(self, eps):
        super().__init__()
        self.eps = ms.Tensor(eps, ms.float32)
        self.forward = kernel("rms_norm", "rms_norm_add", f"{SUMMED}; eps", _first_twice, _first_twice)
        self.backward = kernel("rms_norm", "rms_norm_add_grad", 5, _h_and_w, _first_two)

    def construct(self, x, y, w):
        return self.forward(x, y, w, self.eps)

    def bprop(self, x, y, w, out, dout):
        dx, dw = self.backward(out[0], w, self.eps, dout[1], dout[0])
        return dx, dx, dw


def _x_and_w(x, w, eps, dy):
    return x, w


def _h_and_w(h, w, eps, dnormed, dh):
    return h, w


def _first(x, w, eps):
    return x


def _first_two(x, w, *rest):
    return x, w


def _first_twice(x, y, w, eps):
    return x, x
