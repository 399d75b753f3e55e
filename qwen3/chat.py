"""Converts conversations to token ids and a loss mask with the tokenizer's own chat template, and reads three conversation formats."""

import itertools
import json
import re
from bisect import bisect_right

import numpy as np

from qwen3.messages import ROLES, check_template, normal, parse_json
from qwen3.schema import short

SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)  # before a call
EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def prompt_text(tokenizer, messages, tools=None, enable_thinking=None, strict=False, begin_turn=True, continue_last=False):
    """The text of a conversation, with begin_turn up to where the assistant's next turn begins; with continue_last up to the end of the
    last message's content, which the assistant goes on with. messages, tools: in any form of qwen3/messages.py.

    Raises ValueError for messages that are wrong or that the chat template refuses. strict: also for a key that nothing reads.
    """
    messages, tools = normal(messages, tools)
    check_template(messages, tools, tokenizer.chat_template or "", strict)
    messages = [_unweighted(message) for message in messages]
    if not continue_last:
        return tokenizer.apply_chat_template(messages, tools, add_generation_prompt=begin_turn, enable_thinking=enable_thinking)
    if messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls"):
        raise ValueError("the last message is continued, so it must be the assistant's, without tool calls")
    mark, _ = _unused(messages, tools, tokenizer.chat_template)
    marked = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + mark}]
    text = tokenizer.apply_chat_template(marked, tools, enable_thinking=enable_thinking)
    if text.count(mark) != 1:
        raise ValueError("the chat template does not write the last message once, so that it cannot be continued; leave it out")
    return text.partition(mark)[0]


def encode_chat(tokenizer, messages, tools=None, enable_thinking=None, train_empty_think=False):
    """(ids int32 [n], mask [n]) of a conversation in any form of qwen3/messages.py; the text is what the chat template makes of it.

    The mask is uint8, or float32 where a turn has another weight than 0 and 1. It is 1 on the tokens that an assistant produces: what
    follows its generation prompt, up to and with the token that closes the turn; on a turn with a weight, that weight. A token that is part
    the assistant's counts as its own. An empty think block, which templates of thinking models put before an answer without reasoning, is
    0, so that learning such answers does not unlearn thinking; with train_empty_think it has its turn's weight where the model writes it,
    and still 0 where enable_thinking=False puts it into the prompt. Raises ValueError if the template fails or hides where a turn starts or
    ends.
    """
    messages, tools = normal(messages, tools)
    trained = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
    if not any(trained):
        what = "no assistant turn" if not trained else "no assistant turn with loss"
        raise ValueError(f"the conversation has {what}, so there is nothing to learn; leave it out")
    check_template(messages, tools, tokenizer.chat_template or "", strict=False)
    messages = [_unweighted(message) for message in messages]
    if tokenizer.chat_template and GENERATION.search(tokenizer.chat_template):
        text, spans = _tagged_spans(tokenizer, messages, tools, enable_thinking)
        closed = False
    else:
        text, spans = _spans(tokenizer, messages, tools, enable_thinking)
        closed = True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError("the conversation has half a surrogate pair, which is no character; mend or drop it") from e
    if {*trained} == {1}:
        trained = [1] * len(spans)
    elif len(spans) != len(trained):
        raise ValueError(f"chat template: it tags {len(spans)} turns of {len(trained)} as the assistant's; {_TAG} once a turn")
    ids, start, end = tokenizer.encode_offsets(text)
    mask = np.zeros(len(ids), np.uint8 if {*trained} <= {0, 1} else np.float32)
    for (first, last), weight in zip(spans, trained):
        mask[(start < last) & (np.maximum(end, start + 1) > first)] = weight
        if closed:
            k = int(np.searchsorted(start, last))
            if k == len(ids) or start[k] != last or not tokenizer.is_added(ids[k]):
                raise ValueError(f"chat template: no special token closes the assistant turn at character {last}; {_TAG}")
            mask[k] = weight
        empty = None if train_empty_think else EMPTY_THINK.match(text, first, last)
        if empty:
            mask[(start >= first) & (end <= empty.end()) & (end > start)] = 0
    return ids, mask


