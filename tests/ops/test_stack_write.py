"""Writing into a stack of layers' arrays: the functional form and the one in place, against numpy, and both as the layer loop's."""

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import ops

from ops import registry, stack_write
from parallel.graph.jit import jit
from parallel.graph.scan import scan
from parallel.step import value_and_grad
from tests.ops.kernels import call
from tests.tiny import assert_trees_close, host

SHAPES = [(1,), (3, 5), (2, 7, 1), (4, 300, 301)]  # the last is copied by several threads
FORMS = {"reference": stack_write.reference, "cpu": stack_write.cpu}
KERNELS = {form: replace(registry.Kernels(), stack_write=form) for form in FORMS}
TWO_BYTES = [("reference", "float16"), ("cpu", "float16"), ("cpu", "bfloat16")]  # MindSpore has no ops of bfloat16 on CPU


def caller(form, compiled):
    write = FORMS[form]()

    def call_it(stack, at, x):
        return write(stack, at, x)

    return jit(call_it) if compiled else call_it


def case(shape):
    rng = np.random.default_rng(0)
    return rng.normal(0, 1, shape).astype(np.float32), np.asarray(rng.normal(0, 1, shape[1:]), np.float32)


def at(i):
    return ms.Tensor(i, ms.int32)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layers_array_is_in_its_place_and_others_unchanged(form, shape, compiled):
    write, (stack, x) = caller(form, compiled), case(shape)
    for i in {0, shape[0] // 2, shape[0] - 1}:
        expected = stack.copy()
        expected[i] = new = x + np.float32(i)
        np.testing.assert_array_equal(expected, host(write(ms.Tensor(stack), at(i), ms.Tensor(np.asarray(new)))))


@pytest.mark.parametrize("form, dtype", TWO_BYTES)
def test_arrays_of_two_bytes_are_written_too(form, dtype):
    dtype = getattr(ms, dtype)
    stack, x = (ms.Tensor(part).astype(dtype) for part in case((3, 5, 2)))
    found = jit(FORMS[form]())(stack.copy(), at(1), x)
    assert found.dtype == dtype
    for i, row in enumerate((stack[0], x, stack[2])):
        np.testing.assert_array_equal(row.astype(ms.float32).asnumpy(), found[i].astype(ms.float32).asnumpy())


@pytest.mark.parametrize("compiled", [False, True])
def test_the_kernel_changes_the_stack_it_is_given_and_the_reference_does_not(compiled):
    for form, changes in (("reference", False), ("cpu", True)):
        write, (stack, x) = caller(form, compiled), case((3, 5))
        given = ms.Tensor(stack)
        found = write(given, at(1), ms.Tensor(x))
        np.testing.assert_array_equal(host(found) if changes else stack, host(given))


def test_a_place_outside_is_an_error_of_the_kernel():
    stack, x = case((3, 5))
    for i in (-1, 3):
        with pytest.raises(RuntimeError):
            stack_write.cpu()(ms.Tensor(stack), at(i), ms.Tensor(x)).asnumpy()


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_writes_the_same(threads):
    stack, x = case(SHAPES[-1])
    found = call("stack_write", "stack_write", (stack, np.array(2, np.int32), x, np.zeros(1, np.int32)), (), threads)[0]
    stack[2] = x
    np.testing.assert_array_equal(stack, found)


def test_views_are_read_where_they_lie():
    stack, x = case((3, 5, 4))
    backwards = [ms.Tensor(np.ascontiguousarray(part.T)).T for part in (stack, x)]
    found = stack_write.cpu()(backwards[0], at(1), backwards[1])
    stack[1] = x
    np.testing.assert_array_equal(stack, host(found))


@pytest.mark.parametrize("compiled", [False, True])
def test_differentiating_the_kernel_is_an_error(compiled):
    write, (stack, x) = stack_write.cpu(), case((3, 5))

    def total(params, stack, i):
        return write(stack, i, params["x"]).sum()

    with pytest.raises(RuntimeError, match="stack_write kernel works in place and has no gradient"):
        value_and_grad(total, compiled=compiled)({"x": ms.Tensor(x)}, ms.Tensor(stack), at(0))


@pytest.mark.parametrize("form", FORMS)
def test_new_stacks_are_one_array_each(form):
    """Of one x, and written to in one graph, in a loop and in the next; what one call leaves is not seen by the next."""
    write, new = FORMS[form](), registry.pick(KERNELS[form], "stack_write", "new")((3,))

    def fill(x, first):
        i, a, b, c = ops.ZerosLike()(first), new(x), new(x), new(x)
        while i < 3:
            a, b, i = write(a, i, x + i), write(b, i, x * i), i + 1
        i = ops.ZerosLike()(first)
        while i < 3:
            c, i = write(c, i, x - i), i + 1
        return a, b, c

    run = jit(fill)
    for x in (1.0, 2.0):
        x = np.full((2, 5), x, np.float32)
        found = list(map(host, run(ms.Tensor(x), at(0))))
        for i in range(3):
            np.testing.assert_array_equal((x + i, x * i, x - i), [stack[i] for stack in found])


def layer(p, x, consts):
    y = ops.tanh(ops.matmul(x, p["w"]) + ops.matmul(x, p["u"]) * p["b"]) + consts[0]
    return y, ops.reshape(y.sum(), (1,))


def twice(loop):
    def loss(params, c):
        y, stats = loop(params["x"], params["w"], (c,))
        z, more = loop(y, params["w"], (c,))
        return (z * y).sum() + (stats * more).sum()

    return loss


@pytest.mark.extended
def test_the_layer_loop_gives_the_same_bits_with_both():
    """Leaves of one shape, values that change from call to call, a stack's gradient added to another's."""
    rng, results = np.random.default_rng(0), {}
    weights = {"w": rng.normal(0, 0.3, (4, 6, 6)), "u": rng.normal(0, 0.3, (4, 6, 6)), "b": rng.normal(0, 1, (4, 6))}
    weights, x = {key: w.astype(np.float32) for key, w in weights.items()}, rng.normal(0, 1, (5, 6)).astype(np.float32)
    for form, kernels in KERNELS.items():
        run = value_and_grad(twice(scan(layer, weights, 4, (1,), kernels)), compiled=True)
        for scale in (1.0, 0.5):
            params = {"x": ms.Tensor(x * np.float32(scale)), "w": {key: ms.Tensor(w) for key, w in weights.items()}}
            results[form, scale] = run(params, ms.Tensor(np.float32(scale)))
    for scale in (1.0, 0.5):
        (value, grads), (found, found_grads) = (results[form, scale] for form in FORMS)
        assert host(value) == host(found) != 0
        assert_trees_close(grads, found_grads, 0)
    assert np.any(host(results["cpu", 1.0][1]["w"]["u"]) != host(results["cpu", 0.5][1]["w"]["u"]))
