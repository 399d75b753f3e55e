"""Dropless routing of tokens to experts with static shapes: assignments sorted by expert, each expert's padded to blocks."""

import math

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


@ops.constexpr
def shard_capacity(tokens, choices, experts, shards, factor):
    """Slots that a rank keeps for its assignments to each shard of the experts: for the worst case, in which all of a token's choices that
    can be there are; or, with a factor, for that multiple of the mean."""
    worst = tokens * min(choices, experts // shards)
    return worst if factor is None else min(worst, max(1, math.ceil(factor * tokens * choices / shards)))


def send_plan(num_experts, shards, factor):
    """expert_Tk int32 -> (slot_N, source_M, expert_M, lost_Tk): the places of the N = T * k assignments in M = shards * capacity slots
    by shard; expert s is in shard s // (E / shards).

    slot: where each assignment goes. source: the token in each slot, T for an empty one. expert: its expert counted within the shard,
    E / shards for an empty one. lost: 1 for an assignment that found no slot, float32; 0 unless `factor` bounds the capacity.
    """
    sort, cumsum, reshape, cast = ops.Sort(0), ops.CumSum(), ops.Reshape(), ops.Cast()
    scatter, segment_sum, expand = ops.TensorScatterUpdate(), ops.UnsortedSegmentSum(), ops.ExpandDims()
    gather, less, count = ops.Gather(), ops.Less(), iota.reference()
    zeros_like, ones_like, within = ops.ZerosLike(), ops.OnesLike(), num_experts // shards

    def make(expert):
        T, k = expert.shape
        N, C = T * k, shard_capacity(T, k, num_experts, shards, factor)
        flat, at = reshape(expert, (-1,)), count(N)
        key, _ = sort((flat // within) * N + at)  # unique keys: a stable sort by shard
        shard = key // N
        assignment = key - shard * N
        load = cast(segment_sum(ones_like(flat), flat // within, shards), ms.float32)
        first = cumsum(load, 0) - load  # float32 counts are exact below 2**24
        place = at - cast(gather(first, shard, 0), ms.int32)
        fits = cast(less(place, C), ms.int32)
        slot = (shard * C + place) * fits + shards * C * (1 - fits)  # without a slot: one past the end
        slots = ones_like(count(shards * C + 1))
        source = scatter(slots * T, expand(slot, 1), assignment // k)
        chosen = gather(flat, assignment, 0)
        local = scatter(slots * within, expand(slot, 1), chosen - shard * within)
        places = scatter(zeros_like(flat), expand(assignment, 1), slot * fits)
        lost = scatter(zeros_like(flat), expand(assignment, 1), 1 - fits)
        return places, source[:-1], local[:-1], cast(reshape(lost, (T, k)), ms.float32)

    return make


def plan(num_experts, limit, empty=False):
    """expert_Tk int32 -> (slot_N, source_M, group_n): the places of the N = T * k assignments in M = n * b slots.

    slot: where each assignment goes. source: the token in each slot, T for padding. group: the expert of each block of b slots.
    At most min(E, N) * (b - 1) slots are padding. empty: an expert of number E is none, and its assignments take no slot; the slot given
    for them is 0.
    """
    sort, cumsum = ops.Sort(0), ops.CumSum()
    scatter, reshape, cast = ops.TensorScatterUpdate(), ops.Reshape(), ops.Cast()
    segment_sum, expand = ops.UnsortedSegmentSum(), ops.ExpandDims()
    greater_equal, total = ops.GreaterEqual(), ops.ReduceSum()
    gather, minimum, count = ops.Gather(), ops.Minimum(), iota.reference()
    zeros_like, ones_like = ops.ZerosLike(), ops.OnesLike()
    kinds, filled = num_experts + empty, (_filled if empty else _all_filled)(num_experts)

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
        load = segment_sum(ones_like(flat), flat, kinds)[:num_experts]
        blocks = (load + (b - 1)) // b
        last_block = cumsum(cast(blocks, ms.float32), 0)  # float32 counts are exact below 2**24
        before = cumsum(cast(load, ms.float32), 0) - cast(load, ms.float32)
        first_slot = (last_block - cast(blocks, ms.float32)) * b - before
        sorted_slot = cast(gather(first_slot, minimum(sorted_expert, num_experts - 1), 0), ms.int32) + at
        place, slot_of = filled(sorted_expert, sorted_slot, n * b)
        slot = scatter(zeros_like(flat), expand(assignment, 1), slot_of)
        source = scatter(ones_like(count(n * b + 1)) * T, expand(place, 1), assignment // k)
        passed = cast(greater_equal(expand(cast(count(n), ms.float32), 1), expand(last_block, 0)), ms.int32)
        group = minimum(total(passed, 1), num_experts - 1)
        return slot, source[: n * b], group

    return make


def _all_filled(num_experts):
    def filled(expert, slot, slots):
        return slot, slot

    return filled


def _filled(num_experts):
    """filled(expert, slot, slots) -> where to write an assignment's token, one past the end for none; its slot, 0 for none."""
    less, cast = ops.Less(), ops.Cast()

    def filled(expert, slot, slots):
        real = cast(less(expert, num_experts), ms.int32)
        return slot * real + slots * (1 - real), slot * real

    return filled
