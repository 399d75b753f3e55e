"""Preferences: pairs of answers to one prompt, straight from files of records, packed whole into rows.

A record of data.format=pairs has `chosen` and `rejected`, each a text or a list of messages, and perhaps `prompt`, a text or a list of
messages, `system` and `tools`. Without a prompt, both are whole dialogues, and what they share at their start is the prompt; as texts they
have the form of Anthropic's HH-RLHF, "\\n\\nHuman: ...\\n\\nAssistant: ...". A record of data.format=unpaired has `prompt`, `completion`
and `label`, true for a desirable answer. Sources of the forms: TRL's dataset formats; Bai et al. 2022.
"""

import re
from dataclasses import dataclass

import numpy as np

from experiments.data import conversations, encode, instructions, packing, readers, rows
from experiments.data.conversations import Conversations
from experiments.data.pairs import Skipped
from qwen3 import chat
from qwen3.messages import normal
from qwen3.schema import short

GENERATED = 1600  # pairs that stand in for data.path where it is empty
FORMATS = ("pairs", "unpaired")
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}
CHOSEN, REJECTED, OTHER = 1, -1, 0  # signs of answers


@dataclass(frozen=True)
class Pairs:
    """Pairs of encoded answers, each after its prompt. answers: Conversations, of which 2i and 2i + 1 are those of pair i. signs: int8
    [2 * pairs], CHOSEN, REJECTED, or OTHER for an answer to another prompt."""

    answers: Conversations
    signs: np.ndarray

    def __len__(self):
        return len(self.signs) // 2

    def select(self, places):
        """The pairs at these places."""
        both = np.stack([2 * np.asarray(places), 2 * np.asarray(places) + 1], 1).ravel()
        return Pairs(self.answers.select(both), self.signs[both])


@dataclass(frozen=True)
class Prompted:
    """A prompt, as messages and tools, and answers to it: a list of (messages, sign)."""

    prompt: list
    tools: list | None
    answers: list


def pair(record):
    """Returns the Prompted of a record of data.format=pairs. Raises ValueError naming the key."""
    given, both = _messages(record, "prompt", "user"), [_messages(record, key, "assistant") for key in ("chosen", "rejected")]
    for key, answer in zip(("chosen", "rejected"), both):
        if answer is None:
            raise ValueError(f"key {key!r} is missing; the keys are {', '.join(map(str, record))}")
    shared = 0
    while shared < min(map(len, both)) and both[0][shared] == both[1][shared]:
        shared += 1
    if given is None:
        prompt, both = both[0][:shared], [answer[shared:] for answer in both]
    else:
        prompt, both = given, [answer[len(given) :] if answer[: len(given)] == given else answer for answer in both]
    if both[0] == both[1]:
        raise ValueError("chosen and rejected are equal; leave the record out")
    return _prompted(record, prompt, [(both[0], CHOSEN), (both[1], REJECTED)])


def unpaired(record):
    """Returns the Prompted, with one answer, of a record of data.format=unpaired. Raises ValueError naming the key."""
    prompt, answer = _messages(record, "prompt", "user"), _messages(record, "completion", "assistant")
    for key, found in (("prompt", prompt), ("completion", answer)):
        if found is None:
            raise ValueError(f"key {key!r} is missing; the keys are {', '.join(map(str, record))}")
    label = record.get("label")
    if label not in (True, False):  # 1 and 0 are equal to these
        raise ValueError(f"'label' is {short(label)}; give true for a desirable answer, or false")
    return _prompted(record, prompt, [(answer, CHOSEN if label else REJECTED)])


def _prompted(record, prompt, answers):
    if record.get("system"):
        prompt = [{"role": "system", "content": record["system"]}, *prompt]
    if not prompt:
        raise ValueError("the record has no prompt; give the key prompt, or two dialogues that begin alike")
    for answer, _ in answers:
        if not answer or answer[0].get("role") != "assistant":
            begins = short(answer[0].get("role")) if answer else "nothing"
            raise ValueError(f"an answer must begin with the assistant's turn, and not with {begins}, after the prompt that both share")
    return Prompted(prompt, record.get("tools"), answers)


