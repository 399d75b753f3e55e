"""Routing: plans of both implementations against their definition, rows and choices against numpy, the C++ ones against the reference."""

import mindspore as ms
import numpy as np
import pytest

from ops import routing
from parallel.graph.jit import jit
from tests.ops.kernels import agree, call, same_for_any_threads, takes_views
from tests.ops.test_references import check, draw, softmax
from tests.tiny import assert_close, host

IMPLEMENTATIONS = ("reference", "cpu")


def of(implementation, function):
    return getattr(routing, f"{implementation}_{function}")


def assignments(rows, k, experts, seed):
    """k different experts a row."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(experts)[:k] for _ in range(rows)]).astype(np.int32)


CHOICES = {
    "random": (assignments(13, 2, 6, 1), 6),
    "all": (assignments(5, 4, 4, 2), 4),
    "one_expert": (np.full((9, 1), 3, np.int32), 6),
    "last_expert": (np.full((9, 1), 5, np.int32), 6),
    "more_experts_than_assignments": (assignments(3, 2, 50, 3), 50),
    "one_token": (np.array([[4]], np.int32), 6),
    "one_expert_exists": (np.zeros((7, 1), np.int32), 1),
    "many": (assignments(200, 4, 16, 4), 16),
}


@pytest.mark.extended(but=("*cpu*",))
@pytest.mark.parametrize("limit", [1, 3, 4, 64])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_plan_gives_every_assignment_a_slot_of_its_expert(implementation, choice, limit):
    check_plan(of(implementation, "plan"), *CHOICES[choice], limit)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_plan_is_exact_where_float32_is_not(implementation):
    """Its sort keys run to experts * assignments, here 2 ** 25."""
    expert = np.argsort(np.random.default_rng(0).random((2**15, 128)), 1)[:, :8].astype(np.int32)
    check_plan(of(implementation, "plan"), expert, 128, 64)


def check_plan(plan, expert, experts, limit):
    T, k = expert.shape
    slot, source, group = map(host, plan(experts, limit)(ms.Tensor(expert)))
    size = source.shape[1]
    assert slot.shape == (T * k,) and source.shape == (len(group), size) and 1 <= size <= limit
    source = source.ravel()
    assert len(np.unique(slot)) == T * k and 0 <= slot.min() and slot.max() < len(source)
    np.testing.assert_array_equal(source[slot], np.arange(T * k) // k)
    np.testing.assert_array_equal(group[slot // size], expert.ravel())
    np.testing.assert_array_equal(np.delete(source, slot), T)  # the rest is padding
    assert 0 <= group.min() and (np.diff(group) >= 0).all()
    np.testing.assert_array_equal(group == experts, (source.reshape(-1, size) == T).all(1))  # blocks that hold nothing
    for e in range(experts):  # an expert's tokens are in order, so a rerun adds them alike
        own = source[np.repeat(group == e, size)]
        assert (np.diff(own[own < T]) >= 0).all()


@pytest.mark.extended(but=("True-4",))
@pytest.mark.parametrize("limit", [1, 4])
@pytest.mark.parametrize("compiled", [False, True])
def test_plans_are_the_same_in_both_implementations(limit, compiled):
    """Also of assignments to no expert, which take no slot."""
    some = {name: (np.where(np.arange(expert.size).reshape(expert.shape) % 3, expert, E), E) for name, (expert, E) in CHOICES.items()}
    none = {"nothing": (np.full((7, 1), 5, np.int32), 5)}
    for expert, E in [CHOICES["all"], some["many"], none["nothing"]] if compiled else [*CHOICES.values(), *some.values(), *none.values()]:
        empty = bool((expert == E).any())
        made = [of(i, "plan")(E, limit, empty=empty) for i in IMPLEMENTATIONS]
        each = [(jit(plan) if compiled else plan)(ms.Tensor(expert.astype(np.int32))) for plan in made]
        for a, b in zip(*each):
            assert a.dtype == b.dtype == ms.int32
            np.testing.assert_array_equal(host(a), host(b))
        slot, source, _ = map(host, each[1])
        np.testing.assert_array_equal(slot[expert.ravel() == E], source.size)
        assert (source < len(expert)).sum() == (expert < E).sum()


@pytest.mark.parametrize("factor", [None, 0.5, 1.0, 100.0])
@pytest.mark.parametrize("choice", ["random", "all", "one_expert", "last_expert", "many"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_send_plan_puts_assignments_in_order_into_the_slots_of_their_shard(implementation, choice, factor):
    expert, experts = CHOICES[choice]
    (T, k), within = expert.shape, experts // 2
    slot, source, local, lost = map(host, of(implementation, "send_plan")(experts, 2, factor)(ms.Tensor(expert)))
    capacity, flat, at = source.shape[1], expert.ravel(), np.arange(T * k)
    assert source.shape == local.shape == (2, capacity) and lost.shape == (T, k) and lost.dtype == np.float32
    assert capacity == (T * min(k, within) if factor is None else min(T * min(k, within), int(np.ceil(factor * T * k / 2))))
    for shard in range(2):
        there = at[flat // within == shard]
        kept, given_up = there[:capacity], there[capacity:]
        np.testing.assert_array_equal(slot[kept], shard * capacity + np.arange(len(kept)))
        np.testing.assert_array_equal(slot[given_up], 2 * capacity)
        np.testing.assert_array_equal(lost.ravel()[there], np.arange(len(there)) >= capacity)
        empty = capacity - len(kept)
        np.testing.assert_array_equal(source[shard], [*(kept // k), *[T] * empty])
        np.testing.assert_array_equal(local[shard], [*(flat[kept] - shard * within), *[within] * empty])
    assert lost.sum() >= T * k - source.size  # above 0 with a factor of 0.5


def test_plans_of_one_shape_and_different_sizes_are_different():
    """MindSpore takes an eager op's result shapes from any primitive with the same attributes and inputs."""
    expert = ms.Tensor(CHOICES["many"][0])
    assert [routing.cpu_plan(16, limit)(expert)[1].shape for limit in (1, 4, 64)] == [(800, 1), (212, 4), (28, 64)]
    assert [routing.cpu_top_k(k, True)(ms.Tensor(draw(3, 8)))[1].shape for k in (1, 4)] == [(3, 1), (3, 4)]


