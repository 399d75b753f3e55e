"""Conversations for fine-tuning, straight from files of records: tokens with a loss mask, packed into rows or one a row."""

import hashlib
import itertools
import json
import os
from dataclasses import dataclass

import numpy as np

from experiments.data import encode, instructions, packing, readers, rows
from experiments.data.pairs import Skipped
from qwen3 import chat

GENERATED = 3200  # conversations that stand in for data.path where it is empty
PACKING = ("packed", "padded")


@dataclass(frozen=True)
class Conversations:
    """All conversations joined. ids: int32 [tokens]. mask: uint8 [tokens], or float32 with weights other than 0 and 1. ends: int64
    [count + 1], where each begins and the last ends."""

    ids: np.ndarray
    mask: np.ndarray
    ends: np.ndarray

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        """(ids, mask) of conversation i."""
        if not 0 <= i < len(self.ends) - 1:
            raise IndexError(i)
        part = slice(self.ends[i], self.ends[i + 1])
        return self.ids[part], self.mask[part]

    def select(self, places):
        """The conversations at these places."""
        found = [self[i] for i in places]
        ids, mask = (np.concatenate([pair[k] for pair in found]) for k in (0, 1))
        return Conversations(ids, mask, np.cumsum([0, *(len(pair[0]) for pair in found)]))


class ConversationRows:
    """A loader's source: conversations packed whole into rows by best fit, or with packed=False one a row, padded.

    name: the part of the data, for messages. report: see packing.plan_examples, whose too_long this is. ValueError where nothing is left
    to learn from.
    """

    def __init__(self, conversations, seq_len, pad_id, *, too_long="truncate", packed=True, name="train"):
        self.conversations, self.seq_len, self.pad_id = conversations, seq_len, pad_id
        self.plan, self.report = packing.plan_examples(conversations, seq_len, too_long, packed)
        if not self.report["rows"]:
            raise ValueError(
                f"data.path: the {name} part has no conversation with a target in train.seq_len={seq_len} tokens:"
                f" {packing.describe(self.report)}; raise train.seq_len, or give more records"
            )
        settings = np.frombuffer(repr((seq_len, pad_id, too_long, packed)).encode(), np.uint8)
        what = rows.digest(settings, conversations.ids, conversations.mask, conversations.ends)
        self.fingerprint = f"{len(conversations)} conversations, {PACKING[not packed]} {self.report['rows']}x{seq_len} {what}"

    def __len__(self):
        return self.report["rows"]

    def row(self, i):
        out = {key: value[0] for key, value in packing.empty_rows(1, self.seq_len, self.pad_id).items()}
        packing.fill_row(out, self.plan, i, self.conversations)
        return out


def found_records(data):
    """An iterator over the readers.Records of data.path; made-up instructions where it is empty. Raises ValueError for a wrong key."""
    if not data.path:
        if data.format != "messages":
            raise ValueError(f"data.format={data.format!r} needs data.path, a file of records or a folder of them")
        made = enumerate(instructions.records(GENERATED))
        return (readers.Record(value, f"instruction {i}", 0) for i, value in made)
    if not isinstance(data.path, str):
        raise ValueError(f"data.path={data.path!r} must be one file or folder of conversations; blend pairs made by experiments.preprocess")
    found = readers.records(os.path.expanduser(data.path), name="data.path", bad=Skipped(data.skip_bad, "--config.data.skip_bad=true"))
    return _first(found, data.max_samples, data.max_bytes)


def _first(records, most, most_bytes):
    """The first records: at most `most`, and as many as have `most_bytes` as JSON together, but one at least; 0 = no limit."""
    size = 0
    for number, record in enumerate(itertools.islice(records, most or None)):
        if most_bytes:
            size += len(json.dumps(record.value, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass"))
        if number and size > most_bytes > 0:
            return
        yield record


def load(data, tokenizer_folder):
    """The Conversations of data.path in the format and with the thinking that config.data names, by the tokenizer in that folder."""
    thinking = {"enable_thinking": encode.THINKING[data.enable_thinking], "train_empty_think": data.train_empty_think}
    job = encode.Job(tokenizer_folder, append_eod=False, format=data.format, **thinking)
    bad, ids, masks, lengths = Skipped(data.skip_bad, "--config.data.skip_bad=true"), [], [], []
    for batch in encode.encode(found_records(data), job):
        for message in batch.bad:
            bad(message)
        ids.append(batch.outputs["text"][0])
        masks.append(batch.outputs["loss"][0])
        lengths.append(batch.outputs["text"][1])
    if not sum(map(len, lengths)):
        raise ValueError(f"data.path={data.path} has no conversation; give a file of records with some")
    ends = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    return Conversations(np.concatenate(ids), np.concatenate(masks), ends)


def split(conversations, held_out):
    """(train, held out): which are held out, a hash of their number says, so that more records move none. Each has one at least."""
    count = len(conversations)
    if count < 2:
        raise ValueError(f"data.path has {count} conversation; give two or more, as one at least is held out (data.held_out={held_out})")
    drawn = np.array([int.from_bytes(hashlib.blake2b(str(i).encode(), digest_size=4).digest(), "big") for i in range(count)])
    order = np.argsort(drawn, kind="stable")
    held = min(max(1, int(np.count_nonzero(drawn < held_out * 2**32))), count - 1)
    return conversations.select(np.sort(order[held:])), conversations.select(np.sort(order[:held]))


def texts(data):
    """What a tokenizer can be trained on: what is said in each conversation."""
    for record in found_records(data):
        messages, _ = chat.FORMATS[data.format](record.value)
        yield "\n".join(message["content"] for message in messages)


def questions(conversations, count):
    """[(ids up to the last answer, ids of that answer)] of the first `count` conversations. The answer ends in the token that closes it."""
    out = []
    for i in range(min(count, len(conversations))):
        ids, weights = conversations[i]
        mask = weights > 0
        last = len(mask) - int(np.argmax(mask[::-1]))
        first = last - int(np.argmin(np.concatenate([mask[:last][::-1], [False]])))
        out.append((ids[:first].tolist(), ids[first:last].tolist()))
    return out
