"""rearrange() against einops on numpy; the modes in which it works; how few steps it takes; what it refuses."""

import math

import einops
import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from ops.rearrange import rearrange, steps

NAMES = ("batch", "seq", "heads", "head_dim", "ffn", "experts", "kv")


def grouped(rng, names):
    """The names, in this order, in dims, [[name]]; an empty dim is one of length 1."""
    cuts = sorted(rng.integers(0, len(names) + 1, rng.integers(0, len(names) + 1)))
    return [list(names[a:b]) for a, b in zip([0, *cuts], [*cuts, len(names)])]


def text(rng, dims):
    """The dims as one side of a pattern."""
    words = []
    for dim in dims:
        if dim == [] and rng.random() < 0.5:
            words.append("1")
        elif len(dim) == 1 and rng.random() < 0.8:
            words.append(dim[0])
        else:
            words.append(f"({' '.join(dim)})")
    return " ".join(words)


def drawn(seed):
    """A pattern, a shape and sizes. Axes are of 1 to 4. Some patterns have an ellipsis of 0 to 2 dims, on the right perhaps in a group."""
    rng = np.random.default_rng(seed)
    names = list(NAMES[: rng.integers(1, len(NAMES) + 1)])
    length = {name: int(rng.choice([1, 2, 3, 4], p=[0.2, 0.4, 0.3, 0.1])) for name in names}
    left = grouped(rng, names)
    order = [str(name) for name in rng.permutation(names)] if rng.random() < 0.7 else names[2:] + names[:2]
    shape = [(math.prod(length[name] for name in dim),) for dim in left]
    sizes = {name: length[name] for dim in left for name in dim[rng.integers(2) :]}  # einops infers one of each dim
    left_text = text(rng, left)
    if rng.random() < 0.3:
        place = rng.integers(len(left) + 1)
        left_text = " ".join([text(rng, left[:place]), "...", text(rng, left[place:])])
        shape.insert(place, tuple(int(n) for n in rng.integers(1, 4, rng.integers(3))))
        order.insert(rng.integers(len(order) + 1), "...")
    return f"{left_text} -> {text(rng, grouped(rng, order))}", sum(shape, ()), sizes


SPLIT_HEADS = ("(batch seq) (heads head_dim) -> batch heads seq head_dim", (6, 8), {"batch": 2, "head_dim": 4})
# pattern, shape, sizes, (before, order, after)
LEAST = {
    "nothing": ("batch seq -> batch seq", (2, 3), {}, (None, None, None)),
    "nothing in groups of one": ("(batch) ... -> batch (...)", (2, 3), {}, (None, None, None)),
    "a dim split": ("(batch seq) embed -> batch seq embed", (6, 5), {"batch": 2}, (None, None, (2, 3, 5))),
    "only dims of 1 move": ("batch seq embed -> seq embed batch", (1, 3, 5), {}, (None, None, (3, 5, 1))),
    "a dim of 1 comes": ("seq embed -> seq 1 embed", (3, 5), {}, (None, None, (3, 1, 5))),
    "split and merged": ("batch (seq heads) -> (batch seq) heads", (2, 6), {"seq": 3}, (None, None, (6, 2))),
    "dims move whole": ("batch seq heads -> batch heads seq", (2, 3, 4), {}, (None, (0, 2, 1), None)),
    "dims move whole, one of them 1": ("batch seq heads -> heads batch seq", (1, 3, 4), {}, (None, (2, 0, 1), None)),
    "one transpose, though two dims move together": ("a b c -> c a b", (2, 3, 4), {}, (None, (2, 0, 1), None)),
    "split, then moved": (*SPLIT_HEADS, ((2, 3, 2, 4), (0, 2, 1, 3), None)),
    "moved, then merged": ("batch heads seq head_dim -> batch seq (heads head_dim)", (2, 3, 4, 5), {}, (None, (0, 2, 1, 3), (2, 4, 15))),
    "merged before they move": ("a b c d -> c d (a b)", (2, 3, 4, 5), {}, ((6, 4, 5), (1, 2, 0), None)),
    "merged, then moved": ("a b c -> c (a b)", (2, 3, 4), {}, ((6, 4), (1, 0), None)),
    "moved in a group, then split": ("c (a b) -> a b c", (4, 6), {"a": 2}, (None, (1, 0), (2, 3, 4))),
    "a dim of 1 goes": ("1 seq heads -> heads seq", (1, 3, 4), {}, ((3, 4), (1, 0), None)),
    "three steps": ("(a b) c d -> (c d b) a", (6, 4, 5), {"a": 2}, ((2, 3, 20), (2, 1, 0), (60, 2))),
    "in blocks": ("(a b c) (d e) -> (d a) (e b c)", (24, 35), {"a": 2, "b": 3, "d": 5}, ((2, 12, 5, 7), (2, 0, 3, 1), (10, 84))),
    "no elements": ("batch seq -> seq batch", (0, 3), {}, (None, None, (3, 0))),
    "one number": ("1 1 ->", (1, 1), {}, (None, None, ())),
}


