"""The product of a matrix of activations and a weight matrix.

MindSpore's MatMul runs near the peak of a CPU with AVX-512, but at 40 % of the peak of one with only AVX2; OpenBLAS is near it on both.
"""

from mindspore import nn, ops

from ops import int8
from ops.custom import kernel
from ops.signature import check

INT8 = "x R I; w int8 O I; scale float32 O G"
GROUPS = {"divides": ("G", "I")}


def reference(transpose_b=False):
    """Returns matmul(x_RI, w_IO) -> y_RO, or matmul(x_RI, w_OI) with transpose_b. It is a primitive that MindSpore's partitioner knows."""
    return ops.MatMul(transpose_b=transpose_b)


def cpu(transpose_b=False):
    """Returns matmul by OpenBLAS, forward and backward, in float32."""
    return _Transposed() if transpose_b else _Plain()


def reference_int8():
    """Returns matmul(x_RI, w int8 [O, I], scale float32 [O, G]) -> y_RO, the product with the transpose of a matrix in 8 bits
    (ops/int8.py). It makes the whole matrix in the dtype of x."""
    multiply, wide, require = ops.MatMul(transpose_b=True), int8.widen(), check("matmul", INT8, **GROUPS)

    def matmul(x, w, scale):
        require((x.shape, w.shape, scale.shape), (x.dtype, w.dtype, scale.dtype))
        return multiply(x, wide(w, scale, x))

    return matmul


def cpu_int8():
    """Returns matmul as `reference_int8` does, as a C++ kernel for float32 x, without gradient. Up to 16 rows are multiplied while the
    numbers are converted in registers, and a row has the same bits in every batch of up to 16. For more rows a tile of the matrix at a time
    is made in float32."""
    return _Int8()


class _Int8(nn.Cell):
    def __init__(self):
        super().__init__()
        self.forward = kernel("matmul", "matmul_int8", INT8, _sizes_int8, _first_of_three, **GROUPS)

    def construct(self, x, w, scale):
        return self.forward(x, w, scale)

    def bprop(self, x, w, scale, out, dout):
        raise RuntimeError("the matmul kernel for weights in 8 bits has no gradient; use ops.matmul=reference")


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


def _sizes_int8(x, w, scale):
    return x[0], w[0]


def _first_of_three(x, w, scale):
    return x
