"""The shard lowering of an annotated op: a program in the global view, which MindSpore's partitioner splits over the ranks. Ascend only.

A primitive for which MindSpore has a rule is told the layouts of its operands, and MindSpore finds the collectives. Everything else is a
region: the manual lowering of the op, on this rank's parts, of which MindSpore is told the layouts of what enters and leaves, as in JAX's
shard_map. Between ops, MindSpore brings each tensor into the layout that its next user states.

MindSpore's backward gives each rank that holds a tensor a cotangent of its own, the true one being their sum, and at the end sums the
gradient of a Parameter over all ranks that hold it, data parallel ones included. So the collectives of a region keep the backward of
their primitives, and pvary is the identity.
"""

import inspect

from mindspore import ops
from mindspore.parallel import Layout

from parallel.graph.source import function
from parallel.lowering import manual

ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Exp", "Log1p", "Maximum", "OnesLike", "Softmax")
COUNTED = ("ReduceSum", "ReduceMax", "GatherD", "TopK")  # refuse a Layout, and take the number of parts of each dim
JOINS = ("Concat", "Stack")  # take one tuple of tensors
KNOWN = ELEMENTWISE + COUNTED + JOINS + ("MatMul", "BatchMatMul", "Transpose")
COPIES = {"kv_heads": "kv"}  # where they are split differently, neighbouring parts of the first are the same part of the second


def lower(sharding, fn, wrap, by_hand, operands, results, kind, reduce, sizes, dtype):
    """Returns the callable for fn. wrap: see Sharding.op. by_hand: how a rank calls fn on its shards, or None if that is no different.

    sizes: {dim: size} of the dims of results that no operand has. dtype: of the results, or of each, where not that of the first operand.
    """
    if by_hand is None and _is_known(sharding, fn, results):
        return manual.wrapped(_primitive(sharding, fn, operands, results, kind), wrap)
    local = manual.lower(sharding.inside(), by_hand or manual.wrapped(fn, wrap), operands, results, kind, reduce)
    if kind == "elementwise":
        operands, results = operands * _arity(fn), operands
    return region(sharding, local, operands, results, sizes, dtype)


def lower_fan(sharding, fns, wrap, parsed):
    """f(x, *ws) -> (fns[0](x, ws[0]), ...). parsed: (operands, results) of each, the first operand x."""
    if all(_is_known(sharding, fn, results) for fn, (_, results) in zip(fns, parsed)):
        return manual.fan([manual.wrapped(_primitive(sharding, fn, *each, "contraction"), wrap) for fn, each in zip(fns, parsed)])
    local = manual.lower_fan(sharding.inside(), [manual.wrapped(fn, wrap) for fn in fns], parsed)
    operands = [parsed[0][0][0]] + [part for each, _ in parsed for part in each[1:]]
    return region(sharding, local, operands, [results[0] for _, results in parsed])


def region(sharding, local, operands, results, sizes=None, dtype=None):
    """local, a function of this rank's parts, as an op of the global view. Operands enter as they arrive, results as they leave."""
    shapes, dtypes = _shapes(sharding, operands, results, sizes or {}), _dtypes(len(results), dtype)
    entering = tuple(layout(sharding, [arrives for arrives, _ in part]) for part in operands)
    leaving = tuple(layout(sharding, [used for _, used in part]) for part in results)
    names = ", ".join(f"x{i}" for i in range(len(operands)))
    whole = function(f"region({names})", [f"return local({names})"], local=local)  # Morph refuses a function of *args
    return _Region(whole, shapes, dtypes).shard(entering, leaving)


def stored(mesh, shape, used):
    """For each dim of a parameter the atoms that it is split over between steps, by MindSpore's parallel optimizer: the first also over all
    ranks that use it alike, tensor parallel ones too, if they divide it; else as it is used. shape: of a part as ops use it."""
    split = {atom for atoms in used for atom in atoms}
    alike = tuple(atom for atom in mesh.sizes if atom not in split)
    return used if shape[0] % mesh.size(alike) else (used[0] + alike, *used[1:])


