"""The feed-forward half of a layer, norm to residual sum, for one token a row, as one op for decoding."""

import mindspore as ms
from mindspore import nn

from ops import matmul, rms_norm, swiglu
from ops.custom import kernel
from ops.signature import check

ARGUMENTS = "x B D; norm same D; w_gate same D F; w_up same D F; w_down same F D"
INT8 = (
    "x B D; norm same D; w_gate int8 F D; w_up int8 F D; w_down int8 D F; gate_scale float32 F g; up_scale float32 F g;"
    " down_scale float32 D h"
)


def reference(eps):
    """Returns decode(x_BD, norm_D, w_gate_DF, w_up_DF, w_down_FD) -> y_BD = x + down(silu(gate(h)) * up(h)) with h = norm(x)."""
    norm, multiply, act, require = rms_norm.reference(eps), matmul.reference(), swiglu.reference(), check("decode_mlp", ARGUMENTS)

    def decode(x, norm_w, w_gate, w_up, w_down):
        shapes = x.shape, norm_w.shape, w_gate.shape, w_up.shape, w_down.shape
        require(shapes, (x.dtype, norm_w.dtype, w_gate.dtype, w_up.dtype, w_down.dtype))
        normed = norm(x, norm_w)
        return x + multiply(act(multiply(normed, w_gate), multiply(normed, w_up)), w_down)

    return decode


def reference_int8(eps):
    """Returns decode(x_BD, norm_D, w_gate, w_up int8 [F, D], w_down int8 [D, F], gate_scale, up_scale [F, g], down_scale [D, h]) -> y_BD,
    the same with weights in 8 bits (ops/int8.py)."""
    norm, multiply, act, require = rms_norm.reference(eps), matmul.reference_int8(), swiglu.reference(), check("decode_mlp", INT8)

    def decode(x, norm_w, w_gate, w_up, w_down, gate_scale, up_scale, down_scale):
        shapes = x.shape, norm_w.shape, w_gate.shape, w_up.shape, w_down.shape, gate_scale.shape, up_scale.shape, down_scale.shape
        dtypes = x.dtype, norm_w.dtype, w_gate.dtype, w_up.dtype, w_down.dtype, gate_scale.dtype, up_scale.dtype, down_scale.dtype
        require(shapes, dtypes)
        normed = norm(x, norm_w)
        return x + multiply(act(multiply(normed, w_gate, gate_scale), multiply(normed, w_up, up_scale)), w_down, down_scale)

    return decode


def cpu(eps):
    """Returns decode as `reference` does, as a float32 C++ kernel without gradient.

    Results are bitwise those of the C++ kernels of the ops that it replaces, for up to 16 rows.
    """
    return _Decode(eps)


def cpu_int8(eps):
    """Returns decode as `reference_int8` does, as a C++ kernel. Results are bitwise those of matmul.cpu_int8 and the other kernels."""
    return _DecodeInt8(eps)


class _Decode(nn.Cell):
    def __init__(self, eps):
        super().__init__()
        self.eps = ms.Tensor(eps, ms.float32)
        self.step = kernel("decode_mlp", "decode_mlp", f"{ARGUMENTS}; eps", _x, _x)

    def construct(self, x, norm, w_gate, w_up, w_down):
        return self.step(x, norm, w_gate, w_up, w_down, self.eps)

    def bprop(self, x, norm, w_gate, w_up, w_down, out, dout):
        raise RuntimeError("the decode_mlp kernel has no gradient; use ops.decode_mlp=reference")


class _DecodeInt8(nn.Cell):
    def __init__(self, eps):
        super().__init__()
        self.eps = ms.Tensor(eps, ms.float32)
        self.step = kernel("decode_mlp", "decode_mlp_int8", f"{INT8}; eps", _x_int8, _x_int8)

    def construct(self, x, norm, w_gate, w_up, w_down, gate_scale, up_scale, down_scale):
        return self.step(x, norm, w_gate, w_up, w_down, gate_scale, up_scale, down_scale, self.eps)

    def bprop(self, x, norm, w_gate, w_up, w_down, gate_scale, up_scale, down_scale, out, dout):
        raise RuntimeError("the decode_mlp kernel has no gradient; use ops.decode_mlp=reference")


def _x_int8(x, norm, w_gate, w_up, w_down, gate_scale, up_scale, down_scale, eps):
    return x


def _x(x, norm, w_gate, w_up, w_down, eps):
    return x
