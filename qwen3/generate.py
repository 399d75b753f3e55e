"""Generation with a KV cache: prefill, decode_step, sampling. No I/O.

Prompts of different lengths run as one batch, padded on the right: padding is written into slots that later tokens overwrite,
and that no query sees before.
"""

import functools

import mindspore as ms
import numpy as np

from parallel.spec import hash_uniform
from parallel.step import jit
from qwen3.cache import init_cache, round_up
from qwen3.model import build


@functools.lru_cache(maxsize=8)
def _extend(cfg):
    return jit(build(cfg).extend)


def prefill(params, prompts, cfg, length):
    """prompts: lists of token ids, none empty -> (logits_BV float32 after each prompt, cache for `length` tokens a row)."""
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
    return _extend(cfg)(params, cache, *map(ms.Tensor, (tokens, positions, sizes - 1)))


def decode_step(params, cache, tokens, positions, cfg):
    """tokens_B at positions_B (numpy int32) -> (logits_BV float32, cache)."""
    last = np.zeros(len(tokens), np.int32)
    return _extend(cfg)(params, cache, ms.Tensor(tokens[:, None]), ms.Tensor(positions[:, None]), ms.Tensor(last))


def sample(logits, *, temperature=0.0, top_k=0, top_p=1.0, seed=0, step=0):
    """logits_BV (numpy) -> token ids [B] int32. temperature 0 is greedy; top_k 0 and top_p 1 keep every token.

    The draw of row b depends on (seed, step, b) alone. Raises ValueError for options out of range.
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"sampling: temperature={temperature}, top_k={top_k}, top_p={top_p}; need >= 0, >= 0 and in (0, 1]")
    if temperature == 0:
        return logits.argmax(-1).astype(np.int32)
    order = np.argsort(-logits, axis=-1, kind="stable")[:, : top_k or None]
    z = np.take_along_axis(logits, order, -1).astype(np.float64) / temperature
    p = np.exp(z - z[:, :1])
    p /= p.sum(-1, keepdims=True)
    p[np.cumsum(p, -1) - p >= top_p] = 0  # the smallest set of tokens whose probability reaches top_p
    upto = np.cumsum(p, -1)
    u = hash_uniform(seed, np.uint32(step), np.arange(len(logits)))[:, None] * upto[:, -1:]
    return np.take_along_axis(order, (upto > u).argmax(-1)[:, None], -1)[:, 0].astype(np.int32)


def generate(params, prompts, cfg, max_new_tokens, *, stop_ids=(), **sampling):
    """prompts: lists of token ids -> lists of the new ids, each up to and without its first stop id."""
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens={max_new_tokens} must be at least 1")
    length = round_up(max(map(len, prompts)) + max_new_tokens)
    logits, cache = prefill(params, prompts, cfg, length)
    at = np.array([len(p) for p in prompts], np.int32)
    out, running = [[] for _ in prompts], np.ones(len(prompts), bool)
    for step in range(max_new_tokens):
        token = sample(logits.asnumpy(), step=step, **sampling)
        running &= ~np.isin(token, list(stop_ids))
        for row in np.flatnonzero(running):
            out[row].append(int(token[row]))
        if not running.any() or step + 1 == max_new_tokens:
            break
        logits, cache = decode_step(params, cache, token, at, cfg)
        at = at + 1
    return out
