"""Rotary embedding of half-split pairs. Source: Su et al. 2021; HF modeling_qwen3 (rotate_half)."""

import mindspore as ms
from mindspore import nn, ops
from mindspore.ops.auto_generate import RotaryPositionEmbedding

from ops import rms_norm
from ops.custom import kernel
from ops.signature import check

ANGLES = "cos float32 B S 1 H/2; sin float32 B S 1 H/2"
ROTATE_HALF = 0  # the pairs are (i, i + H/2), as in HF; 1 would be (2i, 2i + 1)
ARGUMENTS, NORMED = f"x B S N H; {ANGLES}", f"x B S N H; w H; {ANGLES}"


def reference():
    """Returns rotate(x_BSNH, cos, sin) -> x_BSNH in the dtype of x. cos and sin are float32 [B, S, 1, H/2]; computes in float32."""
    split, concat, cast, require = ops.Split(-1, 2), ops.Concat(-1), ops.Cast(), check("rope", ARGUMENTS)

    def rotate(x, cos, sin):
        require((x.shape, cos.shape, sin.shape), (x.dtype, cos.dtype, sin.dtype))
        a, b = split(cast(x, cos.dtype))
        return cast(concat((a * cos - b * sin, b * cos + a * sin)), x.dtype)

    return rotate


def reference_norm(eps):
    """Returns norm_rotate(x_BSNH, w_H, cos, sin) -> the RMS norm of each head of x, rotated."""
    return _norm_then_turn(rms_norm.reference(eps), reference())


def _norm_then_turn(norm, rotate):
    require = check("rope", NORMED)

    def norm_rotate(x, w, cos, sin):
        require((x.shape, w.shape, cos.shape, sin.shape), (x.dtype, w.dtype, cos.dtype, sin.dtype))
        return rotate(norm(x, w), cos, sin)

    return norm_rotate


def vendor():
    """Returns rotate by MindSpore's kernel, in float32, since it takes angles of the dtype of x only. cos and sin get no gradient."""
    turn, twice, cast, require = RotaryPositionEmbedding(), ops.Concat(-1), ops.Cast(), check("rope", ARGUMENTS)

    def rotate(x, cos, sin):
        require((x.shape, cos.shape, sin.shape), (x.dtype, cos.dtype, sin.dtype))
        cos, sin = ops.stop_gradient(cos), ops.stop_gradient(sin)
        return cast(turn(cast(x, cos.dtype), twice((cos, cos)), twice((sin, sin)), ROTATE_HALF), x.dtype)

    return rotate


def vendor_norm(eps):
    """Returns norm_rotate by two of MindSpore's kernels."""
    return _norm_then_turn(rms_norm.vendor(eps), vendor())


def vendor_missing(use):
    if use.head_dim is None or use.head_dim % 2 or use.head_dim >= 896:
        return f"needs an even head_dim below 896, and this is {use.head_dim}"
    return ""


def cpu():
    """Returns rotate as a float32 C++ kernel with one pass over memory in each direction. The gradients of cos and sin are 0."""
    return Rotate(kernel("rope", "rope", ARGUMENTS, _first, _first), kernel("rope", "rope_grad", 3, _first, _first))


def cpu_norm(eps):
    """Returns norm_rotate as a float32 C++ kernel with one pass over memory in each direction. The gradients of cos and sin are 0."""
    return _NormRotate(eps)


class Rotate(nn.Cell):
    """rotate by two kernels: forward(x, cos, sin) -> y and backward(dy, cos, sin) -> dx."""

    def __init__(self, forward, backward):
        super().__init__()
        self.forward, self.backward, self.zeros_like = forward, backward, ops.ZerosLike()

    def construct(self, x, cos, sin):
        return self.forward(x, cos, sin)

    def bprop(self, x, cos, sin, out, dout):
        return self.backward(dout, cos, sin), self.zeros_like(cos), self.zeros_like(sin)


class _NormRotate(nn.Cell):
    def __init__(self, eps):
        super().__init__()
        self.eps = ms.Tensor(eps, ms.float32)
        self.forward = kernel("rope", "rope_norm", f"{NORMED}; eps", _first_of_five, _first_of_five)
        self.backward = kernel("rope", "rope_norm_grad", 6, _x_and_w, _first_two)
        self.zeros_like = ops.ZerosLike()

    def construct(self, x, w, cos, sin):
        return self.forward(x, w, cos, sin, self.eps)

    def bprop(self, x, w, cos, sin, out, dout):
        dx, dw = self.backward(x, w, cos, sin, self.eps, dout)
        return dx, dw, self.zeros_like(cos), self.zeros_like(sin)


def _first(x, cos, sin):
    return x


def _first_of_five(x, w, cos, sin, eps):
    return x


def _x_and_w(x, w, cos, sin, eps, dy):
    return x, w


def _first_two(x, w, cos, sin, eps, dy):
    return x, w
