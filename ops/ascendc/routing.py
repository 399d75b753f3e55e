"""MoE routing in AscendC. ops/routing.py defines the functions; docs/ops.md describes the kernels."""

import mindspore as ms
from mindspore import nn, ops

from ops.ascendc.custom import kernel
from ops.routing import BIASED, COMBINED, PERMUTED, BiasedTopK, Combine, chosen, combine_grads, combined, vendor_missing


def ascendc_top_k(k, normalise, biased=False):
    """Returns top_k as reference_top_k does. A row with a NaN logit gets the first k experts."""
    shares = int(normalise)
    forward = kernel("routing", "qwen_top_k", BIASED, chosen(k), _top_k_dtypes, attrs={"k": k, "shares": shares}, least={"E": k})
    choose = BiasedTopK(forward, kernel("routing", "qwen_top_k_grad", 5, _first, _first, attrs={"shares": shares}))
    return choose if biased else _TopK(choose)


def ascendc_permute(num_experts, limit):
    """Returns permute as reference_permute does, for blocks of one row only. Raises ValueError for another `limit`."""
    if limit != 1:
        raise ValueError(f"ops.routing=ascendc makes blocks of one row, not of {limit}; use --config.ops.grouped_matmul=ascendc")
    return _Permute(num_experts)


def ascendc_combine():
    """Returns combine with float32 weights. Every row of y must be in exactly one slot, as ascendc_permute gives them."""
    forward = kernel("routing", "qwen_combine", COMBINED.replace("weight R k", "weight float32 R k"), combined, _first)
    return Combine(forward, kernel("routing", "qwen_combine_grad", 4, combine_grads, _combine_grads_dtypes))


def ascendc_missing(use):
    return vendor_missing(use) if use.expert_shards > 1 or use.padded else ""


class _TopK(nn.Cell):
    def __init__(self, choose):
        super().__init__()
        self.choose, self.zeros_like = choose, ops.ZerosLike()

    def construct(self, logits):
        return self.choose(logits, self.zeros_like(logits[0]))


class _Permute(nn.Cell):
    def __init__(self, num_experts):
        super().__init__()
        self.forward = kernel("routing", "qwen_permute", PERMUTED, _rows, _rows_dtypes, attrs={"experts": num_experts})
        self.backward = kernel("routing", "qwen_permute_grad", 3, _unpermuted, _first)
        self.zeros_like = ops.ZerosLike()

    def construct(self, x, expert):
        return self.forward(x, expert)

    def bprop(self, x, expert, out, dout):
        return self.backward(dout[0], out[1], expert), self.zeros_like(expert)


def _first(x, *rest):
    return x


def _top_k_dtypes(logits, bias):
    return logits, ms.int32, logits


def _rows(x, expert):
    n = expert[0] * expert[1]
    return (n, 1, x[1]), (n,), (n,)


def _rows_dtypes(x, expert):
    return x, expert, expert


def _unpermuted(drows, slot, expert):
    return expert[0], drows[-1]


def _combine_grads_dtypes(y, slot, weight, dout):
    return y, weight
