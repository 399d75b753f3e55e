"""Writes new keys or values into their slots of a KV cache."""

from mindspore import ops

from ops import iota
from ops.custom import InPlace
from ops.signature import FLOATS, check

ARGUMENTS = "cache B T K H; new same B S K H; at int32 B S"


def reference():
    """Returns write(cache_BTKH, new_BSKH, at_BS int32) -> a new cache with new[b, s] in slot at[b, s].

    The slots of a row must differ. A token with a slot outside 0..T-1 is dropped.
    """
    matmul, equal, cast, expand, reshape = ops.BatchMatMul(), ops.Equal(), ops.Cast(), ops.ExpandDims(), ops.Reshape()
    total, select, broadcast, count = ops.ReduceSum(), ops.Select(), ops.BroadcastTo, iota.reference()

    require = check("cache_write", ARGUMENTS.replace("same ", ""), (*FLOATS, "int32"))

    def write(cache, new, at):
        require((cache.shape, new.shape, at.shape), (cache.dtype, new.dtype, at.dtype))
        B, T, K, H = cache.shape
        hit = cast(equal(expand(expand(count(T), 0), 2), expand(at, 1)), cache.dtype)  # [B, T, S]
        written = reshape(matmul(hit, reshape(cast(new, cache.dtype), (B, -1, K * H))), (B, T, K, H))
        is_written = reshape(total(hit, 2), (B, T, 1, 1)) > 0
        return select(broadcast((B, T, K, H))(is_written), written, cache)

    return write


def cpu():
    """Returns write as a C++ kernel that changes and returns the given cache, float32 or int32. See ops.custom.InPlace."""
    return InPlace("cache_write", ARGUMENTS, ("float32", "int32"))
