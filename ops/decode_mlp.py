"""The feed-forward half of a layer, norm to residual sum, for one token a row, as one op for decoding."""

import mindspore as ms
from mindspore import nn

from ops import matmul, rms_norm, swiglu
from ops.custom import kernel
from ops.signature import check

ARGUMENTS = "x B D; norm same D; w_gate same D F; w_up same D F; w_down same F D"


def reference(eps):
    """Returns decode(x_BD, norm_D, w_gate_DF, w_up_DF, w_down_FD) -> y_BD = x + down(silu(gate(h)) * up(h)) with h = norm(x)."""
    norm, multiply, act, require = rms_norm.reference(eps), matmul.reference(), swiglu.reference(), check("decode_mlp", ARGUMENTS)

    def decode(x, norm_w, w_gate, w_up, w_down):
        shapes = x.shape, norm_w.shape, w_gate.shape, w_up.shape, w_down.shape
        require(shapes, (x.dtype, norm_w.dtype, w_gate.dtype, w_up.dtype, w_down.dtype))
        normed = norm(x, norm_w)
        return x + multiply(act(multiply(normed, w_gate), multiply(normed, w_up)), w_down)

    return decode


def cpu(eps):
    """Returns decode as `reference` does, as a float32 C++ kernel without gradient.

    Results are bitwise those of the C++ kernels of the ops that it replaces, for up to 16 rows.
    """
    return _Decode(eps)


class _Decode(nn.Cell):
    def __init__(self, eps):
        super().__init__()
        self.eps = ms.Tensor(eps, ms.float32)
        self.step = kernel("decode_mlp", "decode_mlp", f"{ARGUMENTS}; eps", _x, _x)

    def construct(self, x, norm, w_gate, w_up, w_down):
        return self.step(x, norm, w_gate, w_up, w_down, self.eps)

    def bprop(self, x, norm, w_gate, w_up, w_down, out, dout):
        raise RuntimeError("the decode_mlp kernel has no gradient; use ops.decode_mlp=reference")


def _x(x, norm, w_gate, w_up, w_down, eps):
    return x
