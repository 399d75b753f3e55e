"""Vectors of texts as Qwen3-Embedding makes them, and scores of documents as Qwen3-Reranker gives them.

A text's vector is the state of its last token after the final norm. Texts of about the same length share a batch; each row has one text,
padded at its end, which no token of the text sees. All ranks of a layout call these functions together, with the same arguments, and get
the same results.
"""

import dataclasses

import mindspore as ms
import numpy as np

from experiments.data import packing
from parallel import collectives
from parallel.graph.jit import jit
from parallel.sharding import Sharding
from qwen3 import model

NARROWEST = 16  # tokens of the shortest row; longer rows are this times a power of two
TASK = "Given a web search query, retrieve relevant passages that answer the query"  # of Qwen3-Reranker without another one
# The chat in which Qwen3-Reranker judges a pair. Source: the model's card.
BEFORE_PAIR = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided."
    ' Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
AFTER_PAIR = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
ANSWERS = ("no", "yes")


@dataclasses.dataclass(frozen=True)
class Embedder:
    """A model that gives vectors. model: of qwen3.model.build. batch_size: rows of each data parallel rank. length: the most tokens of a
    text."""

    params: object
    cfg: object
    tokenizer: object
    states: object
    logits: object
    sharding: Sharding
    batch_size: int
    length: int


def build(params, cfg, tokenizer, *, sharding=None, batch_size=8, length=None):
    """Returns an Embedder. params: a rank's shards, or a function that reads them, called after the layout is checked."""
    sharding, cfg = sharding or Sharding(), cfg.replace(moe_capacity_factor=None)  # without a capacity no expert drops a token
    if sharding.mesh.pp > 1:
        raise ValueError(f"parallel.pp={sharding.mesh.pp} is not supported for vectors and scores; use --pp=1 with --tp and --dp")
    if length and length > cfg.max_position:
        raise ValueError(f"--max_length={length} is more than the model's longest text, {cfg.max_position} tokens; use that or less")
    made = model.build(cfg, sharding, kernels=model.choose_kernels({}, cfg, sharding))
    params = params() if callable(params) else params
    states, logits = jit(made.last_states), jit(made.last_logits)
    return Embedder(params, cfg, tokenizer, states, logits, sharding, batch_size, length or cfg.max_position)


def embed(embedder, texts, instruct=None, dims=None, normalise=True):
    """Returns the vectors of texts, float32 [n, D]. instruct: the task, for texts that are queries. dims: the first ones to keep; D is
    then this. normalise: scale each vector, after it is cut, to length 1."""
    size = embedder.cfg.hidden_size
    if dims is not None and not 0 < dims <= size:
        raise ValueError(f"--dims={dims} must be from 1 to {size}, the dims of the model's vectors")
    texts = [f"Instruct: {instruct}\nQuery:{text}" for text in texts] if instruct else list(texts)
    end = embedder.tokenizer.end_ids
    ids = [found[: embedder.length - len(end)] + end for found in embedder.tokenizer.encode_batch(texts)]
    out = of_last_tokens(embedder, embedder.states, ids, size)[:, :dims]
    # as torch.nn.functional.normalize
    return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12) if normalise else out


def rerank(embedder, pairs, instruct=None):
    """Returns a score from 0 to 1 of each (query, document), float32 [n]: the probability of "yes" against "no" as the next token. Of a
    pair that is too long, the end is left out. Raises ValueError for a tokenizer without these tokens."""
    tokenizer = embedder.tokenizer
    before, after = (tokenizer.encode(text, allow_special=True) for text in (BEFORE_PAIR, AFTER_PAIR))
    answers = [tokenizer.encode(answer) for answer in ANSWERS]
    if any(len(answer) != 1 for answer in answers):
        raise ValueError('the tokenizer has no tokens "yes" and "no", by which a reranker answers; give a folder of Qwen3-Reranker')
    room = embedder.length - len(before) - len(after)
    if room < 1:
        raise ValueError(f"--max_length={embedder.length} has no room for a pair; use {len(before) + len(after) + 1} or more")
    texts = [f"<Instruct>: {instruct or TASK}\n<Query>: {query}\n<Document>: {document}" for query, document in pairs]
    ids = [before + found[:room] + after for found in tokenizer.encode_batch(texts)]
    columns = [answer[0] for answer in answers]
    no, yes = of_last_tokens(embedder, embedder.logits, ids, 2, columns).T
    return (1 / (1 + np.exp((no - yes).astype(np.float64)))).astype(np.float32)


def of_last_tokens(embedder, function, ids, size, columns=slice(None)):
    """Returns float32 [n, size]: the `columns` of what `function` gives for the last token of each list of ids."""
    mesh, rows = embedder.sharding.mesh, embedder.batch_size
    place, out = mesh.index(("dp",)), np.zeros((len(ids), size), np.float32)
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # the longest first: what does not fit into memory fails at once
    for start in range(0, len(ids), rows * mesh.dp):  # the same number of batches, of the same shapes, on every rank
        group = order[start : start + rows * mesh.dp]
        width = packing.row_width(len(ids[group[0]]), NARROWEST, embedder.length)
        mine = group[place * rows : (place + 1) * rows]
        arrays = _batch([ids[i] for i in mine], rows, width, embedder.tokenizer.pad_id)
        found = function(embedder.params, *map(ms.Tensor, arrays)).asnumpy()
        out[mine] = found[: len(mine), columns]
    return collectives.host_sum(mesh, ("dp",), out) if mesh.dp > 1 else out


def _batch(texts, rows, width, pad):
    """Returns (tokens, positions, segment_ids, last), int32 [rows, width] and [rows], of lists of ids; the rows that are left over have one
    token."""
    tokens, segments, last = np.full((rows, width), pad, np.int32), np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    segments[:, 0] = 1
    for row, ids in enumerate(texts):
        tokens[row, : len(ids)], segments[row, : len(ids)], last[row] = ids, 1, len(ids) - 1
    return tokens, np.tile(np.arange(width, dtype=np.int32), (rows, 1)), segments, last