def test_experts_that_do_not_exist_are_refused():
    for expert in (-1, 6):
        for make in (routing.cpu_plan(6, 4), routing.cpu_send_plan(6, 2, None)):
            with pytest.raises(RuntimeError):
                make(ms.Tensor([[1], [expert]], ms.int32))[0].asnumpy()


INDEX = np.array([[0, 5, 3], [3, 3, 1]], np.int32)  # a row taken thrice, two not at all, and one past the last


def rows_at(x, index):
    flat = x.reshape(-1, x.shape[-1])
    return np.concatenate((flat, flat[:1] * 0))[index]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("index", [INDEX, INDEX.ravel(), np.array([[2]], np.int32)])
def test_take(implementation, index):
    check(of(implementation, "take")(), rows_at, [draw(5, 3)], (index,))


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (2, 3, 5), (263, 257)])
def test_take_matches_the_reference(shape):
    rows = int(np.prod(shape[:-1]))
    index = np.random.default_rng(0).integers(0, rows + 1, (3, max(rows, 2))).astype(np.int32)
    ways = ("eager", "compiled") if shape == (2, 3, 5) else ("eager",)
    agree(routing.reference_take(), routing.cpu_take(), [draw(*shape)], (index,), ways=ways)
    agree(routing.reference_take(), routing.cpu_take(), [draw(*shape)], (np.zeros(300, np.int32),), ways=("eager",))


@pytest.mark.extended(but=("*cpu", "random-4-reference"))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("limit", [1, 4])
@pytest.mark.parametrize("choice", ["random", "one_expert", "last_expert", "more_experts_than_assignments", "one_token"])
def test_permute_puts_rows_into_the_slots_of_the_plan(implementation, limit, choice):
    """Rows of experts that nobody chose are in no block; a token's gradient is the sum over its choices."""
    expert, E = CHOICES[choice]
    permute, x = of(implementation, "permute")(E, limit), draw(len(expert), 5)
    slot, source, group = map(host, of("reference", "plan")(E, limit)(ms.Tensor(expert)))
    for run in (permute, jit(permute)) if choice == "random" else (permute,):
        rows, *planned = map(host, run(ms.Tensor(x), ms.Tensor(expert)))
        np.testing.assert_array_equal(rows, rows_at(x, source))
        np.testing.assert_array_equal(planned[0], slot)
        np.testing.assert_array_equal(planned[1], group)

    def rows_of(x, expert):
        return permute(x, expert)[0]

    check(rows_of, lambda x, _: rows_at(x, source), [x], (expert,))


def combined(y, weight, slot):
    return (rows_at(y, slot.reshape(weight.shape)) * weight[:, :, None]).sum(1)


