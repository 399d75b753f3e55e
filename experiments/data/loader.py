"""Batches of rows: an order that depends on the seed and a sample's number alone, built ahead in a thread, resumed from a small dict.

A source has len(), the samples of one epoch; fingerprint, a short text that tells its data and settings apart; and row(i), a dict of
arrays [S] as packing.DTYPES names them, and perhaps more. Every epoch the loader takes each row once, in an order of its own. A source with
sample(number, seed) puts itself in order instead, and one with rows(seed, state) is read from front to back: see rows.py and stream.py.
"""

import functools
import itertools
import queue
import threading

import numpy as np


class Loader:
    """An endless iterator of batches: dicts of arrays [batch_size / ranks, S], this rank's rows of each global batch.

    Sample k of the run is row k % batch_size of global batch k // batch_size; rank r has the rows of rank_rows(), and builds no others.
    batch_size may be a function of the step instead, and begun is then the number of steps done. state: what state() gave, of a run with
    any number of ranks and any batch size; ValueError if it is of other data or another seed.
    `prefetch` batches wait ready. An error while building a batch is raised by the next() that needs it. Close it, or use it in a `with`.
    """

    def __init__(self, source, batch_size, seed, rank=0, ranks=1, micro_batches=1, state=None, prefetch=2, begun=0):
        size_of = batch_size if callable(batch_size) else lambda step: batch_size
        if not callable(batch_size) and (batch_size < 1 or batch_size % (ranks * micro_batches)):
            raise ValueError(
                f"train.batch_size={batch_size} must be 1 or more, and a multiple of the {ranks} data parallel ranks times {micro_batches}"
                " micro-batches"
            )
        assert 0 <= rank < ranks and prefetch >= 1
        if not hasattr(source, "rows") and not len(source):
            raise ValueError(f"data.path has too little text for one row of train.seq_len tokens ({source.fingerprint}); give more text")
        self._state = {"sample": 0, "data": source.fingerprint, "seed": seed} if state is None else _checked(state, source, seed)
        plan = ((size, rank_rows(size, rank, ranks, micro_batches)) for size in map(size_of, itertools.count(begun)))
        self._source, self._batch_size, self._mine = source, 0, []  # the last two: of the batch that next() gave
        read = _in_turn if hasattr(source, "rows") else _at_will
        batches = read(source, plan, seed, dict(self._state))
        self._ready, self._stop, self._error = queue.Queue(prefetch), threading.Event(), None
        self._thread = threading.Thread(target=self._fill, args=(batches,), daemon=True, name="loader")
        self._thread.start()

    def __iter__(self):
        return self

    def __next__(self):
        if self._stop.is_set():
            raise ValueError("the loader is closed; make another from its state()")
        if self._error is None:
            batch, state, of = self._ready.get()
            if isinstance(state, dict):
                self._state, (self._batch_size, self._mine) = state, of
                return batch
            self._error = state
        raise self._error

    def state(self):
        """A plain dict of the place after the last batch that next() gave, for JSON: what is built ahead does not count."""
        return dict(self._state)

    def sources(self):
        """Of a source that is a blend: (the names of what is blended, the place among them of each row of the batch that next() gave)."""
        first = self._state["sample"] - self._batch_size
        return self._source.names, [self._source.source_of(first + i) for i in self._mine]

    def close(self):
        """Stop building. state() still answers."""
        self._stop.set()
        while self._thread.is_alive():
            _drain(self._ready)
            self._thread.join(0.01)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _fill(self, batches):
        try:
            for found in batches:
                self._ready.put(found)
                if self._stop.is_set():
                    return
            raise AssertionError("a source ended; it must go on with the next epoch")
        except BaseException as error:
            self._ready.put((None, error, None))
        finally:
            batches.close()


def _drain(waiting):
    """Take out what waits in a queue, so that who fills it can go on."""
    while True:
        try:
            waiting.get_nowait()
        except queue.Empty:
            return


