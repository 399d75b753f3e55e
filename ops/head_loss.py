"""The output head and the terms of cross-entropy over its logits as one op, for a vocabulary that is not sharded."""

from mindspore import nn, ops

from ops import cross_entropy, matmul
from ops.custom import kernel
from ops.signature import check

ARGUMENTS = "x R D; w same V D; ids int32 R"


def reference():
    """Returns measure_head(x_RD, w_VD, ids_R) -> (top, total, picked) [R, 1] of the logits z = x w^T, see ops/cross_entropy.py."""
    project, measure, require = matmul.reference(transpose_b=True), cross_entropy.reference(), check("head_loss", ARGUMENTS)

    def measure_head(x, w, ids):
        require((x.shape, w.shape, ids.shape), (x.dtype, w.dtype, ids.dtype))
        return measure(0, project(x, w), ids)

    return measure_head


def cpu():
    """Returns measure_head as a float32 C++ kernel. Its backward writes the gradient of the logits over the logits, to save memory."""
    pieces = _HeadLoss()

    def measure_head(x, w, ids):
        _, top, total, picked = pieces(x, w, ids)
        return top, total, picked

    return measure_head


class _HeadLoss(nn.Cell):
    """Returns (logits, top, total, picked). The logits are for the backward, which overwrites them; top is a constant for it."""

    def __init__(self):
        super().__init__()
        self.forward = kernel("head_loss", "head_loss", ARGUMENTS, _logits_and_columns, _four)
        self.backward = kernel("head_loss", "head_loss_grad", 7, _x_and_w, _two)
        self.zeros_like = ops.ZerosLike()

    def construct(self, x, w, ids):
        return self.forward(x, w, ids)

    def bprop(self, x, w, ids, out, dout):
        dx, dw = self.backward(x, w, ids, out[0], out[1], dout[2], dout[3])
        return dx, dw, self.zeros_like(ids)


def _logits_and_columns(x, w, ids):
    return (x[0], w[0]), (x[0], 1), (x[0], 1), (x[0], 1)


def _four(x, w, ids):
    return x, x, x, x


def _x_and_w(x, w, ids, z, top, dtotal, dpicked):
    return x, w


def _two(x, w, ids, z, top, dtotal, dpicked):
    return x, w
