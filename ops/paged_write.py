"""Writes new keys or values into their slots of a paged KV cache (ops/paged_attention.py)."""

import mindspore as ms
from mindspore import ops

from ops import iota
from ops.custom import InPlace
from ops.signature import FLOATS, check

ARGUMENTS = "cache P C K H; new same R K H; slot int32 R"


def reference():
    """Returns write(cache [P, C, K, H], new_RKH, slot_R int32) -> a new cache with new[r] in slot[r].

    Slot s is token s % C of page s // C. Slots must differ. A token with a slot outside 0 to P * C - 1 is dropped.
    """
    equal, cast, expand, reshape, total = ops.Equal(), ops.Cast(), ops.ExpandDims(), ops.Reshape(), ops.ReduceSum()
    gather, select, broadcast, count = ops.Gather(), ops.Select(), ops.BroadcastTo, iota.reference()
    require = check("paged_write", ARGUMENTS, FLOATS)

    def write(cache, new, slot):
        require((cache.shape, new.shape, slot.shape), (cache.dtype, new.dtype, slot.dtype))
        P, C, K, H = cache.shape
        hit = cast(equal(expand(count(P * C), 1), expand(slot, 0)), ms.float32)  # [P * C, R]
        row = cast(total(hit * cast(count(slot.shape[0]), ms.float32), 1), ms.int32)
        is_written = reshape(total(hit, 1), (P, C, 1, 1)) > 0
        return select(broadcast(cache.shape)(is_written), reshape(gather(new, row, 0), cache.shape), cache)

    return write


def cpu():
    """Returns write as a C++ kernel that changes and returns the given cache, float32. See ops.custom.InPlace."""
    return InPlace("paged_write", ARGUMENTS, ("float32",))