def case(seed):
    """pattern, sizes, x, einops' result of it, and weights for a sum of the result."""
    rng = np.random.default_rng(seed)
    pattern, shape, sizes = drawn(seed)
    x = rng.normal(0, 1, shape).astype(np.float32)
    expected = einops.rearrange(x, pattern, **sizes)
    return pattern, sizes, x, expected, rng.normal(0, 1, expected.shape).astype(np.float32)


def gradient(pattern, sizes, x, weights):
    """Of the sum of weights * rearrange(x): each weight goes back to the place that its element came from. By einops on numpy."""
    places = einops.rearrange(np.arange(x.size).reshape(x.shape), pattern, **sizes)
    found = np.empty(x.size, np.float32)
    found[places.reshape(-1)] = weights.reshape(-1)
    return found.reshape(x.shape)


@pytest.mark.parametrize("compiled", [False, True])
def test_values_and_gradients_are_those_of_einops(compiled):
    """25 drawn patterns, all in one graph."""
    cases = [case(seed) for seed in range(25)]
    patterns, sizes = [c[0] for c in cases], [c[1] for c in cases]
    xs, weights = tuple(ms.Tensor(c[2]) for c in cases), [ms.Tensor(c[4]) for c in cases]

    def loss(*xs):
        total, results = 0.0, ()
        for i in range(len(patterns)):
            y = rearrange(xs[i], patterns[i], sizes[i])
            total = total + (y * weights[i]).sum()
            results = results + (y,)
        return total, results

    both = ms.value_and_grad(loss, tuple(range(len(xs))), has_aux=True)
    (_, values), grads = (ms.jit(both, fullgraph=True) if compiled else both)(*xs)
    for (pattern, size, x, expected, weight), value, grad in zip(cases, values, grads):
        np.testing.assert_array_equal(value.asnumpy(), expected, pattern)
        np.testing.assert_array_equal(grad.asnumpy(), gradient(pattern, size, x, weight), pattern)


def test_the_steps_of_many_patterns_give_einops_result_and_each_changes_something():
    for seed in range(500):
        pattern, shape, sizes = drawn(seed)
        x = np.arange(math.prod(shape)).reshape(shape)
        before, order, after = steps(pattern, shape, sizes)
        a = x if before is None else x.reshape(before)
        b = a if order is None else a.transpose(order)
        c = b if after is None else b.reshape(after)
        np.testing.assert_array_equal(c, einops.rearrange(x, pattern, **sizes), f"{pattern} {shape} {sizes}")
        assert before != x.shape and after != b.shape, (pattern, shape, sizes)
        assert order is None or not np.array_equal(a.reshape(-1), b.reshape(-1)), (pattern, shape, sizes)


@pytest.mark.parametrize("name", LEAST)
def test_the_steps_are_the_fewest(name):
    pattern, shape, sizes, expected = LEAST[name]
    assert steps(pattern, shape, sizes) == expected
    x = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    np.testing.assert_array_equal(rearrange(ms.Tensor(x), pattern, sizes).asnumpy(), einops.rearrange(x, pattern, **sizes))


def split_heads(x):
    pattern, _, sizes = SPLIT_HEADS
    return rearrange(x, pattern, sizes)


def body(x):
    """Not linear, so that its backward needs what rearrange gave; the last rearrange has no sizes, and the one before it no steps."""
    y = split_heads(x * 0.1)
    z = rearrange(rearrange(ops.exp(y), "batch heads seq head_dim -> batch heads seq head_dim", {}), "... head_dim -> head_dim (...)", {})
    return (z * ops.sin(z) * rearrange(x, "rows (seq head_dim) -> head_dim (rows seq)", {"head_dim": 4})).sum()


class Again(nn.Cell):
    """body with a backward that differentiates it again, perhaps in a while loop, as recompute.py and scan.py of parallel/graph do."""

    def __init__(self, loop):
        super().__init__()
        self.loop, self.vjp = loop, ops.GradOperation(get_all=True, sens_param=True)
        self.zeros_like = ops.ZerosLike()

    def construct(self, x):
        return body(x)

    def bprop(self, x, out, dout):
        if not self.loop:
            return self.vjp(body)(x, dout)
        i, dx = ms.Tensor(0, ms.int32), self.zeros_like(x)
        while i < 2:
            dx = dx + self.vjp(body)(x, dout)[0] / 2
            i = i + 1
        return (dx,)


def expected_gradient(x):
    """Of body, in numpy."""
    pattern, _, sizes = SPLIT_HEADS
    to_z = "batch heads seq head_dim -> head_dim (batch heads seq)"
    z = einops.rearrange(np.exp(einops.rearrange(x * 0.1, pattern, **sizes)), to_z)
    factor = einops.rearrange(x, "rows (seq head_dim) -> head_dim (rows seq)", head_dim=4)
    dz = (np.sin(z) + z * np.cos(z)) * factor * z * 0.1
    through_z = einops.rearrange(dz, "head_dim (batch heads seq) -> (batch seq) (heads head_dim)", batch=2, heads=2)
    return through_z + einops.rearrange(z * np.sin(z), "head_dim (rows seq) -> rows (seq head_dim)", rows=6)


