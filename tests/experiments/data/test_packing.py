"""Packed rows: every pair of neighbours in a document is a target once, and documents stay apart."""

import time

import numpy as np
import pytest

from experiments.data.packing import best_fit, pack, pack_examples

EOD = 999
KEYS = {"tokens": np.int32, "targets": np.int32, "loss_weights": np.float32, "segment_ids": np.int32, "positions": np.int32}


def random_docs(seed):
    """Documents of unique ids (so that a pair names its place), some empty, and a row length."""
    rng = np.random.default_rng(seed)
    lengths = rng.choice([0, 0, 1, 2, 3, 5, 8, 40], size=rng.integers(1, 30))
    ids = iter(range(1000, 10_000))
    return [[next(ids) for _ in range(n)] for n in lengths], int(rng.integers(1, 20))


def one_token_at_a_time(docs, seq_len):
    """The definition of `pack`, slowly: a list of (token, target, weight, segment, position) a row."""
    stream = [(t, i, p) for i, doc in enumerate(docs) for p, t in enumerate([*doc, EOD])]
    rows = []
    for start in range(0, len(stream) - 1, seq_len):
        row = []
        for place in range(start, min(start + seq_len, len(stream) - 1)):
            (token, document, position), (target, next_document, _) = stream[place : place + 2]
            segment = document - stream[start][1] + 1
            row.append((token, target, float(document == next_document), segment, min(position, place - start)))
        rows.append(row + [(EOD, EOD, 0.0, 0, 0)] * (seq_len - len(row)))
    return rows


@pytest.mark.parametrize("seed", range(30))
def test_rows_match_the_definition(seed):
    docs, seq_len = random_docs(seed)
    rows = pack(docs, seq_len, EOD)
    expected = one_token_at_a_time(docs, seq_len)
    assert set(rows) == set(KEYS)
    for i, (key, dtype) in enumerate(KEYS.items()):
        assert rows[key].dtype == dtype and rows[key].shape == (len(expected), seq_len)
        np.testing.assert_array_equal(rows[key], np.reshape([[x[i] for x in row] for row in expected], (-1, seq_len)))


@pytest.mark.parametrize("seed", range(30))
def test_every_pair_of_neighbours_in_a_document_is_a_target_once(seed):
    docs, seq_len = random_docs(seed)
    rows = pack(docs, seq_len, EOD)
    used = rows["loss_weights"] > 0
    trained = sorted(zip(rows["tokens"][used].tolist(), rows["targets"][used].tolist()))
    assert trained == sorted(pair for doc in docs for pair in zip(doc, [*doc[1:], EOD]))


@pytest.mark.parametrize("seed", range(30))
def test_rows_overlap_by_one_token_and_only_the_last_is_padded(seed):
    docs, seq_len = random_docs(seed)
    rows = pack(docs, seq_len, EOD)
    np.testing.assert_array_equal(rows["targets"][:-1, -1], rows["tokens"][1:, 0])
    inside = rows["segment_ids"][:, 1:] > 0
    np.testing.assert_array_equal(rows["targets"][:, :-1][inside], rows["tokens"][:, 1:][inside])
    padding = rows["segment_ids"] == 0
    assert not padding[:-1].any()
    assert (np.diff(padding.astype(int), axis=1) >= 0).all()
    assert (rows["loss_weights"][padding] == 0).all()
    assert (rows["segment_ids"][:, 0] == 1).all() and (rows["positions"][:, 0] == 0).all()


@pytest.mark.parametrize("seed", range(30))
def test_positions_count_up_inside_a_segment(seed):
    docs, seq_len = random_docs(seed)
    rows = pack(docs, seq_len, EOD)
    same = (rows["segment_ids"][:, 1:] == rows["segment_ids"][:, :-1]) & (rows["segment_ids"][:, 1:] > 0)
    step = np.diff(rows["positions"], axis=1)
    assert (step[same] == 1).all()
    assert (rows["positions"][:, 1:][~same] == 0).all()


def test_arrays_and_generators_pack_as_lists_do():
    docs, seq_len = random_docs(0)
    expected = pack(docs, seq_len, EOD)
    for other in ([np.array(d, np.uint16) for d in docs], (d for d in docs)):
        for key, value in pack(other, seq_len, EOD).items():
            np.testing.assert_array_equal(value, expected[key])


@pytest.mark.parametrize("docs", [[], [[]]])
def test_no_pair_gives_no_row(docs):
    assert all(value.shape == (0, 4) for value in pack(docs, 4, EOD).values())


