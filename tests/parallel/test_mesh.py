"""Ranks, axes, their parts and groups; and what a layout may be."""

import itertools
import re

import pytest

from parallel.mesh import AXES, ONE_DEVICE, Mesh, axis_sizes
from parallel.sharding import EVERY_AXIS, RULES, SEQ_PARALLEL_RULES


def test_one_device_is_a_mesh_of_size_one():
    assert ONE_DEVICE == Mesh() and ONE_DEVICE.size(AXES) == 1 and ONE_DEVICE.size(()) == 1 and ONE_DEVICE.sizes == {}


MESHES = [
    dict(dp=2, tp=2),
    dict(dp=2, tp=3, pp=2, cp=2),
    dict(dp=4, ep=2),
    dict(dp=2, tp=4, ep=4),
    dict(dp=2, tp=4, ep=4, kv_repeat=2),
    dict(dp=6, cp=2, tp=2, ep=12),
    dict(tp=8, kv_repeat=4, ep=2),
    dict(dp=2, cp=4, tp=2, ep=4, ulysses=2),
    dict(cp=8, ep=4, ulysses=2),
]


@pytest.mark.parametrize("sizes", MESHES)
def test_groups_partition_the_ranks(sizes):
    """For every axis and part of one: the groups cover the ranks once, agree with each other, and index() is the place in members()."""
    world = Mesh(**sizes).world
    axes = [("dp",), ("tp",), ("pp",), ("cp",), ("ep",), ("tp-ep",), ("tp/ep",), ("tp-kv",), ("tp/kv",), ("dp", "tp"), ("dp-ep", "cp-ep")]
    axes += [("cp-ul",), ("cp/ul",), ("cp/ul", "tp")]
    for chosen in axes:
        groups = set()
        for rank in range(world):
            mesh = Mesh(**sizes, rank=rank)
            members = mesh.members(chosen)
            assert members[mesh.index(chosen)] == rank and len(members) == mesh.size(chosen)
            groups.add(members)
        assert sorted(itertools.chain(*groups)) == list(range(world)), chosen


@pytest.mark.parametrize("sizes", MESHES)
def test_parts_multiply_to_their_axes(sizes):
    mesh = Mesh(**sizes)
    for axis in ("dp", "cp", "tp"):
        assert mesh.size((axis,)) == sizes.get(axis, 1) == mesh.size((f"{axis}-ep",)) * mesh.size((f"{axis}/ep",))
    assert mesh.size(("tp-kv",)) * mesh.size(("tp/kv",)) == mesh.size(("tp",)) and mesh.size(("ep",)) == sizes.get("ep", 1)
    assert mesh.size(("cp-ul",)) * mesh.size(("cp/ul",)) == mesh.size(("cp",)) and mesh.size(("cp/ul",)) == sizes.get("ulysses", 1)
    assert mesh.size(("tp/kv",)) == sizes.get("kv_repeat", 1)


def test_tp_ranks_are_neighbours_and_experts_are_spread_over_the_nearest_data_ranks():
    mesh = Mesh(dp=4, tp=2, ep=2, rank=5)
    assert mesh.members(("tp",)) == (4, 5) and mesh.members(("dp",)) == (1, 3, 5, 7)
    assert mesh.members(("ep",)) == (5, 7) and mesh.members(("dp-ep",)) == (1, 5)


def test_neighbouring_ranks_repeat_a_kv_head():
    assert [Mesh(tp=8, kv_repeat=4, rank=r).index(("tp-kv",)) for r in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


# config.parallel, ranks -> what the error says
REFUSED = [
    (dict(dp=2, tp=2), 8, "dp=2 x tp=2 is 4 ranks, and the job has 8; start it with `python -m experiments.launch --nproc=4 -- ...`"),
    (dict(tp=2), 1, "tp=2 is 2 ranks, and the job has 1; start it with `python -m experiments.launch --nproc=2"),
    (dict(), 2, "dp=1 is 1 rank, and the job has 2"),
    (
        dict(dp=-1, tp=4),
        6,
        "parallel.dp=-1: 6 ranks are not a multiple of tp=4, which takes 4; the product of the other axes must be one of 1, 2, 3, 6",
    ),
    (dict(dp=-1, tp=-1), 4, "parallel.dp and parallel.tp are both -1; set one of them to a number"),
    (dict(dp=0), 1, "parallel.dp=0 must be 1 or more, or -1"),
    (dict(tp=-2), 1, "parallel.tp=-2 must be 1 or more, or -1"),
    (dict(ep=-1), 1, "parallel.ep=-1 must be 1 or more"),
    (dict(dp=2, ep=3), 2, "parallel.ep=3 must divide dp x cp x tp = 2 x 1 x 1 = 2; use 1, 2"),
]


@pytest.mark.parametrize("asked, world, message", REFUSED)
def test_layouts_that_do_not_make_up_the_job_are_refused(asked, world, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        axis_sizes({**dict.fromkeys(AXES, 1), **asked}, world)


def test_one_axis_may_be_what_is_left():
    assert axis_sizes({**dict.fromkeys(AXES, 1), "dp": -1, "tp": 2, "ep": 4}, 8) == dict(dp=4, tp=2, pp=1, cp=1, ep=4)
    assert axis_sizes({**dict.fromkeys(AXES, 1), "dp": 2, "tp": 2})["dp"] == 2  # without processes: as many ranks as asked


def test_parts_that_do_not_nest_are_refused():
    with pytest.raises(ValueError, match=re.escape("parallel.tp=6: ep takes 3 neighbouring ranks of it and kv heads repeat over 2")):
        Mesh(tp=6, ep=3, kv_repeat=2).size(("tp",))
    with pytest.raises(ValueError, match=re.escape("parallel.cp=6: ep takes 3 neighbouring ranks of it and cp_ulysses 2; one must divide")):
        Mesh(cp=6, ep=3, ulysses=2).size(("cp",))


@pytest.mark.parametrize("rules", [RULES, SEQ_PARALLEL_RULES])
def test_rules_are_outermost_first(rules):
    """What the order of gathered parts rests on."""
    order = list(EVERY_AXIS.sizes)
    for dim, axes in rules.items():
        places = [order.index(atom) for atom in EVERY_AXIS.atoms(axes)]
        assert places == sorted(set(places)), dim
