"""What a loader reads rows from: packed rows in memory, a .bin/.idx pair, a blend of sources."""

import functools
import hashlib
import os

import numpy as np

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
    Megatron-LM's depends on how many epochs the whole run has. The last tokens of an epoch, too few for a row, are left out. reset: see
    GPTDataset.row. ValueError if the split holds no row, or, from sample(), for an id of vocab_size or more.
    """

    def __init__(self, indexed, span, seq_len, eod_id, *, vocab_size, reset=True, name="train", cache_dir=None):
        self.indexed, self.span, self.seq_len, self.eod_id = indexed, span, seq_len, eod_id
        self.vocab_size, self.reset, self.name, self.cache_dir = vocab_size, reset, name, cache_dir
        lengths = indexed.lengths[span[0] : span[1]]
        self.count = (int(lengths.sum(dtype=np.int64)) - 1) // seq_len
        if self.count < 1:
            GPTDataset(indexed, span, seq_len, name=name)  # raises, naming the split
        places = np.linspace(0, max(0, len(indexed.flat) - PROBE), PROBES).astype(np.int64)
        tokens = indexed.flat[np.minimum(places[:, None] + np.arange(PROBE), len(indexed.flat) - 1)]
        settings = (span, seq_len, eod_id, reset, indexed.dtype.str, len(indexed.flat))
        what = digest(np.frombuffer(repr(settings).encode(), np.uint8), indexed.lengths, tokens)
        self.fingerprint = f"{os.path.basename(indexed.prefix)}[{span[0]}:{span[1]}]x{seq_len} {what}"
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def __len__(self):
        return self.count

    def sample(self, number, seed):
        epoch, place = divmod(number, self.count)
        row = self._epoch(seed, epoch).row(place, self.eod_id, self.reset)
        ids = row["targets"]
        lowest, highest = int(min(ids.min(), row["tokens"][0])), int(max(ids.max(), row["tokens"][0]))
        if lowest < 0 or highest >= self.vocab_size:
            raise ValueError(
                f"{self.indexed.prefix}: ids from {lowest} to {highest} in sample {number}, but data.tokenizer has"
                f" {self.vocab_size} tokens; give the tokenizer that the pair was made with"
            )
        return row

    def _make_epoch(self, seed, epoch):
        drawn = seed % 2**32 if epoch == 0 else int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
        return GPTDataset(self.indexed, self.span, self.seq_len, None, drawn, name=self.name, cache_dir=self.cache_dir)


class Blend:
    """Several sources by weight: Megatron-LM's greedy rule says whose turn it is, and each goes through its own epochs in its own order.

    Weights need not sum to 1. len() is the sum of the sources'; by then, a source with more than its share of weight has begun to repeat.
    """

    def __init__(self, sources, weights):
        assert len(sources) == len(weights)
        self.sources, self.weights = list(sources), [float(w) for w in weights]
        self._turns = blend_indices(self.weights, 0)
        self.fingerprint = "blend of " + ", ".join(f"{w:g} {s.fingerprint}" for w, s in zip(self.weights, self.sources))

    def __len__(self):
        return sum(map(len, self.sources))

    def sample(self, number, seed):
        if number >= len(self._turns[0]):
            self._turns = blend_indices(self.weights, max(TURNS, 2 * (number + 1)))
        dataset, own = self._turns
        return take(self.sources[dataset[number]], int(own[number]), seed)


def digest(*arrays):
    """16 hexadecimal digits of the shapes and contents of arrays."""
    out = hashlib.blake2b(digest_size=8)
    for values in arrays:
        out.update(repr((values.dtype.str, values.shape)).encode())
        out.update(np.ascontiguousarray(values))
    return out.hexdigest()
