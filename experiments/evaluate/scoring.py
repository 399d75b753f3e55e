"""The requests of lm-evaluation-harness as functions: log-likelihoods of continuations and of complete texts, and generation.

Requests are packed, several to a row under a document mask, so that requests of all lengths run in few compiled shapes. All ranks of a
layout call these functions together, with the same arguments, and get the same results.
"""

import dataclasses
import functools

import mindspore as ms
import numpy as np

from experiments.data import loader, packing
from experiments.generate import batch as generate_batch
from parallel import collectives
from parallel.graph.jit import jit
from parallel.sharding import Sharding
from qwen3 import model, stages
from qwen3.engine import Engine, Request

NARROWEST = 64  # tokens of the shortest row; longer rows are this times a power of two
MAX_NEW, TOKEN_LIMITS = 256, ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("temperature", "top_k", "top_p", "min_p")


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A model that scores texts. score(params, tokens, targets, positions, segment_ids) -> (nats, gap), as score of qwen3.model.build().

    length: the most tokens of a text; a longer one loses its start. prefix_id: the token that stands before a text without a context.
    """

    params: object
    cfg: object
    tokenizer: object
    score: object
    sharding: Sharding
    kernels: object
    batch_size: int
    length: int
    prefix_id: int


def build(params, cfg, tokenizer, *, sharding=None, kernels=None, batch_size=8, length=None, prefix_id=None):
    """Returns a Scorer. params: a rank's shards, as qwen3.model.build(cfg, sharding) takes them. batch_size: rows over all data parallel
    ranks. length: default the model's longest. prefix_id: default the tokenizer's eos_id, as in lm-evaluation-harness."""
    sharding, cfg = sharding or Sharding(), cfg.replace(moe_capacity_factor=None)  # without a capacity no expert drops a token
    if batch_size % sharding.mesh.dp:
        raise ValueError(f"batch_size={batch_size} must be a multiple of parallel.dp={sharding.mesh.dp}")
    kernels, staged = kernels or model.choose_kernels({}, cfg, sharding), sharding.mesh.pp > 1
    score = stages.build_score(cfg, sharding, kernels) if staged else jit(model.build(cfg, sharding, kernels=kernels).score)
    prefix_id = tokenizer.eos_id if prefix_id is None else prefix_id
    length = min(length or cfg.max_position, cfg.max_position)
    return Scorer(params, cfg, tokenizer, score, sharding, kernels, batch_size, length, prefix_id)


def score_rows(scorer, rows):
    """Scores rows {tokens, targets, segment_ids, positions, ...}, numpy [R, S]. Returns (nats, gap), float32 [R, S]: the negative
    log-probability of each target, and how far its logit is below the largest one."""
    mesh, out = scorer.sharding.mesh, np.zeros((2, *rows["tokens"].shape), np.float32)
    dp_rank, size = mesh.index(("dp",)), scorer.batch_size
    mine = np.array(loader.rank_rows(size, dp_rank, mesh.dp))
    for i, batch in enumerate(loader.eval_batches(rows, size, dp_rank, mesh.dp)):
        arrays = (ms.Tensor(np.ascontiguousarray(batch[key])) for key in ("tokens", "targets", "positions", "segment_ids"))
        found = np.stack([x.asnumpy() for x in scorer.score(scorer.params, *arrays)])
        real = i * size + mine < out.shape[1]
        out[:, i * size + mine[real]] = found[:, real]
    return collectives.host_sum(mesh, ("dp",), out) if mesh.dp > 1 else out


def encode_pair(scorer, context, continuation):
    """Returns (ids of the context, ids of the continuation), as lm-evaluation-harness does.

    Both texts are tokenized together, and the ids are split after as many as the context alone has. Spaces at the context's end belong to
    the continuation. An empty context becomes the prefix token.
    """
    encode = functools.partial(scorer.tokenizer.encode, allow_special=True)
    if context == "":
        ids = encode(continuation)
        return (ids[:1], ids[1:]) if ids[:1] == [scorer.prefix_id] else ([scorer.prefix_id], ids)
    kept = context.rstrip()
    first = encode(kept)
    return first, encode(context + continuation)[len(first) :]


def loglikelihood(scorer, requests):
    """Returns (log-probability in nats of the continuation after the context, whether it is the greedy choice) for each (context,
    continuation)."""
    return loglikelihood_ids(scorer, [encode_pair(scorer, *request) for request in requests])


def loglikelihood_ids(scorer, pairs):
    """Computes loglikelihood() for pairs [(ids of a context, ids of a continuation)]. Raises ValueError for a continuation that is empty or
    longer than scorer.length."""
    if not pairs:
        return []
    examples = [_example(scorer, i, *pair) for i, pair in enumerate(pairs)]
    width = packing.row_width(max(len(ids) - 1 for ids, _ in examples), NARROWEST, scorer.length)
    plan, report = packing.plan_examples(examples, width)
    rows = packing.empty_rows(report["rows"], width, scorer.tokenizer.pad_id)
    for row in range(report["rows"]):
        packing.fill_row({key: value[row] for key, value in rows.items()}, plan, row, examples)
    nats, gap = score_rows(scorer, rows)
    row_of, out = np.searchsorted(plan.first, np.arange(len(plan.example)), side="right") - 1, [None] * len(pairs)
    for row, number, end in zip(row_of, plan.example, plan.start + plan.size):
        targets = slice(end - len(pairs[number][1]), end)
        out[number] = -float(nats[row, targets].sum(dtype=np.float64)), bool((gap[row, targets] == 0).all())
    return out


def _example(scorer, number, context, continuation):
    """Returns a request's (ids, mask), for packing; the mask is 1 on the continuation. Ids that are too long lose their start."""
    if not 0 < len(continuation) <= scorer.length:
        raise ValueError(
            f"request {number}: its continuation has {len(continuation)} tokens after those of the context; it must have 1 to"
            f" {scorer.length}, the model's longest"
        )
    ids = [*(context or [scorer.prefix_id]), *continuation][-(scorer.length + 1) :]
    return ids, [0] * (len(ids) - len(continuation)) + [1] * len(continuation)


