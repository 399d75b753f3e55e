"""MoE routing: the choice of experts for each token, and dropless dispatch with static shapes.

An assignment is a pair of a token and an expert that it chose. Assignments are sorted by expert, and those of each expert are padded to
blocks of fixed size. An index of a row that is the number of rows means "no row".

Every function has a factory for each implementation.
"""

import math

import mindspore as ms
from mindspore import nn, ops
from mindspore.ops.auto_generate import MoeGatingTopKSoftmax, MoeTokenPermute, MoeTokenUnpermute

from ops import iota
from ops.custom import kernel
from ops.signature import check

LOGITS, BIASED = "logits float32 R E", "logits float32 R E; bias float32 E"
EXPERT, PERMUTED = "expert int32 T k", "x T D; expert int32 T k"
TAKEN, COMBINED = "x ... M D; index int32 *", "y ... M D; slot int32 R*k; weight R k"


@ops.constexpr
def num_blocks(assignments, experts, block):
    """Returns the number of blocks for any distribution of the assignments: the largest sum over experts of ceil(count / block)."""
    return (assignments + min(experts, assignments) * (block - 1)) // block


@ops.constexpr
def block_size(assignments, experts, limit):
    """Returns the rows of a block: the smallest power of two that is at least the mean load of an expert, at most `limit`."""
    size = 1
    while size < limit and size * experts < assignments:
        size *= 2
    return min(size, limit)


