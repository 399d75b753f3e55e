"""Generation with a KV cache: prefill, decode_step, sampling. No I/O.

Prompts of different lengths run as one batch, padded on the right. Padding is written into cache slots, but later tokens overwrite these
slots before any query sees them.

Each step takes a cache and returns the updated one; do not use the old one again, because the C++ kernels write into it.

With the C++ kernels, `generate` runs up to CHUNK steps in one compiled loop, including sampling and the test for stop ids: for a small
model, passing all its parameters to a compiled graph takes longer than one step. With other kernels the host samples after each step.
"""

import functools

import mindspore as ms
import numpy as np
from mindspore import ops

from ops import registry
from ops import sampling as sampling_op
from parallel.graph.jit import jit
from parallel.random import hash_uniform
from qwen3.cache import init_cache, round_up, writes_in_place
from qwen3.fused import build_to_decode
from qwen3.model import choose_kernels

CHUNK = 32  # decode steps in one compiled loop; the host sees the tokens after them


def prefill(params, prompts, cfg, length, kernels=None):
    """Reads prompts, lists of at least one token id, into a new cache of `length` tokens a row. Returns (logits_BV float32 after the last
    token of each prompt, cache)."""
    sizes = np.array([len(p) for p in prompts], np.int32)
    if not len(prompts) or not sizes.min():
        raise ValueError("prefill: every prompt needs at least one token")
    if sizes.max() > length:
        raise ValueError(f"prefill: a prompt of {sizes.max()} tokens does not fit a cache of {length}")
    width = min(round_up(int(sizes.max())), length)
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    positions = np.tile(np.arange(width, dtype=np.int32), (len(prompts), 1))
    cache = init_cache(cfg, len(prompts), length)
    return extended(params, cache, tokens, positions, sizes - 1, cfg, kernels)


def decode_step(params, cache, tokens, positions, cfg, kernels=None):
    """Reads one token a row, tokens_B at positions_B (numpy int32). Returns (logits_BV float32 for the next token, cache)."""
    return extended(params, cache, tokens[:, None], positions[:, None], np.zeros(len(tokens), np.int32), cfg, kernels)


def sample(logits, *, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, step=0):
    """Samples token ids [B] int32 from logits_BV (numpy). For the options see ops/sampling.py.

    The random draw of row b depends only on (seed, step, b). Raises ValueError for options out of range, and for logits that are NaN.
    """
    options = sampling_op.options(len(logits), temperature, top_k, top_p, min_p)
    return sampling_op.reference()(logits, _draws(seed, step, 1, len(logits))[0], options)


def generate(params, prompts, cfg, max_new_tokens, *, stop_ids=(), kernels=None, **sampling):
    """Continues prompts, lists of token ids. Returns a list of new ids for each, up to and without its first stop id."""
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens={max_new_tokens} must be at least 1")
    kernels = kernels or _default_kernels(cfg)
    length = round_up(max(map(len, prompts)) + max_new_tokens)
    logits, cache = prefill(params, prompts, cfg, length, kernels)
    at = np.array([len(p) for p in prompts], np.int32)
    follow = _chunks if kernels.sampling == kernels.cache_write == "cpu" else _steps
    out, running = [[] for _ in prompts], np.ones(len(prompts), bool)
    for token in follow(params, logits, cache, at, cfg, kernels, max_new_tokens, list(stop_ids), **sampling):
        running &= ~np.isin(token, list(stop_ids))
        for row in np.flatnonzero(running):
            out[row].append(int(token[row]))
        if not running.any():
            break
    return out


def _steps(params, logits, cache, at, cfg, kernels, count, stop_ids, **sampling):
    """Yields the next ids_B `count` times. The host samples after each step."""
    for step in range(count):
        token = sample(logits.asnumpy(), step=step, **sampling)
        yield token
        if step + 1 < count:
            logits, cache = decode_step(params, cache, token, at + step, cfg, kernels)


def _chunks(params, logits, cache, at, cfg, kernels, count, stop_ids, *, seed=0, **sampling):
    """Yields the next ids_B up to `count` times. The device samples; the host reads the ids every CHUNK steps, or when all rows have
    stopped."""
    B = len(at)
    options = ms.Tensor(sampling_op.options(B, **sampling))
    stop = ms.Tensor(np.array(stop_ids, np.int32)[None]) if stop_ids else None
    token = sampling_op.cpu()(logits, ms.Tensor(_draws(seed, 0, 1, B)[0]), options)
    yield token.asnumpy()
    at, running, done = ms.Tensor(at), ms.Tensor((~np.isin(token.asnumpy(), stop_ids)).astype(np.int32)), 1
    while done < count:
        ids, steps = ms.Tensor(np.zeros((1, CHUNK, 1, B), np.int32)), ms.Tensor(min(CHUNK, count - done), ms.int32)
        draws = ms.Tensor(_draws(seed, done, CHUNK, B))
        one = ms.Tensor(1, ms.int32)
        given = cache, None, token, at, running, one, draws, options, stop, ids, steps
        token, at, running, taken = decode_loop(cfg, kernels)(params, *given)
        taken = int(taken)
        yield from ids.asnumpy()[0, :taken, 0]
        done += taken


def _draws(seed, step, count, batch_size):
    """Returns the random draws [count, B] float32 of `count` steps, the first of which is `step`."""
    steps = np.arange(step, step + count, dtype=np.uint32)[:, None]
    return hash_uniform(seed, steps, np.arange(batch_size)[None])


def _default_kernels(cfg):
    return choose_kernels({}, cfg)


