"""Packed rows: every pair of neighbours in a document is a target once, and documents stay apart."""

import numpy as np
import pytest

from experiments.data.packing import pack

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
