"""Matrix products of the residual stream: `columns` gathers rows and splits its output dim, `row` sums over its input dim.

Weights are kept in their own dtype and cast to the activations' inside the op, so that gradients are summed over devices in
the weights' dtype.
"""

from mindspore import ops

from ops.registry import pick

cast = ops.Cast()
KV = {"kv": "kv_heads"}  # a dim of weights -> of activations, where they are not one


def _matmul(matmul, x, w):
    return matmul(x, cast(w, x.dtype))


def columns(sharding, kernels, *outs):
    """f(x_RD, *ws [D, out]) -> ([tokens, out], ...), one for each weight, which share the gathering of x."""
    signatures = [f"embed {out} -> tokens {KV.get(out, out)}" for out in outs]
    return sharding.fan(pick(kernels, "matmul"), "rows>tokens embed", signatures, kind="contraction", call=_matmul)


def row(sharding, kernels, inner):
    """f(x [tokens, inner], w [inner, D]) -> x_RD"""
    dims = f"tokens {inner}, {inner} embed -> tokens>rows embed"
    return sharding.op(pick(kernels, "matmul")(), dims, kind="contraction", call=_matmul)


def bias(sharding, out):
    """f(x [tokens, out], b [out]) -> x + b"""
    dim = KV.get(out, out)
    return sharding.op(ops.Add(), f"tokens {dim}, {out} -> tokens {dim}", kind="kernel", call=_add)


def _add(add, x, b):
    return add(x, cast(b, x.dtype))


def residual(sharding):
    """f(x_RD, y_RD) -> x_RD"""
    return sharding.op(ops.Add(), "rows embed", kind="elementwise")
