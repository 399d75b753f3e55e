"""Batches: a pure function of step and seed that takes each row once an epoch."""

import numpy as np
import pytest

from experiments.data.loader import batch, eval_batches
from experiments.data.packing import pack


def rows_of(count, seq_len=3):
    """Rows whose first token is their number."""
    rows = pack([list(range(count * seq_len))], seq_len, 0)
    rows["tokens"] = np.repeat(np.arange(count, dtype=np.int32)[:, None], seq_len, axis=1)
    return rows


def order(rows, steps, batch_size, seed):
    return np.concatenate([batch(rows, s, batch_size, seed)["tokens"][:, 0] for s in range(steps)])


@pytest.mark.parametrize("count, batch_size", [(12, 4), (10, 4), (7, 1), (5, 5), (3, 8)])
def test_every_epoch_takes_each_row_once(count, batch_size):
    taken = order(rows_of(count), 4 * count, batch_size, seed=0)
    for epoch in taken[: len(taken) // count * count].reshape(-1, count):
        assert sorted(epoch) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own():
    rows = rows_of(50)
    first, second = order(rows, 10, 10, seed=0).reshape(2, 50)
    other = order(rows, 5, 10, seed=1)
    assert not np.array_equal(first, np.arange(50))
    assert not np.array_equal(first, second) and not np.array_equal(first, other) and not np.array_equal(second, other)


def test_batch_depends_on_its_arguments_alone():
    rows = rows_of(10)
    late = batch(rows, 1_000_000, 4, seed=3)
    order(rows, 20, 4, seed=5)
    again = batch({k: v.copy() for k, v in rows.items()}, 1_000_000, 4, seed=3)
    for key in rows:
        np.testing.assert_array_equal(late[key], again[key])


def test_order_stays_the_same_between_releases():
    assert order(rows_of(8), 1, 8, seed=0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_rows_of_a_batch_keep_their_columns_and_dtypes_together():
    rows = pack([list(range(1, 40)), list(range(50, 70))], 4, 0)
    out = batch(rows, 2, 3, seed=-1)
    assert {k: (v.shape, v.dtype) for k, v in out.items()} == {k: ((3, 4), v.dtype) for k, v in rows.items()}
    for i in range(3):
        (source,) = [r for r in range(len(rows["tokens"])) if (rows["tokens"][r] == out["tokens"][i]).all()]
        assert all((out[k][i] == rows[k][source]).all() for k in rows)


@pytest.mark.parametrize("count, batch_size", [(6, 3), (7, 3), (1, 4)])
def test_eval_batches_give_all_rows_in_order_then_rows_without_weight(count, batch_size):
    rows = rows_of(count)
    batches = list(eval_batches(rows, batch_size))
    joined = {k: np.concatenate([b[k] for b in batches]) for k in rows}
    assert all(len(b["tokens"]) == batch_size for b in batches) and len(batches) == -(-count // batch_size)
    for key, value in joined.items():
        np.testing.assert_array_equal(value[:count], rows[key])
        assert not value[count:].any() and value.dtype == rows[key].dtype


def test_no_rows_is_an_error_naming_the_keys():
    empty = pack([], 64, 0)
    for call in (lambda: batch(empty, 0, 2, 0), lambda: list(eval_batches(empty, 2))):
        with pytest.raises(ValueError, match="data.path.*train.seq_len=64"):
            call()
    with pytest.raises(ValueError, match="train.batch_size=0"):
        batch(rows_of(2), 0, 0, 0)