def combine(implementation):
    inner = of(implementation, "combine")()

    def with_slot_last(y, weight, slot):
        return inner(y, slot, weight)

    return with_slot_last


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_combine(implementation):
    check(combine(implementation), combined, [draw(3, 2, 4), draw(3, 2)], (np.array([3, 0, 6, 5, 1, 6], np.int32),))


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 3, 13), (131, 4, 257)])
def test_combine_matches_the_reference(shape):
    """Slots in any order, a tenth of them none, and some rows of y used by nobody."""
    (R, k, D), rng = shape, np.random.default_rng(0)
    slot = rng.permutation(R * k + 3)[: R * k].astype(np.int32)
    slot[:: 10 if R > 1 else 2] = R * k + 3
    ways = ("eager", "compiled") if R == 7 else ("eager",)
    agree(combine("reference"), combine("cpu"), [draw(R * k + 3, 1, D), draw(R, k)], (slot,), ways=ways)


def test_indices_that_are_no_row_are_refused():
    x, weight = ms.Tensor(draw(4, 3)), ms.Tensor(draw(2, 1))
    for bad in (-1, 5):
        index = ms.Tensor([0, bad], ms.int32)
        for op, args in ((routing.cpu_take(), (x, index)), (routing.cpu_combine(), (x, index, weight))):
            with pytest.raises(RuntimeError):
                op(*args).asnumpy()


def chosen(logits, bias=0, k=3, normalise=True):
    """probs, weight; the choice is that of float64."""
    probs = softmax(logits)
    expert = np.argsort(-(probs + bias), 1, kind="stable")[:, :k]
    weight = np.take_along_axis(probs, expert, 1)
    return probs, expert, weight / weight.sum(1, keepdims=True) if normalise else weight


def without_experts(op, i):
    """The result i of top_k, which has a gradient."""

    def result(*args):
        return op(*args)[i]

    return result


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("normalise", [False, True])
def test_top_k(implementation, normalise):
    logits = np.random.default_rng(3).permutation(np.arange(35.0)).reshape(5, 7).astype(np.float32) / 8  # apart, so differences move none
    op = of(implementation, "top_k")(3, normalise)
    np.testing.assert_array_equal(host(op(ms.Tensor(logits))[1]), chosen(logits)[1])
    for i in (0, 2):
        check(without_experts(op, i), lambda z, i=i: chosen(z, normalise=normalise)[i], [logits])


@pytest.mark.extended(but=("*shape1", "True-True-shape2"))
@pytest.mark.parametrize("shape", [(1, 2, 1), (5, 7, 3), (3, 4, 4), (263, 37, 8)])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_top_k_matches_the_reference(shape, normalise, biased):
    (R, E, k), rng = shape, np.random.default_rng(0)  # a seed without scores that differ by rounding alone
    logits, bias = rng.normal(0, 2, (R, E)).astype(np.float32), rng.normal(0, 0.3, E).astype(np.float32)
    fixed = (bias,) if biased else ()
    each = [of(i, "top_k")(k, normalise, biased=biased) for i in IMPLEMENTATIONS]
    experts = [host(op(ms.Tensor(logits), *map(ms.Tensor, fixed))[1]) for op in each]
    np.testing.assert_array_equal(*experts)
    assert experts[1].dtype == np.int32
    np.testing.assert_array_equal(experts[1], chosen(logits, *fixed, k=k)[1])
    agree(*(probs_and_weight(op, biased) for op in each), [logits], fixed, ways=("eager", "compiled") if R == 263 else ("eager",))


def test_top_k_of_one_expert():
    """Not compared with the reference: MindSpore's eager gradient of a Softmax of one element spoils later ones of any size."""
    op, z = routing.cpu_top_k(1, False), ms.Tensor(draw(3, 1))
    for result, one in zip(op(z), (1, 0, 1)):
        np.testing.assert_array_equal(host(result), np.full((3, 1), one))
    np.testing.assert_array_equal(host(ms.grad(without_experts(op, 2))(z)), np.zeros((3, 1)))


def probs_and_weight(op, biased):
    def plain(logits):
        probs, _, weight = op(logits)
        return probs, weight

    def with_bias(logits, bias):
        probs, _, weight = op(logits, bias)
        return probs, weight

    return with_bias if biased else plain


