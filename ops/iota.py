"""Iota: the numbers 0, 1, ... n - 1 as int32.

`ops.arange` has default arguments and branches, which a hand-written backward refuses (docs/mindspore.md).
"""

import mindspore as ms
from mindspore import ops


def reference():
    """Returns iota(n), a function of a Python int -> int32 [n]."""
    steps, cast = ops.Range(), ops.Cast()

    def iota(n):
        return cast(steps(0, n, 1), ms.int32)

    return iota
