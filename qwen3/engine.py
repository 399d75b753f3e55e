"""Continuous batching: any number of requests, of any lengths, share one paged KV cache of fixed size. No I/O.

    engine = Engine(params, cfg, slots=16, length=2048)
    number = engine.submit(Request(prompt=[1, 2, 3], max_new_tokens=100, temperature=0.8, seed=7))
    while engine.busy():
        for event in engine.step():
            ...  # event.id, event.token, event.finish_reason

A request waits until one of `slots` is free, and as many pages of the cache as its prompt needs. Prompts are read in flat batches: a graph
of one of a few widths takes tokens of several prompts, some of a long one and all of short ones. Between two such graphs all rows whose
prompts are read decode a token; when no prompt is left to read, they decode many in one graph. So few graphs are compiled, and a long
prompt stops neither the rows that decode nor short prompts that come after it.

A prompt that begins like an earlier one shares the pages of the full blocks that both have, copies what it has of the next block, and reads
only the rest; these pages stay until others need them. When a row that decodes needs a page and there is none, the row that came last gives
its pages back and is read again later.

The tokens of a request do not depend on its slot nor on the other requests: a random draw depends only on the request's seed, the number of
the token and the number of the sample; and with the C++ kernels, in a dense model, what is computed of a token has the same bits whatever
is read or decoded beside it. Only a row that was read again has other roundings, as its new tokens were then read and not decoded.

With speculation (speculate=N), up to N tokens that may come next are guessed, by prompt lookup (qwen3/lookup.py) or by a smaller model
(qwen3/draft.py), and read together with the last token, in one flat batch of all rows. Then the next token is chosen after each of them, as
if none were guessed, for as long as the choice is the guess. For a guess that is fixed before, this is rejection sampling: it is accepted
with its probability, and else the token is drawn from the others. So the tokens, also drawn ones, are those that the seed gives without
guesses. All new tokens are then read by the graphs that read prompts, so their bits depend on no neighbour and no guess; their roundings
are not those of the graphs that decode.
"""

import time
from collections import deque
from dataclasses import asdict, dataclass, field

import mindspore as ms
import numpy as np

from ops import sampling as sampling_op
from parallel import collectives, host_memory
from parallel.random import hash_uniform
from parallel.sharding import DATA, Sharding
from qwen3.cache import Known, PagedCache, known_blocks, round_up, writes_in_place
from qwen3.generate import CHUNK, copied_page, decode_loop, extended_pages
from qwen3.lookup import Lookup
from qwen3.model import choose_kernels
from qwen3.stages import build_extend, own_layers
from qwen3.steering import GuideError, Steering, steered

READS = 4  # the most flat batches of prompts that one step reads
NARROW = 32  # tokens of the narrowest batch of prompts
OLDEST = 4  # the prompt that came first gets at least one part in so many of each batch; of the rest, the shortest come first
PAGE = 64  # tokens of a page; the kernel of decoding takes as many keys at a time
GUESSES = 8  # tokens of the narrowest batch that checks guesses; the others are 2, 4, ... times as wide
PART = 8  # of a page at least one part in so many is worth a copy
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
    log-probabilities; 0: that of the new token; n: also those of the n most likely tokens. adapter: the number of one of the engine's
    adapters, counted from 1; 0: the base alone.
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
    adapter: int = 0

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