@ops.constexpr
def shard_capacity(tokens, choices, experts, shards, factor):
    """Returns the slots of a rank's send buffer for each shard of the experts.

    factor: the capacity as a multiple of the mean load. None takes the worst case, in which all tokens choose experts of one shard.
    """
    worst = tokens * min(choices, experts // shards)
    return worst if factor is None else min(worst, max(1, math.ceil(factor * tokens * choices / shards)))


def reference_top_k(k, normalise, biased=False):
    """Returns top_k(logits_RE float32) -> (probs_RE, expert_Rk int32, weight_Rk).

    probs: softmax of the logits. expert: the k most probable experts, most probable first; among equals the lower number comes first.
    weight: their probabilities, divided by their sum if `normalise`. biased: the function is top_k(logits_RE, bias_E), and the experts are
    chosen and sorted by probability + bias. The bias has no gradient.
    """
    softmax, best, weights = ops.Softmax(-1), _best(k), _weights(normalise)
    require, require_biased = (check("routing", text, least={"E": k}) for text in (LOGITS, BIASED))

    def top_k(logits):
        require((logits.shape,), (logits.dtype,))
        probs = softmax(logits)
        expert = best(ops.stop_gradient(probs))
        return probs, expert, weights(probs, expert)

    def biased_top_k(logits, bias):
        require_biased((logits.shape, bias.shape), (logits.dtype, bias.dtype))
        probs = softmax(logits)
        expert = best(ops.stop_gradient(probs + bias))
        return probs, expert, weights(probs, expert)

    return biased_top_k if biased else top_k


def _best(k):
    """Returns best(x_RE) -> int32 [R, k], the indices of the k largest elements, largest first and lower index first among equals.

    TopK orders equal elements differently on each device, so only its values are used: the n-th occurrence of a value in the result is
    looked up as its n-th occurrence in the row.
    """
    top, equal, less, cumsum, total = ops.TopK(), ops.Equal(), ops.Less(), ops.CumSum(), ops.ReduceSum()
    cast, expand, count = ops.Cast(), ops.ExpandDims(), iota.reference()

    def best(x):
        values, _ = top(x, k)
        earlier = cast(less(expand(count(k), 0), expand(count(k), 1)), ms.float32)  # [k, k]
        nth = total(cast(equal(expand(values, 1), expand(values, 2)), ms.float32) * earlier, 2) + 1
        alike = cast(equal(expand(x, 1), expand(values, 2)), ms.float32)  # [R, k, E]
        chosen = alike * cast(equal(cumsum(alike, 2), expand(nth, 2)), ms.float32)
        return cast(total(chosen * cast(count(x.shape[1]), ms.float32), 2), ms.int32)

    return best


def _weights(normalise):
    """Returns weights(probs_RE, expert_Rk) -> [R, k], the probabilities of the experts, divided by their sum if `normalise`."""
    pick, total = ops.GatherD(), ops.ReduceSum(keep_dims=True)

    def probability(probs, expert):
        return pick(probs, 1, expert)

    def share(probs, expert):
        weight = pick(probs, 1, expert)
        return weight / total(weight, 1)

    return share if normalise else probability


def vendor_top_k(k, normalise, biased=False):
    """Returns top_k, with experts chosen by MindSpore's kernel. Its order of equal elements is not documented, and it has no bias."""
    if biased:
        raise ValueError("ops.routing=vendor has no bias on the choice of experts; use --config.ops.routing=reference")
    softmax, choose, weights = ops.Softmax(-1), MoeGatingTopKSoftmax(), _weights(normalise)
    require = check("routing", LOGITS, least={"E": k})

    def top_k(logits):
        require((logits.shape,), (logits.dtype,))
        probs, expert = softmax(logits), choose(ops.stop_gradient(logits), None, k)[1]
        return probs, expert, weights(probs, expert)

    return top_k


def vendor_missing(use):
    if use.router_bias:
        return "has no bias on the choice of experts, which model_args.router_bias asks for"
    if use.expert_shards > 1:
        return f"cannot leave out assignments, which expert parallel needs, and experts are spread over {use.expert_shards} ranks"
    if use.padded:
        return "makes no padded blocks, which ops.grouped_matmul=reference needs"
    return ""


def reference_plan(num_experts, limit, empty=False):
    """Returns plan(expert_Tk int32) -> (slot_N, source_nb, group_n) int32, which puts N = T * k assignments into n blocks of b slots.

    slot: the slot of each assignment. source: the token in each slot, T for padding. group: the expert of each block, E if unused.
    The assignments of an expert keep their order. b is block_size(N, E, limit); at most min(E, N) * (b - 1) slots are padding.
    empty: an assignment to expert E is not one; it takes no slot, and its entry in `slot` is n * b.
    """
    stable_sort, cumsum, scatter = _stable_sort(), ops.CumSum(), ops.TensorScatterUpdate()
    reshape, cast, expand = ops.Reshape(), ops.Cast(), ops.ExpandDims()
    segment_sum, greater_equal, total = ops.UnsortedSegmentSum(), ops.GreaterEqual(), ops.ReduceSum()
    gather, minimum, count = ops.Gather(), ops.Minimum(), iota.reference()
    zeros_like, ones_like = ops.ZerosLike(), ops.OnesLike()
    kinds, filled = num_experts + empty, (_filled if empty else _all_filled)(num_experts)

    require = check("routing", EXPERT)

    def plan(expert):
        require((expert.shape,), (expert.dtype,))
        T, k = expert.shape
        N = T * k
        b = block_size(N, num_experts, limit)
        n = num_blocks(N, num_experts, b)
        flat = reshape(expert, (-1,))
        sorted_expert, assignment = stable_sort(flat)
        load = segment_sum(ones_like(flat), flat, kinds)[:num_experts]
        blocks = (load + (b - 1)) // b
        last_block = cumsum(cast(blocks, ms.float32), 0)  # float32 counts are exact below 2**24
        before = cumsum(cast(load, ms.float32), 0) - cast(load, ms.float32)
        first_slot = (last_block - cast(blocks, ms.float32)) * b - before
        sorted_slot = cast(gather(first_slot, minimum(sorted_expert, num_experts - 1), 0), ms.int32) + count(N)
        place = filled(sorted_expert, sorted_slot, n * b)
        slot = scatter(zeros_like(flat), expand(assignment, 1), place)
        source = scatter(ones_like(count(n * b + 1)) * T, expand(place, 1), assignment // k)
        passed = cast(greater_equal(expand(cast(count(n), ms.float32), 1), expand(last_block, 0)), ms.int32)
        return slot, reshape(source[: n * b], (n, b)), total(passed, 1)

    return plan


def _stable_sort():
    """Returns stable_sort(x_N int32, not negative) -> (x sorted, the index that each element had)."""
    sort, count = ops.Sort(0), iota.reference()

    def stable_sort(x):
        N = x.shape[0]
        key, _ = sort(x * N + count(N))  # unique keys, so the order of equal elements is kept
        value = key // N
        return value, key - value * N

    return stable_sort


def _all_filled(num_experts):
    def filled(expert, slot, slots):
        return slot

    return filled


def _filled(num_experts):
    """Returns filled(expert, slot, slots) -> the slot of each assignment, and `slots` for assignments to expert E."""
    less, cast = ops.Less(), ops.Cast()

    def filled(expert, slot, slots):
        real = cast(less(expert, num_experts), ms.int32)
        return slot * real + slots * (1 - real)

    return filled


def reference_send_plan(num_experts, shards, factor):
    """Returns send_plan(expert_Tk int32) -> (slot_N, source_sC, local_sC) int32 and lost_Tk float32, the send buffers for s expert shards.

    N = T * k assignments go into s buffers of C = shard_capacity slots. Expert e is in shard e // (E / s).
    slot: the slot of each assignment, s * C for one that does not fit. source: the token in each slot, T for an empty slot. local: the
    number of the expert within its shard, E / s for an empty slot. lost: 1 for an assignment that does not fit; always 0 without `factor`.
    """
    stable_sort, cumsum, reshape, cast = _stable_sort(), ops.CumSum(), ops.Reshape(), ops.Cast()
    scatter, segment_sum, expand = ops.TensorScatterUpdate(), ops.UnsortedSegmentSum(), ops.ExpandDims()
    gather, less, count = ops.Gather(), ops.Less(), iota.reference()
    zeros_like, ones_like, within = ops.ZerosLike(), ops.OnesLike(), num_experts // shards

    require = check("routing", EXPERT)

    def send_plan(expert):
        require((expert.shape,), (expert.dtype,))
        T, k = expert.shape
        C = shard_capacity(T, k, num_experts, shards, factor)
        flat = reshape(expert, (-1,))
        shard, assignment = stable_sort(flat // within)
        load = cast(segment_sum(ones_like(flat), flat // within, shards), ms.float32)
        first = cumsum(load, 0) - load  # float32 counts are exact below 2**24
        place = count(T * k) - cast(gather(first, shard, 0), ms.int32)
        fits = cast(less(place, C), ms.int32)
        slot = (shard * C + place) * fits + shards * C * (1 - fits)
        slots = ones_like(count(shards * C + 1))
        source = scatter(slots * T, expand(slot, 1), assignment // k)
        chosen = gather(flat, assignment, 0)
        local = scatter(slots * within, expand(slot, 1), chosen - shard * within)
        places = scatter(zeros_like(flat), expand(assignment, 1), slot)
        lost = scatter(zeros_like(flat), expand(assignment, 1), 1 - fits)
        return places, reshape(source[:-1], (shards, C)), reshape(local[:-1], (shards, C)), cast(reshape(lost, (T, k)), ms.float32)

    return send_plan


def reference_take():
    """Returns take(x [..., D], index int32 of any shape) -> [*index.shape, D], rows of x.

    Rows are counted over all leading dims of x. The index after the last row gives zeros.
    """
    gather, concat, reshape, zeros_like = ops.Gather(), ops.Concat(0), ops.Reshape(), ops.ZerosLike()
    require = check("routing", TAKEN)

    def take(x, index):
        require((x.shape, index.shape), (x.dtype, index.dtype))
        rows = reshape(x, (-1, x.shape[-1]))
        return gather(concat((rows, zeros_like(rows[:1]))), index, 0)

    return take


def reference_permute(num_experts, limit):
    """Returns permute(x_TD, expert_Tk int32) -> (rows [n, b, D], slot_N int32, group_n int32), rows of x by reference_plan."""
    return _permute(reference_plan(num_experts, limit), reference_take())


def _permute(plan, take):
    require = check("routing", PERMUTED)

    def permute(x, expert):
        require((x.shape, expert.shape), (x.dtype, expert.dtype))
        slot, source, group = plan(expert)
        return take(x, source), slot, group

    return permute


def vendor_permute(num_experts, limit):
    """Returns permute by MindSpore's kernel, for blocks of one row only. Raises ValueError for another `limit`."""
    if limit != 1:
        raise ValueError(f"ops.routing=vendor makes blocks of one row, not of {limit}; use --config.ops.grouped_matmul=vendor")
    sort, reshape, scatter = MoeTokenPermute(), ops.Reshape(), ops.TensorScatterUpdate()
    zeros_like, expand, require = ops.ZerosLike(), ops.ExpandDims(), check("routing", PERMUTED)

    def permute(x, expert):
        require((x.shape, expert.shape), (x.dtype, expert.dtype))
        rows, slot = sort(x, expert, None, False)
        flat = reshape(expert, (-1,))
        return expand(rows, 1), slot, scatter(zeros_like(flat), expand(slot, 1), flat)

    return permute


def reference_combine():
    """Returns combine(y [..., D], slot int32 [R * k], weight_Rk) -> [R, D], the weighted sums of k rows of y.

    The index after the last row adds nothing.
    """
    take, reshape, total, expand, cast = reference_take(), ops.Reshape(), ops.ReduceSum(), ops.ExpandDims(), ops.Cast()
    require = check("routing", COMBINED)

    def combine(y, slot, weight):
        require((y.shape, slot.shape, weight.shape), (y.dtype, slot.dtype, weight.dtype))
        chosen = take(y, reshape(slot, weight.shape))
        return cast(total(chosen * expand(cast(weight, y.dtype), 2), 1), y.dtype)

    return combine


def vendor_combine():
    """Returns combine by MindSpore's kernel. Every row of y must be in exactly one slot, as vendor_permute gives them."""
    unsort, reshape, cast, require = MoeTokenUnpermute(), ops.Reshape(), ops.Cast(), check("routing", COMBINED)

    def combine(y, slot, weight):
        require((y.shape, slot.shape, weight.shape), (y.dtype, slot.dtype, weight.dtype))
        return unsort(reshape(y, (-1, y.shape[-1])), slot, cast(weight, y.dtype), False, None)

    return combine


def cpu_top_k(k, normalise, biased=False):
    """Returns top_k as a C++ kernel in one pass over the rows."""
    name = "top_k_shares" if normalise else "top_k"
    if not biased:
        return _TopK(name, k)
    forward = kernel("routing", f"{name}_biased", BIASED, chosen(k), _biased_top_k_dtypes, least={"E": k})
    return BiasedTopK(forward, kernel("routing", f"{name}_grad", 5, _first, _first))


class _TopK(nn.Cell):
    def __init__(self, name, k):
        super().__init__()

        def shapes(logits):
            return logits, (logits[0], k), (logits[0], k)

        self.forward = kernel("routing", name, LOGITS, shapes, _top_k_dtypes, least={"E": k})
        self.backward = kernel("routing", f"{name}_grad", 5, _first, _first)

    def construct(self, logits):
        return self.forward(logits)

    def bprop(self, logits, out, dout):
        return (self.backward(out[0], out[1], out[2], dout[0], dout[2]),)


def chosen(k):
    """Returns the function from the shapes of the arguments of a biased top_k to those of its results."""

    def shapes(logits, bias):
        return logits, (logits[0], k), (logits[0], k)

    return shapes


class BiasedTopK(nn.Cell):
    """A biased top_k by two kernels.

    forward(logits, bias) -> (probs, expert, weight). backward(probs, expert, weight, d_probs, d_weight) -> d_logits.
    """

    def __init__(self, forward, backward):
        super().__init__()
        self.forward, self.backward, self.zeros_like = forward, backward, ops.ZerosLike()

    def construct(self, logits, bias):
        return self.forward(logits, bias)

    def bprop(self, logits, bias, out, dout):
        return self.backward(out[0], out[1], out[2], dout[0], dout[2]), self.zeros_like(bias)


def cpu_plan(num_experts, limit, empty=False):
    """Returns plan as a C++ kernel, by a counting sort."""

    def shapes(expert, num):
        N = expert[0] * expert[1]
        b = block_size(N, num_experts, limit)
        n = num_blocks(N, num_experts, b)
        return (N,), (n, b), (n,)

    return _Plan("plan_some" if empty else "plan", num_experts, shapes, _plan_dtypes)


def cpu_send_plan(num_experts, shards, factor):
    """Returns send_plan as a C++ kernel, by a counting sort."""

    def shapes(expert, num):
        T, k = expert
        C = shard_capacity(T, k, num_experts, shards, factor)
        return (T * k,), (shards, C), (shards, C), expert

    return _Plan("send_plan", num_experts, shapes, _send_plan_dtypes)


class _Plan(nn.Cell):
    """A plan by a kernel. Its arguments and results are integers, so it has no gradient."""

    def __init__(self, name, num_experts, shapes, dtypes):
        super().__init__()
        self.forward = kernel("routing", name, f"{EXPERT}; experts int32 1", shapes, dtypes)
        self.num_experts = ms.Tensor([num_experts], ms.int32)
        self.zeros_like = ops.ZerosLike()

    def construct(self, expert):
        return self.forward(expert, self.num_experts)

    def bprop(self, expert, out, dout):
        return (self.zeros_like(expert),)


def cpu_take():
    """Returns take as a float32 C++ kernel, which does not copy x. The gradient of a row is summed in the order of the index."""
    return _Take()


class _Take(nn.Cell):
    def __init__(self):
        super().__init__()
        self.forward = kernel("routing", "take", TAKEN, _taken, _first)
        self.backward = kernel("routing", "take_grad", 3, _first, _first)
        self.zeros_like = ops.ZerosLike()

    def construct(self, x, index):
        return self.forward(x, index)

    def bprop(self, x, index, out, dout):
        return self.backward(x, index, dout), self.zeros_like(index)


def cpu_permute(num_experts, limit):
    """Returns permute by the C++ kernels of cpu_plan and cpu_take, which copy each row once."""
    return _permute(cpu_plan(num_experts, limit), cpu_take())


def cpu_combine():
    """Returns combine as a float32 C++ kernel, which does not copy the rows."""
    backward = kernel("routing", "combine_grad", 4, combine_grads, _combine_grads_dtypes)
    return Combine(kernel("routing", "combine", COMBINED, combined, _first), backward)


class Combine(nn.Cell):
    """combine by two kernels: forward(y, slot, weight) -> x and backward(y, slot, weight, dx) -> (dy, d_weight)."""

    def __init__(self, forward, backward):
        super().__init__()
        self.forward, self.backward, self.zeros_like = forward, backward, ops.ZerosLike()

    def construct(self, y, slot, weight):
        return self.forward(y, slot, weight)

    def bprop(self, y, slot, weight, out, dout):
        dy, d_weight = self.backward(y, slot, weight, dout)
        return dy, self.zeros_like(slot), d_weight


def _first(x, *rest):
    return x


def _top_k_dtypes(logits):
    return logits, ms.int32, logits


def _biased_top_k_dtypes(logits, bias):
    return logits, ms.int32, logits


def _plan_dtypes(expert, num):
    return expert, expert, expert


def _send_plan_dtypes(expert, num):
    return expert, expert, expert, ms.float32


def _taken(x, index):
    return (*index, x[-1])


def combined(y, slot, weight):
    """Returns the shape of the result of combine from those of its arguments."""
    return weight[0], y[-1]


def combine_grads(y, slot, weight, d_out):
    """Returns the shapes of the gradients of combine from those of its arguments."""
    return y, weight


def _combine_grads_dtypes(y, slot, weight, d_out):
    return y, y
