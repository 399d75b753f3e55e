"""Flash attention in AscendC. ops/attention.py defines it; docs/ops.md describes the kernels."""

import mindspore as ms
from mindspore import nn, ops

from ops.ascendc.custom import kernel
from ops.attention import ARGUMENTS, GROUPED, packed, spans

MOST_SIZE = 256  # the largest head_dim, as in op_host/attention.cpp


def ascendc(scale, in_order=False):
    """Returns attention in memory linear in S and T. Scores and softmax are in float32. Orders must be below 2**30."""
    attend = _Attention(scale, in_order)

    def attention(q, k, v, segment, key_segment, order, key_order):
        return attend(q, k, v, segment, key_segment, order, key_order)[0]

    return attention


def ascendc_packed(scale):
    """Returns attention as reference_packed does. Spans of keys of other documents are skipped, forward and backward."""
    return packed(ascendc(scale, in_order=True))


def ascendc_parts(scale):
    """Returns (forward, backward) as reference_parts does. The lse of a query that sees no key is about -8e8."""
    attend, swap = _Attention(scale, False), ops.Transpose()

    def of_part(*inputs):
        o, lse = attend.forward(*inputs)
        return o, swap(lse, (0, 2, 1))

    def gradients(q, k, v, segment, key_segment, order, key_order, o, lse, do, dlse):
        lse, dlse = swap(lse, (0, 2, 1)), swap(dlse, (0, 2, 1))
        return attend.backward(q, k, v, segment, key_segment, order, key_order, o, lse, do, dlse)

    return of_part, gradients


def ascendc_spans(scale):
    """Returns (documents, crossing) as reference_spans of ops/attention.py does, by the kernels of ascendc_parts."""
    return spans(*ascendc_parts(scale))


def ascendc_missing(use):
    if use.head_dim is not None and use.head_dim > MOST_SIZE:
        return f"needs a head_dim of up to {MOST_SIZE}, and this is {use.head_dim}"
    return ""


class _Attention(nn.Cell):
    """attention by two kernels, with the results (o_BSNH, lse_BNS float32)."""

    def __init__(self, scale, in_order):
        super().__init__()
        attrs = {"scale": float(scale), "in_order": int(in_order)}
        self.forward = kernel("attention", "qwen_attention", ARGUMENTS, _forward_shapes, _forward_dtypes, attrs=attrs, **GROUPED)
        self.backward = kernel("attention", "qwen_attention_grad", 11, _first_three, _first_three, attrs=attrs)
        self.zeros_like = ops.ZerosLike()

    def construct(self, q, k, v, segment, key_segment, order, key_order):
        return self.forward(q, k, v, segment, key_segment, order, key_order)

    def bprop(self, q, k, v, segment, key_segment, order, key_order, out, dout):
        dq, dk, dv = self.backward(q, k, v, segment, key_segment, order, key_order, out[0], out[1], dout[0], dout[1])
        zeros, key_zeros = self.zeros_like(segment), self.zeros_like(key_segment)
        return dq, dk, dv, zeros, key_zeros, zeros, key_zeros


def _forward_shapes(q, *rest):
    return q, (q[0], q[2], q[1])


def _forward_dtypes(q, *rest):
    return q, ms.float32


def _first_three(q, k, v, *rest):
    return q, k, v
