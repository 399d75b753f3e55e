"""Annotated ops: each op that touches a sharded dim says which logical dims its operands and its result have.

    linear = sharding.op(ops.MatMul(), "rows>tokens embed, embed heads -> tokens heads", kind="contraction")

An operand or result is a list of dims; `a>b` says that the dim arrives as `a` and is used, or leaves, as `b`, which is where
a layout change happens. RULES maps a dim to mesh axes, and from the signature alone follow the collectives, forward and
backward. On one device every annotation is the identity and `op` returns the function itself.
"""

import difflib

from parallel.mesh import ONE_DEVICE

# Logical dim -> the mesh axes it is split over, outermost first.
# rows are the flattened [batch, seq] rows of the residual stream; tokens the same rows where a layer needs all of a tp group's.
RULES = {
    "batch": ("dp",),
    "seq": ("cp",),
    "keys": (),
    "rows": ("dp", "cp"),
    "tokens": ("dp", "cp"),
    "embed": (),
    "heads": ("tp",),
    "kv": ("tp",),
    "head_dim": (),
    "half": (),
    "ffn": ("tp",),
    "vocab": ("tp",),
    "experts": ("ep",),
    "expert_ffn": ("tp",),
    "router": (),
    "blocks": (),
    "block_rows": (),
    "slots": (),
    "assignments": (),
    "choice": (),
    "stats": (),
    "one": (),
}
KINDS = ("elementwise", "contraction", "reduction", "kernel")


def parse(signature):
    """ "a>b c, c d -> b d" -> ([[("a", "b"), ("c", "c")], ...operands], [...results]); without an arrow, results is []."""
    left, arrow, right = signature.partition("->")

    def side(text):
        return [[_move(word) for word in part.split()] for part in text.split(",")]

    return side(left), side(right) if arrow else []


def _move(word):
    arrives, _, used = word.partition(">")
    return arrives, used or arrives


class Sharding:
    """A mesh and the rules; `op` binds a function to its signature. check: verify every call's shapes (eager; for tests)."""

    def __init__(self, mesh=ONE_DEVICE, rules=RULES, check=False):
        self.mesh, self.rules, self.check = mesh, rules, check

    def op(self, fn, signature, *, kind, call=None):
        """The function `fn`, annotated.

        fn: a MindSpore primitive or a function of tensors. kind: what fn does with the dims (KINDS).
        call(fn, *args): how to call a primitive that wants casts or constants. Arguments after the annotated operands pass through.
        Raises ValueError for a signature that the kind does not allow.
        """
        operands, results = parse(signature)
        self._validate(signature, kind, operands, results)
        bound = fn if call is None else _bind(call, fn)
        return _checked(bound, signature, operands, results) if self.check else bound

    def _validate(self, signature, kind, operands, results):
        def fail(why):
            raise ValueError(f"op {signature!r} ({kind}): {why}")

        if kind not in KINDS:
            fail(f"kind is not one of {', '.join(KINDS)}")
        for dim in {d for part in operands + results for move in part for d in move}:
            if dim not in self.rules:
                near = difflib.get_close_matches(dim, self.rules, 1)
                fail(f"dim {dim!r} is not in RULES" + (f"; did you mean {near[0]!r}?" if near else ""))
        for part in operands + results:
            axes = [axis for _, used in part for axis in self.rules[used]]
            if len(axes) != len(set(axes)):
                fail(f"a mesh axis is used twice in {' '.join(used for _, used in part)!r}")
        used = [{b for _, b in part} for part in operands]
        left = [{a for a, _ in part} for part in results]
        if kind == "elementwise" and (results or len(operands) != 1 or any(a != b for a, b in operands[0])):
            fail("an elementwise op has one list of dims, which all its operands and its result share")
        if kind in ("contraction", "reduction"):
            if len(results) != 1 or (kind == "reduction" and len(operands) != 1):
                fail(f"a {kind} has one result" + (" and one operand" if kind == "reduction" else ""))
            if any(self.rules[dim] for dim in left[0] - set.union(*used)):
                fail("a dim of the result that no operand has must be one that is never sharded")
            if not set.union(*used) - left[0]:
                fail("nothing is summed: every dim of the operands is in the result")
        if kind == "kernel" and not results:
            fail("a kernel names its results")


def _bind(call, fn):
    def bound(*args):
        return call(fn, *args)

    return bound


def _checked(fn, signature, operands, results):
    """fn, with every call's ranks and sizes compared with the signature."""
    elementwise = not results

    def checked(*args):
        tensors = args if elementwise else args[: len(operands)]
        parts = operands * len(tensors) if elementwise else operands
        sizes = {}
        for part, x in zip(parts, tensors):
            _match(signature, [used for _, used in part], x, sizes)
        out = fn(*args)
        for part, y in zip(operands if elementwise else results, out if isinstance(out, tuple) else (out,)):
            _match(signature, [arrives for arrives, _ in part], y, sizes)
        return out

    return checked


def _match(signature, dims, x, sizes):
    if not hasattr(x, "shape"):
        return
    assert len(dims) == len(x.shape), f"{signature!r}: {dims} against shape {x.shape}"
    for dim, n in zip(dims, x.shape):
        known = sizes.setdefault(dim, n)
        assert n == known, f"{signature!r}: dim {dim!r} is {known} and {n}"
