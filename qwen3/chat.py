"""Converts conversations to token ids and a loss mask with the tokenizer's own chat template, and reads three conversation formats."""

import itertools
import json
import re
from bisect import bisect_right

import numpy as np

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def encode_chat(tokenizer, messages, tools=None, enable_thinking=None):
    """Renders a conversation with the chat template and returns (ids int32 [n], mask uint8 [n]).

    mask is 1 on the tokens that an assistant produces: those after its generation prompt, up to and including the token that closes the
    turn. So the empty think block has mask 1 where the model writes it, and mask 0 where enable_thinking=False puts it into the prompt. A
    token that spans the start of the assistant's text has mask 1. Raises ValueError if the template fails, or if the start or end of a
    turn cannot be found.
    """
    for i, message in enumerate(messages):
        if not isinstance(message.get("content", ""), str | None):
            raise ValueError(f"message {i}: 'content' is {type(message['content']).__name__}; give text")
    if not any(m.get("role") == "assistant" for m in messages):
        raise ValueError("the conversation has no assistant turn, so there is nothing to learn; leave it out")
    if tokenizer.chat_template and GENERATION.search(tokenizer.chat_template):
        text, spans = _tagged_spans(tokenizer, messages, tools, enable_thinking)
        closed = False
    else:
        text, spans = _spans(tokenizer, messages, tools, enable_thinking)
        closed = True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError("the conversation contains half a surrogate pair, which is not a character; repair or remove it") from e
    ids, start, end = tokenizer.encode_offsets(text)
    mask = np.zeros(len(ids), np.uint8)
    for first, last in spans:
        mask[(start < last) & (np.maximum(end, start + 1) > first)] = 1
        if closed:
            k = int(np.searchsorted(start, last))
            if k == len(ids) or start[k] != last or not tokenizer.is_added(ids[k]):
                raise ValueError(f"chat template: no special token closes the assistant turn at character {last}; {_TAG}")
            mask[k] = 1
    return ids, mask


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
            raise ValueError(f"'history' has {_short(turn)}; give pairs of a question and an answer")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    texts = [_text(record, "instruction"), _text(record, "input") if record.get("input") else ""]
    messages.append({"role": "user", "content": "\n".join(t for t in texts if t)})
    return messages + [{"role": "assistant", "content": _text(record, "output")}], None


def sharegpt(record):
    """Returns (messages, tools) of a record with the key conversations, a list of {"from", "value"}, and optionally system and tools.

    from: human, gpt, function_call (value: the JSON of {"name", "arguments"}, or of a list of them), observation or system. Raises
    ValueError naming the key.
    """
    messages = [{"role": "system", "content": _text(record, "system")}] if record.get("system") else []
    for turn in _list(record, "conversations"):
        role = SHAREGPT_ROLES.get(str(turn.get("from")))
        if role is None:
            raise ValueError(f"from={turn.get('from')!r} is not known; use one of {', '.join(SHAREGPT_ROLES)}")
        value = _text(turn, "value")
        if turn["from"] == "function_call":
            calls = _json("function_call", value)
            calls = [{"type": "function", "function": c} for c in (calls if isinstance(calls, list) else [calls])]
            messages.append({"role": role, "content": "", "tool_calls": calls})
        else:
            messages.append({"role": role, "content": value})
    return messages, _tools(record)


def openai(record):
    """Returns (messages, tools) of a record with OpenAI's messages, and optionally tools. A content that is a list of texts is joined.
    Raises ValueError naming the key."""
    messages = []
    for message in _list(record, "messages"):
        if message.get("role") not in ROLES:
            raise ValueError(f"role={message.get('role')!r} is not known; use one of {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, list):
            if wrong := [p for p in content if not isinstance(p, dict) or not isinstance(p.get("text"), str)]:
                raise ValueError(f"'content' has the item {_short(wrong[0])}; only text is supported")
            content = "".join(p["text"] for p in content)
        if content is not None and not isinstance(content, str):
            raise ValueError(f"'content' is {type(content).__name__}; give text")
        if content is None and not message.get("tool_calls"):
            raise ValueError(f"a message of role {message['role']!r} has neither content nor tool calls; leave it out")
        messages.append({**message, "content": content or ""})
    return messages, _tools(record)


FORMATS = {"alpaca": alpaca, "sharegpt": sharegpt, "messages": openai}


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
    value = _json(key, record[key]) if isinstance(record[key], str) else record[key]
    if not isinstance(value, list) or not value or not all(isinstance(v, kind) for v in value):
        raise ValueError(f"{key!r} is {_short(value)}; give a list of {'objects' if kind is dict else 'pairs'}, at least one")
    return value


def _tools(record):
    """Returns the record's tools, a list of JSON schemas, or None. Some formats store the list as a JSON string."""
    tools = record.get("tools")
    return (_json("tools", tools) if isinstance(tools, str) else tools) or None


def _json(key, text):
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{key!r} is not JSON: {e}") from e


def _short(value):
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
