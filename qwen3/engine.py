"""Continuous batching: any number of requests, of any lengths, share the rows of one KV cache of fixed size. No I/O.

    engine = Engine(params, cfg, slots=16, length=2048)
    number = engine.submit(Request(prompt=[1, 2, 3], max_new_tokens=100, temperature=0.8, seed=7))
    while engine.busy():
        for event in engine.step():
            ...  # event.id, event.token, event.finish_reason

A request waits until one of the `slots` rows of the cache is free. Then its prompt is read into that row in chunks of fixed width, and one
step decodes a token of every row, until the request stops and the next one takes its row. So few graphs are compiled, one for each chunk
width and one for decoding, and memory is needed only for the cache and the running requests.

The tokens of a request do not depend on its row nor on the other requests: a random draw depends only on the request's seed, the number of
the token and the number of the sample, and a prompt is read alone, in a graph with one row.
"""

import time
from collections import deque
from dataclasses import dataclass

import mindspore as ms
import numpy as np

from ops import sampling as sampling_op
from parallel import collectives, host_memory
from parallel.random import hash_uniform
from parallel.sharding import DATA, Sharding
from qwen3.cache import RowsCache, round_up
from qwen3.generate import CHUNK, decode_loop, extended
from qwen3.model import choose_kernels
from qwen3.stages import build_extend, own_layers
from qwen3.steering import GuideError, Steering, steered

READS = 4  # the most prompt chunks that one step reads before it decodes
SHORT = 4  # the most decode steps at a time while prompts wait to be read
NARROW = 32  # tokens of the narrow chunk, for short prompts and for the last tokens of long ones
STOPS = 8  # the number of stop ids per row in the compiled graph is rounded up to a multiple of this
NEVER = -1  # no token has this id; it fills up the stop ids, and stands for the token that a failed row does not have


@dataclass(frozen=True)
class Request:
    """A prompt and the options for its continuation.

    prompt: token ids, at least one. stop_ids: generation ends, with the reason "stop", when it produces one of them. temperature: 0 is
    greedy. top_k, top_p, min_p: see ops/sampling.py. repetition_penalty: for tokens that are in the prompt or were generated, positive
    logits are divided by it and negative logits multiplied by it, as in Hugging Face. presence_penalty, frequency_penalty: subtracted from
    the logits of tokens that were generated, once, and as often as they were, as in OpenAI's API. logit_bias: ((id, number), ...), added to
    logits. min_tokens: before so many tokens no stop id is chosen. guide: what decides which tokens may come, see qwen3/guide.py. seed,
    sample: the random draws depend on them; give several samples of one prompt different numbers `sample`. logprobs: None: report no
    log-probabilities; 0: that of the new token; n: also those of the n most likely tokens.
    """

    prompt: object
    max_new_tokens: int = 128
    stop_ids: tuple = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple = ()
    min_tokens: int = 0
    guide: object = None
    seed: int = 0
    sample: int = 0
    logprobs: int | None = None

    @property
    def needs_logits(self):
        """Whether the tokens of this request are chosen on the host, which needs their logits."""
        return self.logprobs is not None or steered(self)


@dataclass(frozen=True)
class Event:
    """A new token of the request `id`.

    finish_reason: None, or why this token is the last: "stop" (it is a stop id, which does not belong to the text), "length"
    (max_new_tokens is reached, or the row of the cache is full), "error" (the logits of this row are not finite, so no token can be chosen;
    token is NEVER, and the other rows go on) or "guide" (the request's guide has no next token; token is NEVER). logprob: the natural
    logarithm of the token's probability under the model, before temperature, top-k, top-p, min-p and all that steers. top_logprobs:
    [(token, logprob)] of the most likely tokens, the most likely first. Both are None if Request.logprobs is None.
    """

    id: int
    token: int
    logprob: float | None = None
    top_logprobs: list | None = None
    finish_reason: str | None = None


@dataclass
class _Row:
    """A request and its state. options: [1, 4], for sampling. limit: the most new tokens. read: how many prompt tokens are in the cache.
    count: how many new tokens there are; token: the last of them. steering: see qwen3/steering.py; None where nothing steers."""

    id: int
    request: Request
    options: np.ndarray
    limit: int
    read: int = 0
    count: int = 0
    token: int = 0
    steering: Steering | None = None

    @property
    def at(self):
        """The position of the last token, which is not in the cache yet."""
        return len(self.request.prompt) + self.count - 1

    @property
    def needs_logits(self):
        return self.request.needs_logits


