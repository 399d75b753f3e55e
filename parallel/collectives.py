"""Collectives over named mesh axes, each with its backward, for compiled and eager code. On an axis of size 1 each is the identity.

A value that is not split over an axis is replicated over it, and so is its cotangent; each backward relies on this.

On Ascend the collectives are MindSpore's primitives; ppermute is an all-gather of which one slice is kept.

On CPU MindSpore has only AllReduce of float32 on a group of ranks, so an all-gather there is a sum of buffers that are zero outside the
rank's own slice, and a reduce-scatter is a sum and a slice. Results are equal; more bytes are sent. All-to-all and ppermute of an even
number of ranks use sums over pairs of ranks, so that no rank receives data for others. Integers are sent as float32, exact below 2**24.
"""

import hashlib
from types import SimpleNamespace

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore.communication import create_group, get_rank, init
from mindspore.ops.auto_generate.gen_ops_prim import dist_comm_irecv_op, dist_comm_isend_op

from ops.identity import identity
from parallel.graph import runtime
from parallel.graph.source import function
from parallel.launch import joined
from parallel.mesh import world_size

_groups = {}  # ranks -> name of the process group


def start():
    """Joins the job of the launcher, if there is one, and sets up the runtime. Returns (rank, number of ranks). The launcher may be srun or
    mpirun, see parallel/launch/joined.py."""
    joined.join()
    if world_size() == 1:
        runtime.set_up()
        return 0, 1
    joined.start_scheduler()
    init()
    runtime.set_up()
    return get_rank(), world_size()


def psum(mesh, axes, partial=False):
    """Returns f(x) -> the sum over the ranks of the axes. Backward: the identity, since the cotangent is replicated."""
    w = _wire(mesh, axes)
    return _cell(partial, w.sum, identity) if w else identity


def pvary(mesh, axes, partial=False):
    """Returns f(x) -> x, a replicated value that each rank uses differently. Backward: the sum of the cotangents over the ranks."""
    w = _wire(mesh, axes)
    return _cell(partial, _copy, w.sum) if w else identity


def pmax(mesh, axes, partial=False):
    """Returns f(x) -> the maximum over the ranks of the axes, elementwise. Its gradient is zero."""
    w = _wire(mesh, axes)
    return _cell(partial, w.max, ops.ZerosLike()) if w else identity


def all_gather(mesh, axes, dim=0, grad="scatter", partial=False):
    """Returns f(x) -> the x of all ranks of the axes, concatenated along dim.

    Backward: grad="scatter" is a reduce-scatter, for cotangents that differ between ranks; grad="slice" takes this rank's slice of a
    replicated cotangent.
    """
    w = _wire(mesh, axes)
    return _cell(partial, _along(dim, w.gather), _along(dim, {"scatter": w.scatter, "slice": w.part}[grad])) if w else identity


def reduce_scatter(mesh, axes, dim=0, partial=False):
    """Returns f(x) -> this rank's slice along dim of the sum over the ranks. Backward: an all-gather."""
    w = _wire(mesh, axes)
    return _cell(partial, _along(dim, w.scatter), _along(dim, w.gather)) if w else identity


def split(mesh, axes, dim=0, partial=False):
    """Returns f(x) -> this rank's slice along dim of a replicated x. Backward: an all-gather."""
    w = _wire(mesh, axes)
    return _cell(partial, _along(dim, w.part), _along(dim, w.gather)) if w else identity


def all_to_all(mesh, axes, split_dim, concat_dim, partial=False):
    """Returns f(x): splits x along split_dim, sends slice i to rank i, and concatenates the received slices along concat_dim.

    Backward: an all-to-all with the two dims exchanged.
    """
    w = _wire(mesh, axes)
    return _cell(partial, w.exchange(split_dim, concat_dim), w.exchange(concat_dim, split_dim)) if w else identity


