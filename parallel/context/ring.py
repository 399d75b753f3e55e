"""Ring attention: each rank has the queries of its tokens, and the keys and values of all tokens are passed around the ring of ranks.

In each step a rank attends to the keys of one rank. The results are combined by their log-sum-exp, as in flash attention. The backward
passes keys and values around again, together with their gradients, which are back at their owner after a full round.
Source: Liu et al. 2023; Dao 2023.
"""

import mindspore as ms
from mindspore import nn, ops

from ops import documents
from parallel import collectives


def attention(sharding, parts, dim):
    """Returns attend(q_BSNH, k_BSKH, v_BSKH, segments_BT, order_BT) -> o_BSNH; q, k, v and o are of this rank's S tokens.

    dim: the logical dim that the ring splits. segments, order: the segment and the position in the row of all T tokens of the ring,
    concatenated by rank. parts: (forward, backward) of attention to some of the keys, see ops/attention.py.
    """
    assert sharding.lowering == "manual", sharding.lowering
    mesh, atoms, concat = sharding.mesh, sharding.atoms(dim), ops.Concat(1)
    n, at = mesh.size(atoms), mesh.index(atoms)
    steps = [_of_part(n, at, (at - step) % n, *parts) for step in range(1, n)]
    ring = _Ring(mesh, atoms, _own_part(n, at, *parts), steps)

    def attend(q, k, v, segments, order):
        return ring(q, k, v, concat((segments, order)))[0]

    return attend


def attention_by_lengths(sharding, spans, dim):
    """Returns attend(q_BSNH, k_BSKH, v_BSKH, lengths_BD) -> o_BSNH as `attention` does, for documents that are given by lengths(). No rank
    has a tensor of S * T elements.

    spans: (documents, crossing), see reference_spans in ops/attention.py.
    """
    assert sharding.lowering == "manual", sharding.lowering
    mesh, atoms, ends, (own, crossing) = sharding.mesh, sharding.atoms(dim), sharding.documents - 1, spans
    n, at = mesh.size(atoms), mesh.index(atoms)
    of = [_of_earlier if (at - step) % n < at else _of_later for step in range(1, n)]
    ring = _Ring(mesh, atoms, _own_documents(ends, *own), [each(ends + 2 * i, *crossing) for i, each in enumerate(of)])

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


class _Ring(nn.Cell):
    """Returns (o_BSNH, lse_BSN) of attention to the keys of all ranks. The graphs of all ranks have equal structure, so their collectives
    run in an equal order.

    own: (forward, backward) of the rank's own keys, as in reference_parts of ops/attention.py. steps: for each other rank, in the order in
    which its keys arrive, (attend, gradients), see _of_part. Each takes `about`, int32 [B, X], what it needs to know of the documents.
    """

    def __init__(self, mesh, atoms, own, steps):
        super().__init__()
        n = mesh.size(atoms)
        self.forward_own, self.backward_own = own
        self.pass_on = collectives.ppermute(mesh, atoms, [(i, (i + 1) % n) for i in range(n)])
        self.stack, self.cast, self.zeros_like = ops.Stack(0), ops.Cast(), ops.ZerosLike()
        # The steps call each other. A loop over them in `construct` does not compile within a loop of layers, see docs/mindspore.md
        self.attend, self.gradients = _all_seen, _all_added
        for attend, gradients in reversed(steps):
            self.attend = _attend_and_go_on(self.pass_on, attend, self.attend)
            self.gradients = _add_and_go_on(self.pass_on, gradients, self.gradients)

    def construct(self, q, k, v, about):
        o, lse = self.forward_own(q, k, v, about)
        o, lse = self.attend(q, self.stack((k, v)), about, o, lse)
        return self.cast(o, q.dtype), lse

    def bprop(self, q, k, v, about, out, dout):
        dq, dk, dv = self.backward_own(q, k, v, about, out[0], out[1], dout[0], dout[1])
        # depends on the cotangent, or the compiler would keep the keys of all ranks from the forward instead of sending them again
        kv, dkv = self.stack((ops.depend(k, dout[0]), v)), self.stack((self.cast(dk, ms.float32), self.cast(dv, ms.float32)))
        dq, dkv = self.gradients(q, kv, about, out[0], out[1], dout[0], dout[1], self.cast(dq, ms.float32), dkv)
        dkv = self.pass_on(dkv)
        dk, dv = self.cast(dkv[0], k.dtype), self.cast(dkv[1], v.dtype)
        return self.cast(dq, q.dtype), dk, dv, self.zeros_like(about)


def _all_seen(q, kv, about, o, lse):
    return o, lse


def _all_added(q, kv, about, o, lse, do, dlse, dq, dkv):
    return dq, dkv


def _attend_and_go_on(pass_on, attend, go_on):
    """Returns the step `attend` of the ring followed by the steps `go_on`."""

    def steps(q, kv, about, o, lse):
        kv = pass_on(kv)
        o, lse = attend(q, kv, about, o, lse)
        return go_on(q, kv, about, o, lse)

    return steps


