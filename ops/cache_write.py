"""Writing new keys or values into their slots of a KV cache."""

import mindspore as ms
from mindspore import nn, ops

from ops import iota
from ops.custom import kernel
from ops.signature import FLOATS, check

ARGUMENTS = "cache B T K H; new same B S K H; at int32 B S"


def reference():
    """write(cache_BTKH, new_BSKH, at_BS int32) -> the cache with new[b, s] in slot at[b, s]; a slot outside 0..T-1 is dropped.

    The slots of one row are all different. A new array: `cache` stays as it is.
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
    """The same in place, for arrays of float32, or of int32: the cache that is given changes, and is what is returned.

    Nothing orders the write against other reads of the array that was given, so read the returned one only; a write whose result nothing
    reads does not happen in a graph; and a graph that returns the result copies it, while the array that was given has changed already.
    It has no gradient: differentiating it is an error.
    """
    return _CacheWrite()


class _CacheWrite(nn.Cell):
    def __init__(self):
        super().__init__()
        self.write = kernel("cache_write", "cache_write", ARGUMENTS, _one, _int32, floats=("float32", "int32"))

    def __call__(self, cache, new, at):
        """Eager calls: a kernel is given a copy of a view, and what it writes there would be lost."""
        return super().__call__(cache.contiguous(), new, at)

    def construct(self, cache, new, at):
        return ops.depend(cache, self.write(cache, new, at))

    def bprop(self, cache, new, at, out, dout):
        raise RuntimeError("the cache_write kernel works in place and has no gradient; use ops.cache_write=reference")


def _one(cache, new, at):
    return (1,)


def _int32(cache, new, at):
    return ms.int32
