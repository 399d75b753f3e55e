"""Megatron-LM's indexed dataset: token sequences in `<prefix>.bin`, where they lie in `<prefix>.idx`. Byte for byte its format.

`.bin`: the ids of all sequences, back to back. `.idx`, little-endian: b"MMIDIDX\\0\\0"; u64 version 1; u8 dtype code; u64 number n of
sequences; u64 number d of document indices; i32 lengths[n]; i64 byte offsets[n]; i64 document_indices[d], the number of sequences
before each document and, last, n; i8 modes[n] in multimodal data only. Source: megatron/core/datasets/indexed_dataset.py.
"""

import fcntl
import os
import struct
import tempfile
from array import array
from pathlib import Path

import numpy as np

DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
BLOCK = 1 << 20  # sequences checked or written at a time, so that 100 million need no memory of their own
SPOOLED = 1 << 13  # of a Writer's numbers in memory at a time


def best_dtype(vocab_size):
    """The dtype Megatron-LM stores ids of a vocabulary in: uint16 below 65500 tokens, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedDataset:
    """A `.bin/.idx` pair, memory-mapped and checked in full against the sizes of its files before anything is read through it.

    len(): sequences n. lengths int32 [n]; offsets int64 [n], bytes into `.bin`; document_indices int64 [documents + 1]; modes int8
    [n] or None; flat [tokens]: the whole `.bin`. Raises FileNotFoundError, or ValueError naming the file and what is wrong in it.
    Checking costs about 4 ns a sequence.
    """

    def __init__(self, prefix):
        self.prefix = os.fspath(prefix)
        idx, bin_ = _regular(f"{self.prefix}.idx"), _regular(f"{self.prefix}.bin")
        raw = _mapped(idx)
        self.dtype, count, documents, has_modes = _header(idx, raw)
        parts, start = [], HEADER.size
        for dtype, length in (("<i4", count), ("<i8", count), ("<i8", documents), ("i1", count if has_modes else 0)):
            stop = start + length * np.dtype(dtype).itemsize
            parts.append(raw[start:stop].view(dtype))
            start = stop
        self.lengths, self.offsets, self.document_indices, modes = parts
        self.modes = modes if has_modes else None
        tokens = _check_sequences(idx, self.lengths, self.offsets, self.dtype.itemsize)
        _check_documents(idx, self.document_indices, count)
        data = _mapped(bin_)
        if data.size != tokens * self.dtype.itemsize:
            raise ValueError(
                f"{bin_}: {data.size} bytes, but {idx} describes {tokens} tokens of {self.dtype.itemsize} bytes;"
                " the two are not a pair, or one was cut: make or copy both again"
            )
        self.flat = data.view(self.dtype)

    def __len__(self):
        return len(self.lengths)

    def tokens(self, i, start=0, stop=None):
        """The ids [start:stop] of sequence i, as slicing a list gives them; a read-only view. IndexError if there is no sequence i."""
        if not 0 <= i < len(self):
            raise IndexError(f"sequence {i} of {self.prefix}: it has {len(self)}, numbered from 0")
        start, stop, _ = slice(start, stop).indices(int(self.lengths[i]))
        begin = int(self.offsets[i]) // self.dtype.itemsize
        return self.flat[begin + start : begin + max(start, stop)]


def _regular(path):
    """The path, if it is a file: opening a pipe would wait for ever."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist; a prefix names a pair PREFIX.bin, PREFIX.idx")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a regular file; a prefix names a pair PREFIX.bin, PREFIX.idx")
    return path


def _mapped(path):
    """The bytes of a file, as a read-only array; mmap cannot map none."""
    return np.memmap(path, np.uint8, mode="r").view(np.ndarray) if os.path.getsize(path) else np.empty(0, np.uint8)


