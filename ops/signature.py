"""Checks the arguments of an op: the names, dtypes and dims of its tensors, when it is called or while a graph is compiled.

    require = check("embedding", "w V D; ids int32 R")
    require((w.shape, ids.shape), (w.dtype, ids.dtype))     # ValueError: embedding: ids is int64 and has to be int32

An argument is a name, a dtype and dims. Without a dtype it may have any dtype of `floats`; `same` is the dtype of the first argument. A
named dim has one size in all arguments. `H/2` is half of H, `R*k` a product, `...` any number of dims and `*` any shape. A scalar has no
dims.
"""

import itertools

from mindspore import ops

FLOATS = ("float32", "float16", "bfloat16")
DTYPES = FLOATS + ("float64", "int32", "int8", "same")

_numbers = itertools.count()
listeners = []  # functions (op, shapes, dtypes) that are called on each check; in a graph, once for each kind of call


def check(op, text, floats=FLOATS, **conditions):
    """Returns require(shapes, dtypes), for the first line of an op. In a graph it runs while the graph is compiled. See Signature."""
    signature = Signature(op, text, floats, **conditions)

    def require(shapes, dtypes):
        signature.check_shapes(shapes)
        signature.check_dtypes(dtypes)
        for hear in listeners:
            hear(op, shapes, dtypes)
        return True

    return ops.constexpr(require, name=f"check_{op}_{next(_numbers)}")


class Signature:
    """The parsed arguments of an op.

    op: its name in errors. divides: ("K", "N") if the size of K has to divide that of N. least: {dim: its smallest size}.
    """

    def __init__(self, op, text, floats=FLOATS, divides=(), least=None):
        self.op, self.floats, self.divides, self.least = op, floats, divides, least or {}
        self.arguments = [_argument(part.split()) for part in text.split(";")]

    def check_shapes(self, shapes):
        """Raises ValueError with the name of the argument, its shape and the shape it has to have."""
        sizes = {}
        given = list(zip(self.arguments, map(tuple, shapes), strict=True))
        for (name, _, dims), shape in sorted(given, key=_is_derived):  # products come last, when their factors are known
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
        """Raises ValueError with the name of the argument, its dtype and the dtypes it may have. dtypes: MindSpore's."""
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
    return str(dtype).lower().split("[")[-1].rstrip("]")  # in a graph it is Tensor[Float32], or Ref[Tensor[Float32]] for a Parameter


def _fits(dims, shape, sizes):
    """Whether a shape has these dims. Adds the sizes of new dims to `sizes`."""
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
    """Returns the size that a dim has to have. A new name takes the size `found`."""
    if dim.isdigit():
        return int(dim)
    if dim.endswith("/2"):
        return sizes[dim[:-2]] / 2
    if "*" in dim:
        a, b = dim.split("*")
        return sizes[a] * sizes[b]
    return sizes.setdefault(dim, found)


def _wanted(dims, sizes):
    """Returns the text of dims with their sizes, where known: "[B, S] = [2, 5]"."""
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