def extended(params, cache, tokens, positions, last, cfg, kernels=None, sharding=None):
    """Reads tokens_BS at positions_BS (numpy int32) into the cache. Returns (logits_BV float32 after column last_B of each row, cache).

    Tokens at positions past the end of the cache are not stored. sharding: the layout, in which params and cache are this rank's shards;
    all ranks return the same logits, bit for bit.
    """
    kernels = kernels or _default_kernels(cfg)
    out = _extend(cfg, kernels, sharding)(params, cache, *map(ms.Tensor, (tokens, positions, last)))
    return (out, cache) if kernels.cache_write == "cpu" else out


@functools.lru_cache(maxsize=8)
def _extend(cfg, kernels, sharding):
    """Returns Model.extend, compiled. If the kernels write into the cache, the graph returns only the logits, because returning the cache
    would copy it."""
    extend = build_to_decode(cfg, sharding, kernels).extend

    def logits_alone(params, cache, tokens, positions, last):
        return extend(params, cache, tokens, positions, last)[0]

    return jit(logits_alone if kernels.cache_write == "cpu" else extend)


def extended_pages(params, cache, table, tokens, positions, row, last, cfg, kernels, sharding=None, adapters=None):
    """Reads tokens_R at positions_R (numpy int32) into a paged cache. Returns (logits float32, cache). table_BM, row_R, last_B (numpy
    int32; the last two may be None), adapters (numpy float32 or None): see qwen3.model.extend_paged_cache. sharding: as of `extended`."""
    given = (None if x is None else ms.Tensor(x) for x in (table, tokens, positions, row, last, adapters))
    out = _extend_pages(cfg, kernels, sharding)(params, cache, *given)
    return (out, cache) if writes_in_place(kernels) else out


@functools.lru_cache(maxsize=8)
def _extend_pages(cfg, kernels, sharding):
    """Returns Model.extend_pages, compiled; only its logits if the kernels write into the cache."""
    extend = build_to_decode(cfg, sharding, kernels, rows_alone=True).extend_pages

    def logits_alone(params, cache, table, tokens, positions, row, last, adapters):
        return extend(params, cache, table, tokens, positions, row, last, adapters)[0]

    return jit(logits_alone if writes_in_place(kernels) else extend)


def copied_page(cache, source, to, kernels):
    """Copies page `source` of a paged cache into page `to`. Returns the cache."""
    size = cache[0][0].shape[1]
    given = np.array([source], np.int32), to * size + np.arange(size, dtype=np.int32)
    out = _copy_page(kernels)(cache, *map(ms.Tensor, given))
    return cache if writes_in_place(kernels) else out


@functools.lru_cache(maxsize=8)
def _copy_page(kernels):
    """Returns copy(cache, source [1], slots [C]) -> the new cache, compiled; the source if the kernels write into the cache."""
    write, in_place = registry.pick(kernels, "paged_write")(), writes_in_place(kernels)
    gather, reshape = ops.Gather(), ops.Reshape()

    def copy(cache, source, slots):
        out, done = (), source
        for k, v in cache:
            new_k, new_v = (reshape(gather(x, source, 0), x.shape[1:]) for x in (k, v))
            k, v = write(k, new_k, slots), write(v, new_v, slots)
            out, done = (*out, (k, v)), ops.depend(done, (k, v))
        return done if in_place else out

    return jit(copy)


@functools.lru_cache(maxsize=8)
def decode_loop(cfg, kernels, sharding=None):
    """Returns decode(params, cache, table_BM or None, token_B, at_B, running_B int32, least int32, draws [n, B], options,
    stop [1 or B, M] or None, ids [1, n, 1, B], steps, adapters=None) -> (token_B, at_B, running_B, number of steps taken), a compiled loop
    of decode steps.

    table: of a paged cache, see ops/paged_attention.py; None: the cache is one of rows. adapters: see extended_pages.

    The loop writes into the cache, and the new ids of each step into one row of `ids`. It ends after `steps` steps, or earlier when fewer
    than `least` rows run. running_B is 1 for a row that has not produced one of its stop ids, else 0. The loop needs the C++ kernels of
    cache_write and sampling.
    """
    rows, pages = build_to_decode(cfg, sharding, kernels).extend, build_to_decode(cfg, sharding, kernels, rows_alone=True).extend_pages
    choose, write = registry.pick(kernels, "sampling")(), registry.pick(kernels, "cache_write")()
    reshape, gather, zeros_like, different, enough = ops.Reshape(), ops.Gather(), ops.ZerosLike(), ops.NotEqual(), ops.GreaterEqual()
    cast, lowest, total = ops.Cast(), ops.ReduceMin(), ops.ReduceSum()

    def goes_on(token, stop):
        """Returns 1 for rows whose token is not a stop id, else 0. It reduces in float32, for which every device has reductions."""
        return cast(lowest(cast(different(reshape(token, (-1, 1)), stop), ms.float32), 1), ms.int32)

    def decode(params, cache, table, token, at, running, least, draws, options, stop, ids, steps, adapters=None):
        i = zeros_like(steps)
        while i < steps:
            if table is None:
                logits, _ = rows(params, cache, reshape(token, (-1, 1)), reshape(at, (-1, 1)), zeros_like(token))
            else:
                logits, _ = pages(params, cache, table, token, at, None, None, adapters)
            token = choose(logits, gather(draws, i, 0), options)
            token = ops.depend(token, write(ids, reshape(token, (1, 1, 1, -1)), reshape(i, (1, 1))))
            if stop is not None:
                running = running * goes_on(token, stop)
                steps = steps * cast(enough(cast(total(cast(running, ms.float32)), ms.int32), least), ms.int32)
            at = at + 1
            i = i + 1
        return token, at, running, i

    return jit(decode)
