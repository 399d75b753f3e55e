"""What an annotation may say, and what is refused."""

import re

import mindspore as ms
import numpy as np
import pytest
from mindspore import ops

from parallel.mesh import Mesh
from parallel.sharding import KINDS, Sharding, parse
from parallel.specs import ParamSpec, normal


def test_signatures_are_parsed():
    assert parse("rows>tokens embed, embed heads -> tokens heads") == (
        [[("rows", "tokens"), ("embed", "embed")], [("embed", "embed"), ("heads", "heads")]],
        [[("tokens", "tokens"), ("heads", "heads")]],
    )
    assert parse("tokens ffn") == ([[("tokens", "tokens"), ("ffn", "ffn")]], [])
    assert parse("tokens one ->") == ([[("tokens", "tokens"), ("one", "one")]], [[]])
    assert parse("a -> b, c")[1] == [[("b", "b")], [("c", "c")]]


# (signature, kind) -> what the error says after naming both.
REFUSED = {
    ("rows embde", "elementwise"): "dim 'embde' is not in RULES; did you mean 'embed'?",
    ("rows xyzzy", "elementwise"): "dim 'xyzzy' is not in RULES",
    ("rows>tokns embed, embed heads -> tokens heads", "contraction"): "dim 'tokns' is not in RULES; did you mean 'tokens'?",
    ("rows embed", "matmul"): "kind is not one of elementwise, contraction, reduction, kernel",
    ("rows embed, embed", "elementwise"): "an elementwise op has one list of dims",
    ("rows embed -> rows embed", "elementwise"): "an elementwise op has one list of dims",
    ("rows>tokens embed", "elementwise"): "an elementwise op has one list of dims",
    ("tokens embed, embed ffn", "contraction"): "it names no result",
    ("tokens embed, embed ffn -> tokens ffn, tokens", "contraction"): "a contraction has one result",
    ("tokens vocab, tokens vocab -> tokens one", "reduction"): "a reduction has one result and one operand",
    ("tokens embed -> tokens ffn", "contraction"): "dim 'ffn' of the result is split, and no operand has it",
    ("tokens embed, embed ffn -> rows ffn", "contraction"): "dim 'rows' of the result is split, and no operand has it",
    ("tokens embed, tokens -> tokens embed", "contraction"): "nothing is summed: every dim of the operands is in the result",
    ("tokens embed -> embed tokens", "reduction"): "nothing is summed: every dim of the operands is in the result",
    ("tokens embed, embed", "kernel"): "it names no result",
    ("tokens ffn -> tokens", "kernel"): "the result is split less than dim 'ffn' of an operand, and a kernel is not summed",
    ("tokens heads, heads embed -> tokens kv", "kernel"): "dim 'kv' of the result is split, and no operand has it",
    ("heads ffn -> heads", "reduction"): "a mesh axis is used twice in 'heads ffn'",
    ("experts ffn embed -> experts", "reduction"): "a mesh axis is used twice in 'experts ffn embed'",
    ("rows embed, embed heads -> rows heads", "contraction"): "a mesh axis is used twice in 'rows heads'",  # with sequence parallel
    ("tokens embed, heads ffn -> tokens", "kernel"): "a mesh axis is used twice in 'heads ffn'",
    ("tokens embed, embed>rows -> tokens>rows batch", "kernel"): "a mesh axis is used twice in 'tokens batch'",
}


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("signature, kind", REFUSED)
def test_wrong_signatures_are_refused(signature, kind, check):
    message = f"op {signature!r} ({kind}): {REFUSED[signature, kind]}"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Sharding(check=check).op(ops.Add(), signature, kind=kind)


def test_good_signatures_give_the_function_itself():
    add = ops.Add()
    assert Sharding().op(add, "rows embed", kind="elementwise") is add
    assert {"elementwise", "contraction", "reduction", "kernel"} == set(KINDS)


def doubled(matmul):
    return lambda x, w: matmul(x, w) * 2


