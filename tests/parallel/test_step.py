"""Gradients of parameter trees: what is compiled, what is closed over, and what crosses the border as tuples."""

import re

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, ops
from mindspore.graph import api

from parallel.graph import nested
from parallel.graph.jit import jit
from parallel.graph.scan import scan
from parallel.step import value_and_grad
from parallel.trees import tree_leaves, tree_map, tree_paths, unflatten
from qwen3.model import build, loss_fn, metric_names
from tests.tiny import DENSE, MOE, assert_close, assert_trees_close, host, packed_batch, random_params

TREE = {"a": [np.float32(1), {"b": np.float32(2)}], "c": np.float32(3)}


def tree_of_tensors(offset=0.0):
    return tree_map(lambda x: ms.Tensor(np.full(2, x + offset), ms.float32), TREE)


def parameters(tree):
    return unflatten(tree, [Parameter(leaf, name=path) for path, leaf in tree_paths(tree)])


def flat_gradients(fn, like, leaves, batch):
    """What step.py is held against: MindSpore's own eager gradient of a function of single tensors."""
    count = len(leaves)

    def of_leaves(*leaves):
        return fn(unflatten(like, leaves[:count]), batch)[0]

    return ms.value_and_grad(of_leaves, tuple(range(count)))(*leaves)


@pytest.mark.extended
@pytest.mark.parametrize("cfg", [pytest.param(DENSE, marks=pytest.mark.slow), MOE], ids=["dense", "moe"])
def test_gradients_in_a_graph_equal_eager_ones_as_parameters_change(cfg):
    """Five SGD steps, each form on its own trajectory: arguments in a graph, closed-over Parameters in a graph, and the reference."""
    fn, like = build(cfg).loss_fn, random_params(cfg)
    passed = value_and_grad(fn, aux=metric_names(cfg), compiled=True)
    closed = value_and_grad(fn, aux=metric_names(cfg), compiled=True)
    leaves, params, bound = tree_leaves(like), like, parameters(like)
    for number in range(5):
        batch = packed_batch(cfg, seed=number)
        loss, grads = flat_gradients(fn, like, leaves, batch)
        for vg, values in ((passed, params), (closed, bound)):
            (value, metrics), found = vg(values, batch)
            assert_close(loss, value, 1e-5, f"step {number}")
            assert_trees_close(unflatten(like, grads), found, 1e-4)
            assert tuple(metrics) == metric_names(cfg)
            changed = tree_map(lambda p, g: ms.Tensor(host(p) - 0.05 * host(g)), values, found)
            if values is params:
                params = changed
            else:
                for p, new in zip(tree_leaves(bound), tree_leaves(changed)):
                    ops.assign(p, new)  # set_data would not reach the graph (test_mindspore_traps)
        leaves = [ms.Tensor(host(p) - 0.05 * host(g)) for p, g in zip(leaves, grads)]
    assert max(np.abs(host(a) - host(b)).max() for a, b in zip(leaves, tree_leaves(like))) > 0.02


def square_sum(params, x, shift):
    y = params["a"][0] * x + params["a"][1]["b"] * params["c"]
    if shift is not None:
        y = y + shift
    total = ops.ReduceSum()(y * y)
    return total, {"total": total, "y": y}


def expected_of(params, x, shift):
    a, b, c = (host(leaf) for leaf in tree_leaves(params))
    y = a * host(x) + b * c + (0 if shift is None else host(shift))
    return (y * y).sum(), y, [2 * y * host(x), 2 * y * c, 2 * y * b]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_every_form_gives_the_closed_form(compiled, bound, shifted):
    x, shift = ms.Tensor(np.array([2, 5], np.float32)), ms.Tensor(np.array([1, -1], np.float32)) if shifted else None
    params = parameters(tree_of_tensors()) if bound else tree_of_tensors()
    total, y, grads = expected_of(params, x, shift)
    (value, aux), found = value_and_grad(square_sum, aux=("y", "total"), compiled=compiled)(params, x, shift)
    assert list(aux) == ["y", "total"]  # names in the order asked for
    assert float(value) == float(aux["total"]) == total
    np.testing.assert_allclose(host(aux["y"]), y)
    assert list(found) == ["a", "c"] and isinstance(found["a"], list)
    for got, want in zip(tree_leaves(found), grads):
        np.testing.assert_allclose(host(got), want, rtol=1e-6)


def without_aux(params, x, shift):
    return square_sum(params, x, shift)[0]


