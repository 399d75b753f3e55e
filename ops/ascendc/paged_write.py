"""Writes into a paged KV cache in AscendC. ops/paged_write.py defines it; docs/ops.md describes the kernel."""

import mindspore as ms

from ops.ascendc.custom import kernel
from ops.custom import Writes
from ops.paged_write import ARGUMENTS


def ascendc():
    """Returns write as a kernel that changes and returns the given cache. See ops.custom.Writes."""
    return Writes("paged_write", kernel("paged_write", "qwen_paged_write", ARGUMENTS, _one, _int32))


def ascendc_missing(use):
    return ""


def _one(cache, new, slot):
    return (1,)


def _int32(cache, new, slot):
    return ms.int32