def _header(path, raw):
    """(dtype, sequences, document indices, has modes) from the header; the length of the file must be exactly what they need."""
    if raw.size < HEADER.size:
        raise ValueError(f"{path}: {raw.size} bytes, shorter than the header of {HEADER.size}; the file was cut, make it again")
    magic, version, code, count, documents = HEADER.unpack(raw[: HEADER.size].tobytes())
    if magic != MAGIC:
        raise ValueError(f"{path}: starts with {magic!r}, not {MAGIC!r}; it is no Megatron-LM index, give another prefix")
    if version != 1:
        raise ValueError(f"{path}: version {version} is not known; write it as version 1")
    if code not in DTYPES:
        raise ValueError(f"{path}: dtype code {code} is not one of {min(DTYPES)} to {max(DTYPES)}; make the file again")
    plain = HEADER.size + 12 * count + 8 * documents
    if raw.size not in (plain, plain + count):
        raise ValueError(
            f"{path}: {raw.size} bytes, but {count} sequences and {documents} document indices need {plain}"
            f" ({plain + count} with modes); the file was cut or damaged, make it again"
        )
    return np.dtype(DTYPES[code]).newbyteorder("<"), count, documents, raw.size != plain


def _check_sequences(path, lengths, offsets, itemsize):
    """The number of tokens. Lengths must be 0 or more and each sequence start where the one before it ends."""
    total = 0
    for at in range(0, len(lengths), BLOCK):
        block = lengths[at : at + BLOCK].astype(np.int64)
        if block.min() < 0:
            raise ValueError(f"{path}: sequence {at + int(block.argmin())} has length {block.min()}; the file is damaged, make it again")
        ends = np.cumsum(block) + total
        wrong = offsets[at : at + BLOCK] != (ends - block) * itemsize
        if wrong.any():
            i = int(wrong.argmax())
            raise ValueError(
                f"{path}: sequence {at + i} is at byte {offsets[at + i]}, but those before it end at {(ends - block)[i] * itemsize};"
                " the file is damaged, make it again"
            )
        total = int(ends[-1])
    return total


def _check_documents(path, indices, count):
    if not len(indices) or indices[0] != 0 or indices[-1] != count:
        ends = f"{indices[0]} to {indices[-1]}" if len(indices) else "none"
        raise ValueError(f"{path}: document indices are {ends}, not 0 to {count}; the file is damaged, make it again")
    for at in range(0, len(indices) - 1, BLOCK):
        block = indices[at : at + BLOCK + 1]
        down = block[1:] < block[:-1]  # a difference could wrap
        if down.any():
            raise ValueError(f"{path}: document {at + int(down.argmax())} ends before it starts; the file is damaged, make it again")