def test_without_aux_the_value_is_bare():
    params, x = tree_of_tensors(), ms.Tensor(np.array([2, 5], np.float32))
    for compiled in (False, True):
        value, grads = value_and_grad(without_aux, compiled=compiled)(params, x, None)
        assert float(value) == expected_of(params, x, None)[0]
        assert_trees_close(unflatten(params, expected_of(params, x, None)[2]), grads, 1e-6)


@pytest.mark.extended(but=("False",))
@pytest.mark.parametrize("compiled", [False, True])
def test_a_result_that_is_no_number_is_refused_unless_aux_names_the_rest(compiled):
    """MindSpore differentiates the sum of all results, which doubles the gradients where the loss is among the metrics."""
    cfg, params, batch = DENSE, random_params(DENSE), packed_batch(DENSE)

    def of_cfg(params, batch):
        return loss_fn(params, batch, cfg)

    with pytest.raises(ValueError, match="returns a tuple of .*whose sum would be differentiated; .*metric_names"):
        value_and_grad(of_cfg, compiled=compiled)(params, batch)
    (loss, _), grads = value_and_grad(of_cfg, aux=metric_names(cfg), compiled=compiled)(params, batch)
    assert_trees_close(unflatten(params, flat_gradients(of_cfg, params, tree_leaves(params), batch)[1]), grads, 1e-4)
    x = ms.Tensor(np.array([2, 5], np.float32))
    with pytest.raises(ValueError, match=re.escape("returns a value of shape [2]; return one number")):
        value_and_grad(a_vector, compiled=compiled)(tree_of_tensors(), x)
    with pytest.raises(ValueError, match=re.escape("returns a value of shape [2]; return one number")):
        value_and_grad(a_vector_and_more, aux=("x",), compiled=compiled)(tree_of_tensors(), x)


def a_vector(params, x):
    return params["c"] * x


def a_vector_and_more(params, x):
    return params["c"] * x, {"x": x}


def test_one_name_of_aux_is_no_text():
    with pytest.raises(ValueError, match=re.escape("aux='loss' must be a tuple of names; use aux=('loss',)")):
        value_and_grad(square_sum, aux="loss")


def test_new_values_do_not_compile_again_and_are_used():
    vg = value_and_grad(square_sum, aux=("y",), compiled=True)
    x = ms.Tensor(np.array([2, 5], np.float32))
    vg(tree_of_tensors(), x, None)
    compiled = len(api.ms_compile_cache)
    for offset in (1.0, 2.0, 3.0):
        params, shifted = tree_of_tensors(offset), x * offset
        (value, _), grads = vg(params, shifted, None)
        total, _, expected = expected_of(params, shifted, None)
        assert float(value) == pytest.approx(total, rel=1e-6)
        assert_trees_close(unflatten(params, expected), grads, 1e-6)
    assert len(api.ms_compile_cache) == compiled
    vg(tree_of_tensors(), x, x)  # another structure is another graph
    assert len(api.ms_compile_cache) == compiled + 1


def doubled(tree, x):
    return tree["a"][0] + x, (tree["c"] * 2,)


def test_a_compiled_function_takes_new_values_and_compiles_once_a_shape():
    run = jit(doubled)
    one = ms.Tensor(np.ones(2, np.float32))
    run(tree_of_tensors(), one)
    compiled = len(api.ms_compile_cache)
    for offset in (1.0, 2.0):
        total, (twice,) = run(tree_of_tensors(offset), one)
        np.testing.assert_array_equal(host(total), [2 + offset] * 2)
        np.testing.assert_array_equal(host(twice), [6 + 2 * offset] * 2)
    assert len(api.ms_compile_cache) == compiled
    run(tree_map(lambda t: ops.concat((t, t)), tree_of_tensors()), ms.Tensor(np.ones(4, np.float32)))
    assert len(api.ms_compile_cache) == compiled + 1


def test_closed_over_parameters_are_told_apart_by_identity():
    """Two sets of Parameters of one structure do not share a graph that closes over the first."""
    vg = value_and_grad(square_sum, aux=("y",), compiled=True)
    x = ms.Tensor(np.array([2, 5], np.float32))
    for offset in (0.0, 4.0):
        params = parameters(tree_of_tensors(offset))
        assert float(vg(params, x, None)[0][0]) == pytest.approx(expected_of(params, x, None)[0], rel=1e-6)


def test_mixed_and_empty_params_are_refused():
    tensor, x = ms.Tensor(np.ones(2, np.float32)), ms.Tensor(np.ones(2, np.float32))
    for compiled in (False, True):
        vg = value_and_grad(without_aux, compiled=compiled)
        for params in ({"a": tensor, "b": Parameter(tensor, name="b")}, {"a": Parameter(tensor, name="a"), "b": tensor}):
            with pytest.raises(ValueError, match=re.escape("params mixes Parameters and tensors; use one kind")):
                vg(params, x, None)
        for params in ({}, [], {"layers": []}):
            with pytest.raises(ValueError, match="params has no leaves"):
                vg(params, x, None)