def ppermute(mesh, axes, pairs):
    """Returns f(x) -> the x of rank `source`, for the pair (source, target) whose target is this rank; zeros if there is no such pair.

    pairs: of indices along the axes. No index is twice a source or twice a target. Backward: sends each cotangent from target to source.
    """
    assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs), pairs
    w = _wire(mesh, axes)
    return _cell(False, w.permute(pairs), w.permute([(b, a) for a, b in pairs])) if w else identity


def broadcast(mesh, axes, root=0):
    """Returns f(x) -> the x of the rank with index `root`. Backward: the sum of the cotangents on that rank, zeros on the others."""
    w = _wire(mesh, axes)
    return _cell(False, w.from_root(root), _to_root(w, root)) if w else identity


def send(mesh, to, x):
    """Sends a tensor, called from the host, to the rank with index `to` along pp. Does not wait. Tensors arrive in the order of sending."""
    dist_comm_isend_op(x.contiguous(), to, _group(mesh.members(("pp",))), 0)


def receive(mesh, source, shape, dtype):
    """Returns the next tensor from the rank with index `source` along pp.

    On CPU, reading a tensor that does not arrive within 30 s raises RuntimeError.
    """
    buffer = ops.zeros(shape, dtype)
    _, arrival = dist_comm_irecv_op(buffer, 0, source, _group(mesh.members(("pp",))))
    arrival.wait()
    return buffer


def host_sum(mesh, axes, values):
    """Returns the sum over the ranks of the axes of numbers [n], as float32 numpy. Every rank waits for the others."""
    return psum(mesh, axes)(ms.Tensor(np.asarray(values, np.float32))).asnumpy()


class _Cell(nn.Cell):
    """A Cell that computes forward(x), and backward(cotangent) as its gradient."""

    def __init__(self, forward, backward):
        super().__init__()
        self.forward, self.backward = forward, backward

    def construct(self, x):
        return self.forward(x)

    def bprop(self, x, out, dout):
        return (self.backward(dout),)


def _cell(partial, forward, backward):
    """Returns the function `forward` with `backward` as its gradient.

    partial: each rank's cotangent of a replicated value is a partial sum, as in programs of MindSpore's partitioner. The backward of
    MindSpore's primitives is right there, so `forward` is returned without a backward of ours.
    """
    if partial:
        return identity if forward is _copy else forward
    return _Cell(forward, backward)


def _copy(x):
    return x * 1  # a Cell that returns its input unchanged is read wrongly in a graph (docs/mindspore.md)


def _wire(mesh, axes):
    """Returns the collectives of this rank's group along the axes, which act on the leading dim; None for a group of one rank."""
    if mesh.size(axes) == 1:
        return None
    ranks, n, at = mesh.members(axes), mesh.size(axes), mesh.index(axes)
    assert ranks[at] == mesh.rank, f"axes {axes} are not outermost first"
    native = ms.get_context("device_target") == "Ascend"
    w = (_ascend_wire if native else _cpu_wire)(_group(ranks), ranks, at)

    def part(x):
        rows = x.shape[0] // n
        return x[at * rows : (at + 1) * rows]

    return SimpleNamespace(n=n, at=at, part=part, **w)


def _group(ranks):
    """Returns the name of the process group of these ranks, which is created on first use."""
    if ranks not in _groups:
        _groups[ranks] = f"ranks_{hashlib.sha256(repr(ranks).encode()).hexdigest()[:12]}"
        create_group(_groups[ranks], list(ranks))
    return _groups[ranks]