def layout(sharding, dims):
    """MindSpore's Layout of a tensor. A scalar has none: MindSpore crashes."""
    assert dims, "a region has no scalars: give them a dim `one`"
    each = [sharding.atoms(dim) for dim in dims]
    whole = Layout(tuple(sharding.mesh.sizes.values()), tuple(sharding.mesh.sizes))
    return whole(*("None" if not atoms else atoms[0] if len(atoms) == 1 else atoms for atoms in each))


class _Region(ops.Morph):
    """MindSpore's primitive for a function that is put in its place after partitioning, before differentiation."""

    substitute_name = "Morph"  # by which the compiler knows it

    def __init__(self, local, shapes, dtypes):
        super().__init__(local, _not_called, _not_called)
        self.__dict__.update(infer_shape=shapes, infer_dtype=dtypes)  # as arguments of Morph they would be compiled
        self.add_prim_attr("self_define_shard", True)  # the layouts are as stated

    def _clone(self):
        return self


def _not_called(*args):
    return args


def _is_known(sharding, fn, results):
    """Whether MindSpore has a rule for a primitive that covers this use of it."""
    if not isinstance(fn, ops.Primitive) or fn.name not in KNOWN:
        return False
    moves = [(a, b) for part in results for a, b in part]
    copied = any(a in COPIES and sharding.shards(a) != sharding.shards(COPIES[a]) for a, _ in moves)
    scattered = [set(sharding.atoms(b)) - set(sharding.atoms(a)) for a, b in moves]
    return not copied and all(len(atoms) <= (fn.name == "MatMul") for atoms in scattered)


def _primitive(sharding, fn, operands, results, kind):
    """fn, told its layouts. They become a part of the primitive, so an instance serves one op."""
    assert not {"in_layout", "in_strategy"} & set(fn.attrs), f"{fn.name}: this instance is annotated already; make another for this op"
    used = [[used for _, used in part] for part in (operands * _arity(fn) if kind == "elementwise" else operands)]
    if fn.name in COUNTED:
        return fn.shard(tuple(tuple(map(sharding.shards, dims)) for dims in used))
    entering = tuple(layout(sharding, dims) for dims in used)
    leaving = tuple(layout(sharding, [used for _, used in part]) for part in results)
    if fn.name in JOINS:
        return fn.add_prim_attr("self_define_shard", True).shard((entering,), leaving)
    moved = any(sharding.atoms(a) != sharding.atoms(b) for part in results for a, b in part)
    return fn.shard(entering, leaving if moved else None)


def _arity(fn):
    """How many tensors an elementwise function takes."""
    if isinstance(fn, ops.Primitive):
        return len(fn.attrs.get("input_names") or inspect.signature(fn.__call__).parameters)
    return len(inspect.signature(fn).parameters)


def _shapes(sharding, operands, results, sizes):
    def shapes(*args):
        known = {"one": 1, **sizes}
        for part, shape in zip(operands, args):
            known.update((dim, n) for move, n in zip(part, shape) for dim in move)
        for dim, copied in COPIES.items():
            if copied in known and dim not in known:
                known[dim] = known[copied] * sharding.shards(dim) // sharding.shards(copied)
        for dim in [arrives for part in results for arrives, _ in part]:
            assert dim in known, f"dim {dim!r} of a result is in no operand; give its size to the op, sizes={{{dim!r}: ...}}"
        each = tuple(tuple(known[arrives] for arrives, _ in part) for part in results)
        return each[0] if len(each) == 1 else each

    return shapes


def _dtypes(n, dtype):
    given = dtype if isinstance(dtype, tuple) else (dtype,) * n

    def dtypes(*args):
        each = tuple(one or args[0] for one in given)
        return each[0] if n == 1 else each

    return dtypes
