"""The cases of the stage `ops`: small arguments of odd sizes for every function of every op.

R rows, D model, F ffn, V vocabulary, E experts, k experts a token; B rows of S queries and T keys, N heads on K kv heads of size H; P pages
of C tokens.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from ops import sampling as sampling_op

FLOATS = ("float32", "bfloat16", "float16")
# Largest error of values and of gradients, as a share of the largest number of the array, by dtype. float32: sums in another order.
# The others: what is rounded is the result, and once or twice what it is made of; bfloat16 keeps 8 bits and float16 11. The emulated
# kernels stay within a third of them.
TOLERANCES = {"float32": (2e-5, 5e-5), "bfloat16": (1e-2, 2e-2), "float16": (1.5e-3, 3e-3)}
R, D, F, V, E, k = 37, 48, 80, 67, 8, 2
B, S, T, N, K, H = 2, 13, 29, 4, 2, 16
P, C, EPS = 6, 4, 1e-6


@dataclass(frozen=True)
class Case:
    """A function of an op, with arguments.

    function: as ops.registry.pick takes it. inputs: float32 arrays that take the dtype of the check, and of which there are gradients.
    others: arrays that keep theirs. make(factory) -> the function. gradient: whether it has one. in_place: whether it changes arguments.
    dtypes: of the check. more: properties of the use, for ops.registry.choose.
    """

    op: str
    inputs: tuple
    others: tuple = ()
    function: str = ""
    make: object = None
    gradient: bool = True
    in_place: bool = False
    dtypes: tuple = FLOATS
    more: tuple = ()

    @property
    def name(self):
        return f"{self.op}.{self.function}" if self.function else self.op


def cases():
    """Returns all cases, {name: Case}."""
    found = [*_of_rows(), *_of_attention(), *_of_vocabulary(), *_of_experts(), *_of_updates(), *_of_decoding()]
    return {case.name: case for case in found}


def with_options(*options):
    """Returns make(factory) -> factory(*options)."""
    return partial(_call, options)


def _call(options, factory):
    return factory(*options)


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(0, 1, shape).astype(np.float32)


def _angles(*leading):
    angle = np.arange(int(np.prod(leading)), dtype=np.float32).reshape(*leading, 1, 1) * (0.3 ** np.arange(H // 2, dtype=np.float32))
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def _of_rows():
    eps, heads, turns = with_options(EPS), normal(B, S, N, H), _angles(B, S)
    return [
        Case("rms_norm", (normal(R, D), normal(D)), make=eps),
        Case("rms_norm", (normal(R, D), normal(R, D) + 1, normal(D)), function="add", make=eps),
        Case("rope", (heads,), turns),
        Case("rope", (heads, normal(H)), turns, "norm", eps),
        Case("swiglu", (normal(R, F), normal(R, F) + 1)),
        Case("matmul", (normal(R, D), normal(D, F))),
        Case("rows_matmul", (normal(R, D), normal(D, F)), gradient=False),
    ]


def _documents():
    """Returns segments and orders of packed rows: documents of odd lengths, whose tokens see those before them."""
    place = np.tile(np.arange(S, dtype=np.int32), (B, 1))
    segment = (1 + (place >= 5) + (place >= 9 + np.arange(B)[:, None])).astype(np.int32)
    return segment, segment, place, place


def _of_attention():
    q, keys = normal(B, S, N, H), (normal(B, S, K, H), normal(B, S, K, H) + 1)
    scale, ends = with_options(H**-0.5), np.array([[5, 9, S], [5, 10, S]], np.int32)
    return [
        Case("attention", (q, *keys), _documents(), make=scale, more=(("head_dim", H),)),
        Case("attention", (q, *keys), (ends,), "packed", scale, more=(("head_dim", H),)),
    ]


def _of_vocabulary():
    ids, first = np.random.default_rng(0).integers(0, V, R).astype(np.int32), 11
    logits, draws = normal(R, V), np.linspace(0.01, 0.99, R, dtype=np.float32)
    return [
        Case("cross_entropy", (logits,), (ids,), make=partial(_from, 0), dtypes=FLOATS[:1]),
        Case("embedding", (normal(V, D),), (ids,)),
        Case("embedding", (normal(V, D),), (ids + 5,), "part", partial(_from, first)),
        Case("head_loss", (normal(R, D), normal(V, D)), (ids,), dtypes=FLOATS[:1]),
        Case("sampling", (), (logits, draws, sampling_op.options(R, 0.8, 9, 0.9, 0.02)), gradient=False, dtypes=FLOATS[:1]),
    ]


def _from(first, factory):
    """Returns the function with its first argument, the first id of a shard of the vocabulary."""
    function = factory()

    def call(x, ids):
        return function(first, x, ids)

    return call


def _chosen():
    """Returns the experts of each token, int32 [R, k]: distinct ones, unevenly many of each."""
    return np.argsort(normal(R, E) + np.linspace(0, 1, E), 1)[:, :k].astype(np.int32)


def _of_experts():
    expert, n = _chosen(), R * k
    group, slot = np.sort(expert.ravel()), np.argsort(np.argsort(expert.ravel(), kind="stable")).astype(np.int32)
    rows, weight, padded = (normal(n, 1, D) + 1, np.abs(normal(R, k)), np.random.default_rng(1).integers(0, R + 1, (9, 4)))
    bias, unpadded = normal(E) / 4, (("padded", False),)
    return [
        Case("grouped_matmul", (normal(n, 1, D), normal(E, D, F)), (group,)),
        Case("routing", (normal(R, E),), (), "top_k", with_options(k, True), dtypes=FLOATS[:1]),
        Case("routing", (normal(R, E),), (bias,), "top_k", with_options(k, False, True), dtypes=FLOATS[:1], more=(("router_bias", True),)),
        Case("routing", (), (expert,), "plan", with_options(E, 4), gradient=False, dtypes=FLOATS[:1]),
        Case("routing", (), (expert,), "send_plan", with_options(E, 2, 0.5), gradient=False, dtypes=FLOATS[:1]),
        Case("routing", (normal(R, D),), (padded.astype(np.int32),), "take"),
        Case("routing", (normal(R, D),), (expert,), "permute", with_options(E, 1), more=unpadded),
        Case("routing", (rows,), (slot, weight), "combine", more=unpadded),
    ]


def _of_updates():
    one, values = np.float32(1), np.array([1e-3, 0.1, 0.05, 0], np.float32)
    arrays = normal(R, D), normal(R, D) + 1, normal(R, D) / 9, np.abs(normal(R, D))
    free = {"gradient": False, "dtypes": FLOATS[:1]}
    return [
        Case("adamw", (), (values, np.float32(0.5), one, *arrays), make=with_options(0.9, 0.95, 1e-8, 0.1, False), in_place=True, **free),
        Case("adamw", (), (normal(R, D),), "squares", **free),
        Case("stack_write", (), (normal(3, R, D), np.int32(1), normal(R, D) + 1), in_place=True, **free),
    ]


def _of_decoding():
    """One token of each row, after those in the cache."""
    scale, at = H**-0.5, np.array([[T - 1], [7]], np.int32)
    caches, new = (normal(B, T, K, H), normal(B, T, K, H) + 1), normal(B, 1, K, H)
    pages = normal(P, C, K, H), normal(P, C, K, H) + 1
    table, length = np.array([[4, 1, 3], [5, 0, 2]], np.int32), np.array([9, 12], np.int32)
    packed = table, np.array([1, 1, -1, 0], np.int32), np.array([6, 7, -1, 3], np.int32)
    x, weights = normal(B, D), tuple(normal(*shape) / 7 for shape in ((D, N * H), (D, K * H), (D, K * H), (N * H, D)))
    attend = (x, normal(D), *weights, normal(H), normal(H), *_angles(B, 1), at, np.arange(B, dtype=np.int32)[:, None], *caches)
    free = {"gradient": False, "more": (("head_dim", H),)}
    return [
        Case("cache_write", (caches[0], new), (at,), in_place=True, **free),
        Case("paged_write", (pages[0], normal(B, K, H)), (np.array([9, 22], np.int32),), in_place=True, **free),
        Case("paged_attention", (normal(B, N, H), *pages), (table, length), make=with_options(scale), **free),
        Case("paged_attention", (normal(4, N, H), *pages), packed, "packed", with_options(scale), **free),
        Case("decode_attention", (), attend, make=with_options(EPS, scale), in_place=True, dtypes=FLOATS[:1], **free),
        Case("decode_mlp", (), (x, normal(D), normal(D, F), normal(D, F), normal(F, D)), make=with_options(EPS), dtypes=FLOATS[:1], **free),
    ]
