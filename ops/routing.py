"""Dropless routing of tokens to experts with static shapes: assignments sorted by expert, each expert's padded to blocks."""

import mindspore as ms
from mindspore import ops

from ops import iota


@ops.constexpr
def num_blocks(assignments, experts, block):
    """Blocks that hold any split of the assignments: their sum over experts of ceil(count / block) never exceeds this."""
    return (assignments + min(experts, assignments) * (block - 1)) // block


@ops.constexpr
def block_size(assignments, experts, limit):
    """Rows in a block: the power of two at the mean load of an expert, or `limit` if that is less."""
    size = 1
    while size < limit and size * experts < assignments:
        size *= 2
    return min(size, limit)


def plan(num_experts, limit):
    """expert_Tk int32 -> (slot_N, source_M, group_n, load_E): the places of the N = T * k assignments in M = n * b slots.

    slot: where each assignment goes. source: the token in each slot, T for padding. group: the expert of each block of b slots.
    load: assignments of each expert, float32. At most min(E, N) * (b - 1) slots are padding.
    """
    sort, cumsum = ops.Sort(0), ops.CumSum()
    scatter, reshape, cast = ops.TensorScatterUpdate(), ops.Reshape(), ops.Cast()
    segment_sum, expand = ops.UnsortedSegmentSum(), ops.ExpandDims()
    greater_equal, total = ops.GreaterEqual(), ops.ReduceSum()
    gather, minimum, count = ops.Gather(), ops.Minimum(), iota.reference()
    zeros_like, ones_like = ops.ZerosLike(), ops.OnesLike()

    def make(expert):
        T, k = expert.shape
        N = T * k
        b = block_size(N, num_experts, limit)
        n = num_blocks(N, num_experts, b)
        flat = reshape(expert, (-1,))
        at = count(N)
        key, _ = sort(flat * N + at)  # unique keys: a stable sort by expert
        sorted_expert = key // N
        assignment = key - sorted_expert * N
        load = segment_sum(ones_like(flat), flat, num_experts)
        blocks = (load + (b - 1)) // b
        last_block = cumsum(cast(blocks, ms.float32), 0)  # float32 counts are exact below 2**24
        before = cumsum(cast(load, ms.float32), 0) - cast(load, ms.float32)
        first_slot = (last_block - cast(blocks, ms.float32)) * b - before
        sorted_slot = cast(gather(first_slot, sorted_expert, 0), ms.int32) + at
        slot = scatter(zeros_like(flat), expand(assignment, 1), sorted_slot)
        source = scatter(ones_like(count(n * b)) * T, expand(sorted_slot, 1), assignment // k)
        passed = cast(greater_equal(expand(cast(count(n), ms.float32), 1), expand(last_block, 0)), ms.int32)
        group = minimum(total(passed, 1), num_experts - 1)
        return slot, source, group, cast(load, ms.float32)

    return make
