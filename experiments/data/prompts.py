"""Prompts for reinforcement learning, straight from files of records, each repeated for a group of answers.

A record of data.format=prompts has `prompt`, a text or a list of messages, perhaps `tools`, and whatever else its reward reads, such as
`answer`.
"""

import json
from dataclasses import dataclass

import numpy as np

from experiments.data import conversations, encode, instructions, loader, readers, rows
from experiments.data.pairs import Skipped
from qwen3 import chat

FORMATS = ("prompts",)


@dataclass(frozen=True)
class Prompts:
    """ids: the list of token ids of each prompt, up to where its answer begins. records: the record of each, a dict."""

    ids: list
    records: list

    def __len__(self):
        return len(self.ids)

    def select(self, places):
        """The prompts at these places."""
        return Prompts([self.ids[i] for i in places], [self.records[i] for i in places])


def found_records(data):
    """An iterator over the readers.Records of data.path; the sums of two digits where it is empty."""
    if data.path:
        return conversations.found_records(data)
    return (readers.Record(value, f"sum {i}", 0) for i, value in enumerate(instructions.sums()))


def texts(data):
    """What a tokenizer can be trained on: each prompt that is a text, and each answer that is one."""
    for record in found_records(data):
        values = (record.value.get(key) for key in ("prompt", "answer")) if isinstance(record.value, dict) else ()
        yield "".join(value for value in values if isinstance(value, str))


def load(data, tokenizer, most):
    """The Prompts of data.path. most: the most tokens of a prompt; longer ones are left out, and a line says how many."""
    bad, ids, records, long = Skipped(data.skip_bad, "--config.data.skip_bad=true"), [], [], 0
    for record in found_records(data):
        try:
            found = _encoded(data, tokenizer, record.value)
        except (ValueError, RecursionError) as error:
            bad(f"{record.where}: {error}")
            continue
        if len(found) > most:
            long += 1
            continue
        ids.append(found)
        records.append(record.value)
    if long:
        print(f"data       {long} prompts have more than {most} tokens and are left out", flush=True)
    if not ids:
        raise ValueError(
            f"data.path={data.path} has no prompt of at most {most} tokens, train.seq_len + 1 - rl.max_new_tokens; give shorter prompts, or"
            " raise train.seq_len"
        )
    return Prompts(ids, records)


def _encoded(data, tokenizer, record):
    prompt = record.get("prompt")
    if not prompt or not isinstance(prompt, str | list):
        raise ValueError(f"'prompt' is {prompt!r:.40}; give text, or a list of messages")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = chat.prompt_text(tokenizer, messages, record.get("tools"), encode.THINKING[data.enable_thinking])
    return tokenizer.encode(text, allow_special=True)


class PromptRows:
    """A loader's source: in every epoch each prompt once, in an order that depends on the seed, repeated `group_size` times.

    A row has the prompt's tokens [S], and [1] each: `size`, their number; `record`, the prompt's place among `prompts` plus 1, as rows that
    fill up a batch have 0; and `draw`, the number of the sample in the run, on which its random numbers depend.
    """

    def __init__(self, prompts, seq_len, pad_id, group_size=1):
        self.prompts, self.seq_len, self.pad_id, self.group_size = prompts, seq_len, pad_id, group_size
        every = [np.array(ids, np.int32) for ids in prompts.ids]
        said = np.frombuffer(json.dumps(prompts.records, default=str).encode("utf-8", "surrogatepass"), np.uint8)
        settings = np.frombuffer(repr((seq_len, pad_id, group_size)).encode(), np.uint8)
        self.fingerprint = f"{len(prompts)} prompts, {group_size} answers each, {rows.digest(settings, *every, said)}"

    def __len__(self):
        return len(self.prompts)

    def row(self, i, draw=0):
        tokens, size = np.full(self.seq_len, self.pad_id, np.int32), len(self.prompts.ids[i])
        tokens[:size] = self.prompts.ids[i]
        return {"tokens": tokens, **{key: np.array([n], np.int64) for key, n in (("size", size), ("record", i + 1), ("draw", draw))}}

    def sample(self, number, seed):
        epoch, place = divmod(number // self.group_size, len(self))
        return self.row(int(loader.epoch_order(seed, epoch, len(self))[place]), number)
