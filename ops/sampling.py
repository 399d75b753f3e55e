"""Sampling of the next token: greedy, or from softmax(logits / temperature) filtered by top-k, top-p and min-p.

top_k keeps the k largest logits (0: all). Of these, top_p keeps the smallest set of the most probable tokens whose probability is at least
top_p (1: all). Of these, min_p keeps the tokens with at least min_p times the probability of the most probable one (0: all). Among equal
logits the lower id comes first. Source: Fan et al. 2018 (top-k); Holtzman et al. 2020 (top-p); Nguyen et al. 2024 (min-p). The order of
the filters is that of HF's generate.
"""

import mindspore as ms
import numpy as np

from ops.custom import kernel
from ops.signature import Signature

ARGUMENTS = "logits float32 B V; u float32 B; options float64 B 4"


def options(batch_size, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0):
    """Returns the options of every row, float64 [B, 4]. temperature 0 is greedy. Raises ValueError for values out of range."""
    if not 0 <= temperature < float("inf") or top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p <= 1:  # not NaN either
        raise ValueError(
            f"sampling: temperature={temperature}, top_k={top_k}, top_p={top_p}, min_p={min_p}; need >= 0 and finite, >= 0,"
            " in (0, 1] and in [0, 1]"
        )
    return np.tile(np.array([temperature, top_k, top_p, min_p], np.float64), (batch_size, 1))


def reference():
    """Returns sample(logits_BV float32, u_B float32 in (0, 1), options [B, 4] float64) -> ids_B int32, on numpy arrays, in float64.

    The tokens that are kept are sorted by probability, and the first one is taken at which the cumulative probability exceeds u. Raises
    ValueError for a row with NaN or +inf, or with no finite logit.
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
    if not np.isfinite(high):  # max is NaN if any logit is
        raise ValueError(f"sampling: the largest logit of a row is {high}; it must be finite, and no logit NaN")
    if temperature == 0:
        return logits.argmax()
    order = np.argsort(-logits, kind="stable")[: int(top_k) or None]
    weight = np.exp((logits[order].astype(np.float64) - high) / temperature)
    upto = np.cumsum(weight)
    before = np.concatenate([[0.0], upto[:-1]])
    kept = upto[(before < top_p * upto[-1]) & (weight >= min_p)]  # a prefix of at least one token
    passed = (kept > u * kept[-1]) | (kept >= kept[-1])  # the second condition is for a u that was rounded to 1
    return order[passed.argmax()]


def cpu():
    """Returns sample as `reference` does, as a C++ kernel on tensors. It raises RuntimeError where `reference` raises ValueError."""
    return kernel("sampling", "sampling", ARGUMENTS, _ids, _int32, least={"V": 1})


def _ids(logits, u, options):
    return (logits[0],)


def _int32(logits, u, options):
    return ms.int32
