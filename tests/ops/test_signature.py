"""What is not an op's is refused on entry, eager and compiled, by every implementation, in words that name the argument."""

import mindspore as ms
import numpy as np
import pytest

from ops import (
    adamw,
    attention,
    cache_write,
    cross_entropy,
    embedding,
    grouped_matmul,
    matmul,
    rms_norm,
    rope,
    routing,
    sampling,
    stack_write,
    swiglu,
)
from ops.signature import Signature, check
from parallel.graph.jit import jit


def from_column_1(op):
    def call(x, ids):
        return op(1, x, ids)

    return call


INTS = {name: ("int32", shape) for name, shape in dict(segment=(1, 3), key_segment=(1, 5), order=(1, 3), key_order=(1, 5)).items()}
QKV = dict(q=(1, 3, 4, 16), k=(1, 5, 2, 16), v=(1, 5, 2, 16))
ANGLES = dict(cos=(2, 3, 1, 3), sin=(2, 3, 1, 3))
STATE = dict(p=(4, 6), g=(4, 6), m=(4, 6), v=(4, 6))
F16, F64, I64 = "float16", "float64", "int64"
# op -> (its factories, made; what it takes: shapes of float32, or (dtype, shape); [(argument, what it is given, the error)])
OPS = {
    "swiglu": (
        [swiglu.reference(), swiglu.cpu()],
        dict(gate=(2, 3), up=(2, 3)),
        [("up", (2, 2), "up is [2, 2] and has to be [...] = [2, 3]"), ("up", F16, "up is float16 and has to be float32")],
    ),
    "matmul": (  # the reference is MindSpore's own, which has its own words
        [matmul.cpu()],
        dict(x=(2, 3), w=(3, 5)),
        [("w", (2, 5), "w is [2, 5] and has to be [I, O] = [3, 5]"), ("w", F16, "w is float16 and has to be float32")],
    ),
    "matmul transposed": (
        [matmul.cpu(transpose_b=True)],
        dict(x=(2, 3), w=(5, 3)),
        [("w", (3, 5), "w is [3, 5] and has to be [O, I] = [3, 3]"), ("x", (2, 3, 1), "x is [2, 3, 1] and has to be [R, I]")],
    ),
    "rms_norm": (
        [rms_norm.reference(1e-6), rms_norm.cpu(1e-6)],
        dict(x=(4, 8), w=(8,)),
        [("w", (7,), "w is [7] and has to be [n] = [8]"), ("w", (1, 8), "w is [1, 8] and has to be [n] = [8]"), ("x", I64, "x is int64")],
    ),
    "rms_norm add": (
        [rms_norm.reference_add(1e-6), rms_norm.cpu_add(1e-6)],
        dict(x=(4, 8), y=(4, 8), w=(8,)),
        [("y", (2, 8), "y is [2, 8] and has to be [..., n] = [4, 8]"), ("y", F16, "y is float16 and has to be float32")],
    ),
    "rope": (
        [rope.reference(), rope.cpu()],
        dict(x=(2, 3, 2, 6), **ANGLES),
        [
            ("cos", (1, 3, 1, 3), "cos is [1, 3, 1, 3] and has to be [B, S, 1, H/2] = [2, 3, 1, 3]"),
            ("sin", (2, 3, 3), "sin is [2, 3, 3] and has to be"),
            ("x", (2, 3, 2, 5), "cos is [2, 3, 1, 3] and has to be [B, S, 1, H/2] = [2, 3, 1, 2.5]"),
            ("cos", F16, "cos is float16 and has to be float32"),
        ],
    ),
    "rope norm": (
        [rope.reference_norm(1e-6), rope.cpu_norm(1e-6)],
        dict(x=(2, 3, 2, 6), w=(6,), **ANGLES),
        [("w", (3,), "w is [3] and has to be [H] = [6]"), ("sin", F16, "sin is float16 and has to be float32")],
    ),
    "attention": (
        [attention.reference(0.3), attention.cpu(0.3)],
        {**QKV, **INTS},
        [
            ("k", (1, 5, 2, 8), "k is [1, 5, 2, 8] and has to be [B, T, K, H] = [1, 5, 2, 16]"),
            ("q", (1, 3, 3, 16), "K has to divide N, and they are 2 and 3"),
            ("v", (1, 6, 2, 16), "v is [1, 6, 2, 16] and has to be [B, T, K, H] = [1, 5, 2, 16]"),
            ("segment", (1, 5), "segment is [1, 5] and has to be [B, S] = [1, 3]"),
            ("key_segment", (2, 5), "key_segment is [2, 5] and has to be [B, T] = [1, 5]"),
            ("order", (3,), "order is [3] and has to be [B, S] = [1, 3]"),
            ("key_order", I64, "key_order is int64 and has to be int32"),
            ("v", F16, "v is float16 and has to be float32"),
        ],
    ),
    "cross_entropy": (
        [from_column_1(cross_entropy.reference()), from_column_1(cross_entropy.cpu())],
        dict(z=(4, 7), ids=("int32", (4,))),
        [
            ("ids", (3,), "ids is [3] and has to be [R] = [4]"),
            ("ids", (4, 1), "ids is [4, 1] and has to be [R] = [4]"),
            ("z", F16, "z is float16 and has to be float32"),
        ],
    ),
    "embedding": (
        [embedding.reference(), embedding.cpu()],
        dict(w=(4, 7), ids=("int32", (5,))),
        [("w", (4,), "w is [4] and has to be [V, D]"), ("ids", I64, "ids is int64 and has to be int32")],
    ),
    "embedding part": (
        [from_column_1(embedding.reference_part()), from_column_1(embedding.cpu_part())],
        dict(w=(4, 7), ids=("int32", (5,))),
        [("ids", (5, 1), "ids is [5, 1] and has to be [R]"), ("ids", "float32", "ids is float32 and has to be int32")],
    ),
    "grouped_matmul": (
        [grouped_matmul.reference(), grouped_matmul.cpu()],
        dict(x=(3, 2, 4), w=(4, 4, 5), group=("int32", (3,))),
        [
            ("w", (4, 3, 5), "w is [4, 3, 5] and has to be [E, i, o] = [4, 4, 5]"),
            ("group", (2,), "group is [2] and has to be [n] = [3]"),
            ("x", I64, "x is int64"),
        ],
    ),
    "routing top_k": (
        [routing.reference_top_k(3, True), routing.cpu_top_k(3, True)],
        dict(logits=(4, 6)),
        [("logits", (4, 2), "E is 2 and has to be at least 3"), ("logits", F16, "logits is float16 and has to be float32")],
    ),
    "routing biased top_k": (
        [routing.reference_top_k(3, True, biased=True), routing.cpu_top_k(3, True, biased=True)],
        dict(logits=(4, 6), bias=(6,)),
        [("bias", (4,), "bias is [4] and has to be [E] = [6]")],
    ),
    "routing plan": (
        [routing.reference_plan(6, 2), routing.cpu_plan(6, 2)],
        dict(expert=("int32", (5, 2))),
        [("expert", (5,), "expert is [5] and has to be [T, k]"), ("expert", I64, "expert is int64 and has to be int32")],
    ),
    "routing send_plan": (
        [routing.reference_send_plan(6, 2, None), routing.cpu_send_plan(6, 2, None)],
        dict(expert=("int32", (5, 2))),
        [("expert", (5,), "expert is [5] and has to be [T, k]")],
    ),
    "routing take": (
        [routing.reference_take(), routing.cpu_take()],
        dict(x=(5, 3), index=("int32", (2, 2))),
        [("x", (5,), "x is [5] and has to be [..., M, D]"), ("index", I64, "index is int64 and has to be int32")],
    ),
    "routing permute": (
        [routing.reference_permute(6, 1), routing.cpu_permute(6, 1)],
        dict(x=(5, 3), expert=("int32", (5, 2))),
        [("expert", (4, 2), "expert is [4, 2] and has to be [T, k] = [5, 2]"), ("expert", I64, "expert is int64")],
    ),
    "routing combine": (
        [routing.reference_combine(), routing.cpu_combine()],
        dict(y=(6, 1, 3), slot=("int32", (6,)), weight=(3, 2)),
        [("slot", (5,), "slot is [5] and has to be [R*k] = [6]"), ("weight", (6,), "weight is [6] and has to be [R, k]")],
    ),
    "adamw": (
        [adamw.reference(0.9, 0.99, 1e-8, 0.1, False), adamw.cpu(0.9, 0.99, 1e-8, 0.1, False)],
        dict(values=(4,), scale=(), keep=(), **STATE),
        [
            ("g", (3, 6), " and has to be [...] = "),
            ("m", (6, 4), "m is [6, 4] and has to be [...] = [4, 6]"),
            ("scale", (1,), "scale is [1] and has to be []"),
            ("values", (2,), "n is 2 and has to be at least 3"),
            ("v", F16, "v is float16 and has to be float32"),
        ],
    ),
    "adamw squares": (
        [adamw.reference_squares(), adamw.cpu_squares()],
        dict(g=(4, 6)),
        [("g", I64, "g is int64 and has to be float32")],
    ),
    "cache_write": (
        [cache_write.reference(), cache_write.cpu()],
        dict(cache=(2, 5, 3, 4), new=(2, 1, 3, 4), at=("int32", (2, 1))),
        [
            ("new", (1, 1, 3, 4), "new is [1, 1, 3, 4] and has to be [B, S, K, H] = [2, 1, 3, 4]"),
            ("at", (2, 2), "at is [2, 2] and has to be [B, S] = [2, 1]"),
            ("at", I64, "at is int64 and has to be int32"),
            ("cache", F64, "cache is float64 and has to be float32"),
        ],
    ),
    "stack_write": (
        [stack_write.reference(), stack_write.cpu()],
        dict(stack=(3, 2, 5), at=("int32", ()), x=(2, 5)),
        [
            ("x", (5,), "x is [5] and has to be [...] = [2, 5]"),
            ("x", F16, "x is float16 and has to be float32"),
            ("at", (1,), "at is [1] and has to be []"),
            ("at", I64, "at is int64 and has to be int32"),
            ("stack", (), "stack is [] and has to be [L, ...]"),
            ("stack", F64, "stack is float64 and has to be float32"),
        ],
    ),
    "sampling": (
        [sampling.cpu()],
        dict(logits=(2, 5), u=(2,), options=(F64, (2, 4))),
        [
            ("logits", (5,), "logits is [5] and has to be [B, V]"),
            ("u", (3,), "u is [3] and has to be [B] = [2]"),
            ("options", (2, 3), "options is [2, 3] and has to be [B, 4] = [2, 4]"),
            ("options", "float32", "options is float32 and has to be float64"),
        ],
    ),
}
CASES = [(name, *wrong) for name, (_, _, wrongs) in OPS.items() for wrong in wrongs]