def turn_ends(tokenizer):
    """The ids that end an assistant's turn in the tokenizer's chat template, as a tuple: (the id of <|im_end|>,) for Qwen's. Without a
    template, or with one that does not show where a turn ends, ()."""
    if tokenizer.chat_template is None:
        return ()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    try:
        ids, mask = encode_chat(tokenizer, turns)
    except ValueError:  # encode_chat says it again where such conversations are trained on
        return ()
    last = np.flatnonzero(np.diff(np.append(mask, 0).astype(int)) < 0)
    return tuple(sorted({int(i) for i in ids[last] if tokenizer.is_added(i)}))


def _unweighted(message):
    return {key: value for key, value in message.items() if key != "weight"}


_TAG = "wrap what the assistant produces in {% generation %} ... {% endgeneration %}"


def _spans(tokenizer, messages, tools, enable_thinking):
    """Returns (text, [(start, end)]): the spans of characters that the assistant produces, without the token that closes each turn.

    How a template renders a turn may depend on the turns after it (Qwen3 drops the reasoning of earlier turns), so rendering only the
    first turns does not show where a turn is. Instead, for each turn the conversation is rendered a second time with a mark in place of
    the turn's content: the text before and after that did not change does not belong to the turn.
    """
    mark, _ = _unused(messages, tools, tokenizer.chat_template)

    def render(messages, prompt=False, thinking=enable_thinking):
        return tokenizer.apply_chat_template(messages, tools, add_generation_prompt=prompt, enable_thinking=thinking)

    text, spans = render(messages), []
    for i, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        marked = render(messages[:i] + [_marked(message, mark, replace=True)] + messages[i + 1 :])
        if marked.count(mark) != 1:
            raise ValueError(f"chat template: message {i} (assistant) is not rendered once; {_TAG}")
        content, end = _shared_prefix(text, marked), len(text) - _shared_suffix(text, marked)
        start = _after_prompt(render, messages, i, text, content, mark)
        spans.append((min(start, end), end))
    return text, spans


def _after_prompt(render, messages, i, text, content, mark):
    """Returns the place in the text where the generation prompt of turn i ends. content: the place where the turn's content starts, which
    is there or later."""
    prompts = []
    if i > 0:
        before = [*messages[: i - 1], _marked(messages[i - 1], mark, replace=False)]
        marked = render(before + messages[i:])
        # Only the rest of the previous message is between this place and turn i.
        place = len(text) - _shared_suffix(text, marked)
        for thinking in ({}, {"thinking": None}, {"thinking": True}, {"thinking": False}):
            try:
                prompts.append(render(before, prompt=True, **thinking).rpartition(mark)[2])
            except ValueError:  # the template accepts the complete conversation, but not its first turns alone
                break
            if marked.count(mark) == 1 and text.startswith(prompts[-1], place, content):
                return place + len(prompts[-1])
        if prompts:
            shared = _shared_prefix(prompts[0], text[place:content])
            if marked.count(mark) == 1 and shared >= len(render(before).rpartition(mark)[2]):
                return place + shared
    opening = [{"role": "user", "content": mark}]
    prompt = render(opening, prompt=True, thinking=None)[len(render(opening, thinking=None)) :]
    place = text.rfind(prompt, 0, content) if prompt else -1
    if place < 0:
        raise ValueError(f"chat template: the generation prompt of message {i} is not found in the conversation; {_TAG}")
    return place + len(prompt)


def _marked(message, mark, replace):
    """Returns a copy of the message with the mark in place of all its content; without `replace`, with the mark in the middle of its
    content, if it has any."""
    content = message.get("content") or ""
    if content and not replace:
        half = len(content) // 2
        return {**message, "content": content[:half] + mark + content[half:]}
    return {**{k: v for k, v in message.items() if k not in ("reasoning_content", "tool_calls")}, "content": mark}


def _tagged_spans(tokenizer, messages, tools, enable_thinking):
    """Returns (text, spans) as _spans does, for a template that encloses the assistant's text in `generation` tags, as transformers defines
    them."""
    opened, closed = _unused(messages, tools, tokenizer.chat_template)
    options = {"enable_thinking": enable_thinking, "generation_marks": [opened, closed]}
    marked = tokenizer.apply_chat_template(messages, tools, **options)
    text, spans = "", []
    for section in re.split(f"({opened}.*?{closed})", marked, flags=re.DOTALL):
        plain = section.strip(opened + closed) if section.startswith(opened) else section
        if section.startswith(opened):
            spans.append((len(text), len(text) + len(plain)))
        text += plain
    return text, spans


