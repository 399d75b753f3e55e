"""The AscendC kernels of a paged KV cache, emulated, on the cases of the C++ kernels, in three dtypes and on 1 to 24 cores."""

import mindspore as ms
import numpy as np
import pytest

from ops.ascendc import build
from ops.ascendc import paged_attention as ascendc_paged_attention
from ops.ascendc import paged_write as ascendc_paged_write
from parallel.step import value_and_grad
from tests.ops.emulated import call, cores
from tests.ops.kernels import tensors
from tests.ops.test_paged import CASES, SCALE, WRITTEN, case, decoding_step, formula, writes, written
from tests.tiny import assert_close, host

SLOW = pytest.mark.slow
CHIPS = [1, pytest.param(2, marks=SLOW), pytest.param(3, marks=SLOW), 8]
HALVES = {"float16": 2**-11, "bfloat16": 2**-8}
# Spans are of 512 keys; heads of more than 128 are results in two panels; a kv head has up to 32 query heads.
MORE = {
    "three spans": (4, 2, 16, 20, 128, 9, [1100, 512, 513, 0]),
    "two panels": (4, 2, 144, 12, 64, 9, [70, 576]),
    "a head of 256": (2, 2, 256, 5, 32, 2, [64, 33]),
    "many query heads": (32, 1, 24, 40, 16, 40, [600]),
    "odd groups": (15, 5, 12, 40, 16, 40, [530, 3]),
    "many spans": (2, 1, 8, 60, 128, 60, [7300]),
    "pages of one token": (4, 1, 8, 70, 1, 40, [40, 17]),
}
EVERY = {**CASES, **MORE}
QUICK = ("one", "pages of 16", "three spans", "odd groups")


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in EVERY])
def test_a_row_attends_to_its_pages(name, chip):
    given = case(*EVERY[name])
    with cores(chip):
        assert_close(formula(*given), ascendc_paged_attention.ascendc(SCALE)(*tensors(*given)), 1e-5)


def attend(library, given, scale=SCALE):
    out = np.empty_like(given[0])
    return call(library, "qwen_paged_attention", given, [out], [scale]), out


@pytest.mark.parametrize("name", ["three spans", pytest.param("two panels", marks=SLOW)])
def test_bits_do_not_depend_on_the_number_of_cores_or_on_other_rows(name):
    q, k, v, table, length = case(*EVERY[name])
    library, found = build.emulated("paged_attention"), []
    for chip in (1, 3, 8, 20, 24):
        with cores(chip):
            message, out = attend(library, (q, k, v, table, length))
            assert message == ""
            found.append(out)
    alone = np.concatenate([attend(library, (q[b : b + 1], k, v, table[b : b + 1], length[b : b + 1]))[1] for b in range(len(q))])
    for other in (*found[1:], alone):
        np.testing.assert_array_equal(found[0].view(np.uint32), other.view(np.uint32))


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(dtype):
    """Scores are made of exact inputs and softmax is in float32. Weights are rounded for the product with v, and so is the result: 2."""
    q, k, v, table, length = case(8, 2, 64, 20, 128, 9, [1100, 33, 0])
    kind = getattr(ms, dtype)
    given = [ms.Tensor(np.nan_to_num(x), kind) for x in (q, k, v)]
    expected = formula(*(host(x.astype(ms.float32)) for x in given), table, length)
    found = ascendc_paged_attention.ascendc(SCALE)(*given, *tensors(table, length))
    assert found.dtype == kind
    assert_close(expected, found.astype(ms.float32), 2 * HALVES[dtype])


def test_large_scores_do_not_overflow():
    q, k, v, table, length = case(*EVERY["three spans"])
    given = q * 100, k * 100, v, table, length
    assert_close(formula(*given), ascendc_paged_attention.ascendc(SCALE)(*tensors(*given)), 1e-3)


def test_rows_of_length_0_alone_are_zeros():
    q, k, v, table, length = case(*CASES["odd"])
    assert (host(ascendc_paged_attention.ascendc(SCALE)(*tensors(q, k, v, table, length * 0))) == 0).all()


@pytest.mark.parametrize("chip", [1, 8])
@pytest.mark.parametrize("shape", [*WRITTEN[:2], *(pytest.param(shape, marks=SLOW) for shape in (*WRITTEN[2:], (2, 3, 3, 2000, 4)))])
def test_new_rows_are_in_their_slots_and_others_unchanged(shape, chip):
    cache, new, slot = writes(*shape)
    with cores(chip):
        np.testing.assert_array_equal(written(cache, new, slot), host(ascendc_paged_write.ascendc()(*tensors(cache, new, slot))))


@pytest.mark.parametrize("dtype", HALVES)
def test_writes_in_half_precision_copy_bits(dtype):
    cache, new, slot = writes(3, 7, 2, 5, 6)
    cache, new = (ms.Tensor(x, getattr(ms, dtype)) for x in (cache, new))
    expected = written(*(host(x.astype(ms.float32)) for x in (cache, new)), slot)
    np.testing.assert_array_equal(expected, host(ascendc_paged_write.ascendc()(cache, new, ms.Tensor(slot)).astype(ms.float32)))


def test_a_step_of_decoding_writes_and_then_attends():
    q, k, v, table, length = case(4, 2, 16, 20, 16, 5, [3, 15, 37])
    k, v = np.nan_to_num(k), np.nan_to_num(v)
    slot = (table[np.arange(3), length // 16] * 16 + length % 16).astype(np.int32)
    new_k, new_v = (np.random.default_rng(i).normal(0, 1, (3, 2, 16)).astype(np.float32) for i in (1, 2))
    step = decoding_step(ascendc_paged_attention.ascendc(SCALE), ascendc_paged_write.ascendc())
    expected = formula(q, written(k, new_k, slot), written(v, new_v, slot), table, length + 1)
    assert_close(expected, step(*tensors(q, k, v, table, length, new_k, new_v, slot)), 1e-5)


def test_differentiating_the_kernels_is_an_error():
    given, (cache, new, slot) = case(*CASES["odd"]), writes(3, 7, 2, 5, 6)
    attend, write = ascendc_paged_attention.ascendc(SCALE), ascendc_paged_write.ascendc()

    def of_attention(params, *rest):
        return attend(params["x"], *rest).sum()

    def of_write(params, cache, slot):
        return write(cache, params["x"], slot).sum()

    with pytest.raises(RuntimeError, match="paged_attention kernel is for decoding and has no gradient"):
        value_and_grad(of_attention)({"x": ms.Tensor(given[0])}, *tensors(*given[1:]))
    with pytest.raises(RuntimeError, match="paged_write kernel works in place and has no gradient"):
        value_and_grad(of_write)({"x": ms.Tensor(new)}, *tensors(cache, slot))


def test_what_does_not_fit_the_chip_is_refused():
    library = build.emulated("paged_attention")
    for shape, words in (
        ((2, 1, 257, 3, 4, 2, [5]), "a head has up to 256 elements"),
        ((33, 1, 4, 3, 4, 2, [5]), "a kv head has up to 32 query heads"),
        ((9, 1, 4, 3, 4, 40000, [5]), "a table has too many tokens: up to 262,144 with 8 query heads a kv head"),
    ):
        message, _ = attend(library, case(*shape))
        assert message.startswith("QwenPagedAttention: its tiling function refuses these shapes: ") and words in message
