"""Matrix products of blocks of rows, each with its own group's matrix: what dropless experts compute."""

from mindspore import ops


def reference():
    """x [blocks, b, i], w [E, i, o], group [blocks] int32 -> [blocks, b, o]: x[n] @ w[group[n]].

    The weights of each block are gathered, so memory grows by blocks * i * o elements.
    """
    gather, matmul, cast = ops.Gather(), ops.BatchMatMul(), ops.Cast()

    def grouped_matmul(x, w, group):
        return matmul(x, gather(cast(w, x.dtype), group, 0))

    return grouped_matmul