def test_row_length_below_one_is_refused():
    with pytest.raises(ValueError, match="train.seq_len=0"):
        pack([[1, 2]], 0, EOD)


def random_examples(seed):
    """Examples of unique ids with random masks, some without a target, and a row length."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 25, size=rng.integers(1, 60))
    ids = iter(range(1000, 100_000))
    return [([next(ids) for _ in range(n)], rng.integers(0, 2, n).tolist()) for n in lengths], int(rng.integers(5, 30))


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
@pytest.mark.parametrize("seed", range(20))
def test_every_example_is_whole_in_one_segment(seed, too_long):
    examples, S = random_examples(seed)
    rows, report = pack_examples(examples, S, EOD, too_long)
    want = {}
    for ids, mask in examples:
        if len(ids) <= S + 1 or too_long == "truncate":
            ids, mask = ids[: S + 1], mask[: S + 1]
            if any(mask[1:]):
                want[ids[0]] = (ids[:-1], ids[1:], mask[1:])
    for row in range(report["rows"]):
        segments = rows["segment_ids"][row]
        assert (np.diff(segments[segments > 0]) >= 0).all() and set(np.unique(segments)) - {0} == set(range(1, segments.max() + 1))
        for segment in range(1, segments.max() + 1):
            place = segments == segment
            tokens, targets, weights, positions = (rows[k][row][place].tolist() for k in ("tokens", "targets", "loss_weights", "positions"))
            assert want.pop(tokens[0]) == (tokens, targets, weights) and positions == list(range(len(tokens)))
    assert not want
    padding = rows["segment_ids"] == 0
    assert (rows["tokens"][padding] == EOD).all() and not rows["loss_weights"][padding].any() and not rows["positions"][padding].any()
    assert {k: v.dtype for k, v in rows.items()} == KEYS and all(v.shape == (report["rows"], S) for v in rows.values())


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_those_ofbest_fit_decreasing(seed):
    examples, S = random_examples(seed)
    rooms = []
    for size in sorted((min(len(i) - 1, S) for i, m in examples if any(m[1 : S + 1])), reverse=True):
        fits = [room for room in rooms if room >= size]
        if fits:
            rooms.remove(min(fits))
        rooms.append((min(fits) if fits else S) - size)
    rows, report = pack_examples(examples, S, EOD)
    assert report["rows"] == len(rooms)
    assert sorted((rows["segment_ids"] == 0).sum(axis=1).tolist()) == sorted(rooms)


def test_the_report_counts_what_became_of_every_example():
    examples = [([1] * 9, [1] * 9), ([2] * 5, [1, 0, 0, 0, 0]), ([3], [1]), ([], []), ([4] * 3, [0, 1, 1])]
    rows, report = pack_examples(examples, 4, 0)
    assert report == dict(examples=5, packed=2, rows=2, truncated=1, dropped=0, cut_tokens=4, no_target=3, fill=0.75)
    assert rows["loss_weights"].sum() == 4 + 2
    _, report = pack_examples(iter(examples), 4, 0, "drop")
    assert report == dict(examples=5, packed=1, rows=1, truncated=0, dropped=1, cut_tokens=9, no_target=3, fill=0.5)
    assert pack_examples([], 4, 0)[0]["tokens"].shape == (0, 4)


@pytest.mark.parametrize(
    "examples, arguments, message",
    [
        ([([1] * 9, [1] * 9)], {"too_long": "error"}, "example 0 has 9 tokens, more than train.seq_len=4 .*data.too_long"),
        ([], {"too_long": "cut"}, "data.too_long='cut' is not one of truncate, drop, error"),
        ([([1, 2], [1])], {}, "example 0 has ids of shape .2,. and a loss mask of shape .1,."),
        ([], {"seq_len": 0}, "train.seq_len=0"),
    ],
)
def test_examples_that_cannot_be_packed_are_errors(examples, arguments, message):
    with pytest.raises(ValueError, match=message):
        pack_examples(examples, **{"seq_len": 4, "pad_id": 0, **arguments})


def test_packing_many_examples_is_not_quadratic():
    sizes = np.random.default_rng(0).integers(1, 4097, 50_000)
    start = time.perf_counter()
    *_, rows = best_fit(sizes, 4096)
    assert time.perf_counter() - start < 3 and rows < 1.01 * sizes.sum() / 4096 + 1
