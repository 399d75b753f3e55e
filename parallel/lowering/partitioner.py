"""The shard lowering of an annotated op: MindSpore's partitioner splits a program of global arrays over the ranks. Ascend only.

A primitive that MindSpore's partitioner knows gets the layouts of its operands, and MindSpore inserts the collectives. Any other op is a
region, as in JAX's shard_map: the manual lowering of the op on local shards, for which MindSpore gets the layouts of operands and results.
Between ops, MindSpore changes the layout of each tensor to that of its next user.

In MindSpore's backward the cotangent of a replicated tensor is a partial sum on each rank. At the end MindSpore sums the gradient of a
Parameter over all ranks that have a copy of it, data parallel ranks included. So the collectives inside a region have the backward of
MindSpore's primitives, and pvary is the identity.
"""

import inspect

from mindspore import ops
from mindspore.parallel import Layout

from parallel.graph.source import function
from parallel.lowering import manual

ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Exp", "Log1p", "Maximum", "OnesLike", "Softmax")
COUNTED = ("ReduceSum", "ReduceMax", "GatherD", "TopK")  # take no Layout, but the number of shards of each dim
JOINS = ("Concat", "Stack")  # their operand is a tuple of tensors
KNOWN = ELEMENTWISE + COUNTED + JOINS + ("MatMul", "BatchMatMul", "Transpose")
COPIES = {"kv_heads": "kv"}  # if the first has more shards than the second, neighbouring ranks have copies of one kv head


def lower(sharding, fn, wrap, of_shard, operands, results, kind, reduce, sizes, dtype):
    """Returns the annotated op of `fn` in the global view. Arguments are those of Sharding.op.

    of_shard: the function that calls fn on a shard, if that needs the index of the shard's first element; else None.
    """
    if of_shard is None and _is_known(sharding, fn, results):
        return manual.wrapped(_primitive(sharding, fn, operands, results, kind), wrap)
    local = manual.lower(sharding.inside(), of_shard or manual.wrapped(fn, wrap), operands, results, kind, reduce)
    if kind == "elementwise":
        operands, results = operands * _arity(fn), operands
    return region(sharding, local, operands, results, sizes, dtype)


def lower_fan(sharding, fns, wrap, parsed):
    """Returns f(x, *ws) -> (fns[0](x, ws[0]), ...). parsed: (operands, results) of each; x is the first operand."""
    if all(_is_known(sharding, fn, results) for fn, (_, results) in zip(fns, parsed)):
        return manual.fan([manual.wrapped(_primitive(sharding, fn, *each, "contraction"), wrap) for fn, each in zip(fns, parsed)])
    local = manual.lower_fan(sharding.inside(), [manual.wrapped(fn, wrap) for fn in fns], parsed)
    operands = [parsed[0][0][0]] + [part for each, _ in parsed for part in each[1:]]
    return region(sharding, local, operands, [results[0] for _, results in parsed])


def region(sharding, local, operands, results, sizes=None, dtype=None):
    """Returns `local`, a function of local shards, as one op of global arrays. `a>b` in the signature happens inside `local`."""
    shapes, dtypes = _shapes(sharding, operands, results, sizes or {}), _dtypes(len(results), dtype)
    entering = tuple(layout(sharding, [arrives for arrives, _ in part]) for part in operands)
    leaving = tuple(layout(sharding, [used for _, used in part]) for part in results)
    names = ", ".join(f"x{i}" for i in range(len(operands)))
    fn = function(f"region({names})", [f"return local({names})"], local=local)  # Morph refuses a function of *args
    return _Region(sharding.mesh.pp > 1, fn, shapes, dtypes, entering, leaving)


def stored(mesh, shape, used):
    """Returns for each dim of a parameter the atoms that MindSpore's parallel optimizer splits it over between steps.

    MindSpore splits the first dim over all ranks with a copy of the shard, tensor parallel ranks included, if their number divides it; else
    the parameter is stored as it is used. shape: of the shard that ops use. used: for each dim the atoms of that shard.
    """
    split = {atom for atoms in used for atom in atoms}
    replicas = tuple(atom for atom in of_stage(mesh) if atom not in split)
    return used if shape[0] % mesh.size(replicas) else (used[0] + replicas, *used[1:])


def of_stage(mesh):
    """Returns {atom: size} of the ranks of a pipeline stage, outermost first: MindSpore's layouts know nothing of the other stages."""
    return {atom: size for atom, size in mesh.sizes.items() if atom not in mesh.atoms(("pp",))}


def layout(sharding, dims):
    """Returns MindSpore's Layout of a tensor with these dims. MindSpore crashes on the Layout of a scalar, so there must be a dim."""
    assert dims, "a region has no scalars: give them a dim `one`"
    each, sizes = [sharding.atoms(dim) for dim in dims], of_stage(sharding.mesh)
    device_mesh = Layout(tuple(sizes.values()), tuple(sizes))
    return device_mesh(*("None" if not atoms else atoms[0] if len(atoms) == 1 else atoms for atoms in each))


class _Region(ops.Morph):
    """MindSpore's Morph: a primitive that the compiler replaces by a function after partitioning and before differentiation."""

    substitute_name = "Morph"  # the compiler recognises it by this name

    def __init__(self, in_stage, local, shapes, dtypes, entering, leaving):
        super().__init__(local, _not_called, _not_called)
        self.__dict__.update(infer_shape=shapes, infer_dtype=dtypes)  # as arguments of Morph these would be compiled
        self.add_prim_attr("self_define_shard", True)  # MindSpore takes the given layouts
        self.shard(entering, leaving)
        if in_stage:  # an op with effects gets an input that has no type in the graph of a stage: "The pointer[abs] is null"
            for effect in ("side_effect_mem", "side_effect_io", "side_effect_backprop"):
                self.del_prim_attr(effect)
        self.given = in_stage, local, shapes, dtypes, entering, leaving

    def _clone(self):
        """MindSpore calls this for what it copies, such as the stages of a pipeline for each micro-batch."""
        return _Region(*self.given)


def _not_called(*args):
    return args


def _is_known(sharding, fn, results):
    """Whether MindSpore's partitioner can split this primitive with these results."""
    if not isinstance(fn, ops.Primitive) or fn.name not in KNOWN:
        return False
    moves = [(a, b) for part in results for a, b in part]
    copied = any(a in COPIES and sharding.shards(a) != sharding.shards(COPIES[a]) for a, _ in moves)
    scattered = [(sharding.atoms(a), set(sharding.atoms(b)) - set(sharding.atoms(a))) for a, b in moves]
    # MindSpore's MatMul scatters a dim over one more atom, if it is split already
    return not copied and all(len(more) <= (fn.name == "MatMul" and len(has) > 0) for has, more in scattered)


def _primitive(sharding, fn, operands, results, kind):
    """Returns fn with its layouts. They are attributes of the instance, so each op needs an instance of its own."""
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
    """Returns the number of tensors that an elementwise function takes."""
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
