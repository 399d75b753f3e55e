"""Predicts how long the AscendC kernels take on Ascend 910B, by the clock of the emulator. docs/ops.md says how sure that is.

    python -m ops.ascendc.clock                                   # every kernel, at the sizes of Qwen3-8B and Qwen3-30B-A3B
    python -m ops.ascendc.clock --kernel=attention --trace=t.json # the kernels of that name, and the trace of the last one

A trace is for chrome://tracing or ui.perfetto.dev. The rates, with their sources, are in ops/emulator/clock.h.
"""

import argparse
import ctypes
import json
from typing import NamedTuple

import numpy as np

from ops.ascendc import build

CORES = 24  # cube cores of Ascend 910B2
CYCLES_A_SECOND, HBM, CUBE = 1.85e9, 1.5e12, CORES * 4096 * 2 * 1.85e9  # of the chip: bytes and 16-bit operations a second
WIDTH = {"float32": 4, "int32": 4, "float16": 2, "bfloat16": 2}
TIMED, TIME_ALONE = 1, 2  # emulator_set_clock


def chip():
    library = ctypes.CDLL(build.emulator())
    library.emulator_clock.restype = library.emulator_message.restype = ctypes.c_char_p
    library.emulator_trace.argtypes = [ctypes.c_char_p]
    return library


def predict(library, name, inputs, outputs, attrs=None, cores=CORES, mode=TIME_ALONE, trace=None):
    """Returns what the emulator's clock says of one run of an operator, as a dict; "seconds" is the time in the cores, without the launch.

    inputs, outputs: arrays, (array, dtype name), or (shape, dtype name) for arrays whose numbers do not matter. attrs: numbers, in order.
    With mode TIME_ALONE integers alone are computed. Raises RuntimeError with the emulator's message if the kernel fails.
    """
    emulator = chip()
    arrays = [_array(x) for x in inputs]
    arrays += [_array(np.array(attrs, np.float32))] if attrs is not None else []
    arrays += [_array(x) for x in outputs]
    n = len(arrays)
    sizes = [(ctypes.c_int64 * max(len(shape), 1))(*shape) for _, shape, _ in arrays]
    pointers = (ctypes.POINTER(ctypes.c_int64) * n)(*(ctypes.cast(s, ctypes.POINTER(ctypes.c_int64)) for s in sizes))
    dtypes = (ctypes.c_char_p * n)(*(dtype.encode() for _, _, dtype in arrays))
    data = (ctypes.c_void_p * n)(*(x.ctypes.data for x, _, _ in arrays))
    dims = (ctypes.c_int * n)(*(len(shape) for _, shape, _ in arrays))
    emulator.emulator_set_cores(cores)
    emulator.emulator_set_clock(mode)
    try:
        status = getattr(ctypes.CDLL(library), f"{name}_emulated")(n, data, dims, pointers, dtypes, None, None)
    finally:
        emulator.emulator_set_clock(0)
        emulator.emulator_set_cores(2)
    if status:
        raise RuntimeError(emulator.emulator_message().decode())
    if trace and emulator.emulator_trace(str(trace).encode()):
        raise OSError(f"the trace cannot be written to {trace}")
    return json.loads(emulator.emulator_clock().decode())


def _array(x):
    if isinstance(x, np.ndarray):
        x = np.ascontiguousarray(x)
        return x, x.shape, str(x.dtype)
    shape, dtype = x
    if isinstance(shape, np.ndarray):
        return shape, shape.shape, dtype
    return np.empty(int(np.prod(shape)) * WIDTH[dtype] + 64, np.uint8), shape, dtype  # memory that nobody touches costs nothing


def roofline(inputs, outputs, products):
    """Returns (seconds, "cube" or "memory"): the larger of the products at the cube's peak and each array once at the rate of HBM."""
    memory = sum(_bytes(x) for x in (*inputs, *outputs)) / HBM
    cube = 2 * products / CUBE
    return (cube, "cube") if cube > memory else (memory, "memory")


def _bytes(x):
    return x.nbytes if isinstance(x, np.ndarray) else int(np.prod(x[0])) * WIDTH[x[1]]


HALF = "bfloat16"


class Sizes(NamedTuple):
    tokens: int = 8192  # in two rows
    D: int = 4096  # of Qwen3-8B
    F: int = 12288
    N: int = 32
    K: int = 8
    H: int = 128
    V: int = 151936
    moe_D: int = 2048  # of Qwen3-30B-A3B
    E: int = 128
    choices: int = 8
    moe_F: int = 768