@dataclass(eq=False)
class _Row:
    """A request and its state.

    options: [1, 4], for sampling. limit: the most new tokens. known: the blocks of its prompt, see qwen3/cache.py. pages: its pages, in
    order. read: how many tokens are in them, while `reading`: the prompt, and of a row that is read again its new tokens but the last.
    count: how many new tokens there are; token: the last of them; made: all of them. steering: see qwen3/steering.py; None where nothing
    steers. lookup: see qwen3/lookup.py; None without speculation.
    """

    id: int
    request: Request
    options: np.ndarray
    limit: int
    known: list[Known]
    pages: list = field(default_factory=list)
    reading: bool = True
    read: int = 0
    count: int = 0
    token: int = 0
    made: list = field(default_factory=list)
    steering: Steering | None = None
    lookup: Lookup | None = None

    @property
    def at(self):
        """The position of the last token, which is not in the cache yet."""
        return len(self.request.prompt) + self.count - 1

    @property
    def target(self):
        """How many tokens are to be read before the row decodes."""
        return self.at if self.count else len(self.request.prompt)

    @property
    def most(self):
        """The most tokens of the row that are stored."""
        return len(self.request.prompt) + self.limit - 1

    @property
    def unread(self):
        return self.target - self.read

    @property
    def needs_logits(self):
        return self.request.needs_logits

    def next_tokens(self, count):
        """Returns the next `count` tokens to read."""
        size, stop = len(self.request.prompt), self.read + count
        if stop <= size:
            return self.request.prompt[self.read : stop]
        return [*self.request.prompt[self.read : size], *self.made[max(0, self.read - size) : stop - size]]