def test_wrap_says_how_a_primitive_is_called():
    x, w = ms.Tensor(np.ones((2, 3), np.float32)), ms.Tensor(np.ones((3, 4), np.float32))
    for check in (False, True):
        f = Sharding(check=check).op(ops.MatMul(), "tokens embed, embed ffn -> tokens ffn", kind="contraction", wrap=doubled)
        np.testing.assert_array_equal(f(x, w).asnumpy(), np.full((2, 4), 6))


def test_check_compares_ranks_and_sizes():
    def op(fn, signature, kind="kernel"):
        return Sharding(check=True).op(fn, signature, kind=kind)

    x, w = ms.Tensor(np.ones((2, 3), np.float32)), ms.Tensor(np.ones((4, 3), np.float32))
    with pytest.raises(AssertionError, match=re.escape("dim 'embed' is 3 and 4")):
        op(ops.MatMul(transpose_b=True), "tokens embed, embed ffn -> tokens ffn")(x, w)
    with pytest.raises(AssertionError, match=re.escape("dim 'tokens' is 2 and 3")):
        op(lambda x: ops.transpose(x, (1, 0)), "tokens embed -> tokens embed")(x)
    with pytest.raises(AssertionError, match=re.escape("against shape (2, 3)")):
        op(ops.Neg(), "tokens embed one", "elementwise")(x)
    with pytest.raises(AssertionError, match=re.escape("against shape (2,)")):
        op(lambda x: x.sum(1), "tokens embed -> tokens one", "reduction")(x)
    with pytest.raises(AssertionError, match=re.escape("dim 'tokens' is 2 and 4")):
        op(ops.Add(), "tokens embed", "elementwise")(x, w)


def test_check_compares_what_only_the_shard_lowering_reads():
    def op(fn, **stated):
        return Sharding(check=True).op(fn, "tokens embed -> tokens router", kind="kernel", **stated)

    def first_three(x):
        return ops.cast(x[:, :3], ms.int32)

    x = ms.Tensor(np.ones((2, 5), np.float32))
    assert op(first_three, sizes={"router": 3}, dtype=ms.int32)(x).shape == (2, 3)
    with pytest.raises(AssertionError, match=re.escape("dim 'router' is 4 and 3")):
        op(first_three, sizes={"router": 4}, dtype=ms.int32)(x)
    with pytest.raises(AssertionError, match=re.escape("no operand has dims ['router']")):
        op(first_three, dtype=ms.int32)(x)
    for stated in (None, ms.float16):
        with pytest.raises(AssertionError, match="a result is Int32, not Float"):
            op(first_three, sizes={"router": 3}, dtype=stated)(x)


def test_a_region_is_held_to_its_signature():
    def negated(sharding):
        return sharding.inside().op(ops.Neg(), "rows embed", kind="elementwise")

    x = ms.Tensor(np.ones((2, 5), np.float32))
    for check in (False, True):
        sharding = Sharding(check=check)
        np.testing.assert_array_equal(sharding.region(negated(sharding), "rows embed -> rows embed")(x).asnumpy(), -np.ones((2, 5)))
        with pytest.raises(ValueError, match="dim 'embde' is not in RULES"):
            sharding.region(negated(sharding), "rows embde -> rows embed")
        with pytest.raises(ValueError, match="'rows>tokens' changes a layout"):
            sharding.region(negated(sharding), "rows>tokens embed -> tokens embed")
    with pytest.raises(AssertionError, match=re.escape("dim 'embed' is 2 and 5")):
        Sharding(check=True).region(negated(Sharding(check=True)), "embed embed -> embed embed")(x)


def test_a_part_such_as_a_head_is_not_split_further():
    """The size of the dim alone would divide."""
    weight = ParamSpec((8, 2 * 16), ("embed", "heads"), normal(1.0), parts=(None, 2))
    assert Sharding(Mesh(tp=2)).placement(weight) == ((), Mesh(tp=2).atoms(("tp",)))
    message = "wq: dim 'heads' has 2 parts of 16, which the 4 ranks of tp do not divide; use 1, 2"
    with pytest.raises(ValueError, match=re.escape(message)):
        Sharding(Mesh(tp=4)).placement(weight, "wq")
