"""The pieces of cross-entropy over a vocabulary that may be sharded."""

import mindspore as ms
from mindspore import ops


def pick():
    """z_RV, ids_R -> z[r, ids[r]] as [R, 1]."""
    gather, expand = ops.GatherD(), ops.ExpandDims()

    def pick_column(z, ids):
        return gather(z, 1, expand(ids, 1))

    return pick_column


def pick_part():
    """pick, first, z of the columns from `first` on, ids_R -> the same where an id is among the columns, else 0."""
    greater_equal, less, logical_and = ops.GreaterEqual(), ops.Less(), ops.LogicalAnd()
    expand, cast, select, zeros_like = ops.ExpandDims(), ops.Cast(), ops.Select(), ops.ZerosLike()

    def pick_column(pick, first, z, ids):
        at = ids - first
        mine = logical_and(greater_equal(at, 0), less(at, z.shape[1]))
        picked = pick(z, at * cast(mine, ms.int32))
        return select(expand(mine, 1), picked, zeros_like(picked))  # not a product: the column in its place may be -inf

    return pick_column
