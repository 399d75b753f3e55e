"""Keeps the token ids of a text, so that the next run on the same text starts sooner.

A file of the cache (ops/cache.py) is named by a digest of all that its values depend on: the text, the tokenizer or the size of the one to
train, the code of qwen3/tokenizer.py and the version of its library. numpy's files hold a checksum of each array; a damaged file is made
again. Where there can be no cache, the text is tokenised without one.
"""

import contextlib
import hashlib
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import tokenizers

import qwen3.tokenizer
from ops import cache
from qwen3.tokenizer import Tokenizer, train_bpe

KEPT = 8  # files; the one that was not used for the longest time is removed first
LEAST, MOST = 1 << 20, 1 << 28  # characters of a text that is worth a file, and of one that is not too large for it
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


def tokenised(parts, tokenizer=None, vocab_size=0):
    """Returns (the tokenizer, [[ids int32 [n] of each text] of each part]).

    parts: lists of texts. tokenizer: default: one of at most vocab_size ids, trained on the texts of the first part.
    """
    path = _path(parts, tokenizer, vocab_size) if LEAST <= sum(map(len, sum(parts, []))) <= MOST else None
    if path and path.exists():
        with contextlib.suppress(*DAMAGED):
            found = _read(path, tokenizer)
            os.utime(path)
            return found
    tokenizer = tokenizer or train_bpe(parts[0], vocab_size)
    ids = [[np.array(each, np.int32) for each in tokenizer.encode_batch(texts)] for texts in parts]
    if path:
        with contextlib.suppress(OSError):  # such as a full disk
            _write(path, tokenizer, ids)
    return tokenizer, ids


def _path(parts, tokenizer, vocab_size):
    """Returns the path of the file for these arguments of `tokenised`, or None where there can be no cache."""
    how = tokenizer.to_json() if tokenizer else f"{vocab_size}"
    digest = hashlib.sha256(f"{tokenizers.__version__} {[len(texts) for texts in parts]} {how}".encode())
    digest.update(Path(qwen3.tokenizer.__file__).read_bytes())
    for text in sum(parts, []):
        data = text.encode("utf-8", "surrogatepass")
        digest.update(b"%d " % len(data))
        digest.update(data)
    try:
        return cache.folder("tokens") / f"{digest.hexdigest()}.npz"
    except (OSError, RuntimeError):  # it cannot be made, or is another user's
        return None


def _read(path, tokenizer):
    with np.load(path, allow_pickle=False) as file:
        parts = []
        while f"ids.{len(parts)}" in file:
            ids, lengths = file[f"ids.{len(parts)}"].astype(np.int32), file[f"lengths.{len(parts)}"]
            parts.append(np.split(ids, np.cumsum(lengths))[:-1])
        with tempfile.TemporaryDirectory() as folder:
            for name in TOKENIZER:
                Path(folder, name).write_bytes(file[name].tobytes())
            return tokenizer or Tokenizer.load(folder), parts


def _write(path, tokenizer, parts):
    arrays, dtype = {}, np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    for i, ids in enumerate(parts):
        arrays[f"ids.{i}"] = np.concatenate([np.zeros(0, np.int32), *ids]).astype(dtype)
        arrays[f"lengths.{i}"] = np.array([len(each) for each in ids], np.int64)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        tokenizer.save(folder)
        arrays |= {name: np.frombuffer(Path(folder, name).read_bytes(), np.uint8) for name in TOKENIZER}
        aside = Path(folder, path.name)
        np.savez(aside, **arrays)
        os.replace(aside, path)
    files = sorted(path.parent.glob("*.npz"), key=lambda file: file.stat().st_mtime)
    for old in files[:-KEPT]:
        old.unlink(missing_ok=True)
