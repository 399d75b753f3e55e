"""Computes the communication of a step in a layout: the collectives of the signatures of a model's ops, and those of parallel/zero.py.

The model runs once on one device, with sizes as small as one likes, in a Watched sharding that counts the runs of each op and the
cotangents that flow through it. The signature of an op then gives its collectives in a layout, and the sizes of its dims their bytes.
This holds for unrolled layers in both lowerings; again() gives what scanned layers add.
"""

import math
from collections import Counter
from typing import NamedTuple

from mindspore import nn

from parallel import matrices, zero
from parallel.lowering.manual import entering, op_steps, varying, wrapped
from parallel.placement import ITEMSIZE, local_shape
from parallel.sharding import DATA, Sharding, parse

# Step of parallel/lowering/manual.py -> its collectives in the forward and in the backward. (An all-gather whose backward is a slice is
# handled in of_ops.)
DIRECTIONS = {
    "psum": ("AllReduce", None),
    "pmax": ("AllReduce", None),
    "pvary": (None, "AllReduce"),
    "all_gather": ("AllGather", "ReduceScatter"),
    "reduce_scatter": ("ReduceScatter", "AllGather"),
    "split": (None, "AllGather"),
    "all_to_all": ("AlltoAll", "AlltoAll"),
}
# In the shard lowering the cotangents of replicated tensors are partial sums, see parallel/lowering/partitioner.py.
PARTITIONED = {**DIRECTIONS, "psum": ("AllReduce", "AllReduce"), "pvary": (None, None)}
FLOAT32 = 4  # bytes of a float32 or an int32


class Call(NamedTuple):
    """A collective over the ranks along `atoms`.

    phase: forward, backward or update. kind: such as AllReduce. elements: of the complete array, such as the gathered one of an all-gather.
    """

    phase: str
    kind: str
    atoms: tuple
    elements: int
    itemsize: int = FLOAT32

    def sent(self, mesh):
        """Returns the bytes that a rank sends in a ring: (n - 1) / n of the array; twice that for an all-reduce. It receives as many."""
        n = mesh.size(self.atoms)
        return (2 if self.kind == "AllReduce" else 1) * (n - 1) * self.elements * self.itemsize // n


class Watched(Sharding):
    """A Sharding on one device that counts the runs and the cotangents of its ops.

    layout: the Sharding whose communication is computed; shards() is that of layout.
    bound: the ops, in the order of binding. seen: Counter of (index in `bound`, event). An event is ("run",) for a run, and ("operand", i)
    or ("result", i) for a cotangent.
    """

    def __init__(self, layout):
        super().__init__()
        self.layout, self.bound, self.seen = layout, [], Counter()

    def shards(self, dim):
        return self.layout.shards(dim)

    def placement(self, spec, path=""):
        return ((),) * len(spec.shape)

    def op(self, fn, signature, *, kind, wrap=None, reduce="sum", dtype=None, around=None, **_):
        operands, results = parse(signature)
        place = len(self.bound)
        self.bound.append((operands, [results], kind, reduce, dtype, around))
        if kind == "elementwise":
            return wrapped(fn, wrap)
        return self._watching(place, wrapped(fn, wrap), len(operands))

    def fan(self, make, operand, signatures, *, kind, wrap=None):
        parsed = [parse(f"{operand}, {signature}") for signature in signatures]
        place, fns = len(self.bound), [wrapped(make(), wrap) for _ in signatures]
        operands = [parsed[0][0][0], *(each[1] for each, _ in parsed)]
        self.bound.append((operands, [results for _, results in parsed], kind, "sum", None, None))
        return self._watching(place, lambda x, *ws: tuple(fn(x, w) for fn, w in zip(fns, ws)), 1 + len(fns))

    def _watching(self, place, fn, count):
        def watched(*args):
            self.seen[place, ("run",)] += 1
            args = [self._cell(place, ("operand", i))(x) if i < count and _differentiable(x) else x for i, x in enumerate(args)]
            out = fn(*args)
            each = out if isinstance(out, tuple) else (out,)
            each = tuple(self._cell(place, ("result", i))(y) if _differentiable(y) else y for i, y in enumerate(each))
            return each if isinstance(out, tuple) else each[0]

        return watched

    def _cell(self, place, step):
        return _Cotangent(lambda: self.seen.update([(place, step)]))


class _Cotangent(nn.Cell):
    """The identity. Its backward calls `note`."""

    def __init__(self, note):
        super().__init__()
        self.note = note

    def construct(self, x):
        return x * 1

    def bprop(self, x, out, dout):
        self.note()
        return (dout,)


def _differentiable(x):
    return getattr(x, "dtype", None) is not None and x.is_floating_point()


