"""Text read and tokenised while training, for corpora that nobody wants to preprocess: rows from front to back, from any place on."""

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np

from experiments.data import packing, readers

PLACE = ("file", "record", "token")
GROUP_RECORDS, GROUP_CHARACTERS = 256, 1 << 18  # tokenised at a time


class TextStream:
    """The records of jsonl, parquet or other files (see readers.records), in file order, packed as packing.pack does.

    Every epoch gives the same rows: those of packing.pack over all documents; shuffle the files beforehand. held_out is the fraction of
    records, chosen by a hash of file name and number, that rows() passes over and held_rows() gives. A Loader restores a stream by
    reading the file it was in from its start, without tokenising again what is behind. Every rank of it reads and tokenises the whole
    stream and keeps its own rows; where that is too slow, preprocess. Memory is that of a group of records.
    """

    def __init__(self, path, tokenizer, seq_len, *, key="text", reset=True, held_out=0.0):
        self.files = readers.find_files(path)
        self.tokenizer, self.seq_len, self.key, self.reset, self.held_out = tokenizer, seq_len, key, reset, held_out
        files = [(f.name, f.stat().st_size) for f in self.files]
        settings = (files, seq_len, key, reset, held_out, _tokenizer_digest(tokenizer))
        what = hashlib.blake2b(repr(settings).encode(), digest_size=8).hexdigest()
        self.fingerprint = f"stream of {os.path.basename(os.fspath(path))}, {len(files)} files x{seq_len} {what}"

    def rows(self, state=None):
        """Yields (row, state after it) without end. The state has sample, the rows so far; epoch; and where the next row starts: file
        and record, from 0, and token in that record. ValueError, naming file and line, for a record that cannot be read."""
        state = state or {}
        epoch, sample = state.get("epoch", 0), state.get("sample", 0)
        place = tuple(state.get(name, 0) for name in PLACE)
        while True:
            before, whole = sample, not any(place)
            for row, after in self._epoch(*place):
                sample += 1
                yield row, {"sample": sample, "epoch": epoch, **dict(zip(PLACE, after))}
            if whole and sample == before:
                raise ValueError(f"{self.files[0]}: data.path has no pair of tokens to learn from; give more text, or less data.held_out")
            epoch, place = epoch + 1, (0, 0, 0)

    def held_rows(self, count):
        """(the first `count` held-out rows, or all if there are fewer, as of packing.pack; the first held-out text)."""
        documents, tokens, text = [], 0, None
        for group in self._groups(0, 0, held=True):
            text = group[0][0] if text is None else text
            documents += self.tokenizer.encode_batch([t for t, *_ in group])
            tokens += sum(len(d) + 1 for d in documents[-len(group) :])
            if tokens > count * self.seq_len:
                break
        if tokens < 2:
            raise ValueError(f"data.held_out={self.held_out} holds out no text of {self.files[0]}; raise it, or give more records")
        rows = packing.pack(documents, self.seq_len, self.tokenizer.eod_id, self.reset)
        return {key: value[:count] for key, value in rows.items()}, text

    def _epoch(self, file, record, token):
        """(row, where the next one starts: file, record, token) from a place to the end of the data."""
        pieces, places = [], []  # ids, and where they start
        for group in self._groups(file, record, held=False):
            ids = self.tokenizer.encode_batch([text for text, *_ in group])
            for (_, *place), piece in zip(group, ids):
                skip = token if place == [file, record] else 0
                pieces.append(np.array([*piece, self.tokenizer.eod_id], np.int32)[skip:])
                places.append((*place, skip))
            count = (sum(map(len, pieces)) - 1) // self.seq_len
            if count > 0:
                yield from self._cut(pieces, places, count)
        if sum(map(len, pieces)) > 1:
            pieces.append(np.empty(0, np.int32))
            places.append((len(self.files), 0, 0))
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
            file, record, token = places[at]
            inside = max(0, int(start - ends[at]) + lengths[at]) if lengths[at] else 0
            nexts.append((file, record, token + inside))
        pieces[:at], places[:at] = [], []
        pieces[0], places[0] = pieces[0][inside:], nexts[-1]
        for i, place in enumerate(nexts):
            yield {key: value[i] for key, value in rows.items()}, place

    def _groups(self, file, record, held):
        """Lists of (text, file, record) from a place on, of the records that are held out or of the others."""
        group, characters = [], 0
        for at in range(file, len(self.files)):
            for number, read in enumerate(readers.records(self.files[at], columns=[self.key])):
                if (at == file and number < record) or self._is_held(at, number) != held:
                    continue
                group.append((self._text(read), at, number))
                characters += len(group[-1][0])
                if len(group) == GROUP_RECORDS or characters > GROUP_CHARACTERS:
                    yield group
                    group, characters = [], 0
        if group:
            yield group

    def _is_held(self, file, number):
        if not self.held_out:
            return False
        drawn = hashlib.blake2b(f"{self.files[file].name}:{number}".encode(), digest_size=4).digest()
        return int.from_bytes(drawn, "big") < self.held_out * 2**32

    def _text(self, record):
        text = record.value.get(self.key)
        if not isinstance(text, str):
            what = f"is {type(text).__name__}, not text" if self.key in record.value else "is missing"
            raise ValueError(f"{record.where}: key {self.key!r} {what}; the keys are {', '.join(record.value)}; use data.json_key")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{record.where}: {self.key!r} has half a surrogate pair, which is no character; mend it") from error
        return text


def _tokenizer_digest(tokenizer):
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return hashlib.blake2b((Path(folder) / "tokenizer.json").read_bytes(), digest_size=8).hexdigest()
