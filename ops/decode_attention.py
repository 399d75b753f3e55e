"""The attention half of a layer, norm to residual sum, for one token a row, as one op for decoding."""

import mindspore as ms
from mindspore import nn, ops

from ops import int8, matmul, paged_attention, paged_write, rms_norm, rope
from ops.custom import kernel
from ops.pages import slots_and_lengths
from ops.signature import check

ARGUMENTS = (
    "x B D; norm same D; wq same D Q; wk same D K*H; wv same D K*H; wo same Q D; q_norm same H; k_norm same H; "
    "cos float32 B 1 1 H/2; sin float32 B 1 1 H/2; at int32 B 1; table int32 B M; k same P C K H; v same P C K H"
)
HEADS = {"divides": ("H", "Q")}  # Q = N * H


def reference(eps, scale):
    """Returns decode(x_BD, norm_D, wq, wk, wv, wo, q_norm_H, k_norm_H, cos, sin, at_B1, table_BM, k [P, C, K, H], v [P, C, K, H])
    -> (x + attention(norm(x)), k, v).

    The cache is one of pages, see ops/paged_attention.py; a cache [B, T, K, H] is one with a page of T slots a row. The returned caches
    have the new k and v of each row in slot `at`; they are dropped if the row has no page for it. A row attends
    to the slots from 0 to `at` for which it has pages.
    """
    require, reshape = check("decode_attention", ARGUMENTS, **HEADS), ops.Reshape()
    norm, turn, write = rms_norm.reference(eps), rope.reference_norm(eps), paged_write.reference()
    multiply, attend, places = matmul.reference(), paged_attention.reference(scale), slots_and_lengths()

    def decode(x, norm_w, wq, wk, wv, wo, q_norm, k_norm, cos, sin, at, table, k_cache, v_cache):
        require(*_given(x, norm_w, wq, wk, wv, wo, q_norm, k_norm, cos, sin, at, table, k_cache, v_cache))
        B, (_, C, K, H) = x.shape[0], k_cache.shape
        normed, (slot, length) = norm(x, norm_w), places(table, reshape(at, (B,)), C)
        q, k, v = (reshape(multiply(normed, w), (B, 1, -1, H)) for w in (wq, wk, wv))
        k_cache = write(k_cache, reshape(turn(k, k_norm, cos, sin), (B, K, H)), slot)
        v_cache = write(v_cache, reshape(v, (B, K, H)), slot)
        o = attend(reshape(turn(q, q_norm, cos, sin), (B, -1, H)), k_cache, v_cache, table, length)
        return x + multiply(reshape(o, (B, -1)), wo), k_cache, v_cache

    return decode


def _given(*args):
    """Returns the shapes and dtypes of the arguments."""
    return tuple(x.shape for x in args), tuple(x.dtype for x in args)


def cpu(eps, scale):
    """Returns decode as `reference` does, as a float32 C++ kernel that changes the caches in place (see ops.custom.InPlace). No gradient.

    Results are bitwise those of the C++ kernels of the ops that it replaces, for up to 16 rows and 4 query heads a kv head.
    """
    return _Decode(eps, scale)


class _Decode(nn.Cell):
    def __init__(self, eps, scale):
        super().__init__()
        self.eps, self.scale = ms.Tensor(eps, ms.float32), ms.Tensor(scale, ms.float32)
        self.step = kernel("decode_attention", "decode_attention", f"{ARGUMENTS}; eps; scale", _x, _x, **HEADS)

    def __call__(self, x, norm, wq, wk, wv, wo, q_norm, k_norm, cos, sin, at, table, k, v):
        """Makes the caches contiguous. In an eager call a kernel gets a copy of a view, and what it writes to the copy would be lost."""
        return super().__call__(x, norm, wq, wk, wv, wo, q_norm, k_norm, cos, sin, at, table, k.contiguous(), v.contiguous())

    def construct(self, x, norm, wq, wk, wv, wo, q_norm, k_norm, cos, sin, at, table, k, v):
        y = self.step(x, norm, wq, wk, wv, wo, q_norm, k_norm, cos, sin, at, table, k, v, self.eps, self.scale)
        return y, ops.depend(k, y), ops.depend(v, y)

    def bprop(self, x, norm, wq, wk, wv, wo, q_norm, k_norm, cos, sin, at, table, k, v, out, dout):
        raise RuntimeError("the decode_attention kernel works in place and has no gradient; use ops.decode_attention=reference")


