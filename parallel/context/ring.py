"""Ring attention: each rank has the queries of its tokens, and the keys and values of all tokens are passed around the ring of ranks.

In each step a rank attends to the keys of one rank. The results are combined by their log-sum-exp, as in flash attention. The backward
passes keys and values around again, together with their gradients, which are back at their owner after a full round.
Source: Liu et al. 2023; Dao 2023.
"""

import mindspore as ms
from mindspore import nn, ops

from ops import documents
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


def attention_by_lengths(sharding, spans, dim):
    """Returns attend(q_BSNH, k_BSKH, v_BSKH, lengths_BD) -> o_BSNH as `attention` does, for documents that are given by lengths(). No rank
    has a tensor of S * T elements.

    spans: (documents, crossing), see reference_spans in ops/attention.py.
    """
    assert sharding.lowering == "manual", sharding.lowering
    ring = _RingByLengths(sharding.mesh, sharding.atoms(dim), sharding.documents - 1, *spans)

    def attend(q, k, v, lengths):
        return ring(q, k, v, lengths)[0]

    return attend


def lengths(sharding, dim):
    """Returns lengths(segments_BT) -> int32 [B, count_lengths()], what this rank's attention needs to know of the documents of its rows.

    segments: of all T tokens of the ring, concatenated by rank; each document has an id of its own in its row, and padding is at the end.

    A rank has two chunks of a row in zig-zag order (parallel/context/split.py). Of a rank with a lower number, the first chunk lies before
    all tokens of this rank and the second one after them. Both chunks of a rank with a higher number lie between the two of this rank. So
    either all queries attend to the first chunk of keys, or the second chunk of queries attends to all keys; and all of these keys come
    before all of these queries, so that only one document, that of the last key, can have both.

    The result has the ends of the documents in this rank's own tokens (ops/documents.py). Then, for each step of the ring, the numbers of
    those queries (the first ones) and of those keys (the last ones) that are of the document of the last key.
    """
    mesh, atoms = sharding.mesh, sharding.atoms(dim)
    n, at, own = mesh.size(atoms), mesh.index(atoms), documents.ends(sharding.documents)
    equal, cast, total, concat = ops.Equal(), ops.Cast(), ops.ReduceSum(keep_dims=True), ops.Concat(1)

    def lengths(segments):
        size = segments.shape[1] // n
        mine = segments[:, at * size : (at + 1) * size]
        found = (own(mine),)
        for step in range(1, n):
            source = (at - step) % n
            keys, queries = segments[:, source * size : (source + 1) * size], mine
            if source < at:
                keys = keys[:, : size // 2]
            else:
                queries = queries[:, size // 2 :]
            last = keys[:, -1:]
            found += (total(cast(equal(queries, last), ms.float32), 1), total(cast(equal(keys, last), ms.float32), 1))
        whole = ()
        for x in found:
            whole += (cast(x, ms.int32),)
        return ops.stop_gradient(concat(whole) if n > 1 else whole[0])

    return lengths


def count_lengths(sharding, dim):
    """Returns the number of integers that lengths() gives a row."""
    return sharding.documents - 1 + 2 * (sharding.shards(dim) - 1)


class _RingByLengths(nn.Cell):
    """Returns (o_BSNH, lse_BSN), like _Ring. A rank attends to the keys of another in one call, see lengths()."""

    def __init__(self, mesh, atoms, ends, own, crossing):
        super().__init__()
        n, at = mesh.size(atoms), mesh.index(atoms)
        self.ends, (self.forward_own, self.backward_own) = ends, own
        self.pass_on = collectives.ppermute(mesh, atoms, [(i, (i + 1) % n) for i in range(n)])
        self.stack, self.cast, self.zeros_like = ops.Stack(0), ops.Cast(), ops.ZerosLike()
        # The steps call each other. A loop over them in `construct` does not compile within a loop of layers, see docs/mindspore.md
        self.attend, self.gradients = _all_seen, _all_added
        for step in range(n - 1, 0, -1):
            attend, gradients = (_of_earlier if (at - step) % n < at else _of_later)(*crossing)
            first = ends + 2 * (step - 1)  # of the two numbers that lengths() has for the step
            self.attend = _attend_and_go_on(self.pass_on, attend, first, self.attend)
            self.gradients = _add_and_go_on(self.pass_on, gradients, first, self.gradients)

    def construct(self, q, k, v, lengths):
        o, lse = self.forward_own(q, k, v, lengths[:, : self.ends])
        o, lse = self.attend(q, self.stack((k, v)), lengths, o, lse)
        return self.cast(o, q.dtype), lse

    def bprop(self, q, k, v, lengths, out, dout):
        dq, dk, dv = self.backward_own(q, k, v, lengths[:, : self.ends], out[0], out[1], dout[0], dout[1])
        # depends on the cotangent, or the compiler would keep the keys of all ranks from the forward instead of sending them again
        kv, dkv = self.stack((ops.depend(k, dout[0]), v)), self.stack((self.cast(dk, ms.float32), self.cast(dv, ms.float32)))
        dq, dkv = self.gradients(q, kv, lengths, out[0], out[1], dout[0], dout[1], self.cast(dq, ms.float32), dkv)
        dkv = self.pass_on(dkv)
        dk, dv = self.cast(dkv[0], k.dtype), self.cast(dkv[1], v.dtype)
        return self.cast(dq, q.dtype), dk, dv, self.zeros_like(lengths)


def _all_seen(q, kv, lengths, o, lse):
    return o, lse


def _all_added(q, kv, lengths, o, lse, do, dlse, dq, dkv):
    return dq, dkv


def _attend_and_go_on(pass_on, attend, first, go_on):
    """Returns the step `attend` of the ring followed by the steps `go_on`."""

    def steps(q, kv, lengths, o, lse):
        kv = pass_on(kv)
        o, lse = attend(q, kv, lengths[:, first : first + 2], o, lse)
        return go_on(q, kv, lengths, o, lse)

    return steps


def _add_and_go_on(pass_on, gradients, first, go_on):
    """Returns the step `gradients` of the ring's backward followed by the steps `go_on`."""

    def steps(q, kv, lengths, o, lse, do, dlse, dq, dkv):
        kv = pass_on(kv)
        dkv = pass_on(ops.depend(dkv, kv))  # after the keys, so that all ranks send in an equal order
        dq, dkv = gradients(q, kv, lengths[:, first : first + 2], o, lse, do, dlse, dq, dkv)
        return go_on(q, kv, lengths, o, lse, do, dlse, dq, dkv)

    return steps


def _of_earlier(forward, backward):
    """Returns (attend, gradients) of a step whose keys are of a rank with a lower number: all queries attend to their first half.

    attend(q, kv, meets, o, lse) -> (o, lse) of these keys too. gradients(q, kv, meets, o, lse, do, dlse, dq, dkv) -> (dq, dkv), with the
    share of these queries and keys added, in float32. kv, dkv: [2, B, S, K, H]. forward, backward: `crossing` of ops/attention.py.
    """
    join, stack, concat, cast = _join(), ops.Stack(0), ops.Concat(2), ops.Cast()

    def attend(q, kv, meets, o, lse):
        half = q.shape[1] // 2
        other = forward(q, kv[0][:, :half], kv[1][:, :half], meets)
        return join(o, lse, other[0], other[1])

    def gradients(q, kv, meets, o, lse, do, dlse, dq, dkv):
        half = q.shape[1] // 2
        more = backward(q, kv[0][:, :half], kv[1][:, :half], meets, o, lse, do, dlse)
        early = dkv[:, :, :half] + stack((cast(more[1], ms.float32), cast(more[2], ms.float32)))
        return dq + cast(more[0], ms.float32), concat((early, dkv[:, :, half:]))

    return attend, gradients


def _of_later(forward, backward):
    """Returns (attend, gradients) as _of_earlier does, of a step whose keys are of a rank with a higher number: the second half of the
    queries attends to all of them."""
    join, stack, concat, cast = _join(), ops.Stack(0), ops.Concat(1), ops.Cast()

    def attend(q, kv, meets, o, lse):
        half = q.shape[1] // 2
        other = forward(q[:, half:], kv[0], kv[1], meets)
        late = join(o[:, half:], lse[:, half:], other[0], other[1])
        return concat((cast(o[:, :half], ms.float32), late[0])), concat((lse[:, :half], late[1]))

    def gradients(q, kv, meets, o, lse, do, dlse, dq, dkv):
        half = q.shape[1] // 2
        more = backward(q[:, half:], kv[0], kv[1], meets, o[:, half:], lse[:, half:], do[:, half:], dlse[:, half:])
        dkv = dkv + stack((cast(more[1], ms.float32), cast(more[2], ms.float32)))
        return concat((dq[:, :half], dq[:, half:] + cast(more[0], ms.float32))), dkv

    return attend, gradients


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
