"""The tests of the C++ ops, with the emulated AscendC kernel in the C++ one's place: all of them but those that are named here."""

import types

import pytest
from mindspore import ops

from ops import attention, cross_entropy, grouped_matmul, rms_norm, rope, routing, swiglu
from ops.ascendc import attention as ascendc_attention
from ops.ascendc import cross_entropy as ascendc_cross_entropy
from ops.ascendc import grouped_matmul as ascendc_grouped_matmul
from ops.ascendc import rms_norm as ascendc_rms_norm
from ops.ascendc import rope as ascendc_rope
from ops.ascendc import routing as ascendc_routing
from ops.ascendc import swiglu as ascendc_swiglu
from tests.ops import test_attention, test_cross_entropy, test_grouped_matmul, test_rms_norm, test_rope, test_routing, test_swiglu

pytestmark = pytest.mark.slow

FAMILIES = {  # the tests, the op and the kernels of each
    "attention": (test_attention, attention, ascendc_attention),
    "cross_entropy": (test_cross_entropy, cross_entropy, ascendc_cross_entropy),
    "grouped_matmul": (test_grouped_matmul, grouped_matmul, ascendc_grouped_matmul),
    "rms_norm": (test_rms_norm, rms_norm, ascendc_rms_norm),
    "rope": (test_rope, rope, ascendc_rope),
    "routing": (test_routing, routing, ascendc_routing),
    "swiglu": (test_swiglu, swiglu, ascendc_swiglu),
}
SHAPES = "on chips of 1 to 8 cores: test_ascendc.py, test_ascendc_cube.py"
OUT_OF_ORDER = "groups out of order, which no plan makes and the kernel does not serve"
PLANS = "the reference's: experts over ranks, and blocks of several rows"
SOME_ROWS = "rows in no slot, which experts of one rank do not have: their gradients are not written"
THREADS = "of the C++ kernel's threads; cores are in test_ascendc.py and test_ascendc_cube.py"
LEFT_OUT = {
    "test_matches_the_reference": SHAPES,
    "test_bits_do_not_depend_on_threads": THREADS,
    "test_threads_change_no_bit": THREADS,
    "test_the_same_bits_for_any_number_of_threads": THREADS,
    "test_memory_is_linear_in_length": "of the process; the workspace of the gradient, sums in float32, is linear in the length",
    "test_half_precision_in_the_reference": "of no kernel",
    "test_the_formula_hides_what_it_should": "of no kernel",
    "test_a_block_is_multiplied_by_the_matrix_of_its_group": OUT_OF_ORDER,
    "test_no_block_is_read_twice_or_left_out_when_a_group_has_many_runs": OUT_OF_ORDER,
    "test_groups_that_do_not_exist_are_refused": "nothing reads the group of a block: its rows count as the last group's",
    "test_infinities_stay_in_their_rows": "calls the C++ kernel; with the AscendC one in test_ascendc_cube.py",
    "test_a_plan_gives_every_assignment_a_slot_of_its_expert": PLANS,
    "test_a_plan_is_exact_where_float32_is_not": PLANS,
    "test_plans_are_the_same_in_both_implementations": PLANS,
    "test_plans_of_one_shape_and_different_sizes_are_different": PLANS,
    "test_a_send_plan_puts_assignments_in_order_into_the_slots_of_their_shard": PLANS,
    "test_experts_that_do_not_exist_are_refused": PLANS,
    "test_indices_that_are_no_row_are_refused": PLANS,
    "test_take": PLANS,
    "test_take_matches_the_reference": PLANS,
    "test_combine": SOME_ROWS,
    "test_combine_matches_the_reference": SOME_ROWS,
}
OTHERS = {("grouped_matmul", "test_views"): OUT_OF_ORDER, ("routing", "test_views"): PLANS}  # that others have by that name too

SERVED = {  # of a test's parameters, those that the kernels serve
    "implementation": lambda name: name == "cpu",
    "kind": lambda name: name.startswith("cpu"),
    "limit": lambda rows: rows == 1,
    "name": lambda name: list(test_grouped_matmul.GROUPS[name][0]) == sorted(test_grouped_matmul.GROUPS[name][0]),
}


def borrowed(test):
    """The test with the parameters that are served."""
    own = types.FunctionType(test.__code__, test.__globals__, test.__name__, test.__defaults__, test.__closure__)
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names, values = mark.args
            mark = pytest.mark.parametrize(names, [value for value in values if SERVED.get(names, bool)(value)], **mark.kwargs)
        own = getattr(pytest.mark, mark.name)(*mark.args, **mark.kwargs)(own)
    return own


def every_case():
    for family, (cases, _, _) in FAMILIES.items():
        for name, test in vars(cases).items():
            if name.startswith("test_") and name not in LEFT_OUT and (family, name) not in OTHERS:
                yield name.replace("test_", f"test_{family}_", 1), borrowed(test)


globals().update(every_case())


def with_lse(scale):
    """As attention.cpu_with_lse: o_BSNH, lse_BSN."""
    attend, swap = ascendc_attention._Attention(scale, False), ops.Transpose()

    def attention(*inputs):
        o, lse = attend(*inputs)
        return o, swap(lse, (0, 2, 1))

    return attention


@pytest.fixture(autouse=True)
def kernels(request, monkeypatch):
    """The AscendC kernels under the names of the C++ ones; an op that has none is None."""
    cases, op, ascendc = next(FAMILIES[name] for name in FAMILIES if request.node.name.startswith(f"test_{name}"))
    made = {name: getattr(ascendc, name.replace("cpu", "ascendc", 1), None) for name in vars(op) if name.startswith("cpu")}
    if op is attention:
        made["cpu_with_lse"] = with_lse
    for name, kernel in made.items():
        monkeypatch.setattr(op, name, kernel)
    for choices in (getattr(cases, name, None) for name in ("KINDS", "FACTORIES", "IMPLEMENTATIONS")):
        if isinstance(choices, dict):
            monkeypatch.setitem(choices, "cpu", made["cpu"])
