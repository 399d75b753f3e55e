"""Megatron-LM's order of training: which tokens make sample i of an indexed dataset, for a seed, and how a blend takes turns.

A stream is the sequences of a split, each epoch once, in shuffled order, joined; sample k starts at its token k * S. What Megatron-LM
calls a document here is a sequence of the indexed dataset. Source: megatron/core/datasets gpt_dataset.py, blended_dataset.py, helpers.cpp.
"""

import hashlib
import math
import os
import secrets
from array import array
from functools import partial
from operator import sub
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ops import cache

SPLITS = ("train", "valid", "test")
BLOCK = 1 << 20  # documents of a stream whose lengths are summed at a time
TURNS = 1 << 12  # steps of a blend whose products are made at a time
LANES_FROM = 1 << 15  # steps of a blend
WARM = 64  # of these, a quarter for each dataset and 4 more are the steps that bring a lane from its guess to what was really taken


def split_ranges(split, n):
    """{"train", "valid", "test": (start, stop) of n sequences, or None where the weight is 0} of "969,30,1", or of a list of weights.

    Weights are relative and not shuffled; ends round half to even. A range may be empty: see split_range.
    """
    try:
        weights = np.array([float(w) for w in (split.split(",") if isinstance(split, str) else split)], np.float64)
    except (TypeError, ValueError):
        weights = np.empty(0)
    if not 1 <= len(weights) <= len(SPLITS) or not np.isfinite(weights).all() or weights.min() < 0 or not weights.sum() > 0:
        raise ValueError(f"data.split={split!r} must be up to three weights of {', '.join(SPLITS)}, 0 or more; use '969,30,1'")
    shares = (weights / weights.sum()).tolist() + [0.0] * (len(SPLITS) - len(weights))
    ranges, start = {}, 0.0
    for name, share in zip(SPLITS, shares):
        stop = start + share
        ranges[name] = (round(start * n), round(stop * n)) if share else None
        start = stop
    return ranges


def split_range(split, n, name):
    """(start, stop) of the split called name. ValueError if it has no sequence: Megatron-LM hangs on one."""
    span = split_ranges(split, n)[name]
    if span is None or span[0] == span[1]:
        raise ValueError(f"data.split={split!r} leaves the {name} split without one of the {n} sequences; give {name} more weight")
    return span


class Indices(NamedTuple):
    """document_index int32 [E * n]: sequence ids in stream order. sample_index int32 [count + 1, 2]: where samples start in the stream,
    (position in document_index, token offset). shuffle_index uint32 [count]: item i is sample shuffle_index[i]."""

    document_index: np.ndarray
    sample_index: np.ndarray
    shuffle_index: np.ndarray