def arrays(name, argument=None, given=None):
    """What an op takes, with one argument changed, in shape or dtype."""
    out = {}
    for key, stated in OPS[name][1].items():
        dtype, shape = stated if stated and isinstance(stated[0], str) else ("float32", stated)
        if key == argument:
            dtype, shape = (given, shape) if isinstance(given, str) else (dtype, given)
        out[key] = np.ones(shape, dtype)
    return tuple(out.values())


def calling(op):
    def call(*args):
        return op(*args)

    return call


@pytest.mark.parametrize("name, argument, given, message", CASES, ids=lambda x: str(x)[:24])
def test_what_is_wrong_is_refused_in_words(name, argument, given, message):
    for op in OPS[name][0]:
        args = tuple(map(ms.Tensor, arrays(name, argument, given)))
        for run in (op, jit(calling(op))):
            with pytest.raises(ValueError) as error:
                run(*args)
            assert f"{name.split()[0]}: " in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("name", OPS)
def test_what_is_right_is_taken(name):
    for op in OPS[name][0]:
        out = op(*map(ms.Tensor, arrays(name)))
        (out[0] if isinstance(out, tuple) else out).asnumpy()


@pytest.mark.parametrize("argument, given", [("logits", (5,)), ("u", (3,)), ("options", (2, 3)), ("options", "float32")])
def test_the_reference_of_sampling_checks_numpy_arrays(argument, given):
    with pytest.raises(ValueError, match=f"sampling: {argument} is"):
        sampling.reference()(*arrays("sampling", argument, given))


