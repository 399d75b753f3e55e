"""Where the tokens of rows lie in a paged KV cache (ops/paged_attention.py)."""

import mindspore as ms
from mindspore import ops


def slots_and_lengths():
    """Returns places(table_BM int32, position_B int32, C) -> (slot_B, length_B), both int32.

    slot: the place of a row's token at `position`, page * C + place in the page; -1 where the row has no page for it, which a table says by
    a negative number after its pages. length: how many tokens the row then has, position + 1, but no more than its pages have room for.
    """
    divide, modulo, gather, reshape, cast = ops.FloorDiv(), ops.FloorMod(), ops.GatherD(), ops.Reshape(), ops.Cast()
    total = ops.ReduceSum()
    maximum, minimum, enough, less = ops.Maximum(), ops.Minimum(), ops.GreaterEqual(), ops.Less()

    def places(table, position, C):
        B, M = table.shape
        number = minimum(maximum(divide(position, C), 0), M - 1)
        page = reshape(gather(table, 1, reshape(number, (B, 1))), (B,))
        exists = cast(enough(page, 0), ms.int32) * cast(enough(position, 0), ms.int32) * cast(less(position, M * C), ms.int32)
        room = C * cast(total(cast(enough(table, 0), ms.float32), 1), ms.int32)  # not every device sums integers
        return (page * C + modulo(position, C)) * exists - (1 - exists), minimum(maximum(position + 1, 0), room)

    return places
