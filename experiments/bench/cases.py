"""The cases of the ops benchmark: every op's functions at the shapes of the training benchmark's model, with their bytes and FLOP.

R = 2048 rows: 8 x 256 tokens. Bytes: each array that must be read or written counts once. FLOP: an exp, log, division or root counts as
one, and recomputation is not counted.
"""

from dataclasses import dataclass, field
from functools import partial

import mindspore as ms
import numpy as np

from experiments.bench.train import BATCH, MOE, SEQ_LEN, packed_batch
from ops import routing
from ops import sampling as sampling_op

B, S, D, F, V, E = BATCH, SEQ_LEN, *(MOE[key] for key in ("hidden_size", "ffn_size", "vocab_size", "num_experts"))
N, K, H, TOP = (MOE[key] for key in ("num_heads", "num_kv_heads", "head_dim", "experts_per_token"))
R, EPS, MOE_F = B * S, 1e-6, MOE["moe_ffn_size"]
CACHE_B, CACHE_T, PAGE = 16, 256, 16  # rows and slots of the cache that a token is written to; tokens of a page
STACK_L = 16  # layers whose arrays are stacked


@dataclass(frozen=True)
class Case:
    """A case of the benchmark. op, function: the arguments of ops.registry.pick. make(factory) -> the function that is timed.

    inputs(implementation) -> (arrays with gradients, arrays without). flop: (forward, forward and backward together); the second is None if
    there is no gradient. bytes: a pair like flop; None: each array counts once. in_place: whether the op changes its arguments. alone:
    whether the case is measured only if --ops names it.
    """

    op: str
    inputs: object
    flop: tuple
    function: str = ""
    make: object = field(default=lambda factory: factory())
    bytes: tuple = None
    in_place: bool = False
    alone: bool = False


def cases():
    """Returns all cases, {name: Case}."""
    return {**_of_rows(), **_of_attention(), **_of_vocabulary(), **_of_experts(), **_of_updates(), **_of_decoding()}


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(0, 1, shape).astype(np.float32)


def ids(high, *shape):
    return np.random.default_rng(sum(shape)).integers(0, high, shape).astype(np.int32)


def fixed(arrays, others=()):
    """Returns a function inputs(implementation) that gives every implementation these arrays."""
    return lambda implementation: (arrays, others)