def _x(x, norm, wq, wk, wv, wo, q_norm, k_norm, cos, sin, at, table, k, v, eps, scale):
    return x


# With weights in 8 bits (ops/int8.py): output dim first, and their scales after the other arguments.
INT8 = (
    "x B D; norm same D; wq int8 Q D; wk int8 K*H D; wv int8 K*H D; wo int8 D Q; q_norm same H; k_norm same H; "
    "cos float32 B 1 1 H/2; sin float32 B 1 1 H/2; at int32 B 1; table int32 B M; k same P C K H; v same P C K H"
)
SCALES = "q_scale float32 Q g; k_scale float32 K*H g; v_scale float32 K*H g; o_scale float32 D h"


def reference_int8(eps, scale):
    """Returns decode(x_BD, norm_D, wq, wk, wv, wo, q_norm_H, k_norm_H, cos, sin, at_B1, table_BM, k, v, q_scale, k_scale, v_scale,
    o_scale), which computes reference() with weights in 8 bits."""
    decode_floats, wide, turn = reference(eps, scale), int8.widen(), ops.Transpose()
    require = check("decode_attention", f"{INT8}; {SCALES}", **HEADS)

    def decode(x, norm, wq, wk, wv, wo, q_norm, k_norm, cos, sin, at, table, k, v, q_scale, k_scale, v_scale, o_scale):
        require(*_given(x, norm, wq, wk, wv, wo, q_norm, k_norm, cos, sin, at, table, k, v, q_scale, k_scale, v_scale, o_scale))
        pairs = (wq, q_scale), (wk, k_scale), (wv, v_scale), (wo, o_scale)
        wq, wk, wv, wo = (turn(wide(w, s, x), (1, 0)) for w, s in pairs)
        return decode_floats(x, norm, wq, wk, wv, wo, q_norm, k_norm, cos, sin, at, table, k, v)

    return decode


def cpu_int8(eps, scale):
    """Returns decode as `reference_int8` does, as a C++ kernel that changes the caches in place; see `cpu`."""
    return _DecodeInt8(eps, scale)


class _DecodeInt8(nn.Cell):
    def __init__(self, eps, scale):
        super().__init__()
        self.eps, self.scale = ms.Tensor(eps, ms.float32), ms.Tensor(scale, ms.float32)
        self.step = kernel("decode_attention", "decode_attention_int8", f"{INT8}; eps; scale; {SCALES}", _x_int8, _x_int8, **HEADS)

    def __call__(self, x, norm, wq, wk, wv, wo, q_norm, k_norm, cos, sin, at, table, k, v, qs, ks, vs, os):
        """Makes the caches contiguous, as _Decode does."""
        k, v = k.contiguous(), v.contiguous()
        return super().__call__(x, norm, wq, wk, wv, wo, q_norm, k_norm, cos, sin, at, table, k, v, qs, ks, vs, os)

    def construct(self, x, norm, wq, wk, wv, wo, q_norm, k_norm, cos, sin, at, table, k, v, qs, ks, vs, os):
        y = self.step(x, norm, wq, wk, wv, wo, q_norm, k_norm, cos, sin, at, table, k, v, self.eps, self.scale, qs, ks, vs, os)
        return y, ops.depend(k, y), ops.depend(v, y)

    def bprop(self, x, norm, wq, wk, wv, wo, q_norm, k_norm, cos, sin, at, table, k, v, qs, ks, vs, os, out, dout):
        raise RuntimeError("the decode_attention kernel works in place and has no gradient; use ops.decode_attention=reference")


def _x_int8(x, norm, wq, wk, wv, wo, q_norm, k_norm, cos, sin, at, table, k, v, eps, scale, qs, ks, vs, os):
    return x
