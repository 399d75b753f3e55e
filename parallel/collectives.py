"""Collectives over named mesh axes, each with its backward, in compiled and eager code; the identity on an axis of size 1.

A value that is not split over an axis is held by all its ranks alike, and so is its cotangent: that is the convention behind each
backward here. On Ascend they are MindSpore's own primitives, but for ppermute, a gather of which one part is kept. MindSpore's CPU backend
has AllReduce alone on a group of ranks, of float32, so there a gather is a sum of buffers that are zero outside a rank's own place, and a
reduce-scatter a sum and a slice: the numbers are the same, the traffic is not. Of an even number of ranks, what one has for another goes by
sums over the two, so that none holds what is for others. Integers travel as float32 there, exact below 2**24.
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
from parallel.mesh import world_size

_groups = {}  # ranks -> name, of the groups that this process has made


def start():
    """Joins the job that a launcher started, if any, and sets up the runtime. Returns (rank, number of ranks)."""
    if world_size() == 1:
        runtime.set_up()
        return 0, 1
    init()
    runtime.set_up()
    return get_rank(), world_size()


def psum(mesh, axes, partial=False):
    """f(x) -> the sum over the axes' ranks. Backward: the cotangent, which is the same on all of them."""
    w = _wire(mesh, axes)
    return _cell(partial, w.sum, identity) if w else identity


def pvary(mesh, axes, partial=False):
    """f(x) -> x, from here on used by each rank in its own way. Backward: the sum of the cotangents."""
    w = _wire(mesh, axes)
    return _cell(partial, _copy, w.sum) if w else identity


def pmax(mesh, axes, partial=False):
    """f(x) -> the largest over the axes' ranks. It has no gradient."""
    w = _wire(mesh, axes)
    return _cell(partial, w.max, ops.ZerosLike()) if w else identity


def all_gather(mesh, axes, dim=0, grad="scatter", partial=False):
    """f(x) -> the ranks' x, joined along dim. Backward: grad="scatter" sums what the ranks did with the whole and returns each its part;
    grad="slice" takes a rank's part of a cotangent that is the same on all."""
    w = _wire(mesh, axes)
    return _cell(partial, _along(dim, w.gather), _along(dim, {"scatter": w.scatter, "slice": w.part}[grad])) if w else identity


def reduce_scatter(mesh, axes, dim=0, partial=False):
    """f(x) -> this rank's part along dim of the sum over the ranks. Backward: all_gather."""
    w = _wire(mesh, axes)
    return _cell(partial, _along(dim, w.scatter), _along(dim, w.gather)) if w else identity


def split(mesh, axes, dim=0, partial=False):
    """f(x) -> this rank's part along dim of an x that all hold alike. Backward: all_gather."""
    w = _wire(mesh, axes)
    return _cell(partial, _along(dim, w.part), _along(dim, w.gather)) if w else identity


def all_to_all(mesh, axes, split_dim, concat_dim, partial=False):
    """f(x) -> cut along split_dim, the i-th part sent to rank i; what arrives is joined along concat_dim. Backward: the way back."""
    w = _wire(mesh, axes)
    return _cell(partial, w.exchange(split_dim, concat_dim), w.exchange(concat_dim, split_dim)) if w else identity


def ppermute(mesh, axes, pairs):
    """f(x) -> the x of rank a, for the pair (a, b) whose b is this rank, and zeros on a rank that no pair names. Backward: the same with
    the pairs turned round. pairs: (from, to) places along the axes, no place twice on either side."""
    assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs), pairs
    w = _wire(mesh, axes)
    return _cell(False, w.permute(pairs), w.permute([(b, a) for a, b in pairs])) if w else identity


def broadcast(mesh, axes, root=0):
    """f(x) -> the x of the rank at place `root`. Backward: there the sum of the cotangents, elsewhere zeros."""
    w = _wire(mesh, axes)
    return _cell(False, w.from_root(root), _to_root(w, root)) if w else identity


def send(mesh, to, x):
    """Sends a tensor, on the host, to the rank at place `to` along pp, without waiting; what a rank sends arrives in that order."""
    dist_comm_isend_op(x.contiguous(), to, _group(mesh.members(("pp",))), 0)


def receive(mesh, source, shape, dtype):
    """The next tensor from the rank at place `source` along pp. On CPU a RuntimeError where it is read, if it does not come within 30 s."""
    buffer = ops.zeros(shape, dtype)
    _, arrival = dist_comm_irecv_op(buffer, 0, source, _group(mesh.members(("pp",))))
    arrival.wait()
    return buffer


