"""The AscendC kernels of the vector unit, emulated, on the cases of the C++ ops: values and gradients, in three dtypes, on 1 to 8 cores."""

import mindspore as ms
import numpy as np
import pytest

from ops import cross_entropy, rms_norm, rope, swiglu
from ops.ascendc import build
from ops.ascendc import cross_entropy as ascendc_cross_entropy
from ops.ascendc import rms_norm as ascendc_rms_norm
from ops.ascendc import rope as ascendc_rope
from ops.ascendc import swiglu as ascendc_swiglu
from tests.ops import test_cross_entropy as entropy_cases
from tests.ops import test_rms_norm as norm_cases
from tests.ops import test_rope as rope_cases
from tests.ops import test_swiglu as swiglu_cases
from tests.ops.emulated import call, cores
from tests.ops.kernels import agree
from tests.ops.test_references import draw
from tests.tiny import assert_close, host

EPS = 1e-3
SLOW = pytest.mark.slow
CHIPS = [1, pytest.param(2, marks=SLOW), pytest.param(3, marks=SLOW), 8]
HALVES = {"float16": 2**-11, "bfloat16": 2**-8}  # what one rounding loses, of a number


def some(shapes):
    """The first and the last by default, the others where there is time."""
    return [shapes[0], *(pytest.param(shape, marks=SLOW) for shape in shapes[1:-1]), shapes[-1]]


def ways(shape, shapes):
    return ("eager", "compiled") if shape == shapes[-1] else ("eager",)


@pytest.mark.extended(but=("(263*-8",))
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("shape", some(norm_cases.SHAPES), ids=str)
def test_rms_norm(shape, chip):
    x, y, w, how = draw(*shape), draw(*shape), draw(shape[-1]), ways(shape, norm_cases.SHAPES)
    eps = EPS if shape[-1] > 1 else 1.0
    with cores(chip):
        agree(rms_norm.reference(eps), ascendc_rms_norm.ascendc(eps), [x, w], ways=how)
        agree(rms_norm.reference_add(eps), ascendc_rms_norm.ascendc_add(eps), [x, y, w], ways=how)


def test_rows_that_block_reductions_sum():
    """Of a multiple of 512 columns, up to 4,096."""
    for columns in (512, 1536):
        with cores(3):
            agree(rms_norm.reference(EPS), ascendc_rms_norm.ascendc(EPS), [draw(11, columns), draw(columns)], ways=("eager",))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("shape", some(swiglu_cases.SHAPES), ids=str)
def test_swiglu(shape, chip):
    with cores(chip):
        agree(swiglu.reference(), ascendc_swiglu.ascendc(), [draw(*shape) * 3, draw(*shape)], ways=ways(shape, swiglu_cases.SHAPES))


@pytest.mark.extended(but=("(1, 2*-8",))
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("shape", some([*rope_cases.SHAPES, (1, 2, 3, 300)]), ids=str)
def test_rope(shape, chip):
    x, w, fixed, how = draw(*shape), draw(shape[-1]), rope_cases.angles(shape), ways(shape, [(1, 2, 3, 300)])
    eps = EPS if shape[-1] > 2 else 1.0
    with cores(chip):
        agree(rope.reference(), ascendc_rope.ascendc(), [x], fixed, ways=how)
        agree(rope.reference_norm(eps), ascendc_rope.ascendc_norm(eps), [x, w], fixed, ways=how)


@pytest.mark.extended
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("shape", some([*entropy_cases.SHAPES, (3, 20000)]), ids=str)
def test_cross_entropy(shape, chip):
    z, ids = draw(*shape) * 4, entropy_cases.ids_around(*shape, 5)
    made = (entropy_cases.from_first(make(), 5) for make in (cross_entropy.reference, ascendc_cross_entropy.ascendc))
    with cores(chip):
        agree(*made, [z], (ids,), ways=ways(shape, [(3, 20000)]))


def cross_entropy_terms(library, columns, rows=5):
    """The emulator's message, and what the kernel gives of several rows a core: (top, total, picked), beside the formulas in float64."""
    z = draw(rows, columns) * 4
    at = np.arange(rows, dtype=np.int32) * 7919 % columns
    found = [np.empty(rows, np.float32) for _ in range(3)]
    with cores(1):
        message = call(library, "qwen_cross_entropy", [z, at], found)
    top = z.max(1)
    return message, found, [top, np.exp(z.astype(np.float64) - top[:, None]).sum(1), z[np.arange(rows), at]]


@pytest.mark.parametrize("columns", [257, 8192, 20000, 151936])
def test_cross_entropy_of_several_rows_a_core(columns):
    message, found, expected = cross_entropy_terms(build.emulated("cross_entropy"), columns)
    assert message == ""
    for a, b in zip(expected, found):
        assert_close(a, b, 1e-6)


@pytest.mark.extended
def test_a_work_tensor_without_room_for_indices_is_refused(tmp_path):
    """ReduceMax writes a value and an index for each 64 columns: with room for the values alone it would overwrite what lies behind."""
    header, right = tmp_path / "cross_entropy.h", "AlignUp(2 * ((tiling.tile + 63) / 64), FLOATS)"
    text = (build.KERNEL / "cross_entropy.h").read_text()
    assert right in text
    header.write_text(text.replace(right, "AlignUp((tiling.tile + 63) / 64, FLOATS)"))
    entry = (build.KERNEL / "qwen_cross_entropy.cpp").read_text().replace('"cross_entropy.h"', f'"{header}"')
    lines = ['#include "cross_entropy.cpp"', "using optiling::CrossEntropyTiling;", entry, '#include "launch.h"']
    library = build.built("small_work", "\n".join([*lines, "EMULATED(qwen_cross_entropy, QwenCrossEntropy, false, true)\n"]), (header,))
    message, _, _ = cross_entropy_terms(library, 20000)
    assert "ReduceMax: sharedTmpBuffer has 128 elements and needs 256" in message


