"""Records to tokens, on one core or by worker processes, in the order of the records."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

from qwen3 import chat
from qwen3.tokenizer import Tokenizer

BATCH_RECORDS, BATCH_CHARACTERS = 512, 1 << 19
THINKING = {"none": None, "true": True, "false": False}  # a setting -> the chat template's enable_thinking
THREADS = "TOKENIZERS_PARALLELISM"  # the environment variable of the tokenizers library


class Job(NamedTuple):
    """What is made of a record. tokenizer: its folder. keys: those of the texts, each to an output of its own.

    map_keys: {name in the record: name here}. format: None for texts, else one of chat.FORMATS, to the outputs "text" and "loss".
    """

    tokenizer: str
    keys: tuple = ("text",)
    append_eod: bool = True
    map_keys: dict = {}
    format: str | None = None
    enable_thinking: bool | None = None
    train_empty_think: bool = False
    any_weight: bool = True  # False: a conversation with weights other than 0 and 1 is a bad record

    @property
    def outputs(self):
        return self.keys if self.format is None else ("text", "loss")


class Batch(NamedTuple):
    """Of consecutive records: for each output (values [tokens], lengths [documents]); the messages of bad records; bytes read so far."""

    outputs: dict
    bad: list
    size: int


class Missing(NamedTuple):
    """Stands for the text of a record that lacks a key. keys: those that it has."""

    keys: tuple


def encode(records, job, workers=1):
    """Batches of tokens, in the order of the records, `workers` processes at work on them; 1 is this process. Each uses one core.

    Ids are int32; loss masks are uint8, or float32 where a turn has another weight than 0 and 1. With append_eod the end-of-document id
    follows each document that is not empty, without loss.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be 1 or more")
    batches = _batches(records, job)
    return _here(batches, job) if workers == 1 else _elsewhere(batches, job, workers)


def _batches(records, job):
    """Lists of (where, the mapped record, or its texts), with the bytes read so far."""
    batch, characters, size = [], 0, 0
    for record in records:
        value = _renamed(record.value, job.map_keys) if job.map_keys else record.value
        if job.format is None:
            value = [value[key] if key in value else Missing(tuple(value)) for key in job.keys]
            characters += sum(len(v) for v in value if isinstance(v, str))
        else:
            characters += BATCH_CHARACTERS // 64
        batch.append((record.where, value))
        size = record.size
        if len(batch) >= BATCH_RECORDS or characters >= BATCH_CHARACTERS:
            yield batch, size
            batch, characters = [], 0
    if batch:
        yield batch, size


def _renamed(record, names):
    """The record with its keys renamed; one that already had a new name is replaced."""
    renamed = {to: record[name] for name, to in names.items() if name in record}
    return {**{k: v for k, v in record.items() if k not in names}, **renamed}


def _here(batches, job):
    encoder = _Encoder(job)
    for batch, size in batches:
        with _one_core():
            result = encoder(batch, size)
        yield result


def _elsewhere(batches, job, workers):
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (job,))
    waiting, first = deque(), "the start"
    try:
        for batch, size in batches:
            waiting.append((batch[0][0], pool.submit(_in_worker, batch, size)))
            if len(waiting) > 2 * workers:
                first, future = waiting.popleft()
                yield future.result()
        while waiting:
            first, future = waiting.popleft()
            yield future.result()
    except BrokenProcessPool as e:
        raise RuntimeError(f"a worker process ended at {first} or soon after; if memory ran out, use fewer workers") from e
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(job):
    global _encoder
    os.environ[THREADS] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells of it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = _Encoder(job)


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)  # a killed parent would leave its workers waiting for ever


def _in_worker(batch, size):
    return _encoder(batch, size)


@contextlib.contextmanager
def _one_core():
    before = os.environ.get(THREADS)
    os.environ[THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[THREADS]
        else:
            os.environ[THREADS] = before


class _Encoder:
    def __init__(self, job):
        self.job, self.tokenizer = job, Tokenizer.load(job.tokenizer)
        self.end = [self.tokenizer.eod_id] if job.append_eod else []

    def __call__(self, batch, size):
        bad = []
        documents = self._texts(batch, bad) if self.job.format is None else self._chats(batch, bad)
        return Batch({name: (_flat_masks if self._is_loss(name) else _flat)(d) for name, d in documents.items()}, bad, size)

    def _is_loss(self, name):
        return self.job.format is not None and name == "loss"

    def _texts(self, batch, bad):
        good = []
        for where, values in batch:
            wrong = next(filter(None, map(_not_text, self.job.keys, values)), None)
            bad.append(f"{where}: {wrong}") if wrong else good.append((where, values))
        try:
            encoded = self._encoded([values for _, values in good])
        except ValueError:  # of one record: each alone, to find it
            encoded = {key: [] for key in self.job.keys}
            for where, values in good:
                try:
                    for key, ids in self._encoded([values]).items():
                        encoded[key] += ids
                except ValueError as error:
                    bad.append(f"{where}: {error}")
        for ids in itertools.chain.from_iterable(encoded.values()):
            if ids:
                ids += self.end
        return encoded

    def _encoded(self, rows):
        """Returns {key: token ids of each row}."""
        columns = zip(*rows) if rows else [()] * len(self.job.keys)
        return {key: self.tokenizer.encode_batch(texts) for key, texts in zip(self.job.keys, columns)}

    def _chats(self, batch, bad):
        out = {"text": [], "loss": []}
        for where, record in batch:
            try:
                messages, tools = chat.FORMATS[self.job.format](record)
                ids, mask = chat.encode_chat(self.tokenizer, messages, tools, self.job.enable_thinking, self.job.train_empty_think)
            except (ValueError, RecursionError) as e:
                bad.append(f"{where}: {e}")
                continue
            if mask.dtype != np.uint8 and not self.job.any_weight:
                bad.append(
                    f"{where}: a turn has a weight of {mask.max():g}, and the masks beside a pair are 0 or 1; train with data.format"
                )
                continue
            out["text"].append(ids.tolist() + self.end)
            out["loss"].append(mask.tolist() + [0] * len(self.end))
        return out


def _not_text(key, value):
    if isinstance(value, Missing):
        return f"key {key!r} is missing; the keys are {', '.join(map(str, value.keys))}"
    if not isinstance(value, str):
        return f"{key!r} is {type(value).__name__}; give text"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return f"{key!r} has half a surrogate pair, which is no character; mend or drop it"


def _flat_masks(documents):
    masks, lengths = _flat(documents, np.float32)
    return (masks.astype(np.uint8) if np.isin(masks, (0, 1)).all() else masks), lengths


def _flat(documents, dtype=np.int32):
    lengths = np.array([len(d) for d in documents], np.int64)
    return np.fromiter(itertools.chain.from_iterable(documents), dtype, lengths.sum()), lengths