@dataclass
class Totals:
    """Sums over all steps: prompt tokens read, and the seconds for them; decoded tokens, without the first of each request, and the seconds
    for them."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0


class Engine:
    """Runs requests in the rows of one cache.

    params, cfg: the model; in a layout, params are this rank's shards. slots: rows that decode together. length: the most tokens of a row,
    prompt and new tokens together, rounded up to a multiple of 64. prefill_chunk: prompt tokens that are read at a time. sharding: the
    layout, without sequence parallel and ZeRO. kernels: see qwen3.model.build. totals: see Totals.

    The ranks of one tensor parallel group, and of one pipeline, must make the same calls; they compute the same tokens. Under a pipeline,
    each stage has the cache of its own layers, and the last stage broadcasts its logits, from which every rank chooses on the host. Data
    ranks may have different requests. But if experts are sharded over data ranks, all of them must call step() equally often, even a rank
    that is not busy, because the ranks agree on each step and run it together.
    """

    def __init__(self, params, cfg, *, slots, length, prefill_chunk=256, sharding=None, kernels=None):
        for key, value in (("slots", slots), ("length", length), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise ValueError(f"engine: {key}={value} must be 1 or more")
        self.sharding, self.slots, self.length, self.totals = sharding, slots, round_up(length), Totals()
        sharding = sharding or Sharding()
        # With a capacity factor, a token that finds no slot at its expert would be dropped without an error.
        self.params, self.cfg = params, cfg.replace(moe_capacity_factor=None)
        self.kernels = kernels or choose_kernels({}, cfg, sharding)
        in_place = self.kernels.cache_write == "cpu"
        layers, staged = len(own_layers(cfg, sharding.mesh)), sharding.mesh.pp > 1
        needed = 8 * layers * slots * self.length * (cfg.num_kv_heads // sharding.shards("kv")) * cfg.head_dim
        if ms.get_context("device_target") == "CPU":
            host_memory.check({f"the cache of slots={slots} rows of length={self.length} tokens": needed}, "use fewer or shorter rows")
        self.cache = RowsCache(cfg, slots, self.length, cfg.num_kv_heads // sharding.shards("kv"), in_place, layers)
        self._staged = build_extend(self.cfg, sharding, self.kernels) if staged else None
        self._sample = sampling_op.cpu() if self.kernels.sampling == "cpu" else sampling_op.reference()
        self._on_device = self.kernels.sampling == "cpu" and in_place and not staged
        experts_sharded = sharding.shards("experts") > 1
        self._largest = collectives.pmax(sharding.mesh, DATA) if experts_sharded else None
        self._widths = sorted({min(NARROW, prefill_chunk), prefill_chunk})
        self._rows, self._waiting, self._next = [None] * slots, deque(), 0

    def warm_up(self, sizes=None, by_host=False):
        """Compiles the graphs in advance, so that no step waits for the compiler.

        sizes: numbers of prompt tokens; only the chunk widths that these prompts need are compiled. Default: all widths. by_host: also
        compile for tokens that are chosen on the host. The ranks of one job must call it together: a rank that compiles alone can keep the
        others waiting until their collectives time out.
        """
        chunk = self._widths[-1]
        counts = {n for size in sizes for n in (min(size, chunk), (size - 1) % chunk + 1)} if sizes else self._widths
        for width in {self._fitting(n) for n in counts}:
            self._read(width, [])
        if self._on_device:
            self._decode_on_device(1, [])
        if by_host or not self._on_device:
            token, at = self._inputs()
            self._extended(self.cache.arrays, token[:, None], at[:, None], np.zeros_like(at))

    def submit(self, request):
        """Queues a Request. Returns its id, which is unique in this engine. Raises ValueError for a prompt that is empty, has ids outside
        the vocabulary or does not fit the cache, and for options out of range."""
        options = self._checked(request)
        limit = min(request.max_new_tokens, self.length - len(request.prompt) + 1)  # the last new token is not stored in the cache
        self._waiting.append(_Row(self._next, request, options, limit))
        self._next += 1
        return self._next - 1

    def cancel(self, number):
        """Drops the request with this id, which then has no further events. An id of no running or waiting request is ignored."""
        self._waiting = deque(row for row in self._waiting if row.id != number)
        self._rows = [None if row and row.id == number else row for row in self._rows]

    def busy(self):
        """Returns whether a request is waiting or running."""
        return bool(self._waiting) or any(self._rows)

    def step(self, most=CHUNK):
        """Reads up to READS chunks of prompts, then decodes up to `most` tokens of each running row. Returns a list of Events, in order for
        each request. A small `most` returns tokens sooner; a large one has less overhead a token."""
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
        """Returns the sampling options [1, 4] of a request. Raises ValueError for a request that this engine cannot serve."""
        options, size, V = check(request), len(request.prompt), self.cfg.vocab_size
        if size > self.length:
            raise ValueError(f"prompt of {size} tokens is longer than the cache of {self.length}; shorten it, or make the cache longer")
        if min(request.prompt) < 0 or max(request.prompt) >= V:
            raise ValueError(f"prompt has ids outside the vocabulary of {V}; was it made by another tokenizer?")
        if not all(0 <= i < V for i, _ in request.logit_bias):
            raise ValueError(f"logit_bias has ids outside the vocabulary of {V}; use ids from 0 to {V - 1}")
        if (request.logprobs or 0) > V:
            raise ValueError(f"logprobs={request.logprobs} is more than the {V} tokens of the vocabulary")
        return options

    def _agreed(self, *numbers):
        """Returns the maximum of each number over the ranks that share experts; the numbers themselves if there are no such ranks."""
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
        """Returns (slot, row) of the prompt that is being read. If there is none, gives the next request a free slot. None: no prompt to
        read."""
        for b, row in enumerate(self._rows):
            if row and not row.count:
                return b, row
        if self._waiting and None in self._rows:
            b, row = self._rows.index(None), self._waiting.popleft()
            self._rows[b] = row
            if steered(row.request):
                row.steering = Steering(row.request, self.cfg.vocab_size)
            return b, row
        return None

    def _decoding(self):
        """Returns [(slot, row)] of the rows that decode: those whose prompt is read."""
        return [(b, row) for b, row in enumerate(self._rows) if row and row.count]

    def _width(self):
        """Returns the width of the prompt chunk to read next; 0 if there is none."""
        found = self._reading()
        left = len(found[1].request.prompt) - found[1].read if found else 0
        return left and self._fitting(left)

    def _fitting(self, left):
        """Returns the narrowest chunk width for `left` tokens; the widest one if they fit into none."""
        return next((width for width in self._widths if width >= left), self._widths[-1])

    def _steps(self, most):
        """Returns how many decode steps to take, at most `most`: until the first row ends if requests wait, else until the last row
        ends."""
        left = [row.limit - row.count for _, row in self._decoding()]
        return min(most, CHUNK, (min if self._waiting else max)(left)) if left else 0

    def _least(self):
        """Returns how many rows must still run for decoding to continue."""
        if self._largest is not None:
            return 0  # the ranks have agreed on the number of steps, and none may stop earlier
        return len(self._decoding()) if self._waiting else 1

    def _by_host(self):
        """Returns whether the next tokens are chosen on the host."""
        return not self._on_device or any(row.needs_logits for _, row in self._decoding())

    def _read(self, width, events):
        """Reads a prompt chunk of this width; with no prompt to read, runs the graph without effect, because other ranks run it. Returns
        the number of tokens read."""
        b, row = self._reading() or (0, None)
        chunk = row.request.prompt[row.read : row.read + width] if row else ()
        tokens, positions = np.zeros((1, width), np.int32), np.full((1, width), self.length, np.int32)  # past the end: not written
        tokens[0, : len(chunk)] = chunk
        if row:
            positions[0, : len(chunk)] = np.arange(row.read, row.read + len(chunk))
        last = np.array([max(len(chunk) - 1, 0)], np.int32)
        logits, cache = self._extended(self.cache.row(b), tokens, positions, last)
        if row:
            self.cache.put(b, cache)
            row.read += len(chunk)
            if row.read == len(row.request.prompt):
                self._choose([(b, row)], logits.asnumpy(), events)
        return len(chunk)

    def _extended(self, cache, tokens, positions, last):
        if self._staged:
            return self._staged(self.params, cache, tokens, positions, last)
        return extended(self.params, cache, tokens, positions, last, self.cfg, self.kernels, self.sharding)

    def _inputs(self):
        """Returns token_B and at_B of the next step. Rows that do not decode have a position past the end of the cache, so nothing is
        written."""
        token, at = np.zeros(self.slots, np.int32), np.full(self.slots, self.length, np.int32)
        for b, row in self._decoding():
            token[b], at[b] = row.token, row.at
        return token, at

    def _decode_on_device(self, steps, events):
        """Decodes up to `steps` tokens of each row in one graph, which also samples. Returns the number of new tokens of all rows."""
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
        try:
            taken = int(decode(self.params, self.cache.arrays, *given)[3])
        except RuntimeError:
            if self._largest is not None:
                raise  # other ranks may wait for this one inside the graph
            # One row without finite logits fails the whole graph. The host chooses these tokens again, row by row: the cache is as before
            # up to each row's position, and what the graph wrote after it is written again. Another fault of the graph is raised there.
            return self._decode_by_host(numbers[1], events)
        for found in ids.asnumpy()[0, :taken, 0]:
            for b, row in rows:
                if self._rows[b] is row:
                    self._take(b, row, int(found[b]), events)
        return len(events) - before

    def _decode_by_host(self, steps, events):
        """Decodes up to `steps` tokens of each row; the host samples after each step. Returns the number of new tokens of all rows."""
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
        """Chooses the next token of each row from logits [rows, V] (numpy), and appends its Event."""
        finite, adjusted = np.isfinite(logits.max(1)), {}  # the maximum is NaN if any logit is
        for (b, row), x, good in zip(rows, logits, finite):
            if not good:
                self._fail(b, row, events, "error")
                continue
            try:
                adjusted[b] = row.steering.adjust(x, row.count) if row.steering else x
            except GuideError:
                self._fail(b, row, events, "guide")
        rows, logits = [found for found in rows if found[0] in adjusted], logits[[b in adjusted for b, _ in rows]]
        if not rows:
            return
        adjusted = np.stack([adjusted[b] for b, _ in rows])
        u, options = np.concatenate([_draws(row, 1) for _, row in rows]), np.concatenate([row.options for _, row in rows])
        given = (adjusted, u, options)
        ids = self._sample(*map(ms.Tensor, given)).asnumpy() if self.kernels.sampling == "cpu" else self._sample(*given)
        for (b, row), x, token in zip(rows, logits, ids.tolist()):
            self._take(b, row, token, events, *_logprobs(row, x, token))

    def _fail(self, b, row, events, reason):
        """Ends a row that has no next token, and clears its part of the cache: a NaN there would reach the next request, since a masked
        value is multiplied by 0, and 0 times NaN is NaN."""
        self._rows[b] = None
        self.cache.clear(b)
        events.append(Event(row.id, NEVER, finish_reason=reason))

    def _take(self, b, row, token, events, logprob=None, top=None):
        """Records the new token of a row and appends its Event. After the last token of the request, frees the slot."""
        row.token, row.count = token, row.count + 1
        if row.steering is not None:
            try:
                row.steering.take(token)
            except GuideError:
                self._fail(b, row, events, "guide")
                return
        reason = "stop" if token in row.request.stop_ids else "length" if row.count >= row.limit else None
        if reason:
            self._rows[b] = None
        events.append(Event(row.id, token, logprob, top, reason))


def check(request):
    """Returns the sampling options [1, 4] of a Request. Raises ValueError for options that no engine can serve."""
    r = request
    if not len(r.prompt):
        raise ValueError("prompt is empty; give at least one token")
    if r.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={r.max_new_tokens} must be 1 or more")
    if not 0 < r.repetition_penalty < float("inf"):
        raise ValueError(f"repetition_penalty={r.repetition_penalty} must be above 0; use 1 for no penalty")
    for name in ("presence_penalty", "frequency_penalty"):
        if not np.isfinite(getattr(r, name)):
            raise ValueError(f"{name}={getattr(r, name)} must be a number; use 0 for no penalty")
    if not all(np.isfinite(number) for _, number in r.logit_bias):
        raise ValueError(f"logit_bias={r.logit_bias} must add numbers; use -100 to leave a token out")
    if not 0 <= r.min_tokens <= r.max_new_tokens:
        raise ValueError(f"min_tokens={r.min_tokens} must be from 0 to max_new_tokens={r.max_new_tokens}")
    if r.logprobs is not None and r.logprobs < 0:
        raise ValueError(f"logprobs={r.logprobs} must be 0 or more")
    return sampling_op.options(1, r.temperature, r.top_k, r.top_p, r.min_p)


def _draws(row, count):
    """Returns the random draws [count] float32 in (0, 1) for the next `count` tokens of a request."""
    places = np.arange(row.count, row.count + count, dtype=np.uint32)
    return hash_uniform(row.request.seed, places, row.request.sample)


def _logprobs(row, logits, token):
    """Returns (log-probability of the token, [(token, log-probability)] of the most likely tokens) under logits_V, in float64; (None, None)
    if the request asks for none."""
    count = row.request.logprobs
    if count is None:
        return None, None
    x = logits.astype(np.float64) - logits.max()
    x -= np.log(np.exp(x).sum())
    top = np.flatnonzero(x >= np.partition(x, -count)[-count]) if count else np.zeros(0, int)
    top = top[np.argsort(-x[top], kind="stable")][:count]
    return float(x[token]), [(int(i), float(x[i])) for i in top]
