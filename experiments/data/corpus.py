"""From config.data to packed rows: find the text, split it, train or load the tokenizer, encode, pack."""

import os
from typing import NamedTuple

import numpy as np

from experiments.data import packing, sources
from qwen3.tokenizer import Tokenizer, train_bpe


class Corpus(NamedTuple):
    """train and held_out: packed rows (see packing.pack). held_text: the first held-out document's text."""

    tokenizer: Tokenizer
    train: dict
    held_out: dict
    held_text: str


def load(config, vocab_size):
    """The corpus of a run. vocab_size is the model's; a tokenizer with more tokens is a ValueError."""
    train, held = sources.split(_capped(sources.find_documents(config.data.path), config.data.max_bytes), config.data.held_out)
    tokenizer = _tokenizer(config.data, train)
    if tokenizer.vocab_size > vocab_size:
        where = f"data.tokenizer={config.data.tokenizer}" if config.data.tokenizer else f"data.vocab_size={config.data.vocab_size}"
        raise ValueError(
            f"{where} has {tokenizer.vocab_size} tokens, more than the model's {vocab_size};"
            f" use --config.model_args.vocab_size={tokenizer.vocab_size}"
        )
    rows = [_rows(tokenizer, documents, config.train.seq_len) for documents in (train, held)]
    for part, name in zip(rows, ("train", "held-out")):
        if not part["loss_weights"].sum():
            raise ValueError(f"data.path={config.data.path!r}: the {name} part has no pair of tokens to learn from; give more text")
    return Corpus(tokenizer, *rows, held[0].text)


def _capped(documents, max_bytes):
    """The documents, in a fixed shuffled order, up to max_bytes of text; all if it is 0."""
    if not max_bytes:
        return documents
    order = np.argsort(np.random.Philox(key=0).random_raw(len(documents)), kind="stable")
    out, size = [], 0
    for i in order:
        size += len(documents[i].text.encode("utf-8", "surrogatepass"))
        if out and size > max_bytes:
            break
        out.append(documents[i])
    return out


def _tokenizer(data, documents):
    if data.tokenizer:
        return Tokenizer.load(os.path.expanduser(data.tokenizer))
    return train_bpe([d.text for d in documents], data.vocab_size)


def _rows(tokenizer, documents, seq_len):
    return packing.pack(tokenizer.encode_batch([d.text for d in documents]), seq_len, tokenizer.eod_id)


def with_token_ids(cfg, tokenizer, trained):
    """cfg with the tokenizer's end-of-document id as eos and pad: always of a tokenizer trained here, else where cfg has none."""
    eod = tokenizer.eod_id
    if trained:
        return cfg.replace(bos_id=None, eos_id=eod, pad_id=eod)
    return cfg.replace(eos_id=eod if cfg.eos_id is None else cfg.eos_id, pad_id=eod if cfg.pad_id is None else cfg.pad_id)


def bytes_per_target(tokenizer, rows):
    """Mean number of UTF-8 bytes that a weighted target stands for."""
    targets = rows["targets"][rows["loss_weights"] > 0]
    return float(tokenizer.token_bytes()[targets].mean())