@pytest.mark.parametrize("mode", ["eager", "jit", "backward", "loop in a backward"])
def test_gradients_in_each_mode(mode):
    x = np.random.default_rng(0).normal(0, 1, (6, 8)).astype(np.float32)
    fn = body if mode in ("eager", "jit") else Again(mode == "loop in a backward")

    def loss(x):
        return fn(x * 1)

    grad = ms.grad(loss)
    found = grad(ms.Tensor(x)) if mode == "eager" else ms.jit(grad, fullgraph=True)(ms.Tensor(x))
    np.testing.assert_allclose(found.asnumpy(), expected_gradient(x), rtol=1e-4, atol=1e-5)  # exp and sin of float32


def test_a_graph_follows_the_shape():
    """The plan of one shape is not that of another."""

    @ms.jit(fullgraph=True)
    def merge(x):
        return rearrange(x, "batch (seq heads) -> (batch heads) seq", {"heads": 2})

    for shape in ((2, 6), (3, 4), (2, 6)):
        x = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
        np.testing.assert_array_equal(merge(ms.Tensor(x)).asnumpy(), einops.rearrange(x, "b (s h) -> (b h) s", h=2))


@pytest.mark.parametrize("compiled", [False, True])
def test_dtypes_stay(compiled):
    fn = ms.jit(split_heads, fullgraph=True) if compiled else split_heads
    x = np.arange(48).reshape(6, 8)
    for dtype in (np.float16, np.float32, np.int32, np.int64, np.uint8, np.bool_):
        found = fn(ms.Tensor((x % 3).astype(dtype))).asnumpy()
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, einops.rearrange((x % 3).astype(dtype), SPLIT_HEADS[0], **SPLIT_HEADS[2]))


def test_bfloat16_is_moved_eagerly_and_not_in_a_graph_on_cpu():
    """Should a later MindSpore have these kernels, test_dtypes_stay can have bfloat16 too."""
    x = np.arange(48, dtype=np.float32).reshape(6, 8)
    found = split_heads(ms.Tensor(x).astype(ms.bfloat16))
    assert found.dtype == ms.bfloat16
    np.testing.assert_array_equal(found.float().asnumpy(), einops.rearrange(x, SPLIT_HEADS[0], **SPLIT_HEADS[2]))
    with pytest.raises(TypeError, match="Unsupported data type"):
        ms.jit(split_heads, fullgraph=True)(ms.Tensor(x).astype(ms.bfloat16))


def axes_on_one_side(x):
    return rearrange(x, "batch seq -> batch", {})


def size_that_does_not_divide(x):
    return rearrange(x, "(batch seq) embed -> batch seq embed", {"batch": 4})


def size_missing(x):
    return rearrange(x, "(batch seq) embed -> batch seq embed", {})


def size_of_no_axis(x):
    return rearrange(x, "batch embed -> embed batch", {"seq": 2})


def size_of_zero(x):
    return rearrange(x, "(batch seq) embed -> batch seq embed", {"batch": 0})


def size_below_zero(x):
    return rearrange(x, "(batch seq) embed -> batch seq embed", {"batch": -1})


def size_as_a_tensor(x):
    return rearrange(x, "(batch seq) embed -> batch seq embed", {"batch": x.sum()})


def dims_missing(x):
    return rearrange(x, "batch seq embed -> batch embed seq", {})


def dim_that_is_not_1(x):
    return rearrange(x, "1 embed -> embed 1", {})


def no_arrow(x):
    return rearrange(x, "batch embed", {})


def unbalanced(x):
    return rearrange(x, "(batch embed -> embed batch", {})


REFUSED = {
    axes_on_one_side: "Identifiers only on one side of expression",
    size_that_does_not_divide: "can't divide axis of length 6 in chunks of 4",
    size_missing: "Could not infer sizes",
    size_of_no_axis: "Axis seq is not used in transform",
    size_of_zero: "modulo by zero",
    size_below_zero: "rearrange by",  # numpy's words
    size_as_a_tensor: "batch must be an int, not Tensor",
    dims_missing: "expected 3 dims. Received 2-dim tensor",
    dim_that_is_not_1: "Shape mismatch, 6 != 1",
    no_arrow: "not enough values to unpack",
    unbalanced: "Imbalanced parentheses",
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fn", REFUSED)
def test_a_mistake_is_an_error_with_einops_words_the_pattern_and_the_shape(fn, compiled):
    x = ms.Tensor(np.zeros((6, 8), np.float32))
    with pytest.raises(einops.EinopsError) as found:
        (ms.jit(fn, fullgraph=True) if compiled else fn)(x)
    message = str(found.value)
    assert message.startswith('rearrange by "') and "of a tensor of shape (6, 8): " in message and REFUSED[fn] in message


def test_planning_takes_no_memory():
    """The shape is one of 2^46 elements, of which numpy could make no array."""
    shape = (2**12, 2**14, 2**20)
    pattern = "(batch seq) heads (head_dim kv) -> heads (kv batch) (seq head_dim)"
    assert steps(pattern, shape, {"batch": 4, "kv": 2}) == ((2**12, 2**14, 2**19, 2), (1, 3, 0, 2), (2**14, 8, 2**29))
