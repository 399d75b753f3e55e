"""Gradient sums over the data axes, and ZeRO, which shards optimizer state, gradients and parameters over the data parallel ranks.

Stage 1 shards the optimizer state, stage 2 the summed gradients too, and stage 3 the parameters too. Stage 3 all-gathers parameters where a
layer uses them and reduce-scatters their gradients. A parameter is sharded along one of its dims, so that a shard is a block of the global
array; a parameter of which no dim divides stays replicated. Gradients and parameters are communicated in buckets.
Source: Rajbhandari et al. 2020.
"""

import math

import mindspore as ms
from mindspore import ops
from mindspore.ops.auto_generate import InplaceCopy

from ops.identity import identity
from parallel import collectives
from parallel.graph.nested import expression, subscripts
from parallel.graph.source import function
from parallel.placement import local_shape, place
from parallel.trees import tree_leaves, unflatten

BUCKET_ELEMENTS = 1 << 24  # of float32, 64 MiB


def sum_gradients(sharding, placed):
    """Returns f(flat gradients) -> flat gradients, summed over their data axes. From stage 1 on they are reduce-scattered, so that a rank
    gets its shard of each.

    placed: the flat list of Placed; `state` gives the shard of each. f is for use inside a compiled function.
    """
    mesh, lines, names = sharding.mesh, [], {}
    done = [f"g[{i}]" for i in range(len(placed))]
    for k, (atoms, split, bucket) in enumerate(buckets(mesh, placed)):
        if sharding.zero == 3 and split:
            continue  # summed by the backward of gathered()
        pack, unpack = (_pack_shards, _unpack_shards) if split else (_pack_whole, _unpack_whole)
        names[f"sum{k}"] = (collectives.reduce_scatter if split else collectives.psum)(mesh, atoms)
        lines += [f"b{k} = sum{k}({pack(mesh, placed, bucket, 'used', done)})"]
        for i, text in unpack(mesh, placed, bucket, f"b{k}", "state"):
            done[i] = text
    return _flat_function("sum_gradients(g)", lines, done, names)


def split_params(sharding, placed):
    """Returns f(flat stored parameters) -> flat. Parameters whose optimizer state is sharded further become this rank's shards of it."""
    names, done = {}, [f"g[{i}]" for i in range(len(placed))]
    for i, p in enumerate(placed):
        if p.stored != p.state:
            names[f"part{i}"] = collectives.split(sharding.mesh, p.partial, p.zero_dim)
            done[i] = f"part{i}(g[{i}])"
    return _flat_function("split_params(g)", [], done, names)


def join_params(sharding, placed):
    """Returns f, which undoes split_params: all-gathers the shards, in buckets. In stage 3 parameters stay shards."""
    done = [f"g[{i}]" for i in range(len(placed))]
    lines, names = _gather(sharding.mesh, placed, done) if sharding.zero < 3 else ([], {})
    return _flat_function("join_params(g)", lines, done, names)


def written_back(placed, returned):
    """Returns f(flat old parameters, flat new parameters) -> flat new parameters.

    New values that were gathered from ZeRO shards are copied into the memory of the old ones, which saves a second array; not those whose
    index is in `returned`. The caller makes the new values depend on everything that reads the old ones.
    """
    copied = {i for i, p in enumerate(placed) if p.stored != p.state and i not in returned}
    each = [f"depend(old[{i}], copy(old[{i}], new[{i}]))" if i in copied else f"new[{i}]" for i in range(len(placed))]
    text = f"({', '.join(each)},)" if copied else "new"
    return function("written_back(old, new)", [f"return {text}"], depend=ops.depend, copy=InplaceCopy())


def gathered(sharding, specs):
    """Returns f(tree of stored parameters) -> the tree that the ops use: all-gathered in ZeRO stage 3, else unchanged.

    The backward reduce-scatters the gradients of what was gathered.
    """
    placed = place(sharding, specs)
    flat = tree_leaves(placed)
    if sharding.lowering == "shard" or all(p.stored == p.used for p in flat):  # MindSpore's partitioner gathers by itself
        return identity
    # On CPU a graph neither reshapes nor transposes bfloat16, in which frozen parameters may be.
    on_cpu = ms.get_context("device_target") == "CPU"
    done = [
        f"cast(tree{at}, float32)" if on_cpu and p.stored != p.used else f"tree{at}" for at, p in zip(subscripts(placed), flat, strict=True)
    ]
    lines, names = _gather(sharding.mesh, flat, done)
    return function("gathered(tree)", [*lines, f"return {expression(unflatten(specs, done))}"], **names, **PRIMITIVES)


