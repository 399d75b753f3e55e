"""What an op may be called with: the names, dtypes and dims of its tensors, checked on entry, eagerly or while a graph is compiled.

    require = check("embedding", "w V D; ids int32 R")
    require((w.shape, ids.shape), (w.dtype, ids.dtype))     # ValueError: embedding: ids is int64 and has to be int32

An argument is a name, a dtype and dims. Without a dtype it is one of `floats`; `same` is that of the first argument. A dim with a name has
one size wherever it comes; `H/2` is half of H, `R*k` a product, `...` any dims in its place, and `*` any shape; a scalar has no dims.
"""

import itertools

from mindspore import ops

FLOATS = ("float32", "float16", "bfloat16")
DTYPES = FLOATS + ("float64", "int32", "same")

_numbers = itertools.count()
listeners = []  # f(op, shapes, dtypes) of who wants to know what ops are called with, in a graph once for each kind of call


def check(op, text, floats=FLOATS, **conditions):
    """require(shapes, dtypes), for the first line of an op: in a graph, run while it is compiled. See Signature."""
    signature = Signature(op, text, floats, **conditions)

    def require(shapes, dtypes):
        signature.check_shapes(shapes)
        signature.check_dtypes(dtypes)
        for hear in listeners:
            hear(op, shapes, dtypes)
        return True

    return ops.constexpr(require, name=f"check_{op}_{next(_numbers)}")


class Signature:
    """op: its name in errors. divides: ("K", "N") where the size of K has to divide that of N. least: {"E": k}, the least size of E."""

    def __init__(self, op, text, floats=FLOATS, divides=(), least=None):
        self.op, self.floats, self.divides, self.least = op, floats, divides, least or {}
        self.arguments = [_argument(part.split()) for part in text.split(";")]

    def check_shapes(self, shapes):
        """Raises ValueError, naming the argument, what it is and what it has to be."""
        sizes = {}
        given = list(zip(self.arguments, map(tuple, shapes), strict=True))
        for (name, _, dims), shape in sorted(given, key=_is_derived):  # a product is known after its factors
            if not _fits(dims, shape, sizes):
                raise ValueError(f"{self.op}: {name} is {list(shape)} and has to be {_wanted(dims, sizes)}")
        for dim, size in self.least.items():
            if sizes[dim] < size:
                raise ValueError(f"{self.op}: {dim} is {sizes[dim]} and has to be at least {size}")
        if self.divides:
            small, large = self.divides
            if sizes[large] % sizes[small]:
                raise ValueError(f"{self.op}: {small} has to divide {large}, and they are {sizes[small]} and {sizes[large]}")

    def check_dtypes(self, dtypes):
        """The same for dtypes, MindSpore's."""
        first = _name(dtypes[0])
        for (name, dtype, _), found in zip(self.arguments, dtypes):
            allowed = self.floats if dtype is None else (first,) if dtype == "same" else (dtype,)
            if _name(found) not in allowed:
                raise ValueError(f"{self.op}: {name} is {_name(found)} and has to be {' or '.join(allowed)}")


def _argument(words):
    name, *dims = words
    stated = dims and dims[0] in DTYPES
    return name, dims[0] if stated else None, dims[1:] if stated else dims


def _is_derived(given):
    (_, _, dims), _ = given
    return any("*" in dim[1:] for dim in dims)


def _name(dtype):
    return str(dtype).lower().split("[")[-1].rstrip("]")  # graphs say Tensor[Float32], and of a Parameter Ref[Tensor[Float32]]


def _fits(dims, shape, sizes):
    """Whether a shape has these dims, whose sizes are noted."""
    if dims == ["*"]:
        return True
    if "..." in dims:
        at = dims.index("...")
        end = at + len(shape) - len(dims) + 1
        if end < at or sizes.setdefault("...", shape[at:end]) != shape[at:end]:
            return False
        dims, shape = dims[:at] + dims[at + 1 :], shape[:at] + shape[end:]
    if len(dims) != len(shape):
        return False
    return [_size(dim, n, sizes) for dim, n in zip(dims, shape)] == list(shape)


def _size(dim, found, sizes):
    """What a dim's size has to be, given what was found; a new name takes that."""
    if dim.isdigit():
        return int(dim)
    if dim.endswith("/2"):
        return sizes[dim[:-2]] / 2
    if "*" in dim:
        a, b = dim.split("*")
        return sizes[a] * sizes[b]
    return sizes.setdefault(dim, found)


def _wanted(dims, sizes):
    """[B, S] = [2, 5], as far as sizes are known."""
    known = []
    for dim in dims:
        if dim == "...":
            known += map(str, sizes.get("...", ("...",)))
        elif dim.isidentifier():
            known.append(str(sizes.get(dim, dim)))
        else:
            known.append(f"{_size(dim, None, sizes):g}")
    text = f"[{', '.join(dims)}]"
    return text if known == dims else f"{text} = [{', '.join(known)}]"
