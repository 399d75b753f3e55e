"""Drafts of the next tokens by a second, smaller model with the same tokenizer, for an engine that speculates.

    draft = Draft(small_params, small_cfg, slots=8, length=2048, most=4)
    Engine(params, cfg, slots=8, length=2048, speculate=4, draft=draft)

For each row that decodes, the small model reads the tokens that are new to it, and goes on greedily for a few more. The large model then
reads these guesses in one batch and decides (qwen3/engine.py), so the texts are those without a draft. As the draft is greedy, a guess is
fixed before it is judged, and a drawn token is compared with it as with one of prompt lookup. Source: Leviathan et al. 2023.

The small model has pages of its own, as many for each slot as a row can need. What it has read of guesses that came true is kept.
"""

import mindspore as ms
import numpy as np

from ops import sampling as sampling_op
from qwen3.cache import PagedCache, round_up, writes_in_place
from qwen3.generate import CHUNK, decode_loop, extended_pages
from qwen3.model import choose_kernels

NARROW = 16  # tokens of the narrowest batch that is read
PAGE = 64


class Draft:
    """A model that drafts for the slots of an engine.

    slots, length: those of the engine. most: the most tokens of a draft, up to CHUNK. kernels: see qwen3.model.build. After a draft of
    which some tokens were wrong, the row's next one is at most twice as long as what was right of it, plus one.
    """

    def __init__(self, params, cfg, *, slots, length, most, kernels=None, page=PAGE, prefill_chunk=256):
        if not 1 <= most <= CHUNK:
            raise ValueError(f"speculate={most} with a draft model must be from 1 to {CHUNK}")
        if length > cfg.max_position:
            raise ValueError(f"the draft model has {cfg.max_position} positions, and rows have up to {length} tokens; make them shorter")
        self.params, self.cfg, self.slots, self.most = params, cfg.replace(moe_capacity_factor=None), slots, most
        self.kernels = kernels or choose_kernels({}, cfg)
        self._pages = -(-(round_up(length) + most) // page)  # of a slot
        self.cache = PagedCache(cfg, slots * self._pages, page, cfg.num_kv_heads, cfg.num_layers)
        self._widths = sorted({min(NARROW, prefill_chunk), prefill_chunk})
        self._rows = [None] * slots  # of each slot: the row's id, its tokens in the cache, and how long its next draft may be

    def warm_up(self):
        """Compiles the graphs in advance."""
        for width in self._widths:
            self._read(width, [])
        self._go_on({}, 1)

    def guesses(self, texts):
        """Returns {slot: a list of guesses}. texts: {slot: (the row's id, all of its tokens, the most guesses)}."""
        wanted, unread = {}, {}
        for slot, (number, tokens, room) in texts.items():
            known = self._known(slot, number, tokens)
            wanted[slot], unread[slot] = min(room, self._rows[slot][2]), (known, tokens[known:])
            self._rows[slot][1] = list(tokens)
        found = self._read_all({slot: part for slot, part in unread.items() if wanted[slot] > 0})
        steps = max((wanted[slot] for slot in found), default=0) - 1
        rest = self._go_on({slot: (token, len(texts[slot][1])) for slot, token in found.items()}, steps) if steps > 0 else []
        out = {slot: [] for slot in texts}
        for slot, token in found.items():
            out[slot] = [token, *(int(ids[slot]) for ids in rest)][: wanted[slot]]
            self._rows[slot][1] += out[slot][:-1]  # the last one is not in the cache
        for slot in texts.keys() - found.keys():  # nothing was read of it
            self._rows[slot][1] = self._rows[slot][1][: unread[slot][0]]
        return out

    def learn(self, slot, drafted, right):
        """Notes how many tokens of a slot's draft were right."""
        if drafted:
            self._rows[slot][2] = self.most if right == drafted else min(self.most, 2 * right + 1)

    def _known(self, slot, number, tokens):
        """Returns how many tokens of a text are in the slot's pages; the last one is always read, as its logits are wanted."""
        if self._rows[slot] is None or self._rows[slot][0] != number:
            self._rows[slot] = [number, [], self.most]
        there = self._rows[slot][1]
        same = next((i for i, (a, b) in enumerate(zip(there, tokens)) if a != b), min(len(there), len(tokens)))
        return min(same, len(tokens) - 1)

    def _read_all(self, unread):
        """Reads tokens of some slots, {slot: (the position of the first, tokens)}, in batches. Returns {slot: the likeliest next token}."""
        left, out = {slot: (at, list(tokens)) for slot, (at, tokens) in unread.items()}, {}
        while left:
            count = sum(len(tokens) for _, tokens in left.values())
            width, parts = next((width for width in self._widths if count <= width), self._widths[-1]), []
            room = width
            for slot, (at, tokens) in list(left.items()):
                if not room:
                    break
                part, rest = tokens[:room], tokens[room:]
                parts.append((slot, at, part))
                room -= len(part)
                left[slot] = at + len(part), rest
            best = self._read(width, parts)
            for slot, _, _ in parts:
                if not left[slot][1]:
                    out[slot] = int(best[slot])
                    del left[slot]
        return out

    def _read(self, width, parts):
        """Reads parts [(slot, position, tokens)] in a batch of this width. Returns the likeliest token [slots] after each part."""
        tokens, positions, of_row = np.zeros(width, np.int32), np.full(width, -1, np.int32), np.zeros(width, np.int32)
        last, start = np.zeros(self.slots, np.int32), 0
        for slot, at, part in parts:
            end = start + len(part)
            tokens[start:end], positions[start:end], of_row[start:end], last[slot] = part, np.arange(at, at + len(part)), slot, end - 1
            start = end
        table = self._table(slot for slot, _, _ in parts)
        return self._extended(table, tokens, positions, of_row, last).asnumpy().argmax(-1)

    def _go_on(self, rows, steps):
        """Continues rows {slot: (token, position)} greedily. Returns the new tokens [steps, slots]."""
        token, at = np.zeros(self.slots, np.int32), np.zeros(self.slots, np.int32)
        for slot, (first, position) in rows.items():
            token[slot], at[slot] = first, position
        table = self._table(rows)
        if not (self.kernels.sampling == "cpu" and writes_in_place(self.kernels)):
            out = []
            for _ in range(steps):
                token = self._extended(table, token, at).asnumpy().argmax(-1).astype(np.int32)
                out.append(token)
                at = at + 1
            return out
        ids = ms.Tensor(np.zeros((1, CHUNK, 1, self.slots), np.int32))
        running, draws = np.ones(self.slots, np.int32), np.full((CHUNK, self.slots), 0.5, np.float32)
        given = [*map(ms.Tensor, (table, token, at, running)), ms.Tensor(0, ms.int32), ms.Tensor(draws)]
        given += [ms.Tensor(sampling_op.options(self.slots)), None, ids, ms.Tensor(steps, ms.int32)]
        taken = int(decode_loop(self.cfg, self.kernels)(self.params, self.cache.arrays, *given)[3])
        return ids.asnumpy()[0, :taken, 0]

    def _table(self, slots):
        """Returns the table [slots, pages of a slot] of some slots; the others have no page in it."""
        table = np.full((self.slots, self._pages), -1, np.int32)
        for slot in slots:
            table[slot] = np.arange(slot * self._pages, (slot + 1) * self._pages)
        return table

    def _extended(self, table, tokens, positions, of_row=None, last=None):
        given = table, tokens, positions, of_row, last, self.cfg, self.kernels
        logits, self.cache.arrays = extended_pages(self.params, self.cache.arrays, *given)
        return logits
