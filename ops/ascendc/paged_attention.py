"""Attention over a paged KV cache in AscendC. ops/paged_attention.py defines it; docs/ops.md describes the kernel."""

from ops.ascendc.custom import kernel
from ops.paged_attention import ARGUMENTS, GROUPED, Decoding, reference_packed

MOST_SIZE = 256  # the largest head_dim, as in op_host/paged_attention.cpp


def ascendc(scale):
    """Returns attention for up to 32 query heads a kv head. Scores and softmax are in float32. No gradient.

    The pages that a row needs have to exist: they cannot be checked before the kernel reads them.
    """
    return Decoding(kernel("paged_attention", "qwen_paged_attention", ARGUMENTS, _q, _q, attrs={"scale": float(scale)}, **GROUPED))


def ascendc_packed(scale):
    """Returns packed attention, for reading prompts, by the reference: no kernel was written for it."""
    return reference_packed(scale)


def ascendc_missing(use):
    if use.head_dim is not None and use.head_dim > MOST_SIZE:
        return f"needs a head_dim of up to {MOST_SIZE}, and this is {use.head_dim}"
    return ""


def _q(q, k, v, table, length):
    return q