def _of_rows():
    x, w = normal(R, D), normal(D)
    angles = normal(B, S, 1, H // 2)
    turns = np.cos(angles), np.sin(angles)
    heads = normal(B, S, N, H)
    of_eps = partial(_call, EPS)
    return {
        "rms_norm": Case("rms_norm", fixed((x, w)), (4 * x.size, 15 * x.size), make=of_eps),
        "rms_norm_add": Case("rms_norm", fixed((x, x, w)), (5 * x.size, 17 * x.size), "add", of_eps),
        "rope": Case("rope", fixed((heads,), turns), (3 * heads.size, 6 * heads.size)),
        "rope_norm": Case("rope", fixed((heads, normal(H)), turns), (7 * heads.size, 21 * heads.size), "norm", of_eps),
        "swiglu": Case("swiglu", fixed((normal(R, F), normal(R, F) + 1)), (5 * R * F, 14 * R * F)),
    }


def _call(*args):
    """Calls the last argument, a factory, with the other arguments. partial(_call, EPS) is the `make` of a Case."""
    *args, factory = args
    return factory(*args)


def _of_attention():
    batch = packed_batch(V)
    q, k, v = normal(B, S, N, H), normal(B, S, K, H), normal(B, S, K, H) + 1
    ints = batch["segment_ids"], batch["segment_ids"], batch["positions"], batch["positions"]
    scores = 2 * (S // 2) * (S // 2 + 1) // 2  # unmasked scores of a row with two documents
    flop = 4 * B * N * H * scores

    def long(length, function):
        def inputs(implementation):
            shapes, order = ((1, length, N, 64), (1, length, K, 64), (1, length, K, 64)), np.arange(length, dtype=np.int32)[None]
            one = np.ones_like(order)
            return tuple(normal(*shape) for shape in shapes), (one, one, order, order)

        flop = 4 * N * 64 * length * (length + 1) // 2
        return Case("attention", inputs, (flop, 3 * flop), function, make=partial(_call, 0.125), alone=True)

    decode = normal(CACHE_B, 1, N, H), normal(CACHE_B, CACHE_T, K, H), normal(CACHE_B, CACHE_T, K, H) + 1
    slots = np.tile(np.arange(CACHE_T, dtype=np.int32), (CACHE_B, 1))
    last = np.full((CACHE_B, 1), CACHE_T - 1, np.int32)
    one_token = np.ones_like(last), np.ones_like(slots), last, slots
    return {
        "attention": Case("attention", fixed((q, k, v), ints), (flop, 3 * flop), make=partial(_call, H**-0.5)),
        "attention_decode": Case(
            "attention", fixed((), (*decode, *one_token)), (4 * CACHE_B * N * H * CACHE_T, None), make=partial(_call, H**-0.5)
        ),
        # The gradient of the reference needs several arrays of N * length ** 2. It has no function with_lse, so there only the kernel runs.
        "attention_4096": long(4096, ""),
        "attention_8192": long(8192, "with_lse"),
    }


def _of_vocabulary():
    z, targets, w = normal(R, V), ids(V, R), normal(V, D)
    flop = 3 * R * V, 6 * R * V

    def after_first(factory):
        measure = factory()

        def call(z, ids):
            return measure(0, z, ids)

        return call

    rows = 4 * R * D
    logits = normal(CACHE_B, V)
    return {
        "cross_entropy": Case("cross_entropy", fixed((z,), (targets,)), flop, make=after_first),
        "embedding": Case("embedding", fixed((w,), (targets,)), (0, R * D), bytes=(2 * rows + 4 * R, 3 * rows + 8 * R + w.nbytes)),
        "head_loss": Case("head_loss", fixed((normal(R, D), w), (targets,)), (2 * R * D * V + 3 * R * V, 6 * R * D * V + 6 * R * V)),
        "sampling_greedy": Case("sampling", _sampling(logits), (logits.size, None)),
        "sampling_top_p": Case("sampling", _sampling(logits, temperature=1.0, top_k=50, top_p=0.9), (3 * logits.size, None)),
    }


def _sampling(logits, **options):
    return fixed((), (logits, np.full(len(logits), 0.5, np.float32), sampling_op.options(len(logits), **options)))


def _of_experts():
    logits, expert = normal(R, E), np.argsort(normal(R, E), 1)[:, :TOP].astype(np.int32)
    weight = np.full((R, TOP), 1 / TOP, np.float32)
    flop = 2 * R * TOP * D * MOE_F
    limit = 64
    rows = 4 * R * TOP * D

    def products(implementation):
        _, source, group = placed(implementation)
        x = np.zeros((*source.shape, D), np.float32)
        x[source < R] = normal(D)
        return (x, normal(E, D, MOE_F)), (group,)

    def placed(implementation):
        block = {"cpu": 1}.get(implementation, limit)
        return [x.asnumpy() for x in routing.reference_plan(E, block)(ms.Tensor(expert))]

    def taken(implementation):
        return (normal(R, D),), (placed(implementation)[1],)

    def combined(implementation):
        slot, source, _ = placed(implementation)
        y = normal(*source.shape, D)
        return (y,), (slot, weight)

    def plan(factory):
        return factory(E, limit)

    product = 2 * R * D * F
    return {
        "matmul": Case("matmul", fixed((normal(R, D), normal(D, F))), (product, 3 * product)),
        "matmul_decode": Case("matmul", fixed((), (normal(1, D), normal(D, F))), (2 * D * F, None)),
        "rows_matmul": Case("rows_matmul", fixed((), (normal(R, D), normal(D, F))), (product, None)),
        "grouped_matmul": Case("grouped_matmul", products, (flop, 3 * flop)),
        "routing_top_k": Case("routing", fixed((logits,)), (4 * logits.size, 8 * logits.size), "top_k", partial(_call, TOP, True)),
        "routing_plan": Case("routing", fixed((), (expert,)), (0, None), "plan", plan),
        "routing_take": Case("routing", taken, (0, R * TOP * D), "take", bytes=(2 * rows, 3 * rows + 4 * R * D)),
        "routing_combine": Case(
            "routing", combined, (2 * R * TOP * D, 6 * R * TOP * D), "combine", bytes=(rows + 4 * R * D, 3 * rows + 8 * R * D)
        ),
    }


def _of_updates():
    w = normal(V, D)
    values = np.array([1e-3, 0.1, 0.05, 0], np.float32), np.float32(1), np.float32(1)
    new, cache = normal(CACHE_B, 1, K, H), normal(CACHE_B, CACHE_T, K, H)
    last = np.full((CACHE_B, 1), CACHE_T - 1, np.int32)
    paged, slots = cache.reshape(-1, PAGE, K, H), np.arange(1, CACHE_B + 1, dtype=np.int32) * CACHE_T - 1
    make = partial(_call, 0.9, 0.95, 1e-8, 0.1, False)
    stacked = normal(STACK_L, D, F), np.int32(1), normal(D, F)
    adam = fixed((), (*values, w, normal(V, D), normal(V, D), np.abs(normal(V, D))))
    return {
        "adamw": Case("adamw", adam, (15 * w.size, None), make=make, bytes=(7 * w.nbytes, None), in_place=True),
        "adamw_squares": Case("adamw", fixed((), (w,)), (2 * w.size, None), "squares"),
        "cache_write": Case("cache_write", fixed((), (cache, new, last)), (0, None), bytes=(2 * new.nbytes, None), in_place=True),
        "paged_write": Case("paged_write", fixed((), (paged, new[:, 0], slots)), (0, None), bytes=(2 * new.nbytes, None), in_place=True),
        "stack_write": Case("stack_write", fixed((), stacked), (0, None), bytes=(8 * D * F, None), in_place=True),
    }


def _of_decoding():
    """Returns the cases of decoding one token of one row, after CACHE_T - 1 others."""
    x, w, weights = normal(1, D), normal(D), (normal(D, N * H), normal(D, K * H), normal(D, K * H), normal(N * H, D))
    angles, last, mlp = normal(1, 1, 1, H // 2), np.full((1, 1), CACHE_T - 1, np.int32), (normal(D, F), normal(D, F), normal(F, D))
    caches = normal(1, CACHE_T, K, H), normal(1, CACHE_T, K, H) + 1
    attend = (x, w, *weights, normal(H), normal(H), np.cos(angles), np.sin(angles), last, np.zeros((1, 1), np.int32), *caches)
    flop = 2 * D * (2 * N + 2 * K) * H + 4 * N * H * CACHE_T
    paged = normal(1, N, H), normal(CACHE_T // PAGE, PAGE, K, H), normal(CACHE_T // PAGE, PAGE, K, H)
    pages = np.arange(CACHE_T // PAGE, dtype=np.int32)[None, ::-1].copy(), np.full(1, CACHE_T, np.int32)
    packed = normal(CACHE_T, N, H), *paged[1:]
    reads = pages[0], np.zeros(CACHE_T, np.int32), np.arange(CACHE_T, dtype=np.int32)  # a prompt, as one batch
    return {
        "decode_attention": Case("decode_attention", fixed((), attend), (flop, None), make=partial(_call, EPS, H**-0.5), in_place=True),
        "paged_attention": Case("paged_attention", fixed((), (*paged, *pages)), (4 * N * H * CACHE_T, None), make=partial(_call, H**-0.5)),
        "paged_attention_packed": Case(
            "paged_attention", fixed((), (*packed, *reads)), (2 * N * H * CACHE_T**2, None), "packed", partial(_call, H**-0.5)
        ),
        "decode_mlp": Case("decode_mlp", fixed((), (x, w, *mlp)), (6 * D * F, None), make=partial(_call, EPS)),
    }
