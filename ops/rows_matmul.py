"""The product of rows of activations and a weight matrix, for inference: a row's result has the same bits whatever rows are beside it.

So the tokens of a request do not depend on the requests that are read in the same graph. ops/matmul.py, for training, does not promise
this.
"""

from mindspore import nn, ops

from ops.custom import kernel


def reference(transpose_b=False):
    """Returns matmul(x_RI, w_IO) -> y_RO, or matmul(x_RI, w_OI) with transpose_b. MindSpore's primitive, which rounds a row as it likes."""
    return ops.MatMul(transpose_b=transpose_b)


def cpu(transpose_b=False):
    """Returns matmul as a float32 C++ kernel, without gradient. Each element is a sum in an order that depends on the size of I alone.

    Without transpose_b these are the sums of the kernels of decoding (ops/decode_attention.py, ops/decode_mlp.py).
    """
    if transpose_b:
        return _Product(kernel("rows_matmul", "rows_matmul_nt", "x R I; w O I", _sizes_nt, _first))
    return _Product(kernel("rows_matmul", "rows_matmul", "x R I; w I O", _sizes, _first))


class _Product(nn.Cell):
    def __init__(self, forward):
        super().__init__()
        self.forward = forward

    def construct(self, x, w):
        return self.forward(x, w)

    def bprop(self, x, w, out, dout):
        raise RuntimeError("the rows_matmul kernel is for inference and has no gradient; use ops.rows_matmul=reference")


def _sizes(a, b):
    return a[0], b[1]


def _sizes_nt(a, b):
    return a[0], b[0]


def _first(a, b):
    return a
