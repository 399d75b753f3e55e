"""From config.data to a source of training rows, held-out rows and the tokenizer: text packed in memory, .bin/.idx pairs, or a stream."""

import os
import tempfile
from typing import NamedTuple

import numpy as np

from experiments.configs import common
from experiments.data import batch_ramp, conversations, gpt_index, loader, packing, pairs, parts, preferences, prompts, readers, sources
from experiments.data.megatron import IndexedDataset
from experiments.data.rows import Blend, ExampleRows, PackedRows, PairRows
from experiments.data.stream import TextStream
from experiments.data.token_cache import tokenised
from qwen3 import chat
from qwen3.tokenizer import Tokenizer, train_bpe

HELD_ROWS = 512  # held-out rows kept of a pair or a stream, if train.eval_rows asks for no more
BASELINE_TOKENS = 1 << 23  # a bigram model counted on more of them is hardly better
CONVERSATIONS = "conversations (data.conversations=true)"
RECORDS = "conversations (data.format)"
PREFERENCES = "preferences (data.format)"
PROMPTS = "prompts (data.format)"
ONLY_FOR = {
    "split": ("a .bin/.idx pair", CONVERSATIONS),
    "cache_dir": ("a .bin/.idx pair",),
    "too_long": (CONVERSATIONS, RECORDS, PREFERENCES),
    "enable_thinking": (RECORDS, PREFERENCES, PROMPTS),
    "train_empty_think": (RECORDS, PREFERENCES),
    "packing": (RECORDS, PREFERENCES),
    "reset_at_eod": ("text", "a .bin/.idx pair", "a stream"),
    "json_key": ("a stream",),
    "shuffle_buffer": ("a stream",),
    "skip_bad": ("a stream", RECORDS, PREFERENCES, PROMPTS),
    "held_out": ("text", "a stream", RECORDS, PREFERENCES, PROMPTS),
    "max_bytes": ("text", RECORDS, PREFERENCES, PROMPTS),
    "max_samples": (RECORDS, PREFERENCES, PROMPTS, "a stream"),
}
TABLES = ("jsonl", "json", "csv", "parquet", "arrow")


class Corpus(NamedTuple):
    """train: a source for loader.Loader. held_out: packed rows (see packing.pack). held_text: text of the first held-out document.

    held_questions: of conversations.questions, where the data are conversations of data.format.
    """

    tokenizer: Tokenizer
    train: object
    held_out: dict
    held_text: str
    held_questions: tuple = ()


def load(config, vocab_size):
    """The corpus of a run. vocab_size is the model's; a tokenizer with more tokens is a ValueError."""
    prefixes = _checked_prefixes(config)
    if config.data.format in prompts.FORMATS:
        return _prompts(config, vocab_size)
    if prefixes:
        corpus = _pairs(config, vocab_size, prefixes)
    else:
        of_records = _preferences if config.data.format in preferences.FORMATS else _records
        corpus = (of_records if config.data.format else _stream if config.data.stream else _text)(config, vocab_size)
    for rows, name in ((corpus.held_out, "held-out"), (getattr(corpus.train, "arrays", None), "train")):
        if rows and not rows["loss_weights"].sum():
            raise ValueError(f"data.path={config.data.path!r}: the {name} part has no pair of tokens to learn from; give more text")
    return corpus


def whole(config, vocab_size):
    """(tokenizer, source) of all that data.path has, for evaluation; data.tokenizer has to be set."""
    data, seq_len = config.data, config.train.seq_len
    if data.format in preferences.FORMATS + prompts.FORMATS:
        what = "prompts" if data.format in prompts.FORMATS else "preferences"
        raise ValueError(f"data.format={data.format} has {what}, and evaluation reads text or conversations; give it other data")
    prefixes, tokenizer = _checked_prefixes(config), _loaded(data, vocab_size)
    if data.stream:
        return tokenizer, _text_stream(data, tokenizer, seq_len, held_out=0.0)
    if data.format:
        return tokenizer, _conversation_rows(config, tokenizer, {"whole": conversations.load(data, os.path.expanduser(data.tokenizer))})[
            "whole"
        ]
    if not prefixes:
        _refuse_table(data.path)
        documents = _capped(sources.find_documents(data.path), data.max_bytes)
        rows = packing.pack(tokenised([[d.text for d in documents]], tokenizer)[1][0], seq_len, tokenizer.eod_id, data.reset_at_eod)
        return tokenizer, PackedRows(rows, os.path.basename(data.path) or "library")
    pairs_ = [IndexedDataset(prefix) for _, prefix in prefixes]
    found = [_pair_rows(indexed, (0, len(indexed)), "whole", config, tokenizer) for indexed in pairs_]
    return tokenizer, _blended(found, prefixes)


