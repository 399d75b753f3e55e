"""Matrix products of the residual stream: `column` gathers rows and splits its output dim, `row` sums over its input dim.

Weights are kept in their own dtype and cast to the activations' inside the op, so that gradients are summed over devices in
the weights' dtype.
"""

from mindspore import ops

cast = ops.Cast()


def _matmul(matmul, x, w):
    return matmul(x, cast(w, x.dtype))


def column(sharding, out):
    """f(x_RD, w [D, out]) -> [tokens, out]"""
    return sharding.op(ops.MatMul(), f"rows>tokens embed, embed {out} -> tokens {out}", kind="contraction", call=_matmul)


def row(sharding, inner):
    """f(x [tokens, inner], w [inner, D]) -> x_RD"""
    return sharding.op(ops.MatMul(), f"tokens {inner}, {inner} embed -> tokens>rows embed", kind="contraction", call=_matmul)


def bias(sharding, out):
    """f(x [tokens, out], b [out]) -> x + b"""
    return sharding.op(ops.Add(), f"tokens {out}, {out} -> tokens {out}", kind="kernel", call=_add)


def _add(add, x, b):
    return add(x, cast(b, x.dtype))


def residual(sharding):
    """f(x_RD, y_RD) -> x_RD"""
    return sharding.op(ops.Add(), "rows embed", kind="elementwise")
