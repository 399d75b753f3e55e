"""MindSpore's kernels for Ascend that ops/*.py map to, by their documented formulas, for eager calls on CPU. What is not documented is NaN,
or an assertion. Sources: the docstrings of mindspore.ops.auto_generate and, of what these leave open, of CANN's aclnn functions."""

import mindspore as ms
import numpy as np
from mindspore import ops

ALL = 2**31 - 1  # tokens before, or after: all of them


class _Attention:
    def __init__(self, head_num, keep_prob, scale, pre_tokens, next_tokens, inner_precise, layout, sparse_mode):
        assert (keep_prob, inner_precise) == (1.0, 0)
        assert (layout, sparse_mode) in (("BSND", 0), ("TND", 0), ("TND", 3))
        self.head_num, self.scale, self.window = head_num, scale, (pre_tokens, next_tokens)
        self.layout, self.sparse_mode = layout, sparse_mode

    def documents(self, q, k, v, attn_mask, q_lengths, k_lengths):
        """(queries, keys), slices, of each document that has queries, for TND. NaN where the documentation has no word for it."""
        (T, N, H), (U, K, _) = q.shape, k.shape
        assert N == self.head_num and N % K == 0 and H % 16 == 0 and v.shape == k.shape
        assert q_lengths.dtype == k_lengths.dtype == ms.int64 and q_lengths.shape == k_lengths.shape and q_lengths.size <= 1024
        ends = [np.concatenate([[0], x.asnumpy()]).tolist() for x in (q_lengths, k_lengths)]
        assert all(sorted(each) == each for each in ends) and (ends[0][-1], ends[1][-1]) == (T, U)
        if self.sparse_mode == 3:
            assert attn_mask.shape == (2048, 2048) and (attn_mask.asnumpy() == np.triu(np.ones((2048, 2048), bool), 1)).all()
            assert self.window == (ALL, 0)
        else:
            assert attn_mask is None and self.window == (ALL, ALL)  # all keys
        found = [(slice(*a), slice(*b)) for a, b in zip(zip(ends[0], ends[0][1:]), zip(ends[1], ends[1][1:]))]
        for queries, keys in found:
            s, t = queries.stop - queries.start, keys.stop - keys.start
            assert t > 0 or s == 0  # of a document without keys MindSpore's docstring says nothing
            assert self.sparse_mode == 0 or s <= t
        return [(queries, keys) for queries, keys in found if queries.stop > queries.start]

    def scores(self, q, k, queries, keys):
        """[N, s, t], with -inf for keys that are hidden."""
        group = q.shape[1] // k.shape[1]
        s = ops.matmul(q[queries].swapaxes(0, 1), k[keys].repeat_interleave(group, 1).permute(1, 2, 0)) * self.scale
        ahead = np.arange(s.shape[2])[None] - np.arange(s.shape[1])[:, None]
        hidden = ahead > s.shape[2] - s.shape[1] if self.sparse_mode == 3 else np.zeros(ahead.shape, bool)
        return ops.masked_fill(s, ms.Tensor(hidden), float("-inf"))


def of_documents(parts, N):
    """[N, s, 1] of each document -> [T, N, 8] as CANN's kernel writes what the gradient needs: document by document, head by head."""
    return ops.concat([part.reshape(-1) for part in parts]).reshape(-1, N, 1).repeat_interleave(8, 2)


class FlashAttentionScore(_Attention):
    def packed(self, q, k, v, mask, q_lengths, k_lengths):
        out, top, total = [], [], []
        for queries, keys in self.documents(q, k, v, mask, q_lengths, k_lengths):
            s = self.scores(q, k, queries, keys)
            top.append(s.max(-1, keepdims=True))
            total.append(ops.exp(s - top[-1]).sum(-1, keepdims=True))
            values = v[keys].repeat_interleave(q.shape[1] // v.shape[1], 1).swapaxes(0, 1)
            out.append(ops.matmul(ops.softmax(s, -1), values).swapaxes(0, 1))
        return of_documents(top, q.shape[1]), of_documents(total, q.shape[1]), None, ops.concat(out)

    def __call__(self, q, k, v, real_shift, drop_mask, padding_mask, attn_mask, prefix=None, q_lengths=None, k_lengths=None):
        assert prefix is None
        if self.layout == "TND":
            assert real_shift is drop_mask is padding_mask is None
            return self.packed(q, k, v, attn_mask, q_lengths, k_lengths)
        assert self.sparse_mode == 0 and real_shift is drop_mask is padding_mask is None and attn_mask.dtype == ms.bool_
        (B, S, N, _), T, group = q.shape, k.shape[1], q.shape[2] // k.shape[2]
        assert N == self.head_num and attn_mask.shape == (B, 1, S, T)
        before, after = self.window
        ahead = np.arange(T)[None] - np.arange(S)[:, None]
        outside = ms.Tensor((ahead > after) | (-ahead > before))
        assert after >= T or not (outside.asnumpy() & ~attn_mask.asnumpy()).any()  # the mask has to hide what the window does
        q, k, v = (x.swapaxes(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
        scores = ops.masked_fill(ops.matmul(q, k.swapaxes(2, 3)) * self.scale, ops.logical_or(attn_mask, outside), float("-inf"))
        return None, None, None, ops.matmul(ops.softmax(scores, -1), v).swapaxes(1, 2)  # NaN where all is hidden


class FlashAttentionScoreGrad(_Attention):
    def __call__(self, q, k, v, dy, pse, drop_mask, padding_mask, mask, top, total, softmax_in, out, prefix, q_lengths, k_lengths):
        assert pse is drop_mask is padding_mask is softmax_in is prefix is None
        assert top.shape == total.shape == (*q.shape[:2], 8) and top.dtype == total.dtype == ms.float32 and out.shape == dy.shape == q.shape
        dq, dk, dv = np.zeros(q.shape, np.float32), np.zeros(k.shape, np.float32), np.zeros(v.shape, np.float32)
        N, K, place = q.shape[1], k.shape[1], 0
        for queries, keys in self.documents(q, k, v, mask, q_lengths, k_lengths):
            n = (queries.stop - queries.start) * N
            each = [x.asnumpy().reshape(-1, 8)[place : place + n, :1].reshape(N, -1, 1) for x in (top, total)]
            place += n
            p = np.exp(self.scores(q, k, queries, keys).asnumpy() - each[0]) / each[1]
            q_, do, o = (x.asnumpy()[queries].swapaxes(0, 1) for x in (q, dy, out))
            k_, v_ = (x.asnumpy()[keys].repeat(N // K, 1).swapaxes(0, 1) for x in (k, v))
            ds = p * (do @ v_.swapaxes(1, 2) - (do * o).sum(-1, keepdims=True)) * self.scale
            dq[queries] += (ds @ k_).swapaxes(0, 1)
            for d, of_heads in ((dk, ds.swapaxes(1, 2) @ q_), (dv, p.swapaxes(1, 2) @ do)):
                d[keys] += of_heads.reshape(K, N // K, *of_heads.shape[1:]).sum(1).swapaxes(0, 1)
        return ms.Tensor(dq), ms.Tensor(dk), ms.Tensor(dv), None


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