def _add_and_go_on(pass_on, gradients, go_on):
    """Returns the step `gradients` of the ring's backward followed by the steps `go_on`."""

    def steps(q, kv, about, o, lse, do, dlse, dq, dkv):
        kv = pass_on(kv)
        dkv = pass_on(ops.depend(dkv, kv))  # after the keys, so that all ranks send in an equal order
        dq, dkv = gradients(q, kv, about, o, lse, do, dlse, dq, dkv)
        return go_on(q, kv, about, o, lse, do, dlse, dq, dkv)

    return steps


def _part(n):
    """Returns part(about_BX, i): slice i of `about`, which has the segments and then the orders of all tokens of a ring of n ranks. Slice i
    has the segments, and slice n + i the orders, of the tokens of the rank with index i."""

    def part(about, i):
        size = about.shape[1] // (2 * n)
        return about[:, i * size : (i + 1) * size]

    return part


def _own_part(n, at, forward, backward):
    """Returns (forward, backward) of the keys of this rank, with index `at`, for _Ring. forward, backward: attention to some of the keys,
    see reference_parts in ops/attention.py. about: see _part."""
    part = _part(n)

    def of_own(q, k, v, about):
        segment, place = part(about, at), part(about, n + at)
        return forward(q, k, v, segment, segment, place, place)

    def of_own_back(q, k, v, about, o, lse, do, dlse):
        segment, place = part(about, at), part(about, n + at)
        return backward(q, k, v, segment, segment, place, place, o, lse, do, dlse)

    return of_own, of_own_back


def _of_part(n, at, source, forward, backward):
    """Returns (attend, gradients) of the step whose keys are of the rank `source`, for _Ring. The other arguments: see _own_part.

    attend(q, kv, about, o, lse) -> (o, lse) of these keys too. gradients(q, kv, about, o, lse, do, dlse, dq, dkv) -> (dq, dkv), with the
    share of these queries and keys added, in float32. kv, dkv: [2, B, S, K, H].
    """
    part, join, stack, cast = _part(n), _join(), ops.Stack(0), ops.Cast()

    def attend(q, kv, about, o, lse):
        segment, place = part(about, at), part(about, n + at)
        other = forward(q, kv[0], kv[1], segment, part(about, source), place, part(about, n + source))
        return join(o, lse, other[0], other[1])

    def gradients(q, kv, about, o, lse, do, dlse, dq, dkv):
        segment, place = part(about, at), part(about, n + at)
        more = backward(q, kv[0], kv[1], segment, part(about, source), place, part(about, n + source), o, lse, do, dlse)
        return dq + cast(more[0], ms.float32), dkv + stack((cast(more[1], ms.float32), cast(more[2], ms.float32)))

    return attend, gradients


def _own_documents(ends, forward, backward):
    """Returns (forward, backward) of the rank's own keys for _Ring. about: of lengths(), whose first `ends` integers are of own documents.
    forward, backward: `documents` of reference_spans in ops/attention.py."""

    def of_own(q, k, v, about):
        return forward(q, k, v, about[:, :ends])

    def of_own_back(q, k, v, about, o, lse, do, dlse):
        return backward(q, k, v, about[:, :ends], o, lse, do, dlse)

    return of_own, of_own_back


def _of_earlier(first, forward, backward):
    """Returns (attend, gradients), see _of_part, of a step whose keys are of a rank with a lower number: all queries attend to their first
    half. first: the place in `about` of the two numbers that lengths() has for the step. forward, backward: `crossing` of ops/attention.py.
    """
    join, stack, concat, cast = _join(), ops.Stack(0), ops.Concat(2), ops.Cast()

    def attend(q, kv, about, o, lse):
        half = q.shape[1] // 2
        other = forward(q, kv[0][:, :half], kv[1][:, :half], about[:, first : first + 2])
        return join(o, lse, other[0], other[1])

    def gradients(q, kv, about, o, lse, do, dlse, dq, dkv):
        half = q.shape[1] // 2
        more = backward(q, kv[0][:, :half], kv[1][:, :half], about[:, first : first + 2], o, lse, do, dlse)
        early = dkv[:, :, :half] + stack((cast(more[1], ms.float32), cast(more[2], ms.float32)))
        return dq + cast(more[0], ms.float32), concat((early, dkv[:, :, half:]))

    return attend, gradients


def _of_later(first, forward, backward):
    """Returns (attend, gradients) as _of_earlier does, of a step whose keys are of a rank with a higher number: the second half of the
    queries attends to all of them."""
    join, stack, concat, cast = _join(), ops.Stack(0), ops.Concat(1), ops.Cast()

    def attend(q, kv, about, o, lse):
        half = q.shape[1] // 2
        other = forward(q[:, half:], kv[0], kv[1], about[:, first : first + 2])
        late = join(o[:, half:], lse[:, half:], other[0], other[1])
        return concat((cast(o[:, :half], ms.float32), late[0])), concat((lse[:, :half], late[1]))

    def gradients(q, kv, about, o, lse, do, dlse, dq, dkv):
        half = q.shape[1] // 2
        more = backward(q[:, half:], kv[0], kv[1], about[:, first : first + 2], o[:, half:], lse[:, half:], do[:, half:], dlse[:, half:])
        dkv = dkv + stack((cast(more[1], ms.float32), cast(more[2], ms.float32)))
        return concat((dq[:, :half], dq[:, half:] + cast(more[0], ms.float32))), dkv

    return attend, gradients


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