@dataclass
class Totals:
    """Sums over all steps: tokens of prompts that were read, and the seconds for them; decoded tokens, without the first of each request,
    and the seconds for them; tokens of prompts that were not read because the cache had them; rows that gave their pages back; tokens that
    were guessed, and those of them that were right."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0
    reused_tokens: int = 0
    preempted: int = 0
    guessed_tokens: int = 0
    right_tokens: int = 0


class Engine:
    """Runs requests over one cache.

    params, cfg: the model; in a layout, params are this rank's shards. slots: rows that decode together. length: the most tokens of a row,
    prompt and new tokens together, rounded up to whole pages. prefill_chunk: the most prompt tokens that are read at a time. sharding: the
    layout, without sequence parallel and ZeRO. kernels: see qwen3.model.build. cache_tokens: how many tokens the cache has room for; by
    default all slots at full length. page: tokens of a page. reuse: whether prompts share the blocks that they begin with. reads: the most
    batches of prompts that one step reads. speculate: the most tokens that are guessed of a row at a time; 0: none. adapters: the masks
    [1 + number of adapters, rank] of adapters in params that requests choose between, see qwen3/adapters.py. draft: a qwen3.draft.Draft
    that guesses, for as many slots; default: prompt lookup. totals: see Totals.

    The ranks of one tensor parallel group, and of one pipeline, must make the same calls; they compute the same tokens. Under a pipeline,
    each stage has the cache of its own layers, and the last stage broadcasts its logits, from which every rank chooses on the host. Data
    ranks may have different requests. But if experts are sharded over data ranks, all of them must call step() equally often, even a rank
    that is not busy, because the ranks agree on each step and run it together.
    """

    def __init__(
        self,
        params,
        cfg,
        *,
        slots,
        length,
        prefill_chunk=256,
        sharding=None,
        kernels=None,
        cache_tokens=None,
        page=PAGE,
        reuse=True,
        reads=READS,
        speculate=0,
        adapters=None,
        draft=None,
    ):
        cache_tokens = slots * round_up(length, page) if cache_tokens is None else cache_tokens
        numbers = {
            "slots": slots,
            "length": length,
            "prefill_chunk": prefill_chunk,
            "cache_tokens": cache_tokens,
            "page": page,
            "reads": reads,
        }
        for key, value in numbers.items():
            if value < 1:
                raise ValueError(f"engine: {key}={value} must be 1 or more")
        if speculate < 0:
            raise ValueError(f"engine: speculate={speculate} must be 0 or more")
        if draft is not None and (not speculate or draft.slots != slots):
            raise ValueError(f"engine: a draft model needs speculate=1 or more, and slots={slots} as the engine has")
        pages, self.sharding, self.slots, self.totals = -(-cache_tokens // page), sharding, slots, Totals()
        self.length, self.reads, self._reuse, self._speculate = min(round_up(length, page), pages * page), reads, reuse, speculate
        sharding = sharding or Sharding()
        # With a capacity factor, a token that finds no slot at its expert would be dropped without an error.
        self.params, self.cfg = params, cfg.replace(moe_capacity_factor=None)
        self.kernels = kernels or choose_kernels({}, cfg, sharding)
        layers, staged = len(own_layers(cfg, sharding.mesh)), sharding.mesh.pp > 1
        kv_heads = cfg.num_kv_heads // sharding.shards("kv")
        if ms.get_context("device_target") == "CPU":
            needed = 8 * layers * pages * page * kv_heads * cfg.head_dim
            host_memory.check(
                {f"the cache of {pages * page} tokens, for slots={slots} of length={self.length}": needed}, "use fewer or shorter rows"
            )
        self.cache = PagedCache(cfg, pages, page, kv_heads, layers)
        self._staged = build_extend(self.cfg, sharding, self.kernels) if staged else None
        self._sample = sampling_op.cpu() if self.kernels.sampling == "cpu" else sampling_op.reference()
        self._on_device = self.kernels.sampling == "cpu" and writes_in_place(self.kernels) and not staged and not speculate
        experts_sharded = sharding.shards("experts") > 1
        self._largest = collectives.pmax(sharding.mesh, DATA) if experts_sharded else None
        self._widths = sorted({min(NARROW, prefill_chunk), min(max(NARROW, prefill_chunk // 4), prefill_chunk), prefill_chunk})
        self._rows, self._waiting, self._next = [None] * slots, deque(), 0
        self._draft, self._masks = draft, None if adapters is None else np.asarray(adapters, np.float32)

    def use(self, params):
        """Takes other parameters, or the same arrays with other values, and forgets all keys and values in the cache, which belong to the
        parameters before. Raises ValueError while requests wait or run."""
        if self.busy():
            raise ValueError("engine: its parameters cannot change while requests wait or run; let them end, or cancel them")
        self.params = params
        self.cache.blocks.forget()

    def warm_up(self, sizes=None, by_host=False):
        """Compiles the graphs in advance, so that no step waits for the compiler.

        sizes: numbers of prompt tokens; only the widths are compiled in which these prompts are read, alone or together. Default: all
        widths. by_host: also compile for tokens that are chosen on the host. The ranks of one job must call it together: a rank that
        compiles alone can keep the others waiting until their collectives time out.
        """
        if self._reuse:
            self.cache.arrays = copied_page(self.cache.arrays, 0, 0, self.kernels)
        for width in self._widths_of([*sizes, sum(sizes)]) if sizes else self._widths:
            self._read(width, [])
        if self._on_device:
            self._decode_on_device(1, [])
        if self._speculate:
            if self._draft is not None:
                self._draft.warm_up()
            for width in sorted({self._wide_enough(n) for n in range(1, self.slots * (1 + self._speculate) + 1)}):
                self._checked_guesses({}, {}, width)
        elif by_host or not self._on_device:
            token, at, table = self._inputs({})
            self._extended(table, token, at)

    def _widths_of(self, sizes):
        found = set()
        for left in sizes:
            while left > 0:
                found.add(self._fitting(left))
                left -= self._fitting(left)
        return found

    def submit(self, request):
        """Queues a Request. Returns its id, which is unique in this engine. Raises ValueError for a prompt that is empty, has ids outside
        the vocabulary or does not fit the cache, and for options out of range."""
        options = self.checked(request)
        limit = min(request.max_new_tokens, self.length - len(request.prompt) + 1)  # the last new token is not stored in the cache
        known = known_blocks(request.prompt, self.cache.size, start_of(request)) if self._reuse else []
        self._waiting.append(_Row(self._next, request, options, limit, known))
        self._next += 1
        return self._next - 1

    def cancel(self, number):
        """Drops the request with this id, which then has no further events. An id of no running or waiting request is ignored."""
        self._waiting = deque(row for row in self._waiting if row.id != number)
        for b, row in enumerate(self._rows):
            if row and row.id == number:
                self._leave(b)

    def busy(self):
        """Returns whether a request is waiting or running."""
        return bool(self._waiting) or any(self._rows)

    def step(self, most=CHUNK):
        """Reads up to `reads` batches of prompts and decodes up to `most` tokens of each running row: one after each batch, and the rest
        when no prompt is left to read. With speculation, the right guesses come in addition. Returns a list of Events, in order for each
        request. A small `most` returns tokens sooner; a large one has less overhead a token."""
        events, decoded = [], 0
        for _ in range(self.reads):
            self._admit()
            (width,) = self._agreed(self._fitting(sum(row.unread for _, row in self._read_next())))
            if not width:
                break
            self._timed("prefill", self._read, width, events)
            decoded += self._decode(min(1, most - decoded), events)
        self._admit()
        (reading,) = self._agreed(len(self._read_next()) > 0)
        if not reading:
            self._decode(most - decoded, events)
        return events

    def _decode(self, most, events):
        """Decodes up to `most` tokens of each running row, as many as the ranks agree on. Returns how many."""
        steps, by_host = self._agreed(self._steps(most), self._by_host())
        if steps > 0:
            decode = self._decode_with_guesses if self._speculate else self._decode_by_host if by_host else self._decode_on_device
            self._timed("decode", decode, steps, events)
        return steps

    def counts(self):
        """Returns {name: number} of what the engine has counted, see Totals, and of its cache: tokens that it has room for, those in the
        blocks of running rows, and blocks of earlier prompts that made room."""
        blocks, size = self.cache.blocks, self.cache.size
        cache = {"cache_tokens": blocks.count * size, "cache_tokens_used": blocks.used() * size, "evicted_blocks": blocks.evicted}
        return {**asdict(self.totals), **cache}

    def checked(self, request):
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
        count = 0 if self._masks is None else len(self._masks) - 1
        if not 0 <= request.adapter <= count:
            raise ValueError(f"adapter={request.adapter} must be 0, or the number of one of the engine's {count} adapters")
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

    def _admit(self):
        """Gives free slots to waiting requests, in order of arrival, as long as there are pages for them. A request that begins with a
        block which another one is about to read waits until it is read, and those behind it may pass."""
        coming = {block.digest for _, row in self._read_next() for block in row.known[row.read // self.cache.size :]}
        for row in list(self._waiting):
            if None not in self._rows:
                return
            there = len(self.cache.blocks.find(row.known))
            if there < len(row.known) and row.known[there].digest in coming:
                continue
            if not self._allocate(row):
                return
            self._waiting.remove(row)
            self._rows[self._rows.index(None)] = row
            coming |= {block.digest for block in row.known[there:]}
            if steered(row.request) and row.steering is None:
                row.steering = Steering(row.request, self.cfg.vocab_size)
            if self._speculate and self._draft is None and row.lookup is None:
                row.lookup = Lookup(row.request.prompt, self._speculate)

    def _allocate(self, row):
        """Gives a waiting row the pages that it needs to be read, and returns True; False if there are not enough. One page is left for
        each running row that may still need one."""
        blocks, growing = self.cache.blocks, sum(len(other.pages) < self._pages(other.most) for other in self._rows if other)
        found = blocks.find(row.known)
        source, part = self._part(row, len(found))
        blocks.share(found)
        needed = self._pages(row.target) - len(found)
        taken = blocks.take(needed) if needed + growing <= blocks.available() else None
        if taken is None:
            blocks.release(found)
            return False
        if part and source != taken[0]:
            self.cache.arrays = copied_page(self.cache.arrays, source, taken[0], self.kernels)
        row.pages, row.read, row.reading = found + taken, len(found) * self.cache.size + part, True
        self.totals.reused_tokens += row.read
        return True

    def _part(self, row, found):
        """Returns (page, count): the page of a block of which the first `count` tokens are those of the row after its first `found` blocks;
        (None, 0) if that would save little. The last token of the prompt is not among them, as it is always read."""
        if not self._reuse:
            return None, 0
        size, prompt = self.cache.size, row.request.prompt
        before = row.known[found - 1].digest if found else start_of(row.request)
        page, count = self.cache.blocks.find_part(before, prompt[found * size : -1][:size])
        return (page, count) if count >= max(1, size // PART) else (None, 0)

    def _pages(self, tokens):
        return -(-tokens // self.cache.size)

    def _leave(self, b):
        """Frees a slot and the pages of its row. Returns the row."""
        row, self._rows[b] = self._rows[b], None
        self.cache.blocks.release(row.pages)
        row.pages = []
        return row

    def _grow(self, steps):
        """Makes room for the next tokens of the rows that decode. Returns {slot: how many of `steps` the row has pages for}, each at least
        1.

        While a row has no page for its next token and none is free, the row that came last gives its pages back and waits again.
        """
        blocks, size = self.cache.blocks, self.cache.size
        for b, row in sorted(self._decoding(), key=lambda found: found[1].id):
            while self._rows[b] is row and len(row.pages) * size <= row.at:
                if pages := blocks.take(1):
                    row.pages += pages
                    continue
                last = max((i for i, other in enumerate(self._rows) if other), key=lambda i: self._rows[i].id)
                self._waiting.appendleft(self._leave(last))
                self.totals.preempted += 1
        allotted = {}
        for b, row in self._decoding():
            count = min(steps, row.limit - row.count)
            wanted = self._pages(row.at + count) - len(row.pages)
            row.pages += blocks.take(min(max(wanted, 0), blocks.available()))
            allotted[b] = min(count, len(row.pages) * size - row.at)
        return allotted

    def _read_next(self):
        """Returns [(slot, row)] of the rows that are being read."""
        return [(b, row) for b, row in enumerate(self._rows) if row and row.reading]

    def _parts(self, width):
        """Returns [(slot, row, count)]: how many tokens of each row the next batch of this width reads. The shortest rest comes first, but
        the request that came first always has a share, so that short ones cannot keep it waiting."""
        rows = sorted(self._read_next(), key=lambda found: (found[1].unread, found[1].id))
        if not rows:
            return []
        first = min(rows, key=lambda found: found[1].id)[0]
        counts = {b: min(row.unread, -(-width // OLDEST)) if b == first else 0 for b, row in rows}
        left = width - counts[first]
        for b, row in rows:
            more = min(row.unread - counts[b], left)
            counts[b], left = counts[b] + more, left - more
        return [(b, row, counts[b]) for b, row in rows if counts[b]]

    def _decoding(self):
        """Returns [(slot, row)] of the rows that decode: those whose prompt is read."""
        return [(b, row) for b, row in enumerate(self._rows) if row and not row.reading]

    def _fitting(self, left):
        """Returns the width in which to read of `left` prompt tokens: one that they fill more than half; the narrowest one if there is
        none, and 0 for no tokens."""
        if left <= 0:
            return 0
        return next((width for width in reversed(self._widths) if left > width // 2), self._widths[0])

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
        """Reads a batch of prompt tokens of this width; with none to read, runs the graph without effect, because other ranks run it.
        Returns the number of tokens read."""
        parts, at = self._parts(width), 0
        tokens, positions, of_row = np.zeros(width, np.int32), np.full(width, -1, np.int32), np.zeros(width, np.int32)
        last = np.zeros(self.slots, np.int32)
        for b, row, count in parts:
            tokens[at : at + count] = row.next_tokens(count)
            positions[at : at + count] = np.arange(row.read, row.read + count)
            of_row[at : at + count] = b
            at += count
            last[b] = at - 1
        logits = self._extended(self._table([(b, row) for b, row, _ in parts]), tokens, positions, of_row, last)
        if not parts:
            return 0
        logits, done = logits.asnumpy(), []
        for b, row, count in parts:
            if not np.isfinite(logits[b].max()):
                self._fail(b, row, events, "error")
                continue
            first, row.read = row.read, row.read + count
            for i in range(first // self.cache.size, min(row.read // self.cache.size, len(row.known))):
                self.cache.blocks.know(row.pages[i], row.known[i])
            row.reading = row.unread > 0
            if not row.reading and not row.count:
                done.append((b, row))
        if done:
            self._choose(done, logits[[b for b, _ in done]], events)
        return at

    def _extended(self, table, tokens, positions, of_row=None, last=None):
        """Reads tokens into the cache. Returns the logits [slots, V]."""
        arrays, adapters = self.cache.arrays, self._adapters()
        if self._staged:
            logits, arrays = self._staged(self.params, arrays, table, tokens, positions, of_row, last, adapters)
        else:
            given = table, tokens, positions, of_row, last, self.cfg, self.kernels, self.sharding, adapters
            logits, arrays = extended_pages(self.params, arrays, *given)
        self.cache.arrays = arrays
        return logits

    def _adapters(self):
        """Returns the masks [slots, rank] of the adapters of all rows; None without adapters."""
        return None if self._masks is None else self._masks[[row.request.adapter if row else 0 for row in self._rows]]

    def _table(self, rows):
        """Returns the table [slots, pages of a row] of some rows; the others have no page in it, so nothing of theirs is written."""
        table = np.full((self.slots, -(-self.length // self.cache.size)), -1, np.int32)
        for b, row in rows:
            table[b, : len(row.pages)] = row.pages
        return table

    def _inputs(self, allotted):
        """Returns token_B, at_B and table_BM of the next step. allotted: see _grow. The other rows have no pages."""
        token, at = np.zeros(self.slots, np.int32), np.zeros(self.slots, np.int32)
        for b in allotted:
            token[b], at[b] = self._rows[b].token, self._rows[b].at
        return token, at, self._table([(b, self._rows[b]) for b in allotted])

    def _decode_on_device(self, steps, events):
        """Decodes up to `steps` tokens of each row in one graph, which also samples. Returns the number of new tokens of all rows."""
        allotted, B, before = self._grow(steps), self.slots, len(events)
        if self._largest is None and allotted:
            steps = max(allotted.values())
        rows = [(b, self._rows[b]) for b in allotted]
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
        token, at, table = self._inputs(allotted)
        given = [*map(ms.Tensor, (table, token, at, running)), least, *map(ms.Tensor, (draws, options, stop)), ids, steps]
        if self._masks is not None:
            given.append(ms.Tensor(self._adapters()))
        decode = decode_loop(self.cfg, self.kernels, self.sharding)
        try:
            taken = int(decode(self.params, self.cache.arrays, *given)[3])
        except RuntimeError:
            if self._largest is not None:
                raise  # other ranks may wait for this one inside the graph
            # One row without finite logits fails the whole graph. The host chooses these tokens again, row by row: the pages are as before
            # up to each row's position, and what the graph wrote after it is written again. Another fault of the graph is raised there.
            return self._decode_by_host(numbers[1], events)
        for i, found in enumerate(ids.asnumpy()[0, :taken, 0]):
            for b, row in rows:
                if self._rows[b] is row and i < allotted[b]:
                    self._take(b, row, int(found[b]), events)
        return len(events) - before

    def _decode_by_host(self, steps, events):
        """Decodes up to `steps` tokens of each row; the host samples after each step. Returns the number of new tokens of all rows."""
        least, before = self._least(), len(events)
        for _ in range(steps):
            if len(self._decoding()) < least:
                break
            allotted = self._grow(1)
            token, at, table = self._inputs(allotted)
            logits = self._extended(table, token, at)
            if allotted:
                self._choose([(b, self._rows[b]) for b in allotted], logits.asnumpy()[list(allotted)], events)
        return len(events) - before

    def _decode_with_guesses(self, steps, events):
        """Decodes each row up to `steps` times: by one token, and by the guesses that were right. Returns the number of new tokens."""
        least, before = self._least(), len(events)
        for _ in range(steps):
            if len(self._decoding()) < least:
                break
            guesses = self._guessed({b: row for b, row in self._decoding()})
            allotted = self._grow(1 + max(map(len, guesses.values()), default=0))
            guesses = {b: guesses[b][: room - 1] for b, room in allotted.items()}
            (width,) = self._agreed(self._wide_enough(sum(1 + len(guess) for guess in guesses.values())))
            logits, first = self._checked_guesses(allotted, guesses, width)
            self._accept(guesses, first, logits, events)
        return len(events) - before

    def _guessed(self, rows):
        """Returns {slot: guesses of what comes next} of the rows {slot: row} that decode."""
        room = {b: row.limit - row.count - 1 for b, row in rows.items()}
        if self._draft is None:
            return {b: row.lookup.draft(room[b]) for b, row in rows.items()}
        most = {b: min(self._speculate, n) for b, n in room.items()}
        found = self._draft.guesses({b: (row.id, [*row.request.prompt, *row.made], most[b]) for b, row in rows.items()})
        V = self.cfg.vocab_size
        return {b: guess[: next((i for i, token in enumerate(guess) if token >= V), len(guess))] for b, guess in found.items()}

    def _wide_enough(self, count):
        """Returns the width of the batch in which so many last tokens and guesses are read."""
        width = GUESSES
        while width < count:
            width *= 2
        return width

    def _checked_guesses(self, allotted, guesses, width):
        """Reads the last token of each row and its guesses, [slots] of lists, in a batch of this width. Returns (logits [width, V], the
        place in it of each row's last token)."""
        tokens, positions, of_row = np.zeros(width, np.int32), np.full(width, -1, np.int32), np.zeros(width, np.int32)
        first, at = {}, 0
        for b in allotted:
            row, count = self._rows[b], 1 + len(guesses[b])
            tokens[at : at + count] = [row.token, *guesses[b]]
            positions[at : at + count] = np.arange(row.at, row.at + count)
            of_row[at : at + count] = b
            first[b], at = at, at + count
        logits = self._extended(self._table([(b, self._rows[b]) for b in allotted]), tokens, positions, of_row)
        return logits.asnumpy() if allotted else None, first

    def _accept(self, guesses, first, logits, events):
        """Chooses the next tokens of each row for as long as they are its guesses. logits, first: of _checked_guesses."""
        going, right = {b: self._rows[b] for b in guesses}, dict.fromkeys(guesses, 0)
        while going:
            rows = list(going.items())
            self._choose(rows, logits[[first[b] + right[b] for b, _ in rows]], events)
            for b, row in rows:
                at, guess = right[b], guesses[b]
                if self._rows[b] is row and at < len(guess) and row.token == guess[at]:
                    right[b] += 1
                else:
                    del going[b]
                    if self._draft is None:
                        row.lookup.learn(len(guess), at)
                    else:
                        self._draft.learn(b, len(guess), at)
        self.totals.guessed_tokens += sum(map(len, guesses.values()))
        self.totals.right_tokens += sum(right.values())

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
        """Ends a row that has no next token. What is left in its pages is not seen by the rows that get them: the kernels read no slot
        that a row has not written, and a block is known only if the logits after it are finite."""
        self._leave(b)
        events.append(Event(row.id, NEVER, finish_reason=reason))

    def _take(self, b, row, token, events, logprob=None, top=None):
        """Records the new token of a row and appends its Event. After the last token of the request, frees the slot."""
        row.token, row.count = token, row.count + 1
        row.made.append(token)
        if row.lookup is not None:
            row.lookup.take(token)
        if row.steering is not None:
            try:
                row.steering.take(token)
            except GuideError:
                self._fail(b, row, events, "guide")
                return
        reason = "stop" if token in row.request.stop_ids else "length" if row.count >= row.limit else None
        if reason:
            self._leave(b)
        events.append(Event(row.id, token, logprob, top, reason))


def start_of(request):
    """Returns what the digests of a prompt's blocks begin with: an adapter changes keys and values."""
    return b"" if not request.adapter else b"adapter %d" % request.adapter


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