class Writer:
    """Writes a pair: `with Writer(prefix, best_dtype(vocab_size)) as out: out.add_document([ids])`. `.bin` streams to disk.

    The two are written aside as `.bin.partial` and `.idx.partial`, and take their names at the end of the block, the `.idx` last:
    without it nothing opens. Until then an older pair of that name stays; after an error or a kill nothing new opens. Memory is that of
    one sequence: numbers of the index wait in unnamed files, gone with the process. Raises ValueError for another Writer at work on the
    prefix, an id that the dtype cannot hold, or a document not ended.
    """

    def __init__(self, prefix, dtype):
        self.prefix, self.dtype = os.fspath(prefix), np.dtype(dtype)
        if self.dtype not in CODES:
            raise ValueError(f"dtype={self.dtype} is none of {', '.join(map(str, CODES))}; use best_dtype(vocab_size)")
        self._bin, self._idx = f"{self.prefix}.bin.partial", f"{self.prefix}.idx.partial"
        self._file = _locked(self._bin)
        Path(self._idx).unlink(missing_ok=True)
        self._lengths, self._documents = _Spool(self.prefix, "i"), _Spool(self.prefix, "q")
        self._tokens, self._ended = 0, 0  # of all sequences; sequences of documents that are ended
        self._documents.append(0)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                self._finish()
        finally:
            Path(self._bin).unlink(missing_ok=True)
            Path(self._idx).unlink(missing_ok=True)
            self._lengths.close()
            self._documents.close()
            self._file.close()  # last: closing gives up the lock

    def add(self, sequence):
        """Append one sequence of ids to the open document: a list or array, [length]."""
        ids = np.asarray(sequence)
        if ids.ndim != 1:
            raise ValueError(f"a sequence of shape {ids.shape} is not one row of ids; add sequences one by one")
        if len(ids) >= 2**31:
            raise ValueError(f"a sequence of {len(ids)} tokens does not fit an int32 length; cut it")
        self._file.write(_cast(ids, self.dtype).tobytes())
        self._lengths.append(len(ids))
        self._tokens += len(ids)

    def end_document(self):
        """End the open document; one without sequences is allowed."""
        self._ended = self._lengths.count
        self._documents.append(self._ended)

    def add_document(self, sequences):
        """Append the sequences, then end the document."""
        for sequence in sequences:
            self.add(sequence)
        self.end_document()

    def _finish(self):
        if self._ended != self._lengths.count:
            raise ValueError(f"{self.prefix}: {self._lengths.count - self._ended} sequences of a document not ended; call end_document")
        self._file.flush()
        assert self._file.tell() == self._tokens * self.dtype.itemsize, "a write failed and its error was ignored"
        os.fsync(self._file.fileno())
        with open(self._idx, "wb") as file:
            self._write_index(file)
            file.flush()
            os.fsync(file.fileno())
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)  # an old index would seem to belong to the new .bin
        os.replace(self._bin, f"{self.prefix}.bin")
        os.replace(self._idx, f"{self.prefix}.idx")
        folder = os.open(os.path.dirname(self.prefix) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _write_index(self, file):
        file.write(HEADER.pack(MAGIC, 1, CODES[self.dtype], self._lengths.count, self._documents.count))
        for lengths in self._lengths.blocks():
            file.write(lengths.astype("<i4", copy=False))
        total = 0
        for lengths in self._lengths.blocks():
            ends = np.cumsum(lengths, dtype=np.int64) + total
            file.write(((ends - lengths) * self.dtype.itemsize).astype("<i8", copy=False))
            total = int(ends[-1])
        for documents in self._documents.blocks():
            file.write(documents.astype("<i8", copy=False))


class _Spool:
    """Integers, appended one by one, in an unnamed file beside a prefix. code: their type, as array.array has it."""

    def __init__(self, prefix, code):
        self._waiting, self.count = array(code), 0
        self._file = tempfile.TemporaryFile(dir=os.path.dirname(prefix) or ".")

    def append(self, value):
        self._waiting.append(value)
        self.count += 1
        if len(self._waiting) >= SPOOLED:
            self._flush()

    def blocks(self):
        """All of them, in arrays of at most BLOCK."""
        self._flush()
        self._file.seek(0)
        while data := self._file.read(BLOCK * self._waiting.itemsize):
            yield np.frombuffer(data, self._waiting.typecode)
        self._file.seek(0, os.SEEK_END)

    def close(self):
        self._file.close()

    def _flush(self):
        self._waiting.tofile(self._file)
        del self._waiting[:]


def _locked(path):
    """The file at path, new and empty, open for writing and held by this process alone."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=1 << 20)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one who held it may have renamed it since it was opened here: then this is no longer the file of that name.
            if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate(0)
                return file
        except BlockingIOError:
            file.close()
            raise ValueError(f"{path}: another process is writing it; wait for it, or give another output prefix") from None
        except BaseException:
            file.close()
            raise
        file.close()


def _cast(ids, dtype):
    """The ids in dtype, little-endian. ValueError if one does not fit."""
    if len(ids) and not np.can_cast(ids.dtype, dtype, "safe"):
        if dtype.kind in "iu":
            if ids.dtype.kind not in "iu":
                raise ValueError(f"ids of dtype {ids.dtype} do not fit dtype={dtype}; give integers")
            limits, low, high = np.iinfo(dtype), int(ids.min()), int(ids.max())
            if low < limits.min or high > limits.max:
                wrong = low if low < limits.min else high
                raise ValueError(f"id {wrong} does not fit dtype={dtype}; use best_dtype(vocab_size) of the tokenizer's vocabulary")
        elif ids.dtype.kind not in "iuf":
            raise ValueError(f"values of dtype {ids.dtype} do not fit dtype={dtype}; give numbers")
    return ids.astype(dtype.newbyteorder("<"), copy=False)