def _unused(*values):
    """Returns two private-use characters that occur in none of the values."""
    used = json.dumps(values, ensure_ascii=False, default=str)
    free = list(itertools.islice((c for c in map(chr, range(0xE000, 0xF900)) if c not in used), 2))
    if len(free) < 2:
        raise ValueError("the conversation uses every private-use character; leave it out")
    return free[:2]


def _shared_prefix(a, b):
    """Returns the length of the longest common prefix of a and b."""
    size = min(len(a), len(b))
    return bisect_right(range(1, size + 1), False, key=lambda n: a[:n] != b[:n])


def _shared_suffix(a, b):
    """Returns the length of the longest common suffix of a and b."""
    size = min(len(a), len(b))
    return bisect_right(range(1, size + 1), False, key=lambda n: a[-n:] != b[-n:])


def alpaca(record):
    """Returns (messages, None) of a record with the keys instruction and output, and optionally input, system and history, a list of
    [question, answer]. Raises ValueError naming the key."""
    messages = [{"role": "system", "content": _text(record, "system")}] if record.get("system") else []
    for turn in _list(record, "history", (list, tuple)) if record.get("history") else []:
        if len(turn) != 2 or not all(isinstance(t, str) for t in turn):
            raise ValueError(f"'history' has {short(turn)}; give pairs of a question and an answer")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    parts = [_text(record, "instruction"), _text(record, "input") if record.get("input") else ""]
    messages.append({"role": "user", "content": "\n".join(p for p in parts if p)})
    return normal([*messages, {"role": "assistant", "content": _text(record, "output")}])


def sharegpt(record):
    """Returns (messages, tools) of a record with the key conversations, a list of {"from", "value"}, and optionally system and tools.

    from: human, gpt, function_call (its value the JSON of {"name", "arguments"}, or a list of them, perhaps after a think block),
    observation, system. Other keys of a turn, such as weight, are those of a message.
    """
    messages = [{"role": "system", "content": _text(record, "system")}] if record.get("system") else []
    for turn in _list(record, "conversations"):
        role = SHAREGPT_ROLES.get(str(turn.get("from")))
        if role is None:
            raise ValueError(f"from={turn.get('from')!r} is not known; use one of {', '.join(SHAREGPT_ROLES)}")
        message = {**{key: value for key, value in turn.items() if key not in ("from", "value")}, "role": role}
        message["content"] = value = _text(turn, "value")
        if turn["from"] == "function_call":
            if thought := THOUGHT.match(value):
                message["reasoning_content"], value = thought[1].strip("\n"), value[thought.end() :]
            calls = parse_json("function_call", value)
            message.update(content="", tool_calls=calls if isinstance(calls, list) else [calls])
        messages.append(message)
    return _with_tools(messages, record)


def openai(record):
    """(messages, tools) of a record with OpenAI's messages, and tools if it has them. The text parts of a content are joined."""
    return _with_tools(_list(record, "messages"), record)


FORMATS = {"alpaca": alpaca, "sharegpt": sharegpt, "messages": openai}


def _with_tools(messages, record):
    if record.get("chat_template_kwargs"):
        given = short(record["chat_template_kwargs"])
        raise ValueError(f"chat_template_kwargs={given} of a record is not supported; set enable_thinking for all of them")
    return normal(messages, record.get("tools") or record.get("functions"))


def _text(record, key):
    """Returns record[key], which must be a string."""
    if key not in record:
        raise ValueError(f"key {key!r} is missing; the keys are {', '.join(map(str, record))}")
    if not isinstance(record[key], str):
        raise ValueError(f"{key!r} is {type(record[key]).__name__}; give text")
    return record[key]


def _list(record, key, kind=dict):
    """Returns record[key], which must be a list of at least one `kind`, or the JSON of such a list."""
    if key not in record:
        raise ValueError(f"key {key!r} is missing; the keys are {', '.join(map(str, record))}")
    value = parse_json(key, record[key]) if isinstance(record[key], str) else record[key]
    if not isinstance(value, list) or not value or not all(isinstance(v, kind) for v in value):
        raise ValueError(f"{key!r} is {short(value)}; give a list of {'objects' if kind is dict else 'pairs'}, at least one")
    return value