QWEN3, SMALL = Sizes(), Sizes(300, 128, 96, 4, 2, 32, 700, 64, 8, 2, 48)


def rows(n, width, dtype=HALF):
    return (n, width), dtype


def cases(sizes=QWEN3):
    """Returns {title: (family, operator, inputs, outputs, attrs, products)}, in bfloat16."""
    t, N, K, H, E, k = sizes.tokens, sizes.N, sizes.K, sizes.H, sizes.E, sizes.choices
    x, w, f32 = rows(t, sizes.D), ((sizes.D,), HALF), "float32"
    gate = rows(t, sizes.F)
    q, angles = ((2, t // 2, N, H), HALF), ((t, H // 2), f32)
    head, logits, one = ((H,), HALF), ((t, sizes.V), f32), ((t,), f32)
    at = np.zeros(t, np.int32)
    found = {
        "RMS norm": ("rms_norm", "qwen_rms_norm", [x, w], [x], [1e-6], 0),
        "sum and RMS norm": ("rms_norm", "qwen_add_rms_norm", [x, x, w], [x, x], [1e-6], 0),
        "gradient of RMS norm": ("rms_norm", "qwen_rms_norm_grad", [x, w, x], [x, w], [1e-6], 0),
        "gradient of sum and RMS norm": ("rms_norm", "qwen_add_rms_norm_grad", [x, w, x, x], [x, w], [1e-6], 0),
        "SwiGLU": ("swiglu", "qwen_swiglu", [gate, gate], [gate], None, 0),
        "gradient of SwiGLU": ("swiglu", "qwen_swiglu_grad", [gate, gate, gate], [gate, gate], None, 0),
        "rotary of q": ("rope", "qwen_rope", [q, angles, angles], [q], [1], 0),
        "norm and rotary of q": ("rope", "qwen_rope_norm", [q, head, angles, angles], [q], [1e-6], 0),
        "gradient of norm and rotary": ("rope", "qwen_rope_norm_grad", [q, head, angles, angles, q], [q, head], [1e-6], 0),
        "cross-entropy": ("cross_entropy", "qwen_cross_entropy", [logits, at], [one, one, one], None, 0),
        "gradient of cross-entropy": ("cross_entropy", "qwen_cross_entropy_grad", [logits, at, one, one, one], [logits], None, 0),
    }
    expert = _balanced(t, E, k)
    slot = np.argsort(np.argsort(expert.ravel(), kind="stable")).astype(np.int32).reshape(t, k)
    probs, weight, moved = ((t, E), f32), ((t, k), f32), rows(t * k, sizes.moe_D)
    token, numbers = rows(t, sizes.moe_D), ((t * k,), "int32")
    found |= {
        "top-k": ("routing", "qwen_top_k", [probs, ((E,), f32)], [probs, (expert.shape, "int32"), weight], [k, 1], 0),
        "gradient of top-k": ("routing", "qwen_top_k_grad", [probs, expert, weight, probs, weight], [probs], [1], 0),
        "permute": ("routing", "qwen_permute", [token, expert], [moved, numbers, numbers], [E], 0),
        "gradient of permute": ("routing", "qwen_permute_grad", [moved, slot, expert], [token], None, 0),
        "combine": ("routing", "qwen_combine", [moved, slot, weight], [token], None, 0),
        "gradient of combine": ("routing", "qwen_combine_grad", [moved, slot, weight, token], [moved, weight], None, 0),
    }
    ends, wide = np.cumsum(np.bincount(expert.ravel(), minlength=E)).astype(np.int32), rows(t * k, sizes.moe_F)
    up, products = ((E, sizes.moe_D, sizes.moe_F), HALF), t * k * sizes.moe_D * sizes.moe_F
    found |= {
        "grouped matmul": ("grouped_matmul", "qwen_grouped_matmul", [moved, up, ends], [wide], None, products),
        "its dx": ("grouped_matmul", "qwen_grouped_matmul_dx", [wide, up, ends], [moved], None, products),
        "its dw": ("grouped_matmul", "qwen_grouped_matmul_dw", [moved, wide, ends], [up], None, products),
    }
    found[f"attention, 2 x {t // 2:,}, causal"] = attention(2, t // 2, K, N, H)
    found[f"attention, one head, {t // 2:,}, not causal"] = attention(1, t // 2, 1, 1, H, 0)
    if sizes is QWEN3:
        found["attention, 2 x 4,096, 4 kv heads"] = attention(2, t // 2, 4, N, H)
        found["attention, one head, 32,768, not causal"] = attention(1, 4 * t, 1, 1, H, 0)
    found[f"gradient of attention, 2 x {t // 2:,}"] = attention_grad(2, t // 2, K, N, H)
    for row, length in ((64, t // 2), (1, 4 * t)) if sizes is QWEN3 else ((3, t),):
        found[f"decoding {row} x {length:,} over pages"] = paged_attention(row, length, K, N, H)
    slots = np.random.default_rng(0).permutation(t).astype(np.int32)
    cache, new = ((t // 4, 4, K, H), HALF), ((t, K, H), HALF)
    found["write into pages"] = ("paged_write", "qwen_paged_write", [cache, new, slots], [((1,), "int32")], None, 0)
    return found


def paged_attention(batch, length, kv_heads, heads=QWEN3.N, size=QWEN3.H, page=128):
    """One query a row over `length` keys each, in pages that lie in no order."""
    each = -(-length // page)
    table = np.random.default_rng(0).permutation(batch * each).astype(np.int32).reshape(batch, each)
    q, cache = ((batch, heads, size), HALF), ((batch * each, page, kv_heads, size), HALF)
    inputs = [q, cache, cache, table, np.full(batch, length, np.int32)]
    return "paged_attention", "qwen_paged_attention", inputs, [q], [size**-0.5], 2 * batch * heads * length * size


def _balanced(tokens, experts, choices):
    """Distinct experts of each token, about equally many of each."""
    first = np.random.default_rng(0).integers(0, experts, tokens)
    return ((first[:, None] + np.arange(choices) * (experts // choices + 1)) % experts).astype(np.int32)


def attention(batch, length, kv_heads, heads=QWEN3.N, size=QWEN3.H, in_order=1):
    q, k = ((batch, length, heads, size), HALF), ((batch, length, kv_heads, size), HALF)
    products = batch * heads * length * length * size * 2 // (2 if in_order else 1)
    lse = (batch, heads, length), "float32"
    return "attention", "qwen_attention", [q, k, k, *_documents(batch, length, in_order)], [q, lse], [size**-0.5, in_order], products


def attention_grad(batch, length, kv_heads, heads=QWEN3.N, size=QWEN3.H):
    _, _, inputs, (q, lse), attrs, products = attention(batch, length, kv_heads, heads, size)
    k = inputs[1]
    return "attention", "qwen_attention_grad", [*inputs, q, lse, q, lse], [q, k, k], attrs, products * 5 // 2


def _documents(batch, length, in_order):
    """One document a row, whose tokens see each other, or those before them if in_order."""
    segment, order = np.ones((batch, length), np.int32), np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    return segment, segment, order if in_order else np.full_like(order, length), order


def main():
    parser = argparse.ArgumentParser(description="Predicts how long the AscendC kernels take on Ascend 910B.")
    parser.add_argument("--kernel", default="", help="only the kernels whose title has this text")
    parser.add_argument("--trace", metavar="FILE", help="write the trace of the last one there")
    parser.add_argument("--lines", action="store_true", help="print where the critical path is, line by line")
    args = parser.parse_args()
    for title, (family, name, inputs, outputs, attrs, products) in cases().items():
        if args.kernel not in title:
            continue
        made = predict(build.emulated(family), name, inputs, outputs, attrs, trace=args.trace)
        least, bound = roofline(inputs, outputs, products)
        busy = ", ".join(f"{pipe} {100 * share['mean']:.0f} %" for pipe, share in made["pipes"].items() if share["mean"] > 0.1)
        rate = f", {2e-12 * products / made['seconds']:.0f} TFLOP/s" if products else ""
        print(f"{title:34} {1e6 * made['seconds']:9.0f} us, {made['seconds'] / least:5.2f} x roofline ({bound}){rate}; {busy}", flush=True)
        path = ", ".join(f"{what} {100 * share:.0f} %" for what, share in sorted(made["path"].items(), key=_share) if share > 0.05)
        print(f"{'':34} critical path: {path}", flush=True)
        if args.lines:
            for line, share in sorted(made["lines"].items(), key=_share):
                print(f"{'':38} {100 * share:3.0f} % {line}")


def _share(item):
    return -item[1]


if __name__ == "__main__":
    main()
