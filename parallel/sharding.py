"""Annotated ops: the signature of each op that touches a sharded dim names the logical dims of its operands and its result.

    linear = sharding.op(ops.MatMul(), "rows>tokens embed, embed heads -> tokens heads", kind="contraction")

An operand or result is a list of dims. `a>b` in an operand changes the layout of that dim from `a` to `b` before the function runs, and in
a result from `a` to `b` after it. In the example, sequence parallel splits `rows` over tp and leaves `tokens` whole on each tp rank, so
`rows>tokens` is an all-gather over tp. RULES maps each dim to mesh axes. The signature and the rules alone determine the collectives of the
forward and the backward (parallel/lowering/manual.py). On one device `op` returns the function itself.

The ops do not sum the gradient of a parameter over the data axes, dp and cp. parallel/zero.py sums it over those data axes that the
parameter is not split over, once, in buckets. So a term of the loss that does not depend on the batch, such as a penalty on a weight, is
added by every data parallel rank and has to be divided by their number.
"""

import copy
from functools import cached_property

from mindspore import ops

from parallel.hints import divisors, nearest
from parallel.lowering import manual
from parallel.lowering import partitioner as shard
from parallel.mesh import ONE_DEVICE, Mesh

# Logical dim -> the mesh axes it is split over, outermost first. Sub-axes such as `tp-kv` are described in Mesh.
# Residual stream: `rows` is batch and seq flattened into one dim. Sequence parallel splits it over tp too; `tokens` is that dim where a
# layer needs the rows of all tp ranks, and `expert_rows` is that dim at the experts, which may themselves be split over tp.
# Heads: `kv` is the dim of weights. `kv_heads` is the dim of activations, in which each tp rank has its own kv heads; with fewer kv heads
# than tp ranks, neighbours have copies of one head.
# Vocabulary: `vocab_parts` has one element a vocabulary shard, such as the largest logit of each; `whole_vocab` is all entries.
# Context parallel: `span` is the tokens whose heads a rank computes after the exchange of heads for tokens; `keys` is all tokens of a row.
# Paged cache: `pages` of `page_slots` tokens; each data rank has its own. `row_pages` is the pages of one row.
# `documents` is the numbers that say where the documents of a row end; `answers` is its packed answers, of which training on preferences
# sums the tokens.
# Experts: all-to-all turns send buffers indexed by target rank, [to_shard, sent], into receive buffers indexed by source rank, [shard,
# received]. Each rank has its own buffers, its own `assignments` of tokens to experts and its own `blocks` of slots. `part_ffn` is
# the ffn dim of its slots, as wide as its shard of the weights' `expert_ffn`.
RULES = {
    "layers": (),
    "layers_before": (),
    "layers_so_far": (),
    "batch": ("dp",),
    "seq": ("cp",),
    "span": ("cp-ul",),
    "keys": (),
    "new_keys": (),
    "documents": (),
    "answers": (),
    "pages": ("dp", "cp"),
    "page_slots": (),
    "row_pages": (),
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
PADDED = ("vocab",)  # dims whose last shard may be padded
# dims that may be split in a result although no operand has them: each rank computes its own
OWN = ("kv_heads", "vocab_parts", "assignments", "blocks", "sent", "shard", "received")
KINDS = ("elementwise", "contraction", "reduction", "kernel")
DATA = ("dp", "cp")
EVERY_AXIS = Mesh(pp=2, dp=6, cp=12, tp=12, ep=16, kv_repeat=4, ulysses=2)  # a mesh on which every sub-axis is larger than 1


def parse(signature):
    """Parses a signature: "a>b c, c d -> b d" gives ([[("a", "b"), ("c", "c")], [("c", "c"), ("d", "d")]], [[("b", "b"), ("d", "d")]]).

    Each dim is a pair (layout before, layout after). Without an arrow the list of results is empty.
    """
    left, arrow, right = signature.partition("->")

    def side(text):
        return [[_move(word) for word in part.split()] for part in text.split(",")]

    return side(left), side(right) if arrow else []


def _move(word):
    arrives, _, used = word.partition(">")
    return arrives, used or arrives


class Sharding:
    """A mesh with the rules. `op` binds a function to a signature.

    zero: the ZeRO stage. lowering: "manual" or "shard". documents: the most documents that a row of a batch may have, if attention takes
    them by their lengths; 0: attention compares the segment ids of queries and keys. The caller checks each batch (check_documents of
    parallel/context/split.py). gathers_again: what an all-gather brings to several weights (see fan) is not kept for the backward, which
    gathers it again. check: verifies the shapes of every call; for tests, eager on one device.
    """

    def __init__(
        self, mesh=ONE_DEVICE, rules=None, *, seq_parallel=False, zero=0, lowering="manual", documents=0, gathers_again=False, check=False
    ):
        assert documents == 0 or documents >= 2, documents
        self.mesh, self.rules, self.check = mesh, rules or (SEQ_PARALLEL_RULES if seq_parallel else RULES), check
        self.documents = documents
        self.zero, self.lowering = zero, lowering if mesh.world > 1 else "manual"  # one rank has nothing to partition
        self.gathers_again = gathers_again
        self.partial = False  # whether the cotangent of a replicated tensor is a partial sum on each rank, see lowering/partitioner.py
        self.in_region = False  # whether the ops are inside region()

    def op(self, fn, signature, *, kind, wrap=None, part=None, reduce="sum", sizes=None, dtype=None, around=None):
        """Returns a function of the annotated operands that runs `fn` between the collectives of the signature.

        fn: a MindSpore primitive or a function of tensors.
        kind: one of KINDS. An elementwise op has one list of dims, for all operands and the result. The result of a contraction or a
            reduction is summed over the mesh axes that its operands are split over and it is not (reduce="max" takes the maximum). A kernel
            sums nothing, so its results keep all those axes.
        wrap: wrap(fn) returns the function that calls a primitive with its casts and constants.
        part: (dim, global size, wrap_part), for an op that must know which shard of the dim it has, such as an embedding with a split
            vocabulary. Where the dim is split, wrap_part(fn, first) replaces wrap(fn); `first` is the global index of the first element
            of the shard.
        sizes: {dim: size} of the dims of results that no operand has. Only the shard lowering needs it.
        dtype: the dtype of the results, or a tuple of one a result, where it is not that of the first operand. Only the shard lowering
            needs it.
        around: (dim, numbers of operands), for ring attention: fn passes these operands around the ranks of the dim, and in the backward
            their gradients too. parallel/simulation/traffic.py counts them.
        Raises ValueError for a signature that the kind does not allow.
        """
        operands, results = parse(signature)
        self._validate(signature, kind, operands, results)
        of_shard = None
        if part and self.shards(part[0]) > 1:
            dim, size, wrap_part = part
            of_shard = wrap_part(fn, self.mesh.index(self.rules[dim]) * -(-size // self.shards(dim)))
        if self.lowering == "shard":
            return shard.lower(self, fn, wrap, of_shard, operands, results, kind, reduce, sizes, dtype)
        called = of_shard or manual.wrapped(fn, wrap)
        if self.check:
            asked = not self.in_region and (part is not None or not isinstance(fn, ops.Primitive))
            called = _checked(called, signature, operands, results, sizes, dtype, asked)
        return manual.lower(self, called, operands, results, kind, reduce)

    def region(self, fn, signature, *, sizes=None, dtype=None):
        """Returns `fn`, whose ops are annotated by the sharding inside(), as one op with this signature.

        A region is for ops between which each rank has tensors of sizes that only it knows, such as the slots of experts. The shard
        lowering gives all of them to MindSpore's partitioner as one op; the manual lowering returns fn itself. The signature changes no
        layout. Raises ValueError for a signature that names unknown dims or changes the layout of one.
        """
        operands, results = parse(signature)
        self._validate(signature, "region", operands, results, region=True)  # the ops inside check their own sums
        if moved := [f"{a}>{b}" for part in operands + results for a, b in part if a != b]:
            raise ValueError(f"op {signature!r} (region): {moved[0]!r} changes a layout; change it in an op inside the region")
        if self.lowering == "shard":
            return shard.region(self, fn, operands, results, sizes, dtype)
        return _checked(fn, signature, operands, results, sizes, dtype, asked=not self.in_region) if self.check else fn

    def inside(self):
        """Returns the sharding for the ops inside a region."""
        if self.in_region or (self.lowering != "shard" and not self.check):
            return self
        out = copy.copy(self)
        out.in_region = True
        if self.lowering == "shard":
            out.lowering, out.partial = "manual", True
        return out

    def fan(self, make, operand, signatures, *, kind, wrap=None):
        """Returns f(x, w0, w1, ...) -> a tuple of results, one a signature: several ops that share the operand x and its collectives.

        For example, the projections to q, k and v share one all-gather of x. operand: the dims of x. signatures: of each op, without its
        first operand. make(): returns the function of one op. kind, wrap: see `op`.
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
        """Returns the number of shards of a dim."""
        return self.mesh.size(self.rules[dim])

    @cached_property
    def data_atoms(self):
        """The atoms of the data axes, dp and cp."""
        return self.mesh.atoms(DATA)

    def atoms(self, dim):
        """Returns the atoms that a dim is split over, outermost first."""
        return self.mesh.atoms(self.rules[dim])

    def placement(self, spec, path=""):
        """Returns for each dim of a ParamSpec the atoms it is split over. Raises ValueError, with `path`, where a dim does not divide."""
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
        # sequence parallel splits more dims: a signature that it refuses is refused without it too
        for rules in (self.rules,) if self.rules is not RULES else (RULES, SEQ_PARALLEL_RULES):
            _check_axes(fail, rules, kind, operands, results)


def _check_axes(fail, rules, kind, operands, results):
    """Fails for a signature in which a sum over a mesh axis would be lost or counted twice, on the mesh EVERY_AXIS."""

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
    """Returns fn with assertions that the ranks, sizes and dtypes of every call fit the signature.

    asked: whether the shard lowering needs sizes= and dtype= for what no operand has; if so, a missing one fails too.
    """
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