def _checked(state, source, seed):
    keys = {"sample", "data", "seed"}
    if not isinstance(state, dict) or not keys <= set(state) or not isinstance(state["sample"], int) or state["sample"] < 0:
        raise ValueError(f"{state!r} is no state of a loader; it needs {', '.join(sorted(keys))}")
    if state["data"] != source.fingerprint:
        raise ValueError(
            f"the state is of the data {state['data']!r}, but data.path gives {source.fingerprint!r}; restore with the same data"
        )
    if state["seed"] != seed:
        raise ValueError(
            f"train.seed={seed}, but the state is of seed {state['seed']}, another order; use --config.train.seed={state['seed']}"
        )
    return dict(state)


def _at_will(source, plan, seed, state):
    """(batch, state after it, its entry in the plan) of a source whose rows are built one by one, in any order. plan: (rows of a global
    batch, which of them are this rank's), for each batch."""
    start = state["sample"]
    for size, mine in plan:
        numbers = range(start, start + size)
        start += size
        yield _stack([take(source, number, seed) for number in (numbers[i] for i in mine)]), {**state, "sample": start}, (size, mine)


def _in_turn(source, plan, seed, state):
    """As _at_will, of a source that is read from front to back, by every rank."""
    rows = source.rows(seed, state)
    for size, mine in plan:
        batch = [next(rows) for _ in range(size)]
        yield _stack([batch[i][0] for i in mine]), {**batch[-1][1], "data": source.fingerprint, "seed": seed}, (size, mine)


def rank_rows(batch_size, rank, ranks, micro_batches=1):
    """The rows of a global batch that a data parallel rank has, in its order: of each of the batch's `micro_batches` equal parts the
    rank-th of `ranks` parts, so that a micro-batch is of the same rows on any number of ranks."""
    part = batch_size // (ranks * micro_batches)
    return [(m * ranks + rank) * part + i for m in range(micro_batches) for i in range(part)]


def take(source, number, seed):
    """The row of sample `number` (from 0, over all epochs) of a source."""
    if hasattr(source, "sample"):
        return source.sample(number, seed)
    epoch, place = divmod(number, len(source))
    return source.row(int(epoch_order(seed, epoch, len(source))[place]))


def first_rows(source, count, seed):
    """The first `count` samples, as a dict of arrays [count, S]: what a loader without a state gives, joined."""
    if hasattr(source, "rows"):
        return _stack([row for (row, _), _ in zip(source.rows(seed), range(count))])
    return _stack([take(source, number, seed) for number in range(count)])


def rows_at(source, start, count):
    """The rows start, start + 1, ... of a source, at most `count`, in its own order, as a dict of arrays [rows, S]."""
    return _stack([source.row(i) for i in range(start, min(start + count, len(source)))])


def one_epoch(source, seed):
    """The rows of a source's first epoch, one after another."""
    if hasattr(source, "rows"):
        yield from (row for row, _ in itertools.takewhile(lambda item: item[1]["epoch"] == 0, source.rows(seed)))
    else:
        yield from (take(source, number, seed) for number in range(len(source)))


def _stack(rows):
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def eval_batches(rows, batch_size, rank=0, ranks=1):
    """All rows in order, as dicts of arrays [batch_size / ranks, S], a rank's part of each batch; the last batch is filled with rows of
    zeros, which have no loss weight."""
    for start in range(0, len(rows["tokens"]), batch_size):
        part = {key: value[start : start + batch_size] for key, value in rows.items()}
        missing = batch_size - len(part["tokens"])
        mine = rank_rows(batch_size, rank, ranks)
        yield {key: np.pad(value, ((0, missing), (0, 0)))[mine] for key, value in part.items()}


@functools.lru_cache(maxsize=4)
def epoch_order(seed, epoch, count):
    """The order, int64 [count], in which an epoch (from 0) takes `count` rows."""
    # Raw bits: NumPy keeps them the same between releases, and does not promise that of `permutation`.
    bits = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)).random_raw(count)
    return np.argsort(bits, kind="stable")