def _checked_prefixes(config):
    """_prefixes of data.path. Raises ValueError for a key of data that is not for what is there."""
    prefixes = None if config.data.format else _prefixes(config.data.path)
    if config.data.stream and not config.data.path:
        raise ValueError("data.stream=true needs data.path, a file of records or a folder of them; use --config.data.path=texts.jsonl")
    if config.data.stream and prefixes:
        raise ValueError(f"data.stream=true reads text, and data.path={config.data.path!r} is a .bin/.idx pair; leave data.stream out")
    if config.data.conversations and not prefixes:
        raise ValueError(f"data.conversations=true reads a .bin/.idx pair, and data.path={config.data.path!r} is none; leave it out")
    pair = CONVERSATIONS if config.data.conversations else "a .bin/.idx pair"
    of_format = {**dict.fromkeys(preferences.FORMATS, PREFERENCES), **dict.fromkeys(prompts.FORMATS, PROMPTS)}
    records = of_format.get(config.data.format, RECORDS)
    kind = records if config.data.format else pair if prefixes else "a stream" if config.data.stream else "text"
    if config.data.format and config.data.stream:
        raise ValueError("data.stream=true reads text, and data.format asks for conversations, which are read at the start; leave one out")
    for key, kinds in ONLY_FOR.items():
        if kind not in kinds and config.data[key] != common.get_config().data[key]:
            raise ValueError(f"data.{key}={config.data[key]!r} is for {' or '.join(kinds)}, and data.path={config.data.path!r} is {kind}")
    return prefixes


def _prefixes(path):
    """[(weight, prefix)] if data.path names .bin/.idx pairs, else None."""
    if isinstance(path, str):
        if path.startswith(parts.SCHEME):
            return None
        stem = _stem(path)
        if not os.path.exists(stem) and any(os.path.exists(stem + end) for end in (".bin", ".idx")):
            return [(1.0, stem)]
        if "," not in path or os.path.exists(stem):
            return [(1.0, stem)] if path.endswith((".bin", ".idx")) else None
        path = [part.strip() for part in path.split(",")]
    try:
        blend = [(float(w), _stem(p)) for w, p in zip(path[::2], path[1::2], strict=True)]
    except (ValueError, TypeError, AttributeError):
        blend = []
    if not blend or not all(0 < w < float("inf") for w, _ in blend):
        raise ValueError(f"data.path={path!r} must be weight,prefix,weight,prefix with weights above 0; use '0.3,A,0.7,B'")
    return blend


def _stem(path):
    return os.path.expanduser(path.removesuffix(".bin").removesuffix(".idx"))


def _text(config, vocab_size):
    data, seq_len = config.data, config.train.seq_len
    _refuse_table(data.path)
    train, held = sources.split(_capped(sources.find_documents(data.path), data.max_bytes), data.held_out)
    given = _loaded(data, vocab_size) if data.tokenizer else None
    tokenizer, ids = tokenised([[d.text for d in part] for part in (train, held)], given, data.vocab_size)
    _check_vocabulary(tokenizer, f"data.vocab_size={data.vocab_size}", vocab_size)
    rows = [packing.pack(part, seq_len, tokenizer.eod_id, data.reset_at_eod) for part in ids]
    return Corpus(tokenizer, PackedRows(rows[0], os.path.basename(data.path) or "library"), rows[1], held[0].text)


def _refuse_table(path):
    """A dataset is no text file, nor is a file of records, or a folder of nothing else."""
    kind = None
    if path and not path.startswith(parts.SCHEME) and os.path.exists(os.path.expanduser(path)):
        try:
            kind = readers.kind_of(readers.find_files(path)[0])
        except ValueError:  # other files, or of several kinds
            return
    if kind in TABLES or path.startswith(parts.SCHEME):
        raise ValueError(f"data.path={path} holds records; use --config.data.stream=true, or make a pair of it with experiments.preprocess")


def _pairs(config, vocab_size, prefixes):
    data = config.data
    tokenizer = _loaded(data, vocab_size)
    every = [IndexedDataset(prefix) for _, prefix in prefixes]
    spans = [_spans(indexed, config) for indexed in every]
    train, valid = (
        _blended([_pair_rows(indexed, span[name], name, config, tokenizer) for indexed, span in zip(every, spans)], prefixes)
        for name in ("train", "valid")
    )
    held = loader.first_rows(valid, min(len(valid), _held_rows(config)), config.train.seed)
    first = held["tokens"][0][held["segment_ids"][0] == 1]
    return Corpus(tokenizer, train, held, tokenizer.decode(first))