def test_a_graph_checks_again_when_it_is_given_other_shapes():
    op = jit(calling(swiglu.reference()))
    x = ms.Tensor(np.ones((2, 3), np.float32))
    op(x, x)
    with pytest.raises(ValueError, match="swiglu: up is"):
        op(x, x[:1])


def test_dims_that_are_not_in_the_first_argument_are_shown_by_name():
    signature = Signature("op", "a B T; b ... C T; c int32 B*T; d")
    signature.check_shapes([(2, 3), (7, 5, 4, 3), (6,), ()])
    for shapes, message in (
        ([(2,), (4, 3), (6,), ()], r"a is \[2\] and has to be \[B, T\]"),
        ([(2, 3), (3,), (6,), ()], r"b is \[3\] and has to be \[\.\.\., C, T\] = \[\.\.\., C, 3\]"),
        ([(2, 3), (4, 3), (5,), ()], r"c is \[5\] and has to be \[B\*T\] = \[6\]"),
        ([(2, 3), (4, 3), (6,), (1,)], r"d is \[1\] and has to be \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            signature.check_shapes(shapes)


def test_dtypes_that_have_to_be_alike():
    require = check("op", "a *; b same *", ("float16", "float32"))
    require(((), ()), (ms.float16, ms.float16))
    with pytest.raises(ValueError, match="b is float32 and has to be float16"):
        require(((), ()), (ms.float16, ms.float32))
    with pytest.raises(ValueError, match="a is float64 and has to be float16 or float32"):
        require(((), ()), (ms.float64, ms.float64))
