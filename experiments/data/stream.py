"""Text read and tokenised while training, for corpora that nobody wants to preprocess: rows from front to back, from any place on."""

import hashlib
import itertools
import tempfile
from pathlib import Path

import numpy as np

from experiments.data import packing, parts
from experiments.data.loader import epoch_order
from experiments.data.pairs import Skipped

PLACE = ("part", "record", "drawn", "token")
GROUP_RECORDS, GROUP_CHARACTERS = 256, 1 << 18  # tokenised at a time


class TextStream:
    """The records of jsonl, parquet or other files, or of a dataset (see parts.py), packed as packing.pack does.

    They come in the order of the files, every epoch the same. With shuffle_buffer=N, each epoch takes the files in an order of its own,
    and gives each N records that follow one another in an order of their own: all depends on seed, epoch and place alone, so that a
    state stays small. A record moves no further than N within its file; shuffle a corpus that is sorted in long files beforehand.

    held_out is the fraction of records, chosen by a hash of file name and number, that rows() passes over and held_rows() gives. A
    record that cannot be used is an error, or with skip_bad counted and left out. A Loader restores a stream by reading the file it
    was in from its start, without tokenising again what is behind. most: take the first so many records alone, in the order of the files,
    held-out ones among them; 0 = all. Every rank of it reads and tokenises the whole stream and keeps its
    own rows; where that is too slow, preprocess. Memory is that of a group of records, or of N.
    """

    def __init__(self, path, tokenizer, seq_len, *, key="text", reset=True, held_out=0.0, shuffle_buffer=0, skip_bad=False, most=0):
        if shuffle_buffer < 0:
            raise ValueError(f"data.shuffle_buffer={shuffle_buffer} must be 0 or more; 0 = in the order of the files")
        self.parts, self.key = parts.find(path, key), key
        self.tokenizer, self.seq_len, self.reset, self.held_out, self.shuffle_buffer = tokenizer, seq_len, reset, held_out, shuffle_buffer
        # Not skip_bad: a run that stopped at a bad record may go on without it.
        settings = (self.parts.identity, seq_len, key, reset, held_out, shuffle_buffer, _tokenizer_digest(tokenizer))
        settings += (most,) if most else ()
        what = hashlib.blake2b(repr(settings).encode(), digest_size=8).hexdigest()
        self.fingerprint = f"stream of {self.parts.title}, {len(self.parts.names)} files x{seq_len} {what}"
        self.bad, self._seen = Skipped(skip_bad, "--config.data.skip_bad=true"), {}
        self._most = _first_of_parts(self.parts, most) if most else [None] * len(self.parts.names)

    def rows(self, seed, state=None):
        """Yields (row, state after it) without end. The state has sample, the rows so far; epoch; and where the next row starts: part,
        the place of a file in the epoch's order, and record in it, from 0; drawn, how many records in the order drawn from there on are
        behind; and token in the record. ValueError, naming file and line, for a record that cannot be read."""
        state = state or {}
        epoch, sample = state.get("epoch", 0), state.get("sample", 0)
        place = tuple(state.get(name, 0) for name in PLACE)
        while True:
            before, whole = sample, not any(place)
            for row, after in self._epoch(seed, epoch, place):
                sample += 1
                yield row, {"sample": sample, "epoch": epoch, **dict(zip(PLACE, after))}
            if whole and sample == before:
                raise ValueError(
                    f"{self.parts.title}: data.path has no pair of tokens to learn from; give more text, or less data.held_out"
                )
            epoch, place = epoch + 1, (0, 0, 0, 0)

    def held_rows(self, count):
        """(the first `count` held-out rows, or all if there are fewer, as of packing.pack; the first held-out text). Of records too few for
        one to be held out, rows of the first ones; a line says so."""
        documents, tokens, first = self._held_documents(count, held=True) if self.held_out else ([], 0, None)
        nothing = f"data.held_out={self.held_out} holds out no text of {self.parts.title}"
        if tokens < 2 and self.held_out:
            documents, tokens, first = self._held_documents(count, held=False)
            if tokens >= 2:
                print(f"data       {nothing}; eval_loss is of training data", flush=True)
        if tokens < 2:
            raise ValueError(f"{nothing}; raise it, or give more records")
        rows = packing.pack(documents, self.seq_len, self.tokenizer.eod_id, self.reset)
        return {key: value[:count] for key, value in rows.items()}, first

    def _held_documents(self, count, held):
        """(ids of documents for `count` rows, their tokens, the first text) of the records that are held out or of the others."""
        documents, tokens, first = [], 0, None
        for texts in _groups((text, None) for text, *_ in self._records(range(len(self.parts.names)), held=held)):
            first = texts[0][0] if first is None else first
            documents += self.tokenizer.encode_batch([text for text, _ in texts])
            tokens += sum(len(d) + 1 for d in documents[-len(texts) :])
            if tokens > count * self.seq_len:
                break
        return documents, tokens, first

    def _epoch(self, seed, epoch, place):
        """(row, where the next one starts) from a place to the end of the data."""
        *start, token = place
        pieces, places = [], []  # ids, and where they start
        for group in _groups(self._in_order(seed, epoch, *start)):
            ids = self.tokenizer.encode_batch([text for text, _ in group])
            for (_, at), piece in zip(group, ids):
                skip = token if at == tuple(start) else 0
                pieces.append(np.array([*piece, self.tokenizer.eod_id], np.int32)[skip:])
                places.append((*at, skip))
            count = (sum(map(len, pieces)) - 1) // self.seq_len
            if count > 0:
                yield from self._cut(pieces, places, count)
        if sum(map(len, pieces)) > 1:
            pieces.append(np.empty(0, np.int32))
            places.append((len(self.parts.names), 0, 0, 0))
            yield from self._cut(pieces, places, 1)

    def _cut(self, pieces, places, count):
        """`count` rows off the front of the pieces, which are shortened by them, and where each next one starts."""
        lengths = [len(piece) for piece in pieces]
        ends, S = np.cumsum(lengths), self.seq_len
        document = np.repeat(np.arange(len(pieces)), lengths) if self.reset else np.zeros(ends[-1], np.int64)
        used = slice(count * S + 1)
        rows = packing.cut_rows(np.concatenate(pieces)[used], document[used], S, self.tokenizer.eod_id)
        nexts = []
        for start in np.arange(1, count + 1) * S:
            at = min(int(np.searchsorted(ends, start, side="right")), len(pieces) - 1)
            *document_at, token = places[at]
            inside = max(0, int(start - ends[at]) + lengths[at]) if lengths[at] else 0
            nexts.append((*document_at, token + inside))
        pieces[:at], places[:at] = [], []
        pieces[0], places[0] = pieces[0][inside:], nexts[-1]
        for i, place in enumerate(nexts):
            yield {key: value[i] for key, value in rows.items()}, place

    def _in_order(self, seed, epoch, part, record, drawn):
        """(text, place) of the records of an epoch that are not held out, in its order, from a place on."""
        count = len(self.parts.names)
        if not self.shuffle_buffer:
            yield from ((text, (at, number, 0)) for text, at, number in self._records(range(count), part, record))
            return
        found = self._records(epoch_order(seed, epoch, count).tolist(), part, record)
        while buffer := list(itertools.islice(found, self.shuffle_buffer)):
            _, part, record = buffer[0]
            for i, place in enumerate(_shuffled(len(buffer), seed, epoch, part, record)):
                text, buffer[place] = buffer[place][0], None  # so that no text is kept while the next ones are read
                if i >= drawn:
                    yield text, (part, record, i)
            drawn = 0

    def _records(self, order, part=0, record=0, held=False):
        """(text, place in the order of the parts, number) from a place on, of the records that are held out or of the others."""
        for at in range(part, len(order)):
            for number, text in self._read(order[at], record if at == part else 0):
                if self._is_held(order[at], number) == held:
                    yield text, at, number

    def _read(self, part, start):
        """(number, text) of the records of a part from number `start` on, those left out that cannot be used."""
        at = [start, 0]  # the number of the last record, and how many bad ones came since

        def bad(message):
            at[1] += 1
            if not self.bad.skip or tuple(at) > self._seen.get(part, (0, 0)):  # counted once, though read in every epoch
                self._seen[part] = tuple(at)
                self.bad(message)

        most = self._most[part]
        found = itertools.islice(self.parts.records(part, start, bad), None if most is None else max(0, most - start))
        for number, read in enumerate(found, start):
            at[:] = number + 1, 0
            text, wrong = self._text(read.value)
            if wrong:
                bad(f"{read.where}: {wrong}")
            else:
                yield number, text

    def _is_held(self, part, number):
        if not self.held_out:
            return False
        drawn = hashlib.blake2b(f"{self.parts.names[part]}:{number}".encode(), digest_size=4).digest()
        return int.from_bytes(drawn, "big") < self.held_out * 2**32

    def _text(self, record):
        """(text, what is wrong with it)."""
        text = record.get(self.key)
        if not isinstance(text, str):
            what = f"is {type(text).__name__}, not text" if self.key in record else "is missing"
            return None, f"key {self.key!r} {what}; the keys are {', '.join(record)}; use data.json_key"
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return None, f"{self.key!r} has half a surrogate pair, which is no character"
        try:
            self.tokenizer.check(text)
        except ValueError as error:
            return None, str(error)
        return text, None


def _first_of_parts(found, most):
    """How many records of each part are among the first `most` of all; None for a part that ends before. These are read once."""
    out, left = [], most
    for part in range(len(found.names)):
        count = sum(1 for _ in itertools.islice(found.records(part, 0, lambda message: None), left)) if left else 0
        out.append(None if count < left else left)
        left -= count
    return out


def _groups(texts):
    """Lists of (text, place), to be tokenised at a time."""
    group, characters = [], 0
    for item in texts:
        group.append(item)
        characters += len(item[0])
        if len(group) == GROUP_RECORDS or characters > GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _shuffled(count, *key):
    """The numbers below count, in an order that depends on the integers of key alone."""
    # Raw bits, as in loader.epoch_order: NumPy keeps them, and how SeedSequence spreads a key, the same between releases.
    spread = np.random.SeedSequence([k % 2**64 for k in key]).generate_state(2, np.uint64)
    return np.argsort(np.random.Philox(key=spread).random_raw(count), kind="stable").tolist()


def _tokenizer_digest(tokenizer):
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return hashlib.blake2b((Path(folder) / "tokenizer.json").read_bytes(), digest_size=8).hexdigest()
