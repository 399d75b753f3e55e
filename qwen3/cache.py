"""The KV cache: per layer a pair (k_BTKH, v_BTKH); slot t of a row holds position t."""

import mindspore as ms
import numpy as np


def init_cache(cfg, batch_size, length):
    """An empty cache for sequences of up to `length` tokens, prompt and continuation together, in the compute dtype.

    Each array is one of its own: the C++ kernel writes into them.
    """
    shape = (batch_size, length, cfg.num_kv_heads, cfg.head_dim)

    def empty():
        return ms.Tensor(np.zeros(shape, np.float32), getattr(ms, cfg.compute_dtype))

    return tuple((empty(), empty()) for _ in range(cfg.num_layers))


def round_up(length, step=64):
    """Cache and prompt lengths come in steps, so that few different graphs are compiled."""
    return -(-length // step) * step
