"""Ring attention: each rank has the queries of its tokens, and the keys and values of all tokens are passed around the ring of ranks.

In each step a rank attends to the keys of one rank. The results are combined by their log-sum-exp, as in flash attention. The backward
passes keys and values around again, together with their gradients, which are back at their owner after a full round.
Source: Liu et al. 2023; Dao 2023.
"""

import mindspore as ms
from mindspore import nn, ops

from parallel import collectives
from parallel.graph.source import function


def attention(sharding, parts, dim):
    """Returns attend(q_BSNH, k_BSKH, v_BSKH, segments_BT, order_BT) -> o_BSNH; q, k, v and o are of this rank's S tokens.

    dim: the logical dim that the ring splits. segments, order: the segment and the position in the row of all T tokens of the ring,
    concatenated by rank. parts: (forward, backward) of attention to some of the keys, see ops/attention.py.
    """
    assert sharding.lowering == "manual", sharding.lowering
    ring = _Ring(sharding.mesh, sharding.atoms(dim), *parts)

    def attend(q, k, v, segments, order):
        return ring(q, k, v, segments, order)[0]

    return attend


class _Ring(nn.Cell):
    """Returns (o_BSNH, lse_BSN). The graphs of all ranks have equal structure, so their collectives run in an equal order."""

    def __init__(self, mesh, atoms, forward, backward):
        super().__init__()
        n, at = mesh.size(atoms), mesh.index(atoms)
        self.n, self.at, self.forward, self.backward = n, at, forward, backward
        self.sources = tuple((at - step) % n for step in range(n))  # the rank whose keys this rank has, in each step
        self.pass_on = collectives.ppermute(mesh, atoms, [(i, (i + 1) % n) for i in range(n)])
        lines = []  # written out: as a loop it does not compile in a loop over layers (docs/mindspore.md)
        for source in self.sources[1:]:
            keys = f"kv[0], kv[1], segment, part(segments, {source}), place, part(order, {source})"
            lines += ["kv = pass_on(kv)", f"more = forward(q, {keys})", "o, lse = join(o, lse, more[0], more[1])"]
        names = {"pass_on": self.pass_on, "forward": forward, "part": self.part, "join": _join()}
        self.others = function("others(q, kv, segments, order, segment, place, o, lse)", [*lines, "return o, lse"], **names)
        self.stack, self.cast, self.zeros_like = ops.Stack(0), ops.Cast(), ops.ZerosLike()

    def part(self, x, source):
        """Returns the slice of x_BT for the tokens of the rank with index `source`."""
        size = x.shape[1] // self.n
        return x[:, source * size : (source + 1) * size]

    def construct(self, q, k, v, segments, order):
        segment, place = self.part(segments, self.at), self.part(order, self.at)
        o, lse = self.forward(q, k, v, segment, segment, place, place)
        kv = self.stack((k, v))
        o, lse = self.others(q, kv, segments, order, segment, place, o, lse)
        return self.cast(o, q.dtype), lse

    def bprop(self, q, k, v, segments, order, out, dout):
        segment, place = self.part(segments, self.at), self.part(order, self.at)
        dq, dk, dv = self.backward(q, k, v, segment, segment, place, place, out[0], out[1], dout[0], dout[1])
        # depends on the cotangent, or the compiler would keep the keys of all ranks from the forward instead of sending them again
        kv, dkv = self.stack((ops.depend(k, dout[0]), v)), self.stack((self.cast(dk, ms.float32), self.cast(dv, ms.float32)))
        dq = self.cast(dq, ms.float32)
        for step in range(1, self.n):
            kv = self.pass_on(kv)
            dkv = self.pass_on(ops.depend(dkv, kv))  # after the keys, so that all ranks send in an equal order
            source = self.sources[step]
            segment_of, place_of = self.part(segments, source), self.part(order, source)
            more = self.backward(q, kv[0], kv[1], segment, segment_of, place, place_of, out[0], out[1], dout[0], dout[1])
            dq = dq + self.cast(more[0], ms.float32)
            dkv = dkv + self.stack((self.cast(more[1], ms.float32), self.cast(more[2], ms.float32)))
        dkv = self.pass_on(dkv)
        dk, dv = self.cast(dkv[0], k.dtype), self.cast(dkv[1], v.dtype)
        return self.cast(dq, q.dtype), dk, dv, self.zeros_like(segments), self.zeros_like(order)


def _join():
    """Returns join(o_BSNH, lse_BSN, other_BSNH, other_lse_BSN) -> (o, lse) of attention to the keys of both, in float32."""
    maximum, exp, log1p, absolute, expand, cast = ops.Maximum(), ops.Exp(), ops.Log1p(), ops.Abs(), ops.ExpandDims(), ops.Cast()
    tile = ops.Tile()

    def share(o, lse, joined):  # tiled: a product of different shapes keeps four times its result, see docs/mindspore.md
        return cast(o, ms.float32) * tile(expand(exp(lse - joined), 3), (1, 1, 1, o.shape[3]))

    def join(o, lse, other, other_lse):
        joined = maximum(lse, other_lse) + log1p(exp(-absolute(lse - other_lse)))  # not Log: see layers/loss.py
        return share(o, lse, joined) + share(other, other_lse, joined), joined

    return join