def _spans(indexed, config):
    """{"train" and "valid": (start, stop) of the sequences} of a pair. Where the default data.split leaves a part without a row, as few
    sequences as make a row are held out, or none if that leaves none to train on; a line says so."""
    split, n = config.data.split, len(indexed)
    if split != common.get_config().data.split:
        return {name: gpt_index.split_range(split, n, name) for name in ("train", "valid")}
    needed = 2 if config.data.conversations else config.train.seq_len + 1
    ranges, tokens = gpt_index.split_ranges(split, n), np.concatenate([[0], np.cumsum(indexed.lengths, dtype=np.int64)])
    if all(tokens[stop] - tokens[start] >= needed for start, stop in (ranges["train"], ranges["valid"])):
        return {name: ranges[name] for name in ("train", "valid")}
    first = int(np.searchsorted(tokens, tokens[-1] - needed, side="right")) - 1  # of the fewest last sequences with so many tokens
    few = f"data       {indexed.prefix}: {n} sequences are too few for data.split={split};"
    if first > 0 and tokens[first] >= needed:
        print(f"{few} held out are the last {n - first}", flush=True)
        return {"train": (0, first), "valid": (first, n)}
    print(f"{few} none is held out, and eval_loss is of training data", flush=True)
    return {"train": (0, n), "valid": (0, n)}


def _blended(found, prefixes):
    """The sources of [(weight, prefix)] as one."""
    weights, paths = zip(*prefixes)
    return Blend(found, weights, [os.path.basename(path) for path in paths]) if len(found) > 1 else found[0]


def _pair_rows(indexed, span, name, config, tokenizer):
    """The rows of a split of a pair, of documents or of conversations."""
    data, seq_len, options = config.data, config.train.seq_len, {"vocab_size": tokenizer.vocab_size, "name": name}
    if not data.conversations:
        cache_dir = os.path.expanduser(data.cache_dir) or None
        return PairRows(indexed, span, seq_len, tokenizer.eod_id, reset=data.reset_at_eod, cache_dir=cache_dir, **options)
    masks = pairs.loss_name(indexed.prefix)
    if not os.path.exists(f"{masks}.idx"):
        raise ValueError(f"data.conversations=true needs {masks} beside {indexed.prefix}: experiments.preprocess --format=... makes both")
    rows = ExampleRows(indexed, IndexedDataset(masks), span, seq_len, tokenizer.eod_id, too_long=data.too_long, **options)
    print(f"data       {indexed.prefix}, {name}: {packing.describe(rows.report)}", flush=True)
    return rows


