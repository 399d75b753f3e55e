"""The sum of gradients over the data axes, and ZeRO: optimizer state, gradients and parameters split over the data parallel ranks.

Source: Rajbhandari et al. 2020. Stage 1 splits the optimizer state, 2 the summed gradients too, 3 the parameters too, which are
then gathered where a layer uses them, and whose gradients come back split. A parameter is split along one of its dims, so that a
part is a block of the global array; one that no dim allows stays whole. Gradients and parameters travel in buckets.
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
    """f(flat gradients) -> flat, each summed over its data axes and, from stage 1 on, cut to the part that `placed` calls its state.

    placed: the flat list of Placed. For use inside a compiled function.
    """
    mesh, lines, names = sharding.mesh, [], {}
    done = [f"g[{i}]" for i in range(len(placed))]
    for k, (atoms, split, bucket) in enumerate(buckets(mesh, placed)):
        if sharding.zero == 3 and split:
            continue  # summed by the backward of gathered()
        pack, unpack = (_pack_parts, _unpack_parts) if split else (_pack_whole, _unpack_whole)
        scatters = split and sharding.zero == 2
        names[f"sum{k}"] = (collectives.reduce_scatter if scatters else collectives.psum)(mesh, atoms)
        lines += [f"b{k} = sum{k}({pack(mesh, placed, bucket, 'used', done)})"]
        if split and not scatters:
            names[f"part{k}"] = collectives.split(mesh, atoms)
            lines += [f"b{k} = part{k}(b{k})"]
        for i, text in unpack(mesh, placed, bucket, f"b{k}", "state"):
            done[i] = text
    return _flat_function("sum_gradients(g)", lines, done, names)


def split_params(sharding, placed):
    """f(flat parameters as the model uses them) -> this rank's parts, whose optimizer state it has; all of them where those are one."""
    names, done = {}, [f"g[{i}]" for i in range(len(placed))]
    for i, p in enumerate(placed):
        if p.stored != p.state:
            names[f"part{i}"] = collectives.split(sharding.mesh, p.partial, p.zero_dim)
            done[i] = f"part{i}(g[{i}])"
    return _flat_function("split_params(g)", [], done, names)


def join_params(sharding, placed):
    """The inverse of split_params, in buckets."""
    done = [f"g[{i}]" for i in range(len(placed))]
    lines, names = _gather(sharding.mesh, placed, done) if sharding.zero < 3 else ([], {})
    return _flat_function("join_params(g)", lines, done, names)


def written_back(placed, returned):
    """f(flat parameters, flat new ones) -> the new ones, of which those that ZeRO splits are changed in place, but for the places in
    `returned`: the old array has the new values. They have to depend on all that reads the old ones."""
    written = {i for i, p in enumerate(placed) if p.stored != p.state and i not in returned}
    each = [f"depend(old[{i}], copy(old[{i}], new[{i}]))" if i in written else f"new[{i}]" for i in range(len(placed))]
    text = f"({', '.join(each)},)" if written else "new"
    return function("written_back(old, new)", [f"return {text}"], depend=ops.depend, copy=InplaceCopy())


def gathered(sharding, specs):
    """f(tree of stored parameters) -> the tree as ops use it: gathered in stage 3, else the tree itself. Backward: reduce-scattered."""
    placed = place(sharding, specs)
    flat = tree_leaves(placed)
    if sharding.lowering == "shard" or all(p.stored == p.used for p in flat):  # MindSpore's partitioner gathers by itself
        return identity
    done = [f"tree{at}" for at in subscripts(placed)]
    lines, names = _gather(sharding.mesh, flat, done)
    return function("gathered(tree)", [*lines, f"return {expression(unflatten(specs, done))}"], **names, **PRIMITIVES)


def _gather(mesh, placed, done):
    """(lines, names) that gather the parts that ZeRO makes of parameters. done: the source of each, replaced by that of the whole."""
    lines, names = [], {}
    for k, (atoms, split, bucket) in enumerate(buckets(mesh, placed)):
        if split:
            names[f"gather{k}"] = collectives.all_gather(mesh, atoms)
            lines += [f"b{k} = gather{k}({_pack_parts(mesh, placed, bucket, 'state', done)})"]
            for i, text in _unpack_parts(mesh, placed, bucket, f"b{k}", "used"):
                done[i] = text
    return lines, names


def global_norm_squared(sharding, placed, counted):
    """f(flat summed gradients) -> the squared norm of the whole gradient, on every rank. counted: the places that take part."""
    mesh = sharding.mesh
    shares = []
    for i in counted:
        split = mesh.size({atom for atoms in placed[i].state for atom in atoms})
        stages = len(placed[i].holders) or mesh.pp
        copies = mesh.world // mesh.pp * stages // split
        shares.append(f"total(square(cast(g[{i}], float32)), ())" + (f" / {copies}" if copies > 1 else ""))
    names = {**PRIMITIVES, "sum_all": collectives.psum(mesh, tuple(mesh.sizes)) if mesh.world > 1 else identity}
    return function("norm_squared(g)", [f"return sum_all(add(({', '.join(shares)},)))"], **names)


def _flat_function(head, lines, done, names):
    if not names:  # no collective: nothing to do
        return identity
    return function(head, [*lines, f"return ({''.join(text + ', ' for text in done)})"], **names, **PRIMITIVES)


def buckets(mesh, placed):
    """[(data atoms, whether ZeRO splits these, places)]: what can travel together, in order, up to the size of a bucket."""
    out, sizes = [], []
    for i, p in enumerate(placed):
        if not p.partial:
            continue
        key, size = (p.partial, p.zero_dim is not None), math.prod(local_shape(mesh, p.spec, p.used))
        trains = p.spec.trains  # frozen parameters travel by themselves, so that the backward can leave them out
        fits = [
            k for k, b in enumerate(out) if b[:2] == key and placed[b[2][0]].spec.trains == trains and sizes[k] + size <= BUCKET_ELEMENTS
        ]
        if fits:
            out[fits[-1]][2].append(i)
            sizes[fits[-1]] += size
        else:
            out.append((*key, [i]))
            sizes.append(size)
    return out


def _pack_whole(mesh, placed, bucket, axes, source):
    return "concat0((" + "".join(f"reshape({source[i]}, (-1,)), " for i in bucket) + "))"


def _unpack_whole(mesh, placed, bucket, name, axes):
    start = 0
    for i in bucket:
        shape = local_shape(mesh, placed[i].spec, placed[i].used)
        stop = start + math.prod(shape)
        yield i, f"reshape({name}[{start}:{stop}], {shape})"
        start = stop


def _pack_parts(mesh, placed, bucket, axes, source):
    """[parts, elements]: of each leaf its dim to split in front, cut in as many parts as `axes` has of them."""
    rows = [mesh.size(placed[i].partial) if axes == "used" else 1 for i in bucket]
    return "concat1((" + "".join(f"reshape({_to_front(placed[i], source[i])}, ({n}, -1)), " for i, n in zip(bucket, rows)) + "))"


def _unpack_parts(mesh, placed, bucket, name, axes):
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