def _messages(record, key, role):
    """Returns the messages of a text or a list of messages; None if the record has none."""
    value = record.get(key)
    if value is None or isinstance(value, list):
        return None if value is None else normal(value, None)[0]
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is {type(value).__name__}; give text, or a list of messages")
    return _dialogue(value) if TURN.match(value) else [{"role": role, "content": value}]


def _dialogue(text):
    """Returns the messages of a text of the form "\\n\\nHuman: ...\\n\\nAssistant: ...", without an empty last turn."""
    parts = TURN.split(text)[1:]
    messages = [{"role": ROLES[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])]
    return messages[:-1] if messages[-1]["role"] == "assistant" and not messages[-1]["content"] else messages


def found_records(data):
    """An iterator over the readers.Records of data.path; made-up preferences where it is empty."""
    if data.path:
        return conversations.found_records(data)
    return (readers.Record(value, f"preference {i}", 0) for i, value in enumerate(instructions.preferences(GENERATED, data.format)))


def _all(data, bad):
    """Yields (where, Prompted) of all records of data.path that can be used."""
    read = pair if data.format == "pairs" else unpaired
    for record in found_records(data):
        try:
            found = read(record.value)
        except (ValueError, RecursionError) as error:
            bad(f"{record.where}: {error}")
            continue
        yield record.where, found


def texts(data):
    """What a tokenizer can be trained on: what is said in each prompt and its answers."""
    for _, found in _all(data, lambda message: None):
        said = [*found.prompt, *(message for answer, _ in found.answers for message in answer)]
        yield "\n".join(message.get("content") or "" for message in said)


def load(data, tokenizer, loss):
    """The Pairs of data.path. loss: prefer.loss.

    For kto, each answer stands alone, with the first answer of the next record after its own prompt as the second of its pair: from these
    the reference point is estimated. For reward, all tokens of a dialogue are read, and the target that counts is the one after the last.
    """
    bad = Skipped(data.skip_bad, "--config.data.skip_bad=true")
    found = list(_all(data, bad))
    encoded, signs = [], []
    for number, (where, one) in enumerate(found):
        if loss == "kto":
            _, other = found[(number + 1) % len(found)]
            groups = [((answer, sign), (other.answers[0][0], OTHER)) for answer, sign in one.answers]
        else:
            groups = [one.answers]
        try:
            for group in groups:
                encoded += [_encoded(data, tokenizer, one, answer, loss) for answer, _ in group]
                signs += [sign for _, sign in group]
        except (ValueError, RecursionError) as error:
            bad(f"{where}: {error}")
            del encoded[len(signs) :]
    if not signs:
        raise ValueError(f"data.path={data.path} has no pair of answers; give a file of records with some")
    ids, masks = (np.concatenate([each[k] for each in encoded]) for k in (0, 1))
    return Pairs(Conversations(ids, masks, np.cumsum([0, *(len(each[0]) for each in encoded)])), np.array(signs, np.int8))


def _encoded(data, tokenizer, one, answer, loss):
    """Returns (ids int32 [n], mask uint8 [n]) of an answer after its prompt, which has no loss."""
    prompt = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in one.prompt]
    thinking = encode.THINKING[data.enable_thinking], data.train_empty_think
    ids, mask = chat.encode_chat(tokenizer, [*prompt, *answer], one.tools, *thinking)
    if mask.dtype != np.uint8:
        raise ValueError(f"a turn has a weight of {mask.max():g}, and answers have none but 0 and 1; leave it out")
    if loss != "reward":
        return ids, mask
    ids = np.append(ids, np.int32(tokenizer.eod_id))
    return ids, (np.arange(len(ids)) == len(ids) - 1).astype(np.uint8)