def test_the_bias_of_top_k_has_no_gradient():
    for implementation in IMPLEMENTATIONS:
        op = of(implementation, "top_k")(2, True, biased=True)

        def weights(logits, bias, op=op):
            return (op(logits, bias)[2] ** 2).sum()

        d_bias = ms.grad(weights, 1)(ms.Tensor(draw(4, 6)), ms.Tensor(draw(6)))
        np.testing.assert_array_equal(host(d_bias), np.zeros(6))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_among_equals_the_lower_number_comes_first(implementation):
    logits = np.array([[1] * 6, [0, 2, 2, 0, 2, 0], [-500, -500, 9, -500, -500, -500], [0, 1, 2, 3, 4, 5]], np.float32)
    op = of(implementation, "top_k")(3, True)
    for run in (op, jit(op)):
        np.testing.assert_array_equal(host(run(ms.Tensor(logits))[1]), [[0, 1, 2], [1, 2, 4], [2, 0, 1], [5, 4, 3]])
    many = np.random.default_rng(0).integers(0, 4, (100, 64)).astype(np.float32)  # TopK alone gets most of these rows wrong on CPU
    expected, bias = np.argsort(-many, 1, kind="stable")[:, :8], np.zeros(64, np.float32)
    np.testing.assert_array_equal(host(of(implementation, "top_k")(8, False)(ms.Tensor(many))[1]), expected)
    np.testing.assert_array_equal(host(of(implementation, "top_k")(8, False, biased=True)(*map(ms.Tensor, (many, bias)))[1]), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_top_k_of_extreme_logits(implementation):
    """Above exp's range, far below it, and with infinities below."""
    logits = np.array([[1e4, 1e4 - 1, 0, -3e38], [-1e4, -1e4 - 1, -3e38, -np.inf], [3e38, 1, 2, -3e38]], np.float32)
    for compiled in (False, True):
        op = of(implementation, "top_k")(2, True)
        probs, expert, weight = map(host, (jit(op) if compiled else op)(ms.Tensor(logits)))
        expected = chosen(logits.astype(np.float64), k=2)
        for a, b in zip(expected, (probs, expert, weight)):
            assert_close(a, b, 1e-6)


def test_not_a_number_gives_an_expert_that_exists():
    logits = np.full((2, 5), np.nan, np.float32)
    logits[1] = [1, np.inf, 2, 3, 4]
    _, expert, weight = map(host, routing.cpu_top_k(3, True)(ms.Tensor(logits)))
    assert expert.min() >= 0 and expert.max() < 5 and all(len(set(row)) == 3 for row in expert.tolist())
    assert np.isnan(weight[0]).all()


def test_threads_change_no_bit():
    R, k, E, D = 1031, 3, 37, 67
    expert, weight, x, y = assignments(R, k, E, 0), draw(R, k), draw(R, D), draw(R * k, 1, D)
    slot, source = (host(a) for a in routing.cpu_plan(E, 1)(ms.Tensor(expert))[:2])
    same_for_any_threads("routing", "take", [x, source], [(R * k, 1, D)])
    same_for_any_threads("routing", "take_grad", [x, source, y], [(R, D)])
    same_for_any_threads("routing", "combine", [y, slot, weight], [(R, D)])
    same_for_any_threads("routing", "combine_grad", [y, slot, weight, x], [y.shape, weight.shape])
    probs, logits = softmax(draw(R, E)).astype(np.float32), draw(R, E)
    for name in ("top_k", "top_k_shares"):
        same_for_any_threads("routing", f"{name}_grad", [probs, expert, weight, logits, draw(R, k)], [(R, E)])
        one, two = (call_top_k(name, logits, k, threads) for threads in (1, 2))
        for a, b in zip(one, two):
            np.testing.assert_array_equal(a, b)


def call_top_k(name, logits, k, threads):
    """The kernel with its expert, which are integers, as an input that it writes to."""
    R, E = logits.shape
    return call("routing", name, [logits, np.zeros((R, E), np.float32), np.zeros((R, k), np.int32)], [(R, k)], threads)


def test_views():
    takes_views(routing.cpu_take(), draw(6, 4), INDEX)
    takes_views(routing.cpu_combine(), draw(6, 4), np.array([0, 6, 2, 3], np.int32), draw(2, 2))
    takes_views(routing.cpu_top_k(2, True), draw(6, 4))
    takes_views(routing.cpu_plan(6, 2), CHOICES["random"][0])
    takes_views(routing.cpu_permute(6, 2), draw(13, 4), CHOICES["random"][0])
    takes_views(routing.cpu_send_plan(6, 2, None), CHOICES["random"][0])