def loglikelihood_rolling(scorer, texts):
    """Returns the log-probability in nats of each complete text after the prefix token.

    As in lm-evaluation-harness, a text longer than scorer.length is split into windows that predict each token once; the last window has
    as much context as fits.
    """
    windows, owners = [], []
    for i, ids in enumerate(scorer.tokenizer.encode_batch(texts, allow_special=True)):
        found = list(rolling_windows(ids, scorer.prefix_id, scorer.length))
        windows, owners = windows + found, owners + [i] * len(found)
    out = [0.0] * len(texts)
    for i, (logprob, _) in zip(owners, loglikelihood_ids(scorer, windows)):
        out[i] += logprob
    return out


def rolling_windows(ids, prefix_id, length):
    """Yields (context ids, ids to predict) of windows in which the model reads at most `length` ids."""
    if ids:
        yield [prefix_id], ids[:length]
    for start in range(length, len(ids), length):
        end = min(start + length, len(ids))
        yield ids[end - length - 1 : start], ids[start:end]


def generate_until(scorer, requests):
    """Returns the generated text for each (context, options) of `requests`.

    options: until, a stop string or a list of them; max_gen_toks, default 256; and do_sample, temperature, top_k, top_p, min_p, where
    generation is greedy without a temperature. Raises ValueError for other options. A context that leaves no room for the answer loses its
    start. The seed of a request is its number.
    """
    tokenizer, asked = scorer.tokenizer, []
    stop = tuple(sorted(stop_ids(scorer.cfg, tokenizer)))
    contexts = tokenizer.encode_batch([context for context, _ in requests], allow_special=True)
    for number, (ids, (_, options)) in enumerate(zip(contexts, requests)):
        most, until, sampling = _options(scorer, options)
        ids = ids[-(scorer.length - most) :] or [scorer.prefix_id]
        asked.append((Request(prompt=ids, max_new_tokens=most, stop_ids=stop, seed=number, **sampling), until))
    return _generated(scorer, asked)


def stop_ids(cfg, tokenizer):
    """Returns the set of token ids that end an answer: the tokenizer's eos_token and the config's eos_id."""
    return {tokenizer.eos_id, *cfg.eos_ids}


def _options(scorer, options):
    """Returns (most new tokens, stop strings, sampling options of a Request) from the options of lm-evaluation-harness."""
    rest = dict(options)
    limits = [rest.pop(key, None) for key in TOKEN_LIMITS]
    most = next((limit for limit in limits if limit is not None), MAX_NEW)
    until, sample = rest.pop("until", None) or [], rest.pop("do_sample", True)
    sampling = {key: rest.pop(key) for key in SAMPLING if key in rest}
    if rest:
        raise ValueError(f"generation has no option {next(iter(rest))!r}; use until, do_sample, {TOKEN_LIMITS[0]}, {', '.join(SAMPLING)}")
    if not 0 < most < scorer.length:
        raise ValueError(f"{TOKEN_LIMITS[0]}={most} must be from 1 to {scorer.length - 1}, as the model sees {scorer.length} tokens")
    greedy = not sample or not sampling.get("temperature")
    return most, [until] if isinstance(until, str) else list(until), {} if greedy else sampling


def _generated(scorer, asked):
    """Returns the generated text of each (Request, stop strings). The requests are split over the data parallel ranks."""
    mesh, sharding = scorer.sharding.mesh, scorer.sharding
    if sharding.shards("rows") > sharding.shards("tokens"):
        raise ValueError("generation works without sequence parallelism; leave out --seq_parallel")
    if not asked:
        return []
    length = max(len(request.prompt) + request.max_new_tokens for request, _ in asked)
    slots = scorer.batch_size // mesh.dp
    engine = Engine(scorer.params, scorer.cfg, slots=slots, length=length, sharding=sharding, kernels=scorer.kernels)
    mine = range(mesh.index(("dp",)), len(asked), mesh.dp)
    requests = [(number, asked[number][0], tuple(filter(None, asked[number][1]))) for number in mine]
    results = generate_batch.run(engine, scorer.tokenizer, requests, generate_batch.Together(sharding))
    return [result.text for result in generate_batch.gathered(mesh, results, engine.totals)[0]]
