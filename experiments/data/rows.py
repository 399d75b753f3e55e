"""What a loader reads rows from: packed rows in memory, a .bin/.idx pair, pairs of conversations, a blend of sources."""

import functools
import hashlib
import os

import numpy as np

from experiments.data import packing
from experiments.data.gpt_index import GPTDataset, blend_indices
from experiments.data.loader import take
from experiments.data.packing import DTYPES

PROBES, PROBE = 256, 64  # places of a .bin, and tokens at each, that go into its fingerprint
TURNS = 1 << 16  # steps of a blend that are worked out at first


class PackedRows:
    """The rows of packing.pack or pack_examples, a dict of arrays [R, S]."""

    def __init__(self, rows, name="packed"):
        self.arrays = rows
        count, seq_len = rows["tokens"].shape
        self.fingerprint = f"{name} {count}x{seq_len} {digest(*(rows[key] for key in DTYPES))}"

    def __len__(self):
        return len(self.arrays["tokens"])

    def row(self, i):
        return {key: self.arrays[key][i] for key in DTYPES}


class PairRows:
    """Rows of sequences span = (start, stop) of an IndexedDataset, in Megatron-LM's order for the loader's seed.

    That is its order for one epoch; each further epoch cuts and orders the sequences anew, for a seed drawn from (seed, epoch), where
    Megatron-LM's depends on how many epochs the whole run has. The last tokens of an epoch, too few for a row, are left out. An epoch's
    indices are made when its first row is asked for, 0.1 s a million sequences; in another thread that would hold up Python as long, for
    NumPy's legacy shuffle keeps its lock. reset: see GPTDataset.row. ValueError if the split holds no row, or, from sample(), for an id
    of vocab_size or more.
    """

    def __init__(self, indexed, span, seq_len, eod_id, *, vocab_size, reset=True, name="train", cache_dir=None):
        self.indexed, self.span, self.seq_len, self.eod_id = indexed, span, seq_len, eod_id
        self.vocab_size, self.reset, self.name, self.cache_dir = vocab_size, reset, name, cache_dir
        lengths = indexed.lengths[span[0] : span[1]]
        self.count = (int(lengths.sum(dtype=np.int64)) - 1) // seq_len
        if self.count < 1:
            GPTDataset(indexed, span, seq_len, name=name)  # raises, naming the split
        self.fingerprint = _fingerprint([indexed], span, seq_len, (eod_id, reset))
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def __len__(self):
        return self.count

    def sample(self, number, seed):
        epoch, place = divmod(number, self.count)
        return _checked(self._epoch(seed, epoch).row(place, self.eod_id, self.reset), self.indexed, self.vocab_size, f"sample {number}")

    def _make_epoch(self, seed, epoch):
        drawn = seed % 2**32 if epoch == 0 else int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
        return GPTDataset(self.indexed, self.span, self.seq_len, None, drawn, name=self.name, cache_dir=self.cache_dir)


class ExampleRows:
    """Rows of conversations, packed whole by best fit: sequences span = (start, stop) of an IndexedDataset of ids and of one of masks.

    report: see packing.plan_examples, whose too_long this is. Only where they go is held, about 30 bytes a conversation; finding it
    takes 8 us each. ValueError if the two do not match or the split has nothing to learn from, or, from row(), for an id of vocab_size
    or more.
    """

    def __init__(self, indexed, loss, span, seq_len, pad_id, *, vocab_size, too_long="truncate", name="train"):
        if loss.dtype != np.uint8 or not np.can_cast(indexed.dtype, np.int32) or not np.array_equal(indexed.lengths, loss.lengths):
            raise ValueError(f"{loss.prefix} is not of the run that made {indexed.prefix}; make both again with experiments.preprocess")
        self.indexed, self.loss, self.span, self.seq_len = indexed, loss, span, seq_len
        self.pad_id, self.vocab_size = pad_id, vocab_size
        self.plan, self.report = packing.plan_examples(self, seq_len, too_long)
        if not self.report["rows"]:
            raise ValueError(
                f"{indexed.prefix}: the {name} split has no conversation with a target in train.seq_len={seq_len} tokens:"
                f" {packing.describe(self.report)}; raise train.seq_len, or give {name} more weight in data.split"
            )
        self.fingerprint = _fingerprint([indexed, loss], span, seq_len, (pad_id, too_long))

    def __len__(self):
        return self.report["rows"]

    def __getitem__(self, i):
        """(ids, mask) of a conversation."""
        at = self.span[0] + i
        if at >= self.span[1]:
            raise IndexError(i)
        return self.indexed.tokens(at), self.loss.tokens(at)

    def row(self, i):
        out = packing.empty_rows(1, self.seq_len, self.pad_id)
        packing.fill_row({key: value[0] for key, value in out.items()}, self.plan, i, self)
        return _checked({key: value[0] for key, value in out.items()}, self.indexed, self.vocab_size, f"row {i}")