def gpt_indices(lengths_of_split, first_id, seq_len, num_samples, seed, add_extra_token=True, drop_last_partial=True):
    """Indices of the sequences first_id, first_id + 1, ... of the given lengths: equal to Megatron-LM's.

    num_samples only says how many epochs E there are, the fewest that hold them; None is one epoch. A sample is S tokens, and one
    more with add_extra_token, which the next sample has too. Without drop_last_partial a short last sample is kept (above 2^24 tokens
    Megatron-LM may miscount it, in float32). The final epoch is shuffled on its own if less than 80 % of it is asked for. Raises
    ValueError if there is no token.
    70 to 110 ns a document and epoch, most of it the shuffle, and little memory beside the result (measured at 1, 10 and 30 million
    documents of 500 tokens, S = 4096).
    """
    lengths, extra = np.asarray(lengths_of_split), int(add_extra_token)
    if not 0 <= seed < 2**32:
        raise ValueError(f"data.seed={seed} must be from 0 to 2^32 - 1, as NumPy's RandomState needs")
    if seq_len < 1 or (num_samples is not None and num_samples < 0):
        raise ValueError(f"train.seq_len={seq_len} must be 1 or more and num_samples={num_samples} 0 or more, or None for one epoch")
    if first_id + len(lengths) > 2**31:
        raise ValueError(f"{first_id + len(lengths)} sequences: ids are int32, as Megatron-LM's; split the data into several prefixes")
    tokens = int(lengths.sum(dtype=np.int64))
    if not tokens:
        raise ValueError(f"a split of {len(lengths)} sequences has no token; give it more weight or more text")
    epochs = 1 if num_samples is None else max(1, -(-(num_samples * seq_len + extra) // tokens))
    usable = epochs * tokens - extra
    count = usable // seq_len if drop_last_partial else -(-usable // seq_len)
    before, separate = count, False
    if epochs > 1:
        sooner = ((epochs - 1) * tokens - extra) // seq_len
        separate = num_samples - sooner < int(0.80 * ((tokens - extra) // seq_len))
        before = sooner if separate else count

    rng = np.random.RandomState(seed)  # its shuffle is the legacy one; NumPy keeps it for ever
    document_index = np.tile(np.arange(first_id, first_id + len(lengths), dtype=np.int32), epochs)
    _shuffle_parts(rng, document_index, len(lengths) * (epochs - 1) if separate else 0)
    sample_index = _sample_index(lengths, first_id, document_index, seq_len, count, extra)
    shuffle_index = np.arange(count, dtype=np.uint32 if count < 2**32 - 2 else np.int64)
    _shuffle_parts(rng, shuffle_index, before)
    return Indices(document_index, sample_index, shuffle_index)


def _shuffle_parts(rng, values, cut):
    """Shuffle values[:cut], then values[cut:], in place."""
    for part in (values[:cut], values[cut:]):
        if len(part):
            rng.shuffle(part)


def _sample_index(lengths, first_id, document_index, seq_len, count, extra):
    """Row k >= 1: one past the last token of sample k - 1, less the extra one, in the sequence that holds that last token."""
    out = np.zeros((count + 1, 2), np.int32 if len(document_index) < 2**31 else np.int64)
    k, base = 1, 0
    for at in range(0, len(document_index), BLOCK):
        sizes = lengths[document_index[at : at + BLOCK] - first_id]
        ends = np.cumsum(sizes, dtype=np.int64)
        stop = min(count, (base + int(ends[-1]) - extra) // seq_len) + 1
        if stop > k:
            last_token = np.arange(k, stop, dtype=np.int64) * seq_len + (extra - 1 - base)
            place = np.searchsorted(ends, last_token, side="right")
            out[k:stop, 0] = place + at
            out[k:stop, 1] = last_token + 1 - extra - ends[place] + sizes[place]
            k = stop
        base += int(ends[-1])
    if k == count:  # the short last sample
        out[k] = len(document_index) - 1, lengths[document_index[-1] - first_id] - extra
    return out


class Item(NamedTuple):
    """tokens int32 [up to S + 1]. starts: the places in tokens, after 0, at which a sequence of the indexed dataset starts."""

    tokens: np.ndarray
    starts: np.ndarray


class GPTDataset:
    """The samples of sequences span = (start, stop) of an IndexedDataset, in Megatron-LM's order; the same from any access order.

    len() is what the epochs hold, num_samples or more. The indices are kept in cache_dir, if given, and memory-mapped from there.
    ValueError, naming the split, if it has less than one sample.
    """

    def __init__(
        self,
        indexed,
        span,
        seq_len,
        num_samples=None,
        seed=1234,
        *,
        name="train",
        add_extra_token=True,
        drop_last_partial=True,
        cache_dir=None,
    ):
        start, stop = span
        lengths = indexed.lengths[start:stop]
        if indexed.dtype.kind not in "iu":
            raise ValueError(f"{indexed.prefix}: dtype={indexed.dtype} holds no token ids; write it with best_dtype(vocab_size)")
        if not 0 <= start < stop <= len(indexed) or not lengths.any():
            raise ValueError(
                f"{indexed.prefix}: the {name} split, sequences {start} to {stop} of {len(indexed)}, has no token;"
                f" give {name} more weight in data.split, or more text"
            )
        settings = (start, seq_len, num_samples, seed, add_extra_token, drop_last_partial)
        self.indices = Indices(*cached(cache_dir, "gpt", settings, [lengths], Indices._fields, lambda: gpt_indices(lengths, *settings)))
        if not len(self):
            raise ValueError(
                f"{indexed.prefix}: the {name} split has {lengths.sum(dtype=np.int64)} tokens, too few for one sample of"
                f" train.seq_len={seq_len}; give {name} more weight in data.split, or more text"
            )
        self.indexed, self.seq_len, self._extra = indexed, seq_len, int(add_extra_token)

    def __len__(self):
        return len(self.indices.shuffle_index)

    def item(self, i):
        """The tokens of item i, an Item: S + 1, one less without the extra token, fewer in a kept partial sample. Else IndexError."""
        if not 0 <= i < len(self):
            raise IndexError(f"item {i} of a dataset of {len(self)} items, numbered from 0")
        k = int(self.indices.shuffle_index[i])
        (first, skipped), (last, end) = self.indices.sample_index[k : k + 2].tolist()
        sequences = self.indices.document_index[first : last + 1]
        begins = self.indexed.offsets[sequences] // self.indexed.dtype.itemsize
        stops = begins + self.indexed.lengths[sequences]
        stops[-1] = begins[-1] + end + self._extra
        begins[0] += skipped
        ends = np.cumsum(stops - begins)
        tokens = self.indexed.flat[np.arange(ends[-1]) + np.repeat(stops - ends, stops - begins)]
        if tokens.dtype.itemsize == 8 and len(tokens) and not -(2**31) <= tokens.min() <= tokens.max() < 2**31:
            raise ValueError(f"{self.indexed.prefix}: item {i} has ids from {tokens.min()} to {tokens.max()}, which do not fit int32")
        return Item(tokens.astype(np.int32), ends[:-1])

    def row(self, i, eod_id, reset=True, eod_mask_loss=False):
        """Item i as a dict of arrays [S]: tokens, targets (the next tokens), loss_weights float32, segment_ids from 1, positions.

        reset=True starts a segment, and positions at 0, after each eod_id and where a sequence of the indexed dataset starts, and
        gives no weight to a target in the next segment. reset="eod" does so after eod_id alone, as Megatron-LM's reset flags do;
        reset=False is one segment and weight 1 everywhere. eod_mask_loss gives no weight where the token is eod_id. Padding, after
        a short sample, has zeros in all five; the last token of one has weight 0. Raises IndexError.
        """
        if reset not in (True, False, "eod") or (eod_id is None and (reset == "eod" or eod_mask_loss)):
            raise ValueError(f"reset={reset!r}, eod_mask_loss={eod_mask_loss} with eod_id={eod_id}; use True, or 'eod' with an eod_id")
        item, S = self.item(i), self.seq_len
        n = len(item.tokens)
        ids, cut, place = np.zeros(S + 1, np.int32), np.zeros(S + 1, bool), np.arange(S + 1, dtype=np.int32)
        ids[:n] = item.tokens
        is_eod = np.zeros(S + 1, bool) if eod_id is None else (ids == eod_id) & (place < n)
        if reset:
            cut[1:] = is_eod[:-1]
        if reset is True:
            cut[item.starts[(item.starts > 0) & (item.starts < n)]] = True
        weights = (place[1:] < n) & ~cut[1:]
        if eod_mask_loss:
            weights &= ~is_eod[:-1]
        real = place < n
        return {
            "tokens": ids[:-1],
            "targets": ids[1:].copy(),
            "loss_weights": weights.astype(np.float32),
            "segment_ids": ((np.cumsum(cut, dtype=np.int32) + 1) * real)[:-1],
            "positions": ((place - np.maximum.accumulate(np.where(cut, place, 0))) * real)[:-1],
        }


def cached(folder, kind, settings, arrays, names, build):
    """build(), a tuple of arrays called names, kept as `.npy` files in folder and memory-mapped; just build() if folder is None.

    The files are named by kind and a hash of the settings and the contents of arrays. Each is written aside and renamed, so any number
    of processes may ask at once. A last file has their digests; if one is missing or another than was written, all are built again.
    """
    if folder is None:
        return build()
    digest = hashlib.blake2b(repr((1, kind, settings, [(a.dtype.str, a.shape) for a in arrays])).encode(), digest_size=16)
    for values in arrays:
        digest.update(np.ascontiguousarray(values))
    paths = [Path(folder) / f"{kind}-{digest.hexdigest()}.{name}.npy" for name in names]
    sums = Path(folder) / f"{kind}-{digest.hexdigest()}.digests"
    try:
        if sums.read_text() == "\n".join(map(cache.digest, paths)):
            return tuple(np.load(path, mmap_mode="r") for path in paths)
    except (OSError, ValueError):
        pass
    os.makedirs(folder, exist_ok=True)
    for path, values in zip(paths, build()):
        _replace(path, partial(np.save, arr=values))
    found = "\n".join(map(cache.digest, paths)).encode()
    _replace(sums, lambda file: file.write(found))
    return tuple(np.load(path, mmap_mode="r") for path in paths)


def _replace(path, write):
    """Writes a file aside by write(file), and puts it in the place of `path` when it is on the disk."""
    aside = Path(f"{path}.{secrets.token_hex(8)}.partial")
    try:
        with open(aside, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def blend_indices(weights, size, cache_dir=None):
    """(dataset_index int16 [size], dataset_sample_index int64 [size]): step i takes sample dataset_sample_index[i] of its dataset.

    A step goes to the dataset with the largest w * max(i, 1) - taken in float64, weights summing to 1; the first wins ties. For
    datasets without weights Megatron-LM takes their lengths as weights and min(size, sum) as size, or blend_exhaustive.
    About 0.05 us a step with few datasets, 0.15 us with 50; below 32768 steps 0.5 and 4 us.
    """
    weights = _normalised(weights)
    if size < 0:
        raise ValueError(f"a blend of size={size} must be 0 or more samples")
    return cached(cache_dir, "blend", (weights.tolist(), size), [], ("dataset", "sample"), lambda: _greedy(weights, size))


def blend_exhaustive(counts, cache_dir=None):
    """blend_indices in which every dataset d gives exactly counts[d] samples; one that is used up leaves the choice."""
    counts = [int(c) for c in counts]
    weights = _normalised(counts)
    return cached(cache_dir, "blend", ("all", counts), [], ("dataset", "sample"), lambda: _greedy(weights, sum(counts), counts))


def _normalised(weights):
    values = np.asarray(weights, np.float64)
    if values.ndim != 1 or not 1 <= len(values) < 2**15 or not np.isfinite(values).all() or values.min() <= 0:
        raise ValueError(f"data.path has weights {list(weights)}; give each dataset one above 0, or leave it out")
    return values / values.sum()


def _greedy(weights, size, counts=None):
    """See blend_indices; with counts, blend_exhaustive."""
    left = np.full(len(weights), size, np.int64) if counts is None else np.array(counts, np.int64)
    taken = np.zeros(len(weights), np.int64)
    parts, i = [np.empty(0, np.int16)], 0
    while i < size:
        open_ = np.flatnonzero(left)
        picks = open_[_turns(weights[open_], taken[open_], i, size, left[open_])].astype(np.int16)
        number = np.bincount(picks, minlength=len(weights))
        taken, left, i = taken + number, left - number, i + len(picks)
        parts.append(picks)
    dataset_index = np.concatenate(parts)
    sample_index = np.empty(size, np.int64)
    for d in range(len(weights)):
        steps = np.flatnonzero(dataset_index == d)
        sample_index[steps] = np.arange(len(steps))
    return dataset_index, sample_index


def _turns(weights, taken, i, size, left):
    """Whose turn it is, int16, at steps i, i + 1, ... up to size, or up to the step that takes the last one left of a dataset."""
    if len(weights) == 1:
        return np.zeros(min(size - i, left[0]), np.int16)
    picks = _in_lanes(weights, size) if i == 0 and size >= LANES_FROM else _in_turn(weights, taken, i, size, left)
    ends = [np.flatnonzero(picks == d)[n - 1] + 1 for d, n in enumerate(left) if np.count_nonzero(picks == d) >= n]
    return picks[: min(ends, default=len(picks))]


def _in_turn(weights, taken, i, size, left):
    """_turns, one by one."""
    taken, left, picks = taken.astype(np.float64).tolist(), left.tolist(), array("h")
    for at in range(i, size, TURNS):
        steps = np.maximum(np.arange(at, min(at + TURNS, size), dtype=np.float64), 1)
        for due in np.multiply.outer(steps, weights).tolist():
            errors = list(map(sub, due, taken))
            d = errors.index(max(errors))
            picks.append(d)
            taken[d] += 1.0
            left[d] -= 1
            if not left[d]:
                return np.array(picks, np.int16)
    return np.array(picks, np.int16)


def _in_lanes(weights, size):
    """_turns from step 0 without limits, many stretches of the steps side by side.

    A turn depends on the step and what was taken, and what was taken soon forgets where it began. So each lane starts `warm` steps
    before its stretch from a guess. Where a lane then has taken what the lane before it ends with, all that follows in it is what one
    lane alone would do; where it has not, its stretch is done again, one by one.
    """
    D, lanes = len(weights), math.isqrt(size // 8)
    warm = min(size // 4, WARM * (4 + D // 4))
    length = -(-(size - warm) // lanes)
    start = np.arange(lanes)[:, None] * float(length)
    taken = np.floor(start * weights)
    short = start - taken.sum(axis=1, keepdims=True)
    taken += np.argsort(np.argsort(taken - start * weights, axis=1, kind="stable"), axis=1) < short  # largest remainders first
    picks, each = np.empty((warm + length, lanes), np.int16), np.arange(lanes)
    for t in range(warm + length):
        if t == warm:
            warmed = taken.copy()
        d = np.argmax(np.maximum(start + t, 1) * weights - taken, axis=1)
        picks[t] = d
        taken[each, d] += 1
    stretches, end = picks[warm:].T.copy(), taken[0]
    for lane in range(1, lanes):
        if (end == warmed[lane]).all():
            end = taken[lane]
            continue
        i = warm + lane * length
        stretches[lane] = _in_turn(weights, end, i, i + length, np.full(D, length + 1))
        end = end + np.bincount(stretches[lane], minlength=D)
    return np.concatenate([picks[:warm, 0], stretches.ravel()])[:size]
