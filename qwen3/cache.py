"""The KV cache: a pair (k_BTKH, v_BTKH) per layer, in which slot t of a row stores position t."""

import mindspore as ms
import numpy as np
from mindspore import ops


def init_cache(cfg, batch_size, length, kv_heads=None, layers=None):
    """Returns an empty cache for sequences of up to `length` tokens, prompt and continuation together, in the compute dtype.

    No two arrays share memory, because the C++ kernel writes into them. kv_heads, layers: how many this rank has; default: all of the
    model.
    """
    shape = (batch_size, length, kv_heads or cfg.num_kv_heads, cfg.head_dim)

    def empty():
        return ms.Tensor(np.zeros(shape, np.float32), getattr(ms, cfg.compute_dtype))

    return tuple((empty(), empty()) for _ in range(cfg.num_layers if layers is None else layers))


class RowsCache:
    """A KV cache that gives one row at a time, so that a prompt is read into one row while the other rows do not change.

    arrays: all rows, in the form of init_cache. in_place: the ops write into the arrays that they are given (ops.cache_write=cpu). Then
    the arrays of row(b) share the memory of `arrays`, and nothing is copied or allocated after the constructor.
    """

    def __init__(self, cfg, batch_size, length, kv_heads, in_place, layers):
        self.length = length
        if not in_place:
            self.arrays, self._rows = init_cache(cfg, batch_size, length, kv_heads, layers), None
            return
        shape = (batch_size, length, kv_heads, cfg.head_dim)
        memory = [(np.zeros(shape, np.float32), np.zeros(shape, np.float32)) for _ in range(layers)]
        self.arrays = _shared(memory, slice(None))
        self._rows, self._memory = [_shared(memory, slice(b, b + 1)) for b in range(batch_size)], memory

    @property
    def nbytes(self):
        return sum(array.nbytes for pair in self.arrays for array in pair)

    def row(self, b):
        """Returns the cache of row b alone, arrays [1, T, K, H]."""
        return self._rows[b] if self._rows else tuple((k[b : b + 1], v[b : b + 1]) for k, v in self.arrays)

    def put(self, b, row):
        """Stores the cache [1, T, K, H] that a step returned for row b."""
        if self._rows is None:
            at = ms.Tensor([[b]], ms.int32)
            self.arrays = tuple(
                tuple(ops.tensor_scatter_update(all_rows, at, one) for all_rows, one in zip(*pair)) for pair in zip(self.arrays, row)
            )

    def clear(self, b):
        """Sets row b to 0."""
        if self._rows is None:
            self.put(b, tuple((ops.zeros_like(k), ops.zeros_like(v)) for k, v in self.row(b)))
            return
        for k, v in self._memory:
            k[b] = v[b] = 0


def _shared(memory, rows):
    """Returns tensors that share the memory of the selected rows of numpy arrays."""
    return tuple((ms.Tensor.from_numpy(k[rows]), ms.Tensor.from_numpy(v[rows])) for k, v in memory)


def round_up(length, step=64):
    """Rounds a cache or prompt length up to a multiple of `step`, so that few different graphs are compiled."""
    return -(-length // step) * step
