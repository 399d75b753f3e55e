"""Continuous batching: requests of any number and length share a cache of fixed size, row by row. No I/O.

    engine = Engine(params, cfg, slots=16, length=2048)
    number = engine.submit(Request(prompt=[1, 2, 3], max_new_tokens=100, temperature=0.8, seed=7))
    while engine.busy():
        for event in engine.step():
            ...  # event.id, event.token, event.finish_reason

A request waits until one of the `slots` rows is free. Its prompt is then read into that row in chunks of fixed width, and the row is
decoded together with the others, all in one step, until it stops; the next request takes its place. So there are few compiled graphs, one
for each width of chunk and one for decoding, whatever comes, and no memory but the cache's and that of the requests at work.

Where a row is, and which others run, does not enter its tokens: a draw depends on the request's seed, the number of its token and that of
the sample alone, and a prompt is read in a graph of its own.
"""

import time
from collections import deque
from dataclasses import dataclass

import mindspore as ms
import numpy as np

from ops import sampling as sampling_op
from parallel import collectives
from parallel.random import hash_uniform
from parallel.sharding import DATA, Sharding
from qwen3.cache import RowsCache, round_up
from qwen3.generate import CHUNK, decode_loop, extended
from qwen3.model import choose_kernels
from qwen3.stages import build_extend, own_layers

READS = 4  # chunks of prompts that are read between two looks at the rows that decode
SHORT = 4  # decode steps at a time while prompts are to be read
NARROW = 32  # width of the chunks of short prompts and of ends of prompts
STOPS = 8  # stop ids a row for which the graph has room; more in multiples of it
NEVER = -1  # no token


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on from it. prompt: token ids, at least one. stop_ids: the first of them ends the text, with reason "stop".

    temperature 0 is greedy; top_k, top_p, min_p as in ops/sampling.py; repetition_penalty divides the logits above 0 of the tokens that are
    in the prompt or were chosen, and multiplies those below, as Hugging Face's does. seed, sample: of the draws; samples of one prompt have
    different numbers. logprobs: how many of the likeliest tokens are told of with each, 0 for its own logarithm alone, None for none.
    """

    prompt: object
    max_new_tokens: int = 128
    stop_ids: tuple = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    sample: int = 0
    logprobs: int | None = None


@dataclass(frozen=True)
class Event:
    """A new token of the request `id`. finish_reason: None, or why it is the last: "stop" (it is a stop id, and not of the text) or
    "length" (max_new_tokens, or the row of the cache is full).

    logprob: the natural logarithm of the token's probability by the model, before temperature, cuts and penalty; top_logprobs: that of
    the likeliest tokens, [(token, logprob)] from the likeliest on. Both None where Request.logprobs is.
    """

    id: int
    token: int
    logprob: float | None = None
    top_logprobs: list | None = None
    finish_reason: str | None = None


@dataclass
class _Row:
    """A request in a slot. read: tokens of the prompt in the cache. count: new tokens; token: the last. seen: with a penalty, [V] bool."""

    id: int
    request: Request
    options: np.ndarray
    limit: int
    read: int = 0
    count: int = 0
    token: int = 0
    seen: np.ndarray | None = None

    @property
    def at(self):
        """The position of the last token, which is not in the cache yet."""
        return len(self.request.prompt) + self.count - 1

    @property
    def needs_logits(self):
        """Whether its tokens are chosen on the host."""
        return self.request.logprobs is not None or self.request.repetition_penalty != 1


@dataclass
class Totals:
    """Of all steps: tokens of prompts read and seconds for it; tokens decoded, without the first of each request, and seconds for it."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0