def test_cross_entropy_of_padding_and_nan():
    """-inf has no part in a sum; a row of it has a sum of 0 and no gradient; a NaN stays in its row."""
    z = draw(5, 9000)
    z[1], z[2, :4500], z[3, 4500:] = -np.inf, -np.inf, -np.inf
    z[4, 100] = np.nan
    measure, ids = ascendc_cross_entropy.ascendc(), ms.Tensor(np.full(5, -1, np.int32))
    top, total, at = map(host, measure(0, ms.Tensor(z), ids))
    assert top[1] == -np.inf and total[1] == 0 and (at == 0).all() and np.isnan(total[4])
    rest = [0, 2, 3]
    assert_close(entropy_cases.log_sum_exp(z[rest].astype(np.float64)), np.log(total[rest]) + top[rest], 1e-6)
    grad = host(ms.grad(lambda z: (measure(0, z, ids)[1] * 3).sum())(ms.Tensor(z)))
    assert (grad[1] == 0).all() and (grad[~np.isfinite(z) & ~np.isnan(z)] == 0).all()
    assert_close(3 * np.exp(z[rest] - top[rest]), grad[rest], 1e-5)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_one_rounding_of_float32(dtype):
    """Of each result and gradient, against the formulas in float64 on the rounded inputs; sums over rows are rounded once too."""
    x, y, w = (ms.Tensor(draw(*shape), getattr(ms, dtype)) for shape in ((37, 131), (37, 131), (131,)))
    heads, (cos, sin) = ms.Tensor(draw(2, 5, 3, 34), getattr(ms, dtype)), map(ms.Tensor, rope_cases.angles((2, 5, 3, 34)))
    head = ms.Tensor(draw(34), getattr(ms, dtype))
    for op, reference, inputs, fixed in (
        (ascendc_rms_norm.ascendc(EPS), rms_norm.reference(EPS), (x, w), ()),
        (ascendc_swiglu.ascendc(), swiglu.reference(), (x, y), ()),
        (ascendc_rope.ascendc(), rope.reference(), (heads,), (cos, sin)),
        (ascendc_rope.ascendc_norm(EPS), rope.reference_norm(EPS), (heads, head), (cos, sin)),
    ):
        wide = tuple(a.astype(ms.float32) for a in inputs)
        expected, found = reference(*wide, *fixed), op(*inputs, *fixed)
        assert found.dtype == getattr(ms, dtype)
        assert_close(expected, found.astype(ms.float32), 1.01 * HALVES[dtype], str(op))
        every = tuple(range(len(inputs)))
        wanted = ms.grad(lambda *a, op=reference, fixed=fixed: op(*a, *fixed).sum(), every)(*wide)
        given = ms.grad(lambda *a, op=op, fixed=fixed: op(*a, *fixed).astype(ms.float32).sum(), every)(*inputs)
        for a, b in zip(_tuple(wanted), _tuple(given)):
            assert_close(a, b.astype(ms.float32), 1.01 * HALVES[dtype], str(op))


def _tuple(x):
    return x if isinstance(x, tuple) else (x,)


def test_bits_do_not_depend_on_the_number_of_cores():
    x, w, dy = draw(263, 131), draw(131), draw(263, 131)
    heads, turned, head, (cos, sin) = draw(2, 41, 8, 32), draw(2, 41, 8, 32), draw(32), rope_cases.angles((2, 41, 8, 32))
    for family, name, inputs, shapes, attrs in (
        ("rms_norm", "qwen_rms_norm_grad", [x, w, dy], [x.shape, w.shape], [EPS]),
        ("rope", "qwen_rope_norm_grad", [heads, head, cos, sin, turned], [heads.shape, head.shape], [EPS]),
    ):
        found = []
        for chip in (1, 2, 3, 8, 20, 24):
            outputs = [np.empty(shape, np.float32) for shape in shapes]
            with cores(chip):
                assert call(build.emulated(family), name, inputs, outputs, attrs) == ""
            found.append(outputs)
        for outputs in found[1:]:
            for a, b in zip(found[0], outputs):
                np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def test_what_does_not_fit_the_chip_is_refused():
    x, w = draw(2, 9000), draw(9000)
    message = call(build.emulated("rms_norm"), "qwen_rms_norm_grad", [x, w, x], [np.empty_like(x), np.empty_like(w)], [EPS])
    assert message == "QwenRmsNormGrad: its tiling function refuses these shapes: a row is too long: its buffers do not fit UB"
    with pytest.raises(RuntimeError):
        host(ascendc_rms_norm.ascendc(EPS)(ms.Tensor(draw(2, 20000)), ms.Tensor(draw(20000))))
    with pytest.raises(ValueError, match=r"rms_norm: w is \[8\] and has to be \[n\] = \[9\]"):
        ascendc_rms_norm.ascendc(EPS)(ms.Tensor(draw(2, 9)), ms.Tensor(draw(8)))