WITH_NONE = {"a": [1, {"b": None}], "c": (), "d": {"e": 4, "f": [5]}, "it's": None}


def test_rebuild_undoes_to_tuple():
    """Lists become tuples; a None in the pattern stays None whatever stands for it."""
    expected = {"a": (1, {"b": None}), "c": (), "d": {"e": 4, "f": (5,)}, "it's": None}
    assert nested.to_tuple(WITH_NONE) == ((1, (None,)), (), (4, (5,)), None)
    assert nested.rebuild(WITH_NONE)(nested.to_tuple(WITH_NONE)) == expected
    assert nested.rebuild(WITH_NONE)(((1, (9,)), (), (4, (5,)), 9)) == expected
    assert nested.from_tuple(WITH_NONE, nested.to_tuple(WITH_NONE)) == WITH_NONE
    assert nested.rebuild(3)(7) == 7


def test_rebuild_flat_undoes_flatten_in_graph():
    like = {"a": [0, {"b": 0}], "c": {"d": (0, 0)}}
    flat = (1, 2, 3, 4)
    tree = nested.rebuild_flat(like)(flat)
    assert tree == {"a": (1, {"b": 2}), "c": {"d": (3, 4)}}
    assert nested.flatten_in_graph(like)(tree) == flat
    assert nested.rebuild_flat({"a": 0})((5,)) == {"a": 5} and nested.flatten_in_graph({"a": 0})({"a": 5}) == (5,)


def test_trees_cross_a_graph_with_their_structure():
    like = {"a": [0, {"b": 0}], "c": 0}
    build_tree, flatten = nested.rebuild_flat(like), nested.flatten_in_graph(like)

    @ms.jit(fullgraph=True)
    def round_trip(flat):
        tree = build_tree(flat)
        return flatten({"a": (tree["a"][0], {"b": tree["a"][1]["b"] * 10}), "c": tree["c"]})

    leaves = tuple(ms.Tensor(np.full(2, n), ms.float32) for n in (1, 2, 3))
    assert [host(x)[0] for x in round_trip(ms.mutable(leaves))] == [1, 20, 3]


def in_a_loop(x, w):
    i = ms.Tensor(0, ms.int32)
    while i < 2:
        x = x * w
        i = i + 1
    return x


def test_slices_of_a_tensor_are_read_from_their_place():
    """MindSpore reads them from elsewhere in a graph with a loop (test_mindspore_traps)."""
    whole, run = ms.Tensor(np.arange(8, dtype=np.float32).reshape(4, 2)), jit(in_a_loop)
    for w in (*whole, *ops.split(whole, 1)):
        np.testing.assert_array_equal(host(run(ops.ones_like(w), w)), host(w) ** 2)
    np.testing.assert_array_equal(host(run(ops.ones_like(whole.T), whole.T)), host(whole).T ** 2)


LEAVES = {"one": [(2,)], "two_of_a_shape": [(2,), (2,)], "two_shapes": [(2,), (3, 2)]}
total, reshape = ops.ReduceSum(), ops.Reshape()


def layer(p, x, consts):
    for w in p:
        x = x * total(w) + consts[0]
    return x, reshape(total(x), (1,))


@pytest.mark.extended
@pytest.mark.parametrize("shapes", LEAVES)
def test_the_layer_loop_takes_leaves_of_any_shapes(shapes):
    """Gradients of the loop over 3 stacked layers are those of the layers one after the other."""
    rng = np.random.default_rng(0)
    stacked = [ms.Tensor(rng.normal(0, 1, (3, *shape)), ms.float32) for shape in LEAVES[shapes]]
    like, (x, c) = [0] * len(stacked), ms.Tensor(rng.normal(0, 1, (2, 2)), ms.float32)
    loop = scan(layer, like, 3, (1,))

    def looped(params, c):
        y, stats = loop(params["x"], params["w"], (c,))
        return (y * y).sum() + (stats * stats).sum()

    def unrolled(params, c):
        y, squares = params["x"], 0
        for i in range(3):
            y, s = layer([w[i] for w in params["w"]], y, (c,))
            squares = squares + (s * s).sum()
        return (y * y).sum() + squares

    params = {"x": x, "w": stacked}
    expected, grads = value_and_grad(unrolled)(params, c)
    value, found = value_and_grad(looped, compiled=True)(params, c)
    assert_close(expected, value, 1e-6)
    assert_trees_close(grads, found, 1e-5)