class Blend:
    """Several sources by weight: Megatron-LM's greedy rule says whose turn it is, and each goes through its own epochs in its own order.

    Weights need not sum to 1. len() is the sum of the sources'; by then, a source with more than its share of weight has begun to repeat.
    names: of the sources, for metrics; those that come again get a number.
    """

    def __init__(self, sources, weights, names=()):
        assert len(sources) == len(weights)
        self.names = _told_apart(names or [f"source-{i}" for i in range(len(sources))])
        self.sources, self.weights = list(sources), [float(w) for w in weights]
        self._turns = blend_indices(self.weights, 0)
        self.fingerprint = "blend of " + ", ".join(f"{w:g} {s.fingerprint}" for w, s in zip(self.weights, self.sources))

    def __len__(self):
        return sum(map(len, self.sources))

    def sample(self, number, seed):
        dataset, own = self._upto(number)
        return take(self.sources[dataset[number]], int(own[number]), seed)

    def source_of(self, number):
        """The place among the sources of that of sample `number`."""
        return int(self._upto(number)[0][number])

    def _upto(self, number):
        turns = self._turns  # another thread may be making it longer
        if number >= len(turns[0]):
            turns = self._turns = blend_indices(self.weights, max(TURNS, 2 * (number + 1)))
        return turns


def _told_apart(names):
    """["wiki", "code", "wiki"] -> ["wiki", "code", "wiki-2"]"""
    out = []
    for name in names:
        number = 1
        while (told := name if number == 1 else f"{name}-{number}") in out:
            number += 1
        out.append(told)
    return out


def _checked(row, indexed, vocab_size, where):
    """The row, if the vocabulary has its ids."""
    lowest, highest = (int(f((f(row["tokens"]), f(row["targets"])))) for f in (np.min, np.max))
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"{indexed.prefix}: ids from {lowest} to {highest} in {where}, but data.tokenizer has {vocab_size} tokens;"
            " give the tokenizer that the pair was made with"
        )
    return row


def _fingerprint(pairs, span, seq_len, settings):
    """Of IndexedDatasets: of all lengths, and of tokens here and there."""
    probes = []
    for pair in pairs:
        places = np.linspace(0, max(0, len(pair.flat) - PROBE), PROBES).astype(np.int64)
        probes.append(pair.flat[np.minimum(places[:, None] + np.arange(PROBE), len(pair.flat) - 1)])
    settings = (span, seq_len, *settings, [(pair.dtype.str, len(pair.flat)) for pair in pairs])
    what = digest(np.frombuffer(repr(settings).encode(), np.uint8), pairs[0].lengths, *probes)
    return f"{os.path.basename(pairs[0].prefix)}[{span[0]}:{span[1]}]x{seq_len} {what}"


def digest(*arrays):
    """16 hexadecimal digits of the shapes and contents of arrays."""
    out = hashlib.blake2b(digest_size=8)
    for values in arrays:
        out.update(repr((values.dtype.str, values.shape)).encode())
        out.update(np.ascontiguousarray(values))
    return out.hexdigest()