def of_ops(layout, bound, seen, sizes, itemsize):
    """Returns the Counter of the Calls of watched ops in a layout.

    bound, seen: of Watched. sizes: {dim: global size} of the dims that collectives have. itemsize: of the compute dtype.
    """
    out, directions = Counter(), PARTITIONED if layout.lowering == "shard" else DIRECTIONS
    for place, (operands, results, kind, reduce, dtype, around) in enumerate(bound):
        if kind == "elementwise" or not seen[place, ("run",)]:
            continue
        if around:
            runs = seen[place, ("run",)], seen[place, ("result", 0)]
            out += _rounds(layout, *around, operands, runs, sizes, itemsize)
        for what, i, part, steps in _sides(layout, operands, results, kind, reduce):
            item = FLOAT32 if dtype and what == "result" else _itemsize(layout, part, itemsize)
            again = 0  # the gathers of a fan that its backward repeats, for the gradients of its weights
            if layout.gathers_again and len(results) > 1 and (what, i) == ("operand", 0):
                again = max(seen[place, ("operand", 1 + k)] for k in range(len(results)))
            for name, atoms, complete in _payloads(layout, part, steps, what):
                if again and name == "all_gather":
                    elements = math.prod(-(-_size(sizes, dim) // n) for dim, n in complete)
                    out[Call("backward", "AllGather", atoms, elements, item)] += again
                forward, backward = directions[name] if name != "sliced" else ("AllGather", None)
                for phase, kind, step in (("forward", forward, ("run",)), ("backward", backward, (what, i))):
                    if kind and seen[place, step]:
                        elements = math.prod(-(-_size(sizes, dim) // n) for dim, n in complete)
                        out[Call(phase, kind, atoms, elements, item)] += seen[place, step]
    return out


def _rounds(layout, dim, numbers, operands, runs, sizes, itemsize):
    """Returns the Counter of the Calls by which ring attention passes operands around the ranks of a dim.

    With n ranks the forward passes the operands n - 1 times. The backward passes them n - 1 times, and their float32 gradients n times.
    Each is an all-gather, see collectives.ppermute. runs: (runs of the forward, runs of the backward).
    """
    atoms, (forward, backward) = layout.atoms(dim), runs
    n = layout.mesh.size(atoms)
    parts = [operands[i] for i in numbers]
    each = [math.prod(-(-_size(sizes, used) // layout.shards(used)) for _, used in part) for part in parts]
    assert len(set(each)) == 1, "operands that are passed around together have one shape"
    call = Call("forward", "AllGather", atoms, n * sum(each), _itemsize(layout, parts[0], itemsize))
    again = call._replace(phase="backward")
    out = Counter({call: (n - 1) * forward, again: (n - 1) * backward})
    out[again._replace(itemsize=FLOAT32)] += n * backward
    return out


def _sides(layout, operands, results, kind, reduce):
    """Yields ("operand" or "result", index, its dims, its Steps) for an op or a fan. The first operand of a fan is yielded once."""
    if len(results) == 1:
        enters, leaves = op_steps(layout, operands, results[0], kind, reduce)
        yield from (("operand", i, part, steps) for i, (part, steps) in enumerate(zip(operands, enters)))
        yield from (("result", i, part, steps) for i, (part, steps) in enumerate(zip(results[0], leaves)))
        return
    for i, each in enumerate(results):
        pair = [operands[0], operands[1 + i]]
        (_, weight), (leave,) = op_steps(layout, pair, each, kind, reduce)
        if i == 0:
            yield "operand", 0, operands[0], entering(layout, operands[0], varying(layout, pair, each))
        yield "operand", 1 + i, operands[1 + i], weight
        yield "result", i, each[0], leave


def _payloads(layout, part, steps, what):
    """Yields (name, atoms, [(dim, shards)] of the complete array) for each Step."""
    split_over = [set(layout.atoms(arrives)) for arrives, _ in part]
    for name, atoms, args in steps:
        before = list(map(set, split_over))
        if name == "all_gather":
            split_over[args[0]] -= set(atoms)
        elif name in ("reduce_scatter", "split"):
            split_over[args[0]] |= set(atoms)
        elif name == "all_to_all":
            split_over[args[0]] |= set(atoms)
            split_over[args[1]] -= set(atoms)
        complete = split_over if name == "all_gather" else before
        sliced = name == "all_gather" and args[1] == "slice"
        yield "sliced" if sliced else name, atoms, [(arrives, layout.mesh.size(split)) for (arrives, _), split in zip(part, complete)]


def _size(sizes, dim):
    assert dim in sizes, f"the size of dim {dim!r}, which a collective has, is not known"
    return sizes[dim]


def _itemsize(layout, part, itemsize):
    """Returns the bytes of an element: those of the compute dtype for activations with embed, head_dim or rank, else 4 (float32, int32)."""
    dims = {dim for dim, _ in part}
    of_data = any(axis[:2] in DATA for dim in dims for axis in layout.rules[dim])
    return itemsize if of_data and dims & {"embed", "head_dim", "rank"} else FLOAT32


def of_update(layout, placed, micro_batches=1, itemsize=FLOAT32):
    """Returns the Counter of the Calls of the update: gradient sums, all-gathers of updated parameters, and the norm of the gradient.

    itemsize: of the compute dtype, in which MindSpore's partitioner gathers parameters.
    """
    if layout.lowering == "shard":
        return _of_partitioned_update(layout, placed, micro_batches, itemsize)
    out, mesh = of_sums(layout, placed, micro_batches), layout.mesh
    for atoms, split, elements, _ in _bucket_sizes(mesh, placed):
        if split and layout.zero < 3:
            out[Call("update", "AllGather", atoms, elements)] += 1
    if mesh.world > 1:
        out[Call("update", "AllReduce", tuple(mesh.sizes), 1)] += 1
    if micro_batches > 1 and layout.data_atoms:
        out[Call("update", "AllReduce", layout.data_atoms, micro_batches)] += 1
    return out


def _of_partitioned_update(layout, placed, micro_batches, itemsize):
    """Returns the Calls of of_update in the shard lowering.

    In each micro-batch MindSpore sums the gradient of each parameter over all ranks with a copy, with a reduce-scatter if the parameter is
    stored as shards. The norm is computed as in the manual lowering.
    """
    out, mesh = Counter(), layout.mesh
    for p in placed:
        split = {atom for atoms in p.used for atom in atoms}
        replicas = tuple(atom for atom in mesh.sizes if atom not in split)
        if replicas:
            kind = "AllReduce" if p.stored == p.used else "ReduceScatter"
            out[Call("update", kind, replicas, math.prod(local_shape(mesh, p.spec, p.used)))] += 1
    out += times(partitioned_gathers(mesh, placed, itemsize), 2 if layout.zero == 3 else 1)  # stage 3 gathers again for the backward
    norm = Counter({Call("update", "AllReduce", tuple(mesh.sizes), 1): 1} if mesh.world > 1 else {})
    return times(out, micro_batches) + norm


def partitioned_gathers(mesh, placed, itemsize):
    """Returns the Counter of the Calls by which MindSpore all-gathers sharded parameters: each once, after the cast to the dtype of use."""
    out = Counter()
    for p in placed:
        if p.stored != p.used:
            (atoms,) = (more[len(has) :] for has, more in zip(p.used, p.stored) if has != more)
            in_float32 = p.path == "embed" or "router" in p.spec.dims
            elements = math.prod(local_shape(mesh, p.spec, p.used))
            out[Call("update", "AllGather", atoms, elements, ITEMSIZE[p.spec.dtype] if in_float32 else itemsize)] += 1
    return out


def of_sums(layout, placed, micro_batches):
    """Returns the Counter of the Calls of the gradient sums."""
    out = Counter()
    for atoms, split, elements, _ in _bucket_sizes(layout.mesh, placed):
        times = micro_batches if layout.zero >= 2 else 1
        if not (split and layout.zero == 3):
            out[Call("update", "ReduceScatter" if split else "AllReduce", atoms, elements)] += times
    return out


def of_gathered(layout, placed):
    """Returns the Counter of the Calls of ZeRO stage 3 for these parameters, which one place of the model gathers."""
    out = Counter()
    for atoms, split, elements, itemsize in _bucket_sizes(layout.mesh, placed):
        if split and layout.zero == 3:  # in the shard lowering zero_dim is None, since MindSpore gathers
            out[Call("forward", "AllGather", atoms, elements, itemsize)] += 1
            out[Call("backward", "ReduceScatter", atoms, elements, itemsize)] += 1
    return out


def of_whole_matrices(mesh, placed):
    """Returns the Counter of the Calls of matrices.on_whole for a parameter: of the exchanges, one there and one back."""
    out = Counter()
    for move in matrices.moves(mesh, local_shape(mesh, placed.spec, placed.state), placed.state):
        out[Call("update", move.kind, (move.atom,), move.elements)] += 2 if move.kind == "AlltoAll" else 1
    return out


def _bucket_sizes(mesh, placed):
    for atoms, split, places in zero.buckets(mesh, placed):
        elements = sum(math.prod(local_shape(mesh, placed[i].spec, placed[i].used)) for i in places)
        yield atoms, split, elements, ITEMSIZE[placed[places[0]].spec.dtype]


def times(calls, n):
    """Returns the Counter of calls that are repeated n times."""
    return Counter({call: count * n for call, count in calls.items()})


def again(calls, n=2):
    """Returns the forward calls that the backward of a scanned layer repeats: once for the inputs of all layers, once for the gradient.

    This is an upper bound: a graph leaves out calls whose result it does not need, such as the last sum of a layer in its recomputation.
    """
    return Counter({call._replace(phase="backward"): count * n for call, count in calls.items() if call.phase == "forward"})