def _ascend_wire(group, ranks, at):
    n, whole = len(ranks), ops.AllGather(group)

    def from_root(root):
        """By an all-gather: of ops.Broadcast it is not clear whether it takes the rank in the job or in the group (docs/mindspore.md)."""

        def broadcast(x):
            rows = x.shape[0]
            return whole(x)[root * rows : (root + 1) * rows]

        return broadcast

    reduce, largest = ops.AllReduce("sum", group), ops.AllReduce("max", group)

    def exchange(split_dim, concat_dim):
        return _exchange(ops.AlltoAll(n, 0, 0, group), n, split_dim, concat_dim)

    def permute(pairs):
        return _permute_by_gather(whole, n, at, pairs)

    wire = {"sum": reduce, "max": largest, "gather": whole, "scatter": ops.ReduceScatter("sum", group), "from_root": from_root}
    return {**wire, "exchange": exchange, "permute": permute}


def _cpu_wire(group, ranks, at):
    reshape, amax, n = ops.Reshape(), ops.ReduceMax(), len(ranks)
    total, gather = _cpu_sum(group), _cpu_gather(group, n, at)

    def largest(x):
        return amax(reshape(gather(reshape(x, (-1,))), (n, *x.shape)), 0)

    def scatter(x):
        rows = x.shape[0] // n
        return total(x)[at * rows : (at + 1) * rows]

    def from_root(root):
        keep, cast = _keep(at == root), ops.Cast()

        def broadcast(x):
            return cast(total(keep(cast(x, ms.float32))), x.dtype)  # CPU stacks no bfloat16

        return broadcast

    def exchange(split_dim, concat_dim):
        if n % 2:
            return _exchange(_exchange_by_gather(gather, n, at), n, split_dim, concat_dim)
        return _exchange_by_two(ranks, at, split_dim, concat_dim)

    def permute(pairs):
        return _pass_by_two(ranks, at, pairs) if _is_ring(n, pairs) else _permute_by_gather(gather, n, at, pairs)

    wire = {"sum": total, "max": largest, "gather": gather, "scatter": scatter, "from_root": from_root}
    return {**wire, "exchange": exchange, "permute": permute}


def _cpu_sum(group):
    reduce, cast = ops.AllReduce("sum", group), ops.Cast()

    def total(x):
        return cast(reduce(cast(x, ms.float32)), x.dtype)

    return total


def _cpu_gather(group, n, at):
    total, concat, zeros_like = _cpu_sum(group), ops.Concat(0), ops.ZerosLike()

    def gather(x):
        empty = zeros_like(x)  # not 0 * x, which is not 0 for infinities
        return total(concat((empty,) * at + (x,) + (empty,) * (n - 1 - at)))

    return gather


def _rounds(n, at):
    """Returns the other indices of a group of n ranks, n even, in the order in which index `at` exchanges with them.

    In each round all ranks exchange in pairs, so that no rank waits for one that is busy. Source: the circle method for round-robin
    tournaments.
    """
    last = n - 1
    return sorted({*range(n)} - {at}, key=lambda other: (at + other if last not in (at, other) else 2 * min(at, other)) % last)


def _exchange_by_two(ranks, at, split_dim, concat_dim):
    """Returns the f(x) of all_to_all, by exchanges in pairs of ranks."""
    swaps, lines, last = {}, ["parts = split(x)"], "x"
    for i in _rounds(len(ranks), at):
        swaps[f"swap{i}"] = _swap(ranks, at, i)
        lines.append(f"y{i} = swap{i}(depend(parts[{i}], {last}))")
        last = f"y{i}"
    lines += [f"y{at} = parts[{at}]", f"return concat(({', '.join(f'y{i}' for i in range(len(ranks)))}))"]
    return function("exchange(x)", lines, split=ops.Split(split_dim, len(ranks)), concat=ops.Concat(concat_dim), depend=ops.depend, **swaps)