def host_sum(mesh, axes, values):
    """The sum over the axes' ranks of a few numbers [n] on the host, float32 numpy. The ranks wait for each other."""
    return psum(mesh, axes)(ms.Tensor(np.asarray(values, np.float32))).asnumpy()


def axis_index(mesh, axes):
    """This rank's place along the axes, a Python int."""
    return mesh.index(axes)


class _Cell(nn.Cell):
    """forward(x), with backward(cotangent) as its gradient."""

    def __init__(self, forward, backward):
        super().__init__()
        self.forward, self.backward = forward, backward

    def construct(self, x):
        return self.forward(x)

    def bprop(self, x, out, dout):
        return (self.backward(dout),)


def _cell(partial, forward, backward):
    """partial: of a value that all ranks hold alike, each has a cotangent of its own, and their sum is the true one. That is the
    convention of MindSpore's partitioner, and the backward of its own primitives."""
    if partial:
        return identity if forward is _copy else forward
    return _Cell(forward, backward)


def _copy(x):
    return x * 1  # a Cell that returns its input unchanged is read wrongly in a graph (docs/mindspore.md)


def _wire(mesh, axes):
    """The exchanges of this rank's group along the axes, on leading dims; None for a group of one."""
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
    """The name of the process group of these ranks, made on first use."""
    if ranks not in _groups:
        _groups[ranks] = f"ranks_{hashlib.sha256(repr(ranks).encode()).hexdigest()[:12]}"
        create_group(_groups[ranks], list(ranks))
    return _groups[ranks]


def _ascend_wire(group, ranks, at):
    n, whole = len(ranks), ops.AllGather(group)

    def from_root(root):
        send = ops.Broadcast(ranks[root], group)

        def broadcast(x):
            return send((x,))[0]

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
        keep = _keep(at == root)

        def broadcast(x):
            return total(keep(x))

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
    """The others of a group of n, even, by the round in which this place meets them, one in each: ranks that compute much at once, in the
    order of their graphs, would else wait for each other. Source: the round-robin tournament's circle method."""
    last = n - 1
    return sorted({*range(n)} - {at}, key=lambda other: (at + other if last not in (at, other) else 2 * min(at, other)) % last)


def _exchange_by_two(ranks, at, split_dim, concat_dim):
    """f(x) -> cut along split_dim, the i-th part sent to rank i; what arrives is joined along concat_dim."""
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
    """f(x) -> the x of another rank, which gets this one's."""
    place = int(at > other)
    gather = _cpu_gather(_pair(ranks, at, other), 2, place)

    def swap(x):
        rows = x.shape[0]
        return gather(x)[(1 - place) * rows : (2 - place) * rows]

    return swap


def _is_ring(n, pairs):
    """Whether each of an even number of ranks sends to its neighbour on one side."""
    return n % 2 == 0 and any(set(pairs) == {(i, (i + step) % n) for i in range(n)} for step in (1, -1))


def _pass_by_two(ranks, at, pairs):
    """f(x) -> the x of a neighbour, in a ring of an even number: first every second two ranks, then the others."""
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
        everyone = concat((gather(row), zeros_like(row)))  # the last row is for a rank that no pair names
        return reshape(everyone[source], x.shape)

    return permute


@ops.constexpr
def _moved(ndim, source, to):
    """The permutation of ndim dims that moves one."""
    rest = [d for d in range(ndim) if d != source]
    return tuple(rest[:to] + [source] + rest[to:])


@ops.constexpr
def _joined(shape, dim):
    """shape, with dims dim and dim + 1 as one."""
    return (*shape[:dim], shape[dim] * shape[dim + 1], *shape[dim + 2 :])


def _along(dim, f):
    """f, which works on the leading dim, on another one."""
    transpose = ops.Transpose()

    def along(x):
        ndim = len(x.shape)
        return transpose(f(transpose(x, _moved(ndim, dim, 0))), _moved(ndim, 0, dim))

    return along if dim else f


def _exchange(by_rank, n, split_dim, concat_dim):
    """The same, by a function that does so with the parts of the leading dim."""
    transpose, reshape = ops.Transpose(), ops.Reshape()

    def exchange(x):
        ndim = len(x.shape)
        x = transpose(x, _moved(ndim, split_dim, 0))
        y = reshape(by_rank(x), (n, x.shape[0] // n, *x.shape[1:]))  # by sender
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
    """f(x) -> x if it is mine, else zeros; the graph is the same on all ranks. A graph drops a collective whose result it does not use, and
    its structure gives the order in which the others run: where ranks differ in either, they wait for each other in vain."""
    stack, zeros_like, place = ops.Stack(0), ops.ZerosLike(), 0 if mine else 1

    def keep(x):
        return stack((x, zeros_like(x)))[place]

    return keep
