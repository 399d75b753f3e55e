"""KV caches: rows for `generate`, pages for the engine.

A cache of rows is a pair (k_BTKH, v_BTKH) per layer, in which slot t of a row stores position t. A cache of pages is a pair of arrays
[P, C, K, H] per layer; which pages a row has is said by a table (ops/paged_attention.py), which the engine keeps on the host by Blocks.
"""

import hashlib
from collections import OrderedDict, deque
from dataclasses import dataclass

import mindspore as ms
import numpy as np

DIGEST_BYTES = 16


def init_cache(cfg, batch_size, length, kv_heads=None, layers=None):
    """Returns an empty cache for sequences of up to `length` tokens, prompt and continuation together, in the compute dtype.

    A cache of pages has `batch_size` pages of `length` tokens. No two arrays share memory, because the C++ kernel writes into them.
    kv_heads, layers: how many this rank has; default: all of the model.
    """
    shape = (batch_size, length, kv_heads or cfg.num_kv_heads, cfg.head_dim)

    def empty():
        return ms.Tensor(np.zeros(shape, np.float32), getattr(ms, cfg.compute_dtype))

    return tuple((empty(), empty()) for _ in range(cfg.num_layers if layers is None else layers))


def writes_in_place(kernels):
    """Returns whether the kernels change the pages that they are given, instead of returning new ones."""
    return kernels.paged_write != "reference"


def round_up(length, step=64):
    """Rounds a cache or prompt length up to a multiple of `step`, so that few different graphs are compiled."""
    return -(-length // step) * step


@dataclass(frozen=True)
class Known:
    """A block of a prompt whose keys and values are in a page. digest: of the prompt up to the end of this block. tokens: of the block.
    before: the digest of the block before it, or what the digests begin with."""

    digest: bytes
    tokens: bytes
    before: bytes = b""


def known_blocks(prompt, size, start=b""):
    """Returns [Known] of the full blocks of `size` tokens of a prompt, without the last token: its logits are wanted, so it is always
    read. start: what the digests begin with, so that prompts of different adapters share no block."""
    tokens, digest, found = np.asarray(prompt, np.int32), start, []
    for at in range(0, (len(tokens) - 1) // size * size, size):
        block = tokens[at : at + size].tobytes()
        before, digest = digest, hashlib.blake2b(digest + block, digest_size=DIGEST_BYTES).digest()
        found.append(Known(digest, block, before))
    return found


class Blocks:
    """Which pages of a cache are free, how many rows use each of the others, and which hold blocks of prompts that may come again.

    count: the number of pages. A page is free, or used by one row or more, or kept: no row uses it, and it holds a known block. take()
    takes free pages first, then the kept page that was used least lately. All of this depends on the calls alone, so ranks that make the
    same calls agree. evicted: how many kept pages were taken.
    """

    def __init__(self, count):
        self.count, self.evicted = count, 0
        self._free, self._users, self._kept = deque(range(count)), [0] * count, OrderedDict()
        self._page_of, self._known = {}, {}  # digest: page; page: Known
        self._after = {}  # digest, or b"": the page of the block that was known last of those after it

    def available(self):
        """Returns how many pages take() could give."""
        return len(self._free) + len(self._kept)

    def used(self):
        """Returns how many pages rows use."""
        return self.count - self.available()

    def find(self, known):
        """Returns the pages of the first blocks of [Known], as many as are there. They are not the caller's until share()."""
        pages = []
        for block in known:
            page = self._page_of.get(block.digest)
            if page is None or self._known[page] != block:
                break
            pages.append(page)
        return pages

    def find_part(self, before, tokens):
        """Returns (page, count) of a block that begins with the first `count` of these tokens and comes after the block with the digest
        `before`; (None, 0) if there is none. The page stays as it is until others write to it, so the caller may copy it at once."""
        page = self._after.get(before)
        if page is None:
            return None, 0
        other = np.frombuffer(self._known[page].tokens, np.int32)[: len(tokens)]
        same = np.append(other == np.asarray(tokens, np.int32)[: len(other)], False)
        return page, int(same.argmin())

    def share(self, pages):
        """Makes the caller one more user of each page that find() returned."""
        for page in pages:
            self._users[page] += 1
            self._kept.pop(page, None)

    def take(self, count):
        """Returns `count` pages with one user, the caller, or None if there are not so many."""
        if count > self.available():
            return None
        pages = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._users[page] = 1
        return pages

    def forget(self):
        """Forgets all known blocks, so that find() finds none. No page may be used."""
        assert not self.used()
        self._free.extend(self._kept)
        for known in (self._kept, self._page_of, self._known, self._after):
            known.clear()

    def _evict(self):
        page, _ = self._kept.popitem(last=False)
        known = self._known.pop(page)
        del self._page_of[known.digest]
        if self._after.get(known.before) == page:
            del self._after[known.before]
        self.evicted += 1
        return page

    def know(self, page, block):
        """Notes that a page which the caller uses holds a block of a prompt. Another page with this block stays the one that is found."""
        if block.digest not in self._page_of:
            self._page_of[block.digest], self._known[page], self._after[block.before] = page, block, page

    def release(self, pages):
        """Ends the caller's use of a row's pages. The last ones are taken first by others, as a block is found only after those before
        it."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._known:
                self._kept[page] = True
            else:
                self._free.append(page)


class PagedCache:
    """The arrays of a cache of pages, [pages, size, K, H] in pairs of keys and values per layer, and its Blocks.

    kv_heads, layers: how many this rank has.
    """

    def __init__(self, cfg, pages, size, kv_heads, layers):
        self.arrays, self.blocks, self.size = init_cache(cfg, pages, size, kv_heads, layers), Blocks(pages), size

    @property
    def nbytes(self):
        return sum(array.nbytes for pair in self.arrays for array in pair)