def _gather(mesh, placed, done):
    """Returns (lines, names) of a function that all-gathers ZeRO shards.

    done: the source text of each parameter; those of shards are replaced by those of gathered arrays.
    """
    lines, names = [], {}
    for k, (atoms, split, bucket) in enumerate(buckets(mesh, placed)):
        if split:
            names[f"gather{k}"] = collectives.all_gather(mesh, atoms)
            lines += [f"b{k} = gather{k}({_pack_shards(mesh, placed, bucket, 'state', done)})"]
            for i, text in _unpack_shards(mesh, placed, bucket, f"b{k}", "used"):
                done[i] = text
    return lines, names


def global_norm_squared(sharding, placed, counted):
    """Returns f(flat summed gradients) -> the squared norm of the global gradient, on every rank.

    counted: the indices of the gradients to take. Each rank adds its shards, divided by the number of ranks with a copy, over all ranks.
    """
    mesh = sharding.mesh
    shares = []
    for i in counted:
        shards = mesh.size({atom for atoms in placed[i].state for atom in atoms})
        stages = len(placed[i].holders) or mesh.pp
        copies = mesh.world // mesh.pp * stages // shards
        shares.append(f"total(square(cast(g[{i}], float32)), ())" + (f" / {copies}" if copies > 1 else ""))
    names = {**PRIMITIVES, "sum_all": collectives.psum(mesh, tuple(mesh.sizes)) if mesh.world > 1 else identity}
    return function("norm_squared(g)", [f"return sum_all(add(({', '.join(shares)},)))"], **names)


def _flat_function(head, lines, done, names):
    if not names:  # no collectives
        return identity
    return function(head, [*lines, f"return ({''.join(text + ', ' for text in done)})"], **names, **PRIMITIVES)


def buckets(mesh, placed):
    """Returns [(data atoms, whether ZeRO shards these, indices in `placed`)], one a bucket of at most BUCKET_ELEMENTS where that can be.

    The gradients of a bucket are communicated as one array, so they have equal atoms.
    """
    out, sizes = [], []
    for i, p in enumerate(placed):
        if not p.partial:
            continue
        key, size = (p.partial, p.zero_dim is not None), math.prod(local_shape(mesh, p.spec, p.used))
        fits = [k for k, b in enumerate(out) if b[:2] == key and _kind(placed[b[2][0]]) == _kind(p) and sizes[k] + size <= BUCKET_ELEMENTS]
        if fits:
            out[fits[-1]][2].append(i)
            sizes[fits[-1]] += size
        else:
            out.append((*key, [i]))
            sizes.append(size)
    return out


def _kind(p):
    """Returns what all parameters of a bucket share: one dtype, and whether they train, as the backward leaves out frozen ones."""
    return p.spec.trains, p.spec.dtype


def _pack_whole(mesh, placed, bucket, axes, source):
    return "concat0((" + "".join(f"reshape({source[i]}, (-1,)), " for i in bucket) + "))"


def _unpack_whole(mesh, placed, bucket, name, axes):
    start = 0
    for i in bucket:
        shape = local_shape(mesh, placed[i].spec, placed[i].used)
        stop = start + math.prod(shape)
        yield i, f"reshape({name}[{start}:{stop}], {shape})"
        start = stop


def _pack_shards(mesh, placed, bucket, axes, source):
    """Returns source text that packs a bucket into one array [shards, elements].

    The dim that ZeRO splits is moved to the front of each leaf. axes: "used" for leaves of all shards, "state" for leaves of one.
    """
    rows = [mesh.size(placed[i].partial) if axes == "used" else 1 for i in bucket]
    return "concat1((" + "".join(f"reshape({_to_front(placed[i], source[i])}, ({n}, -1)), " for i, n in zip(bucket, rows)) + "))"


def _unpack_shards(mesh, placed, bucket, name, axes):
    start = 0
    for i in bucket:
        p = placed[i]
        shape, rows = local_shape(mesh, p.spec, getattr(p, axes)), mesh.size(p.partial) if axes == "used" else 1
        stop = start + math.prod(shape) // rows
        front = (shape[p.zero_dim], *shape[: p.zero_dim], *shape[p.zero_dim + 1 :])
        yield i, _from_front(p, f"reshape({name}[:, {start}:{stop}], {front})")
        start = stop


def _to_front(p, text):
    rest = [d for d in range(len(p.spec.shape)) if d != p.zero_dim]
    return text if p.zero_dim == 0 else f"transpose({text}, {(p.zero_dim, *rest)})"


def _from_front(p, text):
    d, n = p.zero_dim, len(p.spec.shape)
    return text if d == 0 else f"transpose({text}, {(*range(1, d + 1), 0, *range(d + 1, n))})"


PRIMITIVES = {
    "float32": ms.float32,
    "reshape": ops.Reshape(),
    "transpose": ops.Transpose(),
    "concat0": ops.Concat(0),
    "concat1": ops.Concat(1),
    "total": ops.ReduceSum(),
    "add": ops.AddN(),
    "square": ops.Square(),
    "cast": ops.Cast(),
}
