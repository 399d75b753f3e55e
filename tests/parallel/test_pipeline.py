"""Pipeline schedules: complete, free of deadlock, with the bubble and the live micro-batches that their formulas say."""

import re

import pytest

from parallel.pipeline import schedule as pipeline
from parallel.pipeline.schedule import Backward, Forward, Recv, Send
from tests.parallel.formulas import live_formula

# name, ranks, micro-batches, virtual stages
CASES = [("gpipe", p, m, 1) for p in (2, 3, 4) for m in (1, 2, 5, 8)]
CASES += [("1f1b", p, m, 1) for p in (2, 3, 4, 8) for m in (1, 2, 3, 5, 8, 16)]
CASES += [("interleaved", p, m, v) for p in (2, 3, 4) for m in (p, 2 * p, 4 * p) for v in (1, 2, 3)]


def computed(actions):
    return [action for action in actions if isinstance(action, (Forward, Backward))]


@pytest.mark.parametrize("name, ranks, micro, virtual", CASES)
def test_every_stage_sees_every_micro_batch_once_each_way(name, ranks, micro, virtual):
    lists = pipeline.schedule(name, ranks, micro, virtual)
    for rank, actions in enumerate(lists):
        stages = range(rank, ranks * virtual, ranks)
        want = {kind(i, stage) for kind in (Forward, Backward) for i in range(micro) for stage in stages}
        assert set(computed(actions)) == want and len(computed(actions)) == len(want)


@pytest.mark.parametrize("name, ranks, micro, virtual", CASES)
def test_no_rank_waits_forever_and_the_bubble_is_the_formula(name, ranks, micro, virtual):
    """simulate() itself holds that nothing is computed before its inputs are there; with sends that wait for their receives, too."""
    lists = pipeline.schedule(name, ranks, micro, virtual)
    timeline = pipeline.simulate(lists)
    assert timeline.length >= 3 * micro * virtual
    assert timeline.bubble == pytest.approx(pipeline.bubble_formula(ranks, micro, virtual))
    for blocking in (False, True):  # uneven costs stop nothing either
        assert pipeline.simulate(lists, [1.0 + s for s in range(ranks * virtual)], 2.5, 0.25, blocking).bubble > 0


@pytest.mark.parametrize("name, ranks, micro, virtual", CASES)
def test_live_micro_batches_are_the_formula(name, ranks, micro, virtual):
    for rank, actions in enumerate(pipeline.schedule(name, ranks, micro, virtual)):
        assert pipeline.live(actions) == live_formula(name, rank, ranks, micro, virtual)


@pytest.mark.parametrize("name, ranks, micro, virtual", CASES)
def test_messages_between_two_ranks_are_received_in_the_order_of_their_sending(name, ranks, micro, virtual):
    """They carry no address: a channel is first in, first out."""
    lists = pipeline.schedule(name, ranks, micro, virtual)
    for a in range(ranks):
        for b in range(ranks):
            sent = [action.action for action in lists[a] if isinstance(action, Send) and action.rank == b]
            assert sent == [action.action for action in lists[b] if isinstance(action, Recv) and action.rank == a]
            assert a != b or not sent


@pytest.mark.parametrize("ranks, micro, virtual", [(2, 1, 1), (4, 3, 1), (2, 5, 2), (3, 2, 3)])
def test_evaluation_is_the_forwards_alone(ranks, micro, virtual):
    lists = pipeline.forward_only(ranks, micro, virtual)
    assert pipeline.simulate(lists, blocking=True).length >= micro * virtual
    assert sum(len(computed(actions)) for actions in lists) == ranks * virtual * micro
    assert not any(isinstance(action, Backward) for actions in lists for action in actions)


def test_1f1b_holds_less_than_gpipe_and_interleaving_waits_less():
    gpipe, alternating = pipeline.schedule("gpipe", 4, 16), pipeline.schedule("1f1b", 4, 16)
    assert [pipeline.live(a) for a in gpipe] == [16] * 4 and [pipeline.live(a) for a in alternating] == [4, 3, 2, 1]
    assert pipeline.simulate(pipeline.schedule("interleaved", 4, 16, 3)).bubble < pipeline.simulate(alternating).bubble / 2


def test_the_simulation_finds_a_deadlock_and_what_comes_too_early():
    first = (Forward(0, 0), Recv(Backward(0, 0), 1), Send(Forward(0, 1), 1), Backward(0, 0))
    second = (Recv(Forward(0, 1), 0), Forward(0, 1), Backward(0, 1), Send(Backward(0, 0), 0))
    with pytest.raises(ValueError, match="wait for each other: rank 0 at Recv"):
        pipeline.simulate((first, second), blocking=True)
    with pytest.raises(ValueError, match=re.escape("Forward(micro=0, stage=1) comes before its input")):
        pipeline.simulate(((Forward(0, 0),), (Forward(0, 1),)))
    with pytest.raises(ValueError, match=re.escape("Backward(micro=0, stage=0) comes before its forward")):
        pipeline.simulate(((Backward(0, 0),),))


def test_layers_are_split_evenly_and_the_last_stage_last():
    assert pipeline.split_layers(8, 4) == (2, 2, 2, 2) and pipeline.split_layers(5, 2) == (3, 2)
    assert pipeline.split_layers(6, 4) == (1, 2, 2, 1) and pipeline.split_layers(7, 4) == (2, 2, 2, 1)
    assert pipeline.split_layers(1, 2) == (1, 0) and pipeline.split_layers(2, 4) == (0, 1, 1, 0)
    for layers in range(1, 20):
        for stages in range(2, layers + 3):
            ranges = pipeline.stage_ranges(layers, stages)
            assert [i for r in ranges for i in r] == list(range(layers)) and len(ranges) == stages


REFUSED = [
    (lambda: pipeline.stage_ranges(2, 5), "parallel.pp=5 x virtual_stages=1: stage 3 of (0, 1, 1, 0, 0) has no layer"),
    (lambda: pipeline.stage_ranges(4, 2, 1, (1, 2)), "parallel.stage_layers=(1, 2) must be 2 numbers"),
    (
        lambda: pipeline.stage_ranges(4, 2, 2, (2, 2)),
        "must be 4 numbers, the layers of each of pp=2 x virtual_stages=2 stages",
    ),
    (lambda: pipeline.stage_ranges(4, 3, 1, (2, 0, 2)), "stage 1 of (2, 0, 2) has no layer"),
    (lambda: pipeline.schedule("zigzag", 2, 2), "parallel.pp_schedule='zigzag' is not one of gpipe, 1f1b, interleaved"),
    (lambda: pipeline.schedule("interleaved", 4, 6, 2), "parallel.micro_batches=6 must be a multiple of parallel.pp=4"),
    (lambda: pipeline.schedule("1f1b", 4, 8, 2), "parallel.virtual_stages=2 needs parallel.pp_schedule=interleaved, not 1f1b"),
]


@pytest.mark.parametrize("make, message", REFUSED)
def test_what_does_not_fit_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_a_schedule_is_drawn_as_text():
    assert pipeline.draw(pipeline.schedule("1f1b", 2, 2)) == [
        "rank 0   F0 F1       B0---    B1---",
        "rank 1      F0 B0--- F1 B1---",
    ]
    assert pipeline.draw(pipeline.schedule("interleaved", 2, 2, 2))[0].startswith("rank 0   F0a F1a F0b F1b         B0b----")
    assert pipeline.draw(pipeline.schedule("gpipe", 2, 40), columns=40)[0].endswith("...")
