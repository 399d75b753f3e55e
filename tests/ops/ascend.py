"""MindSpore's kernels for Ascend that ops/*.py map to, by their documented formulas, for eager calls on CPU. What is not documented is NaN,
or an assertion. Sources: the docstrings of mindspore.ops.auto_generate and, of what these leave open, of CANN's aclnn functions."""

import mindspore as ms
import numpy as np
from mindspore import ops


class FlashAttentionScore:
    def __init__(self, head_num, keep_prob, scale, pre_tokens, next_tokens, inner_precise, layout, sparse_mode):
        assert (keep_prob, inner_precise, layout, sparse_mode) == (1.0, 0, "BSND", 0)
        self.head_num, self.scale, self.window = head_num, scale, (pre_tokens, next_tokens)

    def __call__(self, q, k, v, real_shift, drop_mask, padding_mask, attn_mask):
        assert real_shift is drop_mask is padding_mask is None and attn_mask.dtype == ms.bool_
        (B, S, N, _), T, group = q.shape, k.shape[1], q.shape[2] // k.shape[2]
        assert N == self.head_num and attn_mask.shape == (B, 1, S, T)
        before, after = self.window
        ahead = np.arange(T)[None] - np.arange(S)[:, None]
        outside = ms.Tensor((ahead > after) | (-ahead > before))
        assert after >= T or not (outside.asnumpy() & ~attn_mask.asnumpy()).any()  # the mask has to hide what the window does
        q, k, v = (x.swapaxes(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
        scores = ops.masked_fill(ops.matmul(q, k.swapaxes(2, 3)) * self.scale, ops.logical_or(attn_mask, outside), float("-inf"))
        return None, None, None, ops.matmul(ops.softmax(scores, -1), v).swapaxes(1, 2)  # NaN where all is hidden


class RmsNorm:
    def __init__(self, eps):
        self.eps = eps

    def __call__(self, x, gamma):
        assert gamma.dtype == x.dtype
        scale = ops.rsqrt((x * x).mean(-1, keep_dims=True) + self.eps)
        return x * scale * gamma, scale


class AddRmsNorm:
    def __call__(self, x1, x2, gamma, eps):
        h = x1 + x2
        return *RmsNorm(eps)(h, gamma), h


class RmsNormGrad:
    def __call__(self, dy, x, rstd, gamma):
        back = (dy * gamma * x * rstd).mean(-1, keep_dims=True)
        return (dy * gamma - x * rstd * back) * rstd, (dy * x * rstd).reshape(-1, x.shape[-1]).sum(0)


class RotaryPositionEmbedding:
    def __call__(self, x, cos, sin, mode):
        assert mode == 0 and cos.dtype == sin.dtype == x.dtype and cos.shape == sin.shape == (*x.shape[:2], 1, x.shape[3])
        a, b = ops.split(x, x.shape[3] // 2, 3)
        return x * cos + ops.concat((-b, a), 3) * sin


class Swiglu:
    def __call__(self, x, dim):
        a, b = ops.split(x, x.shape[dim] // 2, dim)
        return a * ops.sigmoid(a) * b


class GroupedMatmulV4:
    def __call__(self, x, weight, *rest):
        *unused, ends = rest[:7]
        assert unused == [None] * 6 and rest[7:] == (None, None, None, 3, 0, 0, 0) and ends.dtype == ms.int64
        (x,), (weight,), ends = x, weight, ends.asnumpy()
        assert x.ndim == 2 and x.dtype == weight.dtype and ends.shape == weight.shape[:1]
        assert (np.diff(ends, prepend=0) >= 0).all() and ends[-1] == len(x)
        rows = [ops.matmul(x[a:b], weight[e]) for e, (a, b) in enumerate(zip([0, *ends[:-1].tolist()], ends.tolist())) if b > a]
        return (ops.concat(rows, 0),)


class MoeTokenPermute:
    def __call__(self, tokens, indices, num_out_tokens, padded_mode):
        assert num_out_tokens is None and padded_mode is False and len(indices) == len(tokens)
        flat = indices.asnumpy().ravel()
        first = np.argsort(flat, kind="stable")
        rows = ops.gather(tokens, ms.Tensor(first // (len(flat) // len(tokens)), ms.int32), 0)
        return rows, ms.Tensor(np.argsort(first), ms.int32)


class MoeTokenUnpermute:
    def __call__(self, tokens, sorted_indices, probs, padded_mode, restore_shape):
        assert padded_mode is False and restore_shape is None and probs.dtype == tokens.dtype
        assert sorted(sorted_indices.asnumpy().tolist()) == list(range(len(tokens))) and probs.size == len(tokens)
        rows = ops.gather(tokens, sorted_indices, 0).reshape(*probs.shape, -1)
        return (rows * probs.expand_dims(2)).sum(1)


class MoeGatingTopKSoftmax:
    def __call__(self, x, finished, k):
        assert finished is None
        probs = ops.softmax(x, -1).asnumpy()
        expert = np.argsort(-probs, 1, kind="stable")[:, :k]
        return ms.Tensor(np.take_along_axis(probs, expert, 1)), ms.Tensor(expert, ms.int32), None
