"""The product of a matrix of activations and a weight matrix.

MindSpore's MatMul runs near the peak of a CPU with AVX-512, but at 40 % of the peak of one with only AVX2; OpenBLAS is near it on both.
"""

from mindspore import nn, ops

from ops.custom import kernel


def reference(transpose_b=False):
    """Returns matmul(x_RI, w_IO) -> y_RO, or matmul(x_RI, w_OI) with transpose_b. It is a primitive that MindSpore's partitioner knows."""
    return ops.MatMul(transpose_b=transpose_b)


def cpu(transpose_b=False):
    """Returns matmul by OpenBLAS, forward and backward, in float32."""
    return _Transposed() if transpose_b else _Plain()


class _Plain(nn.Cell):
    """y = x w; dx = dy w^T, dw = x^T dy."""

    def __init__(self):
        super().__init__()
        self.forward, self.to_x, self.to_w = _plain(), _of_transposed_b(), _of_transposed_a()

    def construct(self, x, w):
        return self.forward(x, w)

    def bprop(self, x, w, out, dout):
        return self.to_x(dout, w), self.to_w(x, dout)


class _Transposed(nn.Cell):
    """y = x w^T; dx = dy w, dw = dy^T x."""

    def __init__(self):
        super().__init__()
        self.forward, self.to_x, self.to_w = _of_transposed_b(), _plain(), _of_transposed_a()

    def construct(self, x, w):
        return self.forward(x, w)

    def bprop(self, x, w, out, dout):
        return self.to_x(dout, w), self.to_w(dout, x)


def _plain():
    return kernel("matmul", "matmul", "x R I; w I O", _sizes, _first)


def _of_transposed_b():
    return kernel("matmul", "matmul_nt", "x R I; w O I", _sizes_nt, _first)


def _of_transposed_a():
    return kernel("matmul", "matmul_tn", "x R I; y R O", _sizes_tn, _first)


def _sizes(a, b):
    return a[0], b[1]


def _sizes_nt(a, b):
    return a[0], b[0]


def _sizes_tn(a, b):
    return a[1], b[1]


def _first(a, b):
    return a