class Engine:
    """params, cfg: a model; in a layout, this rank's parts of the parameters. slots: rows that decode together. length: tokens that each
    has room for, prompt and new ones, rounded up to a multiple of 64. prefill_chunk: tokens of a prompt that are read at a time.
    sharding: the layout, without sequence parallel and ZeRO. kernels: as of qwen3.model.build. totals: see Totals.

    Ranks of one tensor parallel group, and of one pipeline, are given the same calls, and find the same tokens: each stage has the cache of
    its layers, and the last one's logits go to all, which choose on the host. Data ranks have requests of their own; where
    experts are spread over them, they must call step() equally often, busy or not, as each then does what any of them needs.
    """

    def __init__(self, params, cfg, *, slots, length, prefill_chunk=256, sharding=None, kernels=None):
        for key, value in (("slots", slots), ("length", length), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise ValueError(f"engine: {key}={value} must be 1 or more")
        self.sharding, self.slots, self.length, self.totals = sharding, slots, round_up(length), Totals()
        sharding = sharding or Sharding()
        # with a bound, a token without a place at its expert would be lost without a word
        self.params, self.cfg = params, cfg.replace(moe_capacity_factor=None)
        self.kernels = kernels or choose_kernels({}, cfg, sharding)
        in_place = self.kernels.cache_write == "cpu"
        layers, staged = len(own_layers(cfg, sharding.mesh)), sharding.mesh.pp > 1
        self.cache = RowsCache(cfg, slots, self.length, cfg.num_kv_heads // sharding.shards("kv"), in_place, layers)
        self._staged = build_extend(self.cfg, sharding, self.kernels) if staged else None
        self._sample = sampling_op.cpu() if self.kernels.sampling == "cpu" else sampling_op.reference()
        self._on_device = self.kernels.sampling == "cpu" and in_place and not staged
        spread = sharding.shards("experts") > 1
        self._largest = collectives.pmax(sharding.mesh, DATA) if spread else None
        self._widths = sorted({min(NARROW, prefill_chunk), prefill_chunk})
        self._rows, self._waiting, self._next = [None] * slots, deque(), 0

    def warm_up(self, sizes=None, by_host=False):
        """Compiles what prompts of these sizes need, by default of any, so that no step has to. by_host: also for tokens that are chosen on
        the host. Ranks of one job call it together: one that compiles alone keeps the others waiting for longer than they do."""
        chunk = self._widths[-1]
        left = {n for size in sizes for n in (min(size, chunk), (size - 1) % chunk + 1)} if sizes else self._widths
        for width in {self._fitting(n) for n in left}:
            self._read(width, [])
        if self._on_device:
            self._decode_on_device(1, [])
        if by_host or not self._on_device:
            token, at = self._inputs()
            self._extended(self.cache.arrays, token[:, None], at[:, None], np.zeros_like(at))

    def submit(self, request):
        """Queues a Request. Returns its id, which no other request of this engine ever has. Raises ValueError for a prompt that is empty,
        has ids that are none, or does not fit the cache, and for options out of range."""
        options = self._checked(request)
        limit = min(request.max_new_tokens, self.length - len(request.prompt) + 1)  # the last token needs no place
        self._waiting.append(_Row(self._next, request, options, limit))
        self._next += 1
        return self._next - 1

    def cancel(self, number):
        """Drops a request: it has no further events. Nothing happens to one that has ended, or never was."""
        self._waiting = deque(row for row in self._waiting if row.id != number)
        self._rows = [None if row and row.id == number else row for row in self._rows]

    def busy(self):
        """Whether a request of this engine is waiting or running."""
        return bool(self._waiting) or any(self._rows)

    def step(self, most=CHUNK):
        """Reads some chunks of prompts, and decodes up to `most` tokens of each row that runs. Returns a list of Events, in order for each
        request. Few `most` show tokens soon; many cost fewer looks at them."""
        events = []
        for _ in range(READS):
            (width,) = self._agreed(self._width())
            if not width:
                break
            self._timed("prefill", self._read, width, events)
        reading, steps, by_host = self._agreed(self._width() > 0, self._steps(most), self._by_host())
        if steps:
            decode = self._decode_by_host if by_host else self._decode_on_device
            self._timed("decode", decode, min(steps, SHORT) if reading else steps, events)
        return events

    def _checked(self, request):
        """The sampling options [1, 4] of a request that can be served."""
        options, size, V = check(request), len(request.prompt), self.cfg.vocab_size
        if size > self.length:
            raise ValueError(f"prompt of {size} tokens is longer than the cache of {self.length}; shorten it, or make the cache longer")
        if min(request.prompt) < 0 or max(request.prompt) >= V:
            raise ValueError(f"prompt has ids outside the vocabulary of {V}; was it made by another tokenizer?")
        if (request.logprobs or 0) > V:
            raise ValueError(f"logprobs={request.logprobs} is more than the {V} tokens of the vocabulary")
        return options

    def _agreed(self, *numbers):
        """The largest of each number over ranks that must do the same; what it is here where there are none."""
        if self._largest is None:
            return numbers
        return self._largest(ms.Tensor(numbers, ms.float32)).asnumpy().astype(int).tolist()

    def _timed(self, what, call, count, events):
        began = time.perf_counter()
        tokens = call(count, events)
        took = time.perf_counter() - began
        setattr(self.totals, f"{what}_tokens", getattr(self.totals, f"{what}_tokens") + tokens)
        setattr(self.totals, f"{what}_s", getattr(self.totals, f"{what}_s") + took)

    def _reading(self):
        """(slot, row) of the prompt that is being read, or of the next one, if there is a free slot for it; else None."""
        for b, row in enumerate(self._rows):
            if row and not row.count:
                return b, row
        if self._waiting and None in self._rows:
            b, row = self._rows.index(None), self._waiting.popleft()
            self._rows[b] = row
            if row.request.repetition_penalty != 1:
                row.seen = np.zeros(self.cfg.vocab_size, bool)
                row.seen[np.asarray(row.request.prompt)] = True
            return b, row
        return None

    def _decoding(self):
        """[(slot, row)] of those that have a token."""
        return [(b, row) for b, row in enumerate(self._rows) if row and row.count]

    def _width(self):
        """Of the chunk to read next; 0 for none."""
        found = self._reading()
        left = len(found[1].request.prompt) - found[1].read if found else 0
        return left and self._fitting(left)

    def _fitting(self, left):
        """The narrowest width for so many tokens; the widest where none holds them."""
        return next((width for width in self._widths if width >= left), self._widths[-1])

    def _steps(self, most):
        """How many decode steps to take: while others wait, until the first row is done, else until the last is."""
        left = [row.limit - row.count for _, row in self._decoding()]
        return min(most, CHUNK, (min if self._waiting else max)(left)) if left else 0

    def _least(self):
        """How many rows must run for decoding to go on."""
        if self._largest is not None:
            return 0  # all ranks take the steps that they have agreed on
        return len(self._decoding()) if self._waiting else 1

    def _by_host(self):
        return not self._on_device or any(row.needs_logits for _, row in self._decoding())

    def _read(self, width, events):
        """Reads a chunk of this width, or nothing in a chunk of it, where other ranks read. Returns the number of its tokens."""
        b, row = self._reading() or (0, None)
        part = row.request.prompt[row.read : row.read + width] if row else ()
        tokens, positions = np.zeros((1, width), np.int32), np.full((1, width), self.length, np.int32)  # beyond the cache: dropped
        tokens[0, : len(part)] = part
        if row:
            positions[0, : len(part)] = np.arange(row.read, row.read + len(part))
        last = np.array([max(len(part) - 1, 0)], np.int32)
        logits, cache = self._extended(self.cache.row(b), tokens, positions, last)
        if row:
            self.cache.put(b, cache)
            row.read += len(part)
            if row.read == len(row.request.prompt):
                self._choose([(b, row)], logits.asnumpy(), events)
        return len(part)

    def _extended(self, cache, tokens, positions, last):
        if self._staged:
            return self._staged(self.params, cache, tokens, positions, last)
        return extended(self.params, cache, tokens, positions, last, self.cfg, self.kernels, self.sharding)

    def _inputs(self):
        """token_B and at_B of the next step; rows that do not decode write beyond the cache, so nowhere."""
        token, at = np.zeros(self.slots, np.int32), np.full(self.slots, self.length, np.int32)
        for b, row in self._decoding():
            token[b], at[b] = row.token, row.at
        return token, at

    def _decode_on_device(self, steps, events):
        """Up to `steps` tokens of each row, chosen in one graph. Returns how many there are in all."""
        rows, B, before = self._decoding(), self.slots, len(events)
        running, draws = np.zeros(B, np.int32), np.full((CHUNK, B), 0.5, np.float32)
        options = sampling_op.options(B)
        width = round_up(max([1, *(len(row.request.stop_ids) for _, row in rows)]), STOPS)
        stop = np.full((B, width), NEVER, np.int32)
        for b, row in rows:
            running[b], options[b] = 1, row.options[0]
            draws[:, b] = _draws(row, CHUNK)
            stop[b, : len(row.request.stop_ids)] = row.request.stop_ids
        ids, numbers = ms.Tensor(np.zeros((1, CHUNK, 1, B), np.int32)), (self._least(), steps)
        least, steps = (ms.Tensor(n, ms.int32) for n in numbers)
        given = [*map(ms.Tensor, (*self._inputs(), running)), least, *map(ms.Tensor, (draws, options, stop)), ids, steps]
        decode = decode_loop(self.cfg, self.kernels, self.sharding)
        taken = int(decode(self.params, self.cache.arrays, *given)[3])
        for found in ids.asnumpy()[0, :taken, 0]:
            for b, row in rows:
                if self._rows[b] is row:
                    self._take(b, row, int(found[b]), events)
        return len(events) - before

    def _decode_by_host(self, steps, events):
        """The same, chosen on the host after each step."""
        least, before = self._least(), len(events)
        for _ in range(steps):
            rows = self._decoding()
            if len(rows) < least:
                break
            token, at = self._inputs()
            logits, self.cache.arrays = self._extended(self.cache.arrays, token[:, None], at[:, None], np.zeros_like(at))
            if rows:
                self._choose(rows, logits.asnumpy()[[b for b, _ in rows]], events)
        return len(events) - before

    def _choose(self, rows, logits, events):
        """The next token of each row, from logits [rows, V] (numpy)."""
        adjusted = np.stack([_penalised(row, x) for (_, row), x in zip(rows, logits)])
        u, options = np.concatenate([_draws(row, 1) for _, row in rows]), np.concatenate([row.options for _, row in rows])
        given = (adjusted, u, options)
        ids = self._sample(*map(ms.Tensor, given)).asnumpy() if self.kernels.sampling == "cpu" else self._sample(*given)
        for (b, row), x, token in zip(rows, logits, ids.tolist()):
            self._take(b, row, token, events, *_logprobs(row, x, token))

    def _take(self, b, row, token, events, logprob=None, top=None):
        """Notes the new token of a row, which leaves its slot if that was the last one."""
        row.token, row.count = token, row.count + 1
        if row.seen is not None:
            row.seen[token] = True
        reason = "stop" if token in row.request.stop_ids else "length" if row.count >= row.limit else None
        if reason:
            self._rows[b] = None
        events.append(Event(row.id, token, logprob, top, reason))


def check(request):
    """The sampling options [1, 4] of a Request. Raises ValueError for what no engine could serve."""
    r = request
    if not len(r.prompt):
        raise ValueError("prompt is empty; give at least one token")
    if r.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={r.max_new_tokens} must be 1 or more")
    if not 0 < r.repetition_penalty < float("inf"):
        raise ValueError(f"repetition_penalty={r.repetition_penalty} must be above 0; 1 is none")
    if r.logprobs is not None and r.logprobs < 0:
        raise ValueError(f"logprobs={r.logprobs} must be 0 or more")
    return sampling_op.options(1, r.temperature, r.top_k, r.top_p, r.min_p)


def _draws(row, count):
    """[count] float32 in (0, 1), for the tokens of a request from its next one on."""
    places = np.arange(row.count, row.count + count, dtype=np.uint32)
    return hash_uniform(row.request.seed, places, row.request.sample)


def _penalised(row, logits):
    """The logits_V of a row after the repetition penalty. Source: Keskar et al. 2019; HF's RepetitionPenaltyLogitsProcessor."""
    if row.seen is None:
        return logits
    penalty = np.float32(row.request.repetition_penalty)
    return np.where(row.seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)


def _logprobs(row, logits, token):
    """(the log-probability of the token, [(token, log-probability)] of the likeliest) by logits_V, in float64."""
    count = row.request.logprobs
    if count is None:
        return None, None
    x = logits.astype(np.float64) - logits.max()
    x -= np.log(np.exp(x).sum())
    top = np.flatnonzero(x >= np.partition(x, -count)[-count]) if count else np.zeros(0, int)
    top = top[np.argsort(-x[top], kind="stable")][:count]
    return float(x[token]), [(int(i), float(x[i])) for i in top]