def _records(config, vocab_size):
    """Conversations of data.format, tokenised here; by a tokenizer that is trained on them where data.tokenizer names none."""
    data = config.data
    tokenizer = _loaded(data, vocab_size) if data.tokenizer else train_bpe(list(conversations.texts(data)), data.vocab_size)
    _check_vocabulary(tokenizer, f"data.vocab_size={data.vocab_size}", vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        found = conversations.load(data, folder)
    parts_ = dict(zip(("train", "held-out"), conversations.split(found, data.held_out)))
    rows = _conversation_rows(config, tokenizer, parts_)
    print(f"data       {packing.describe(rows['train'].report)}", flush=True)
    held = loader.first_rows(rows["held-out"], min(len(rows["held-out"]), _held_rows(config)), config.train.seed)
    questions = conversations.questions(parts_["held-out"], max(config.train.exact_match_rows, 1))
    return Corpus(tokenizer, rows["train"], held, tokenizer.decode(questions[0][0]), tuple(questions))


def _conversation_rows(config, tokenizer, found):
    """The ConversationRows of each of {name: Conversations}."""
    seq_len, options = config.train.seq_len, {"too_long": config.data.too_long, "packed": config.data.packing == "packed"}
    return {name: conversations.ConversationRows(part, seq_len, tokenizer.eod_id, name=name, **options) for name, part in found.items()}


def _preferences(config, vocab_size):
    """Pairs of answers, tokenised here; by a tokenizer that is trained on them where data.tokenizer names none."""
    data, seq_len = config.data, config.train.seq_len
    tokenizer = _loaded(data, vocab_size) if data.tokenizer else train_bpe(list(preferences.texts(data)), data.vocab_size)
    _check_vocabulary(tokenizer, f"data.vocab_size={data.vocab_size}", vocab_size)
    found = conversations.split(preferences.load(data, tokenizer, config.prefer.loss), data.held_out)
    options = {"most": config.prefer.row_pairs if data.packing == "packed" else 1, "too_long": data.too_long}
    train, held_out = (
        preferences.PreferenceRows(part, seq_len, tokenizer.eod_id, name=name, **options)
        for name, part in zip(("train", "held-out"), found)
    )
    print(f"data       {preferences.describe(train.report)}", flush=True)
    held = loader.first_rows(held_out, min(len(held_out), _held_rows(config)), config.train.seed)
    ids, mask = found[1].answers[0]
    return Corpus(tokenizer, train, held, tokenizer.decode(ids[: int(np.argmax(mask))]))


def _prompts(config, vocab_size):
    """Prompts for sampling, tokenised here; by a tokenizer that is trained on them where data.tokenizer names none. held_questions are
    the held-out (ids, record)."""
    data, seq_len = config.data, config.train.seq_len
    tokenizer = _loaded(data, vocab_size) if data.tokenizer else train_bpe(list(prompts.texts(data)), data.vocab_size)
    _check_vocabulary(tokenizer, f"data.vocab_size={data.vocab_size}", vocab_size)
    found = prompts.load(data, tokenizer, seq_len + 1 - config.rl.max_new_tokens)
    train, held = conversations.split(found, data.held_out)
    rows = prompts.PromptRows(train, seq_len, tokenizer.eod_id, config.rl.group_size)
    held = held.select(range(min(len(held), _held_rows(config))))
    held_rows = prompts.PromptRows(held, seq_len, tokenizer.eod_id)
    questions = tuple(zip(held.ids, held.records))
    return Corpus(tokenizer, rows, loader.rows_at(held_rows, 0, len(held)), tokenizer.decode(held.ids[0]), questions)


def _stream(config, vocab_size):
    tokenizer = _loaded(config.data, vocab_size)
    stream = _text_stream(config.data, tokenizer, config.train.seq_len, config.data.held_out)
    return Corpus(tokenizer, stream, *stream.held_rows(_held_rows(config)))


def _text_stream(data, tokenizer, seq_len, held_out):
    options = {"key": data.json_key, "reset": data.reset_at_eod, "shuffle_buffer": data.shuffle_buffer, "skip_bad": data.skip_bad}
    return TextStream(data.path, tokenizer, seq_len, held_out=held_out, most=data.max_samples, **options)


def _held_rows(config):
    return max(config.train.eval_rows, HELD_ROWS)


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


def _loaded(data, vocab_size):
    """The tokenizer of data.tokenizer."""
    if not data.tokenizer:
        raise ValueError(
            f"data.path={data.path!r} needs data.tokenizer, the folder of the tokenizer of its tokens; use --config.data.tokenizer=DIR"
        )
    tokenizer = Tokenizer.load(os.path.expanduser(data.tokenizer))
    _check_vocabulary(tokenizer, f"data.tokenizer={data.tokenizer}", vocab_size)
    return tokenizer


def _check_vocabulary(tokenizer, where, vocab_size):
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{where} has {tokenizer.vocab_size} tokens, more than the model's {vocab_size};"
            f" use --config.model_args.vocab_size={tokenizer.vocab_size}"
        )


def with_token_ids(cfg, tokenizer, trained, chats=False):
    """cfg with the tokenizer's end-of-document id as eos and pad: always of a tokenizer trained here, else where cfg has none.

    chats: the model learns conversations, so the ids that end a turn in the chat template are eos too. They go from here into the files of
    the model: a base model's own eos, the end of a document, never comes after a turn.
    """
    eod = tokenizer.eod_id
    if trained:
        cfg = cfg.replace(bos_id=None, eos_id=eod, pad_id=eod)
    cfg = cfg.replace(eos_id=eod if cfg.eos_id is None else cfg.eos_id, pad_id=eod if cfg.pad_id is None else cfg.pad_id)
    return cfg.with_eos(chat.turn_ends(tokenizer)) if chats else cfg


def describe(corpus, seq_len):
    """What the corpus holds, in a line."""
    held = f"{corpus.held_out['tokens'].size:,} held-out tokens"
    size = f"{len(corpus.train) * seq_len:,} training tokens" if hasattr(corpus.train, "__len__") else "training tokens as they come"
    return f"{size} and {held}; {corpus.train.fingerprint}"


def rows_seen(source, config):
    """The first rows of the run, each at most once an epoch, up to BASELINE_TOKENS of them: tokens, targets, loss_weights, ... [R, S]."""
    count = min(batch_ramp.total(config.train, config.train.steps), max(1, BASELINE_TOKENS // config.train.seq_len))
    count = min(count, len(source)) if hasattr(source, "__len__") else count
    return loader.first_rows(source, count, config.train.seed)


def bytes_per_target(tokenizer, rows):
    """Mean number of UTF-8 bytes that a weighted target stands for."""
    targets = rows["targets"][rows["loss_weights"] > 0]
    return float(tokenizer.token_bytes()[targets].mean())