class PreferenceRows:
    """A loader's source: pairs packed into rows, both answers of a pair in one row, at most `most` pairs in a row.

    A pair takes as many places as its two answers with their prompts have tokens, less 1 each. too_long says what becomes of one that takes
    more than seq_len: `truncate` cuts the end of each answer that is longer than half a row. reference: None, or float32 [rows, S], the
    nats of the targets under the reference model. report: of packing.plan_examples, where examples are pairs.
    """

    def __init__(self, pairs, seq_len, pad_id, *, most, too_long="truncate", name="train"):
        self.pairs, self.seq_len, self.pad_id, self.reference = pairs, seq_len, pad_id, None
        self.plan, self.report = plan(pairs, seq_len, too_long, most)
        if not self.report["rows"]:
            raise ValueError(
                f"data.path: the {name} part has no pair whose answers have a target in train.seq_len={seq_len} tokens, which hold both:"
                f" {describe(self.report)}; raise train.seq_len, or give more records"
            )
        settings = np.frombuffer(repr((seq_len, pad_id, too_long, most)).encode(), np.uint8)
        what = rows.digest(settings, pairs.answers.ids, pairs.answers.mask, pairs.answers.ends, pairs.signs)
        self.fingerprint = f"{len(pairs)} pairs of answers, {self.report['rows']}x{seq_len} {what}"

    def __len__(self):
        return self.report["rows"]

    def row(self, i):
        out = {key: value[0] for key, value in packing.empty_rows(1, self.seq_len, self.pad_id).items()}
        packing.fill_row(out, self.plan, i, self.pairs.answers)
        inside, out["signs"] = slice(self.plan.first[i], self.plan.first[i + 1]), np.zeros(self.seq_len, np.float32)
        out["signs"][self.plan.start[inside]] = self.pairs.signs[self.plan.example[inside]]
        return out if self.reference is None else {**out, "reference": self.reference[i]}


def plan(pairs, seq_len, too_long, most):
    """Returns (packing.Plan of the answers, report): whole pairs into as few rows as best fit finds, at most `most` in a row. See
    PreferenceRows for a pair that is too long; one in which an answer has no target that counts is left out."""
    report = dict.fromkeys(("examples", "packed", "rows", "truncated", "dropped", "cut_tokens", "no_target"), 0)
    kept = []
    for i in range(len(pairs)):
        report["examples"] += 1
        answers = [pairs.answers[2 * i], pairs.answers[2 * i + 1]]
        sizes = [len(ids) - 1 for ids, _ in answers]
        if sum(sizes) > seq_len:
            if too_long == "error":
                raise ValueError(
                    f"pair {i} takes {sum(sizes)} tokens with both of its answers, more than train.seq_len={seq_len}; raise train.seq_len,"
                    " or use data.too_long='truncate' or 'drop'"
                )
            cut = [min(size, seq_len // 2) for size in sizes]
            report["cut_tokens"] += sum(sizes) - (sum(cut) if too_long == "truncate" else 0)
            report["truncated" if too_long == "truncate" else "dropped"] += 1
            if too_long == "drop":
                continue
            sizes = cut
        if not all(np.any(mask[1 : size + 1]) for (_, mask), size in zip(answers, sizes)):
            report["no_target"] += 1
            continue
        kept.append((i, *sizes))
    kept = np.array(kept, np.int64).reshape(-1, 3)
    row, start, count = packing.best_fit(kept[:, 1] + kept[:, 2], seq_len, most)
    order = np.lexsort((start, row))
    kept, start, row = kept[order], start[order], row[order]
    example = np.stack([2 * kept[:, 0], 2 * kept[:, 0] + 1], 1).ravel()
    starts = np.stack([start, start + kept[:, 1]], 1).ravel()
    first = 2 * np.searchsorted(row, np.arange(count + 1))
    used = int(kept[:, 1:].sum())
    report.update(packed=len(kept), rows=count, fill=used / (count * seq_len) if count else 0.0)
    return packing.Plan(example, kept[:, 1:].ravel(), starts, first), report


def describe(report):
    """A report of plan(), in a line."""
    return packing.describe(report).replace("conversations", "pairs of answers")
