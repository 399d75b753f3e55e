"""Choosing the next token: greedy, or a draw from softmax(logits / temperature) cut by top-k, top-p and min-p.

top_k keeps that many of the largest logits (0: all), top_p of those the fewest whose probability reaches it (1: all), min_p of those the
ones with at least this share of the largest's probability (0: all). Of equal logits the lower id comes first. Source: Fan et al. 2018
(top-k); Holtzman et al. 2020 (top-p); Nguyen et al. 2024 (min-p); in the order of HF's generate.
"""

import mindspore as ms
import numpy as np

from ops.custom import kernel
from ops.signature import Signature

ARGUMENTS = "logits float32 B V; u float32 B; options float64 B 4"


def options(batch_size, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0):
    """One choice of options for every row: [B, 4] float64. temperature 0 is greedy. Raises ValueError for values out of range."""
    if not temperature >= 0 or top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p <= 1:  # not NaN either
        raise ValueError(
            f"sampling: temperature={temperature}, top_k={top_k}, top_p={top_p}, min_p={min_p}; need >= 0, >= 0, in (0, 1] and in [0, 1]"
        )
    return np.tile(np.array([temperature, top_k, top_p, min_p], np.float64), (batch_size, 1))


def reference():
    """sample(logits_BV float32, u_B float32 in (0, 1), options [B, 4] float64) -> ids_B int32; numpy arrays, in float64, on the host.

    A token is drawn where the weights, summed in order of rank, first pass u of the sum of those that are kept. Raises ValueError for a
    row with NaN or +inf, or of -inf alone.
    """

    signature = Signature("sampling", ARGUMENTS, least={"V": 1})

    def sample(logits, u, options):
        signature.check_shapes((logits.shape, u.shape, options.shape))
        signature.check_dtypes((logits.dtype, u.dtype, options.dtype))
        return np.array([_token(*row) for row in zip(logits, u, options)], np.int32)

    return sample


def _token(logits, u, options):
    temperature, top_k, top_p, min_p = options
    high = logits.max()
    if not np.isfinite(high):  # max gives NaN where there is one
        raise ValueError(f"sampling: the largest logit of a row is {high}; it must be finite, and no logit NaN")
    if temperature == 0:
        return logits.argmax()
    order = np.argsort(-logits, kind="stable")[: int(top_k) or None]
    weight = np.exp((logits[order].astype(np.float64) - high) / temperature)
    upto = np.cumsum(weight)
    before = np.concatenate([[0.0], upto[:-1]])
    kept = upto[(before < top_p * upto[-1]) & (weight >= min_p)]  # the first ones, at least one
    passed = (kept > u * kept[-1]) | (kept >= kept[-1])  # the second: u may have been rounded to 1
    return order[passed.argmax()]


def cpu():
    """The same as a kernel on tensors, for eager and compiled code, with a RuntimeError in place of the ValueError."""
    return kernel("sampling", "sampling", ARGUMENTS, _ids, _int32, least={"V": 1})


def _ids(logits, u, options):
    return (logits[0],)


def _int32(logits, u, options):
    return ms.int32
