"""Annotated ops: each op that touches a sharded dim says which logical dims its operands and its result have.

    linear = sharding.op(ops.MatMul(), "rows>tokens embed, embed heads -> tokens heads", kind="contraction")

An operand or result is a list of dims; `a>b` says that the dim arrives as `a` and is used, or leaves, as `b`, which is where
a layout change happens. RULES maps a dim to mesh axes, and from the signature alone follow the collectives, forward and
backward (parallel/lowering/manual.py). On one device every annotation is the identity and `op` returns the function itself.

One sum is left out of the ops: a parameter's gradient over the data axes, dp and cp. It is partial over those of them that the
parameter is not split over, and parallel/zero.py sums it once, in buckets. So a term of the loss that does not come from the batch, such
as a penalty on a weight, has to be divided by the number of data parallel ranks.
"""

import copy
from functools import cached_property

from mindspore import ops

from parallel.hints import divisors, nearest
from parallel.lowering import manual
from parallel.lowering import partitioner as shard
from parallel.mesh import ONE_DEVICE, Mesh

# Logical dim -> the mesh axes it is split over, outermost first; `tp-kv` and the like are parts of axes, see Mesh.
# rows are the flattened [batch, seq] rows of the residual stream, which sequence parallel splits over tp too; tokens the same rows where a
# layer needs all of a tp group's; expert_rows the same where experts are split over tp. kv is a dim of weights, and kv_heads of
# activations, in which every tp rank has a kv head of its own, if need be the same as its neighbour's. vocab_parts are the ranks that share
# the vocabulary: what each has found in its part of it.
# Attention sees a span of a row, the tokens of the ranks that exchange heads for them, or, of segments and orders, all keys.
# Between the rank that a token is on and the ranks of its experts: `sent` slots `to_shard` of experts become `received` slots of a `shard`.
# Those, the assignments of tokens to experts, and blocks of slots are each rank's own, as are the partial sums over a split expert_ffn.
RULES = {
    "layers": (),
    "layers_before": (),
    "layers_so_far": (),
    "batch": ("dp",),
    "seq": ("cp",),
    "span": ("cp-ul",),
    "keys": (),
    "new_keys": (),
    "rows": ("dp", "cp"),
    "tokens": ("dp", "cp"),
    "embed": (),
    "heads": ("tp",),
    "kv": ("tp-kv",),
    "kv_heads": ("tp",),
    "span_heads": ("cp/ul", "tp"),
    "span_kv_heads": ("cp/ul", "tp"),
    "head_dim": (),
    "half": (),
    "ffn": ("tp",),
    "vocab": ("tp",),
    "vocab_parts": ("tp",),
    "whole_vocab": (),
    "experts": ("ep",),
    "expert_ffn": ("tp-ep",),
    "expert_rows": ("dp", "cp"),
    "to_shard": (),
    "shard": ("ep",),
    "sent": ("dp", "cp", "tp"),
    "received": ("dp-ep", "cp-ep", "tp-ep"),
    "assignments": ("dp", "cp", "tp"),
    "blocks": ("dp", "cp", "tp"),
    "block_rows": (),
    "part_ffn": (),
    "router": (),
    "choice": (),
    "rank": (),
    "stats": (),
    "router_stats": (),
    "one": (),
}
SEQ_PARALLEL_RULES = {**RULES, "rows": ("dp", "cp", "tp"), "expert_rows": ("dp", "cp", "tp/ep")}
PADDED = ("vocab",)  # dims whose last shard may have elements that are in no parameter
# dims of a result that each rank may make for itself, though no operand is split
OWN = ("kv_heads", "vocab_parts", "assignments", "blocks", "sent", "shard", "received")
KINDS = ("elementwise", "contraction", "reduction", "kernel")
DATA = ("dp", "cp")
EVERY_AXIS = Mesh(pp=2, dp=6, cp=12, tp=12, ep=16, kv_repeat=4, ulysses=2)  # every part of every axis has ranks here


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
    """A mesh and the rules; `op` binds a function to its signature. check: verify every call's shapes (eager, one device; for tests)."""

    def __init__(self, mesh=ONE_DEVICE, rules=None, *, seq_parallel=False, zero=0, lowering="manual", check=False):
        self.mesh, self.rules, self.check = mesh, rules or (SEQ_PARALLEL_RULES if seq_parallel else RULES), check
        self.zero, self.lowering = zero, lowering
        self.partial = False  # whether cotangents of what ranks hold alike are partial sums, as inside the regions of shard.py
        self.in_region = False  # whether the ops are within a region, whose tensors the global view does not know

    def op(self, fn, signature, *, kind, wrap=None, part=None, reduce="sum", sizes=None, dtype=None, around=None):
        """Returns the function `fn` of exactly the annotated operands, between the collectives that the signature asks for.

        fn: a MindSpore primitive or a function of tensors. kind: how fn treats the dims (KINDS). An elementwise op has one list of dims;
        a contraction or a reduction is summed over the axes that its result lacks (reduce="max": the largest is taken); a kernel is not
        summed, so its results lack none. wrap(fn) -> the function that calls a primitive with the casts and constants it wants.
        part: (dim, its global size, wrap_part), for an op that must know which shard of a dim it has: where the dim is split,
        wrap_part(fn, first), with the global index of the shard's first element, takes the place of wrap(fn).
        sizes: {dim: size} of the dims of results that no operand has. dtype: of the results (a tuple: of each), where it is not the first
        operand's. Only the shard lowering needs these two. around: (dim, numbers of operands) that fn sends round the ranks of the dim,
        and their gradients in the backward (parallel/context/ring.py), for parallel/simulation/traffic.py.
        Raises ValueError for a signature that the kind does not allow.
        """
        operands, results = parse(signature)
        self._validate(signature, kind, operands, results)
        by_hand = None
        if part and self.shards(part[0]) > 1:
            dim, size, wrap_part = part
            by_hand = wrap_part(fn, self.mesh.index(self.rules[dim]) * -(-size // self.shards(dim)))
        if self.lowering == "shard":
            return shard.lower(self, fn, wrap, by_hand, operands, results, kind, reduce, sizes, dtype)
        called = by_hand or manual.wrapped(fn, wrap)
        if self.check:
            asked = not self.in_region and (part is not None or not isinstance(fn, ops.Primitive))
            called = _checked(called, signature, operands, results, sizes, dtype, asked)
        return manual.lower(self, called, operands, results, kind, reduce)

    def region(self, fn, signature, *, sizes=None, dtype=None):
        """Returns `fn`, a function whose ops the sharding inside() annotates, as one op with this signature, which moves nothing.

        For ops between which each rank has tensors of its own, of sizes that the global view does not know. The shard lowering gives
        MindSpore's partitioner all of them as one op; elsewhere this is fn itself. Raises ValueError for a signature that names unknown
        dims, or moves one.
        """
        operands, results = parse(signature)
        self._validate(signature, "region", operands, results, region=True)  # its sums are checked op by op
        if moved := [f"{a}>{b}" for part in operands + results for a, b in part if a != b]:
            raise ValueError(f"op {signature!r} (region): {moved[0]!r} moves, which is for the ops inside")
        if self.lowering == "shard":
            return shard.region(self, fn, operands, results, sizes, dtype)
        return _checked(fn, signature, operands, results, sizes, dtype, asked=not self.in_region) if self.check else fn

    def inside(self):
        """Returns the sharding that annotates the ops within a region."""
        if self.in_region or (self.lowering != "shard" and not self.check):
            return self
        out = copy.copy(self)
        out.in_region = True
        if self.lowering == "shard":
            out.lowering, out.partial = "manual", True
        return out

    def fan(self, make, operand, signatures, *, kind, wrap=None):
        """Returns f(x, w0, w1, ...) -> a tuple of one result for each of `signatures`: ops that share x and its collectives.

        operand: the dims of x; signatures: those of each op without its first operand. make() gives the function of one of them. kind and
        wrap are those of `op`.
        """
        parsed = [parse(f"{operand}, {signature}") for signature in signatures]
        for signature, (operands, results) in zip(signatures, parsed):
            self._validate(f"{operand}, {signature}", kind, operands, results)
        fns = [make() for _ in signatures]
        if self.lowering == "shard":
            return shard.lower_fan(self, fns, wrap, parsed)
        called = [manual.wrapped(fn, wrap) for fn in fns]
        if self.check:
            called = [_checked(f, f"{operand}, {s}", *p) for f, s, p in zip(called, signatures, parsed)]
        return manual.lower_fan(self, tuple(called), parsed)

    def shards(self, dim):
        """How many parts a dim is cut into."""
        return self.mesh.size(self.rules[dim])

    @cached_property
    def data_atoms(self):
        return self.mesh.atoms(DATA)

    def atoms(self, dim):
        """The mesh's atoms that a dim is split over, outermost first."""
        return self.mesh.atoms(self.rules[dim])

    def placement(self, spec, path=""):
        """For each dim of a ParamSpec the atoms it is split over. Raises ValueError, naming `path`, where it cannot be split so."""
        seen = {}
        for i, (dim, size) in enumerate(zip(spec.dims, spec.shape)):
            if dim not in self.rules:
                raise ValueError(f"{path}: dim {dim!r} is not in RULES{nearest(dim, self.rules)}")
            for axis in self.rules[dim]:
                if axis in seen:
                    raise ValueError(f"{path}: dims {seen[axis]!r} and {dim!r} are both split over {axis}; change one of them in RULES")
                seen[axis] = dim
            self._check_divides(path, dim, spec.parts_of(i), size)
        return tuple(self.atoms(dim) for dim in spec.dims)

    def _check_divides(self, path, dim, parts, size):
        n = self.shards(dim)
        if dim in PADDED or parts % n == 0:
            return
        of = f"{parts}" if parts == size else f"{parts} parts of {size // parts}"
        raise ValueError(
            f"{path}: dim {dim!r} has {of}, which the {n} ranks of {'+'.join(self.rules[dim])} do not divide; use {divisors(parts)}"
        )

    def _validate(self, signature, kind, operands, results, region=False):
        def fail(why):
            raise ValueError(f"op {signature!r} ({kind}): {why}")

        if kind not in KINDS and not region:
            fail(f"kind is not one of {', '.join(KINDS)}")
        for dim in {d for part in operands + results for move in part for d in move}:
            if dim not in self.rules:
                fail(f"dim {dim!r} is not in RULES{nearest(dim, self.rules)}")
        if kind == "elementwise":
            if results or len(operands) != 1 or any(a != b for a, b in operands[0]):
                fail("an elementwise op has one list of dims, which all its operands and its result share")
        elif not results:
            fail("it names no result")
        if kind in ("contraction", "reduction") and (len(results) != 1 or (kind == "reduction" and len(operands) != 1)):
            fail(f"a {kind} has one result" + (" and one operand" if kind == "reduction" else ""))
        # sequence parallel splits more: what it would refuse is refused with or without it
        for rules in (self.rules,) if self.rules is not RULES else (RULES, SEQ_PARALLEL_RULES):
            _check_axes(fail, rules, kind, operands, results)


def _check_axes(fail, rules, kind, operands, results):
    """An op may neither lose nor double a sum, on a mesh where every axis, and every part of one, is split."""

    def atoms(dim):
        return set(EVERY_AXIS.atoms(rules[dim]))

    for part in operands + results:
        for side in zip(*part):
            if sum(len(atoms(dim)) for dim in side) > len(set().union(*map(atoms, side))):
                fail(f"a mesh axis is used twice in {' '.join(side)!r}")
    used = {b for part in operands for _, b in part}
    for part in results:
        left = {a for a, _ in part}
        for dim in left - used:
            if atoms(dim) and dim not in OWN:
                fail(f"dim {dim!r} of the result is split, and no operand has it")
        kept = set().union(*map(atoms, left))
        for dim in sorted(used):
            if atoms(dim) - kept and kind == "kernel":
                fail(f"the result is split less than dim {dim!r} of an operand, and a kernel is not summed; make it a contraction")
            if atoms(dim) - kept and dim in left:
                fail(f"a mesh axis of dim {dim!r} is lost")
        if kind in ("contraction", "reduction") and not used - left:
            fail("nothing is summed: every dim of the operands is in the result")


def _checked(fn, signature, operands, results, stated_sizes=None, dtype=None, asked=False):
    """fn, with every call's ranks, sizes and stated dtypes compared with the signature. asked: whether the shard lowering needs to be told
    what is not the operands': then what is not stated is an error."""
    elementwise = not results

    def checked(*args):
        tensors = args if elementwise else args[: len(operands)]
        parts = operands * len(tensors) if elementwise else operands
        sizes = {"one": 1, **(stated_sizes or {})}
        for part, x in zip(parts, tensors):
            _match(signature, [used for _, used in part], x, sizes)
        told = set(sizes) | {copy for copy, of in shard.COPIES.items() if of in sizes}
        out = fn(*args)
        each = out if isinstance(out, tuple) else (out,)
        for part, y in zip(operands if elementwise else results, each):
            _match(signature, [arrives for arrives, _ in part], y, sizes)
        for y, stated in zip(each, dtype if isinstance(dtype, tuple) else (dtype,) * len(each)):
            known = stated or (args[0].dtype if asked else y.dtype)
            assert y.dtype == known, f"{signature!r}: a result is {y.dtype}, not {known}; say so in the op's dtype="
        new = {arrives for part in results for arrives, _ in part} - told
        assert not (asked and new), f"{signature!r}: no operand has dims {sorted(new)}; say their size in the op's sizes="
        return out

    return checked


def _match(signature, dims, x, sizes):
    if not hasattr(x, "shape"):
        return
    assert len(dims) == len(x.shape), f"{signature!r}: {dims} against shape {x.shape}"
    for dim, n in zip(dims, x.shape):
        known = sizes.setdefault(dim, n)
        assert n == known, f"{signature!r}: dim {dim!r} is {known} and {n}"
