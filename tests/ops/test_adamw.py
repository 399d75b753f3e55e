"""AdamW in new arrays and in place, and sums of squares."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import ops

from ops import adamw
from parallel.graph.jit import jit
from tests.ops.kernels import call, same_for_any_threads, tensors
from tests.ops.test_references import draw
from tests.tiny import assert_close, host

KINDS = {"reference": adamw.reference, "cpu": adamw.cpu, "vendor": adamw.vendor}
SQUARES = {"reference": adamw.reference_squares, "cpu": adamw.cpu_squares}
BETAS_AND_EPS = (0.9, 0.99, 1e-8)
SHAPES = [(), (1,), (17,), (3, 5, 7), (131, 263)]  # the last with threads


def values_at(step, lr=0.01):
    return np.array([lr, 1 - 0.9**step, 1 - 0.99**step, 1], np.float32)


def scalar(x):
    return ms.Tensor(x, ms.float32)


def adamw_in_numpy(values, scale, decay, p, g, m, v):
    """torch.optim.AdamW in float64."""
    p, g, m, v, (lr, c1, c2, _) = *(x.astype(np.float64) for x in (p, g, m, v)), values.astype(np.float64)
    g = g * scale
    m, v = 0.9 * m + (1 - 0.9) * g, 0.99 * v + (1 - 0.99) * g * g
    return p * (1 - lr * decay) - lr * (m / c1) / (np.sqrt(v / c2) + 1e-8), m, v


@pytest.mark.extended(but=("cpu*", "*(3, 5, 7)*"))
@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_float64_over_steps(kind, shape, way):
    update = KINDS[kind](*BETAS_AND_EPS, 0.1, False)
    update = jit(update) if way == "compiled" else update
    p, m, v = np.asarray(1 + np.abs(draw(*shape)), np.float32), np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    state, expected = tensors(p, m, v), (p, m, v)
    for step in range(1, 4):
        g, scale = draw(*shape) + np.zeros(shape, np.float32), 0.3 * step
        values = values_at(step)
        state = update(ms.Tensor(values), scalar(scale), scalar(1.0), state[0], ms.Tensor(g), *state[1:])
        expected = adamw_in_numpy(values, scale, 0.1, expected[0], g, *expected[1:])
        for x, y in zip(expected, state):
            assert_close(x, y, 2e-6)  # the constants are rounded to float32


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("keep", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_keep_decides_only_where_steps_may_be_skipped(kind, keep, skips):
    """And where nothing changes, a gradient that is not finite does no harm."""
    update = KINDS[kind](*BETAS_AND_EPS, 0.1, skips)
    p, g, m, v = draw(5, 7), draw(5, 7), draw(5, 7), np.abs(draw(5, 7))
    skipped = skips and keep == 0
    if skipped:
        g[2, 3] = np.inf
    new = update(ms.Tensor(values_at(3)), scalar(0.0 if skipped else 0.5), scalar(keep), *tensors(p, g, m, v))
    if skipped:
        for y, before in zip(new, (p, m, v)):
            np.testing.assert_array_equal(host(y), before)
    else:
        for x, y in zip(adamw_in_numpy(values_at(3), 0.5, 0.1, p, g, m, v), new):
            assert_close(x, y, 2e-6)


@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("kind", ["cpu", "vendor"])
def test_what_works_in_place_changes_the_callers_tensors(kind, way):
    update = KINDS[kind](*BETAS_AND_EPS, 0.1, False)
    update = jit(update) if way == "compiled" else update
    arrays = draw(5, 7), draw(5, 7), draw(5, 7), np.abs(draw(5, 7))
    p, g, m, v = tensors(*arrays)
    new = update(ms.Tensor(values_at(3)), scalar(1.0), scalar(1.0), p, g, m, v)
    for returned, given in zip(new, (p, m, v)):
        np.testing.assert_array_equal(host(returned), host(given))
    expected = adamw_in_numpy(values_at(3), 1.0, 0.1, *arrays)
    for x, y in zip(expected, (p, m, v)):
        assert_close(x, y, 2e-6)
    np.testing.assert_array_equal(host(g), arrays[1])


@pytest.mark.parametrize("kind", ["cpu", "vendor"])
def test_a_result_that_depends_on_the_update_is_enough_to_run_it(kind):
    """So a step need not return the state, which would copy it; what reads the returned arrays sees them after the update."""
    update = KINDS[kind](*BETAS_AND_EPS, 0.0, False)

    def step(values, one, p, g, m, v):
        new = update(values, one, one, p, g, m, v)
        return ops.depend(one, new), ops.ReduceSum()(new[0], ())

    arrays = draw(64, 64), draw(64, 64), np.zeros((64, 64), np.float32), np.zeros((64, 64), np.float32)
    expected, compiled = adamw_in_numpy(values_at(1), 1.0, 0.0, *arrays), jit(step)
    for _ in range(5):
        p, g, m, v = tensors(*arrays)
        _, total = compiled(ms.Tensor(values_at(1)), scalar(1.0), p, g, m, v)
        assert_close(expected[0], p, 2e-6)
        assert abs(float(total) - expected[0].sum()) < 1e-5 * np.abs(expected[0]).sum()


@pytest.mark.parametrize("kind", SQUARES)
@pytest.mark.parametrize("shape", [(), (1,), (17,), (2047,), (2, 1024), (2049,), (3, 41, 997)], ids=str)
def test_sums_of_squares(kind, shape):
    squares, g = SQUARES[kind](), draw(*shape) + np.zeros(shape, np.float32)
    for run in (squares, jit(squares)):
        out = run(ms.Tensor(g))
        assert out.shape == () and out.dtype == ms.float32
        assert_close((g.astype(np.float64) ** 2).sum(), out, 1e-5)


def test_sums_of_squares_of_many():
    """3 million terms of one size, of which float32 in one run would lose a part."""
    g = np.full(3_000_001, 0.1, np.float32)
    assert_close(3_000_001 * np.float64(np.float32(0.1)) ** 2, adamw.cpu_squares()(ms.Tensor(g)), 1e-6)


@pytest.mark.parametrize("size", [0, 1e-30, 1e-12, 1e18])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_gradients(kind, size):
    """Squares that vanish in float32, where eps decides alone, and those near its largest; a step is never longer than lr."""
    p, g = draw(5, 7), (draw(5, 7) * size).astype(np.float32)
    zeros = np.zeros_like(p)
    new = KINDS[kind](*BETAS_AND_EPS, 0.0, False)(
        ms.Tensor(values_at(1)), scalar(1.0), scalar(1.0), *tensors(p.copy(), g, zeros, zeros.copy())
    )
    expected = adamw_in_numpy(values_at(1), 1.0, 0.0, p, g, zeros, zeros)
    assert_close(expected[0], new[0], 2e-6)
    assert_close(expected[1], new[1], 2e-6)
    assert np.abs(host(new[0]) - p).max() <= 0.01 * (1 + 1e-4)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_has_no_finite_norm(wrong):
    g = draw(40_000)
    g[31_234] = wrong
    assert not np.isfinite(float(adamw.cpu_squares()(ms.Tensor(g))))


def test_views():
    """A compiled function gets them in order. An eager call would change a copy, so it refuses; the gradient may be a view."""
    update, one, values = adamw.cpu(*BETAS_AND_EPS, 0.1, False), scalar(1.0), ms.Tensor(values_at(3))
    arrays = draw(5, 7), draw(5, 7), draw(5, 7), np.abs(draw(5, 7))
    backwards = [ms.Tensor(np.ascontiguousarray(x.T)).T for x in arrays]
    for a, b in zip(jit(update)(values, one, one, *backwards), update(values, one, one, *tensors(*arrays))):
        np.testing.assert_array_equal(host(a), host(b))
    for i in range(4):
        mixed = list(tensors(*arrays))
        mixed[i] = backwards[i]
        if i == 1:
            assert_close(adamw_in_numpy(values_at(3), 1.0, 0.1, *arrays)[0], update(values, one, one, *mixed)[0], 2e-6)
            continue
        with pytest.raises(ValueError, match="contiguous"):
            update(values, one, one, *mixed)


def test_bits_do_not_depend_on_threads():
    shape = (131, 263)
    p, g, m, v = draw(*shape), draw(*shape), draw(*shape), np.abs(draw(*shape))
    constants, one = np.array([0.9, 0.1, 0.99, 0.01, 1e-8, 0.1, 0], np.float32), np.float32(1)
    same_for_any_threads("adamw", "adamw", [values_at(3), one, one, constants, g, p, m, v], [(1,)])
    same_for_any_threads("adamw", "sum_of_squares", [draw(100_003)], [()])
    changed = call("adamw", "adamw", [values_at(3), one, one, constants, g, p, m, v], [(1,)], 2)[5]
    assert (changed != p).mean() > 0.99