def _exchange_by_gather(gather, n, at):
    reshape = ops.Reshape()

    def exchange(x):
        everyone = reshape(gather(x), (n, n, x.shape[0] // n, *x.shape[1:]))
        return reshape(everyone[:, at], x.shape)

    return exchange


def _pair(ranks, at, other):
    return _group((ranks[min(at, other)], ranks[max(at, other)]))


def _swap(ranks, at, other):
    """Returns f(x) -> the x of the rank with index `other`, which gets this rank's x."""
    place = int(at > other)
    gather = _cpu_gather(_pair(ranks, at, other), 2, place)

    def swap(x):
        rows = x.shape[0]
        return gather(x)[(1 - place) * rows : (2 - place) * rows]

    return swap


def _is_ring(n, pairs):
    """Whether `pairs` is a rotation by one place, in either direction, of an even number of ranks."""
    return n % 2 == 0 and any(set(pairs) == {(i, (i + step) % n) for i in range(n)} for step in (1, -1))


def _pass_by_two(ranks, at, pairs):
    """Returns the f(x) of ppermute for an even ring: first pairs (0, 1), (2, 3), ... exchange, then the other pairs."""
    to, source = dict(pairs)[at], {b: a for a, b in pairs}[at]
    if to == source:
        return _swap(ranks, at, to)
    first, second = sorted((to, source), key=lambda other: other != at ^ 1)
    sum_first, sum_second = (_cpu_sum(_pair(ranks, at, other)) for other in (first, second))
    keep_first, keep_second = _keep(first == to), _keep(second == to)
    stack, depend, arrives = ops.Stack(0), ops.depend, int(second == source)

    def pass_on(x):
        a = sum_first(keep_first(x))
        b = sum_second(depend(keep_second(x), a))
        return stack((a, b))[arrives]

    return pass_on


def _permute_by_gather(gather, n, at, pairs):
    source = {b: a for a, b in pairs}.get(at, n)
    reshape, concat, zeros_like = ops.Reshape(), ops.Concat(0), ops.ZerosLike()

    def permute(x):
        row = reshape(x, (1, -1))
        everyone = concat((gather(row), zeros_like(row)))  # the last row is for a rank that is no target
        return reshape(everyone[source], x.shape)

    return permute


@ops.constexpr
def _moved(ndim, source, to):
    """Returns the permutation of ndim dims that moves dim `source` to position `to`."""
    rest = [d for d in range(ndim) if d != source]
    return tuple(rest[:to] + [source] + rest[to:])


@ops.constexpr
def _joined(shape, dim):
    """Returns `shape` with dims `dim` and `dim + 1` merged."""
    return (*shape[:dim], shape[dim] * shape[dim + 1], *shape[dim + 2 :])


def _along(dim, f):
    """Returns f, which acts on the leading dim, as a function that acts on `dim`."""
    transpose = ops.Transpose()

    def along(x):
        ndim = len(x.shape)
        return transpose(f(transpose(x, _moved(ndim, dim, 0))), _moved(ndim, 0, dim))

    return along if dim else f


def _exchange(by_rank, n, split_dim, concat_dim):
    """Returns the f(x) of all_to_all from by_rank, an all-to-all of the leading dim."""
    transpose, reshape = ops.Transpose(), ops.Reshape()

    def exchange(x):
        ndim = len(x.shape)
        x = transpose(x, _moved(ndim, split_dim, 0))
        y = reshape(by_rank(x), (n, x.shape[0] // n, *x.shape[1:]))  # the leading dim is the source rank
        y = transpose(y, _moved(ndim + 1, 1, split_dim + 1))
        y = transpose(y, _moved(ndim + 1, 0, concat_dim))
        return reshape(y, _joined(y.shape, concat_dim))

    return exchange


def _to_root(w, root):
    keep = _keep(w.at == root)

    def to_root(x):
        return keep(w.sum(x))

    return to_root


def _keep(mine):
    """Returns f(x) -> x if `mine`, else zeros, with a graph of equal structure on all ranks.

    MindSpore removes a collective whose result is not used and orders the others by the structure of the graph. If ranks differed in
    either, they would wait for each other forever.
    """
    stack, zeros_like, place = ops.Stack(0), ops.ZerosLike(), 0 if mine else 1

    def keep(x):
        return stack((x, zeros_like(x)))[place]

    return keep
