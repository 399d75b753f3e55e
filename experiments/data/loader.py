"""Batches of packed rows. The batch of a step depends on the step and the seed alone, so a run resumes without a saved iterator."""

import functools

import numpy as np


def batch(rows, step, batch_size, seed):
    """The rows of one step (from 0), as a dict of arrays [batch_size, S]. Every epoch takes each row once, in an order of its own.

    A batch may end one epoch and start the next. Raises ValueError if there is no row.
    """
    count = _count(rows, batch_size)
    epochs, places = np.divmod(step * batch_size + np.arange(batch_size), count)
    index = np.array([epoch_order(seed, int(e), count)[p] for e, p in zip(epochs, places)])
    return {key: value[index] for key, value in rows.items()}


def eval_batches(rows, batch_size):
    """All rows in order, as dicts of arrays [batch_size, S]; the last is filled with rows of zeros, which have no loss weight."""
    count = _count(rows, batch_size)
    for start in range(0, count, batch_size):
        part = {key: value[start : start + batch_size] for key, value in rows.items()}
        missing = batch_size - len(part["tokens"])
        yield {key: np.pad(value, ((0, missing), (0, 0))) for key, value in part.items()}


def _count(rows, batch_size):
    if batch_size < 1:
        raise ValueError(f"train.batch_size={batch_size} must be 1 or more")
    count, seq_len = rows["tokens"].shape
    if not count:
        raise ValueError(f"data.path has too little text for one row of train.seq_len={seq_len} tokens; give more text")
    return count


@functools.lru_cache(maxsize=4)
def epoch_order(seed, epoch, count):
    """The order, int64 [count], in which an epoch (from 0) takes `count` rows."""
    # Raw bits: NumPy keeps them the same between releases, and does not promise that of `permutation`.
    bits = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)).random_raw(count)
    return np.argsort(bits, kind="stable")
