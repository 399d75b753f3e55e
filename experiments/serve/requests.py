"""Checks the requests of the OpenAI API, and turns a JSON body into prompts of token ids and options of the engine.

Nothing in a body is trusted. A field that is unknown, wrong or not supported raises a Refused that names it.
"""

import json
import math
import secrets
from dataclasses import dataclass

from qwen3 import chat

MAX_STOPS, MAX_STOP_CHARACTERS, MAX_TOP_LOGPROBS, COMPLETION_TOKENS = 16, 256, 20, 16
NUMBERS = {  # field: (type, least, most, default)
    "temperature": (float, 0, 100, 1.0),
    "top_p": (float, 1e-9, 1, 1.0),
    "min_p": (float, 0, 1, 0.0),
    "top_k": (int, -1, 2**31 - 1, 0),
    "repetition_penalty": (float, 1e-3, 1e3, 1.0),
    "seed": (int, -(2**63), 2**63 - 1, None),
    "n": (int, 1, 128, 1),
    "max_tokens": (int, 1, 2**31 - 1, None),
    "max_completion_tokens": (int, 1, 2**31 - 1, None),
}
BOTH = {*NUMBERS, "model", "stop", "stream", "stream_options", "logprobs", "user"}
CHAT = {"messages", "tools", "tool_choice", "top_logprobs", "chat_template_kwargs"}
# Unsupported fields that clients send with a value that changes nothing: field -> the values that are accepted.
NEUTRAL = {
    "frequency_penalty": (0, 0.0, None),
    "presence_penalty": (0, 0.0, None),
    "logit_bias": (None, {}),
    "best_of": (1, None),
    "echo": (False, None),
    "suffix": (None, ""),
    "store": (False, None),
    "response_format": (None, {"type": "text"}),
    "parallel_tool_calls": (None, True),
    "service_tier": (None, "auto", "default"),
    "metadata": (None, {}),
}


class Refused(Exception):
    """Raised for a request that is answered with an error. param: the wrong field. code: OpenAI's error code."""

    def __init__(self, message, param=None, status=400, code=None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


@dataclass(frozen=True)
class Asked:
    """A checked request. prompts: lists of token ids. options: fields of qwen3.engine.Request without prompt and sample. n: texts for each
    prompt.

    logprobs: None, or how many of the likeliest tokens each entry lists. include_usage: whether a stream ends with the token counts.
    """

    prompts: list
    n: int
    options: dict
    stop: tuple
    logprobs: int | None
    stream: bool
    include_usage: bool

    @property
    def prompt_tokens(self):
        return sum(map(len, self.prompts))


def parse(data, kind, tokenizer, model, length, stop_ids, most):
    """Returns the Asked of a body, which is JSON as bytes. kind: "chat" or "completion". length: the most tokens of a prompt and its answer
    together. most: the most texts of one request. Raises Refused."""
    body = _body(data)
    _check_fields(body, kind)
    if body.get("model") != model:
        raise Refused(f"the model {_short(body.get('model'))} does not exist; use {model!r}", "model", 404, "model_not_found")
    numbers = {field: _number(body, field) for field in NUMBERS}
    texts = [_chat_text(body, tokenizer)] if kind == "chat" else _prompts(body)
    field = "messages" if kind == "chat" else "prompt"
    if len(texts) * numbers["n"] > most:
        raise Refused(f"{len(texts)} prompts with n={numbers['n']} are more than {most} texts, the most of a request", "n")
    prompts = [_ids(text, tokenizer, length, field) for text in texts]
    options = {key: numbers[key] for key in ("temperature", "top_p", "min_p", "repetition_penalty")}
    options["top_k"] = max(numbers["top_k"], 0)  # some clients send -1 for all
    options["seed"] = secrets.randbits(32) if numbers["seed"] is None else numbers["seed"]
    options["max_new_tokens"] = _max_tokens(numbers, kind, length - max(map(len, prompts)))
    options["logprobs"], options["stop_ids"] = _logprobs(body, kind), tuple(stop_ids)
    stream = _flag(body, "stream")
    include_usage = _include_usage(body, stream)
    return Asked(prompts, numbers["n"], options, _stop(body), options["logprobs"], stream, include_usage)


def _body(data):
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refused("the body is not JSON in UTF-8") from error
    if not isinstance(body, dict):
        raise Refused("the body is not a JSON object")
    return body


def _check_fields(body, kind):
    known = BOTH | (CHAT if kind == "chat" else {"prompt"})
    for field, value in body.items():
        if field in known or any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL.get(field, ())):
            continue
        reason = f"{field}={_short(value)} is not supported" if field in NEUTRAL else f"there is no field {_short(field)}"
        raise Refused(f"{reason}; leave it out", field[:64], code="unsupported_parameter")


def _number(body, field):
    kind, least, most, default = NUMBERS[field]
    value = body.get(field)
    if value is None:
        return default
    right = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not right or not math.isfinite(value) or not least <= value <= most:
        noun = "an integer" if kind is int else "a number"
        raise Refused(f"{field}={_short(value)} must be {noun} from {least:g} to {most:g}", field)
    return kind(value)


def _flag(body, field):
    value = body.get(field)
    if value is not None and not isinstance(value, bool):
        raise Refused(f"{field}={_short(value)} must be true or false", field)
    return bool(value)


def _include_usage(body, stream):
    options = body.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise Refused("stream_options needs stream=true", "stream_options")
    if not isinstance(options, dict) or set(options) - {"include_usage"}:
        raise Refused(f"stream_options={_short(options)} must be an object with include_usage only", "stream_options")
    return _flag(options, "include_usage")


def _stop(body):
    stop = body.get("stop")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    right = isinstance(stop, list) and all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARACTERS for s in stop)
    if not right or len(stop) > MAX_STOPS:
        raise Refused(f"stop must be up to {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters", "stop")
    return tuple(stop)


def _logprobs(body, kind):
    """Returns how many of the likeliest tokens each logprobs entry lists, or None without logprobs."""
    if kind == "chat":
        asked, field = _flag(body, "logprobs"), "top_logprobs"
        if body.get(field) is not None and not asked:
            raise Refused("top_logprobs needs logprobs=true", field)
        value = body.get(field) or 0 if asked else None
    else:
        field, value = "logprobs", body.get("logprobs")
    if value is not None and (type(value) is not int or not 0 <= value <= MAX_TOP_LOGPROBS):
        raise Refused(f"{field}={_short(value)} must be an integer from 0 to {MAX_TOP_LOGPROBS}", field)
    return value


def _max_tokens(numbers, kind, room):
    """Returns the most new tokens. The default is all the room that is left for a chat, and OpenAI's 16 for a completion."""
    field = "max_completion_tokens" if numbers["max_completion_tokens"] is not None else "max_tokens"
    asked = numbers[field]
    if asked is None:
        return room if kind == "chat" else min(room, COMPLETION_TOKENS)
    if asked > room:
        raise Refused(f"{field}={asked} must be at most {room}, the room that the prompt leaves", field, code="context_length_exceeded")
    return asked


def _chat_text(body, tokenizer):
    """Returns the text of a conversation, by the tokenizer's chat template."""
    messages, tools, choice = body.get("messages"), body.get("tools"), body.get("tool_choice")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages must be a list with at least one message", "messages")
    if choice not in (None, "auto", "none"):
        raise Refused(f"tool_choice={_short(choice)} is not supported; use 'auto' or 'none'", "tool_choice")
    if tools is not None and (not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools)):
        raise Refused("tools must be a list of objects", "tools")
    given = body.get("chat_template_kwargs") or {}
    if not isinstance(given, dict) or set(given) - {"enable_thinking"}:
        raise Refused("chat_template_kwargs must be an object with enable_thinking only", "chat_template_kwargs")
    thinking = _flag(given, "enable_thinking") if "enable_thinking" in given else None
    try:
        messages, _ = chat.openai({"messages": messages})
        tools = None if choice == "none" else tools or None
        return tokenizer.apply_chat_template(messages, tools, add_generation_prompt=True, enable_thinking=thinking)
    except (ValueError, RecursionError) as error:
        raise Refused(f"messages: {_short(str(error), 200)}", "messages") from error


def _prompts(body):
    """Returns the prompts as a list, in which each is a text or a list of token ids."""
    prompt = body.get("prompt")
    one = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(type(i) is int for i in prompt))
    prompts = [prompt] if one else prompt
    if not isinstance(prompts, list) or not prompts:
        raise Refused("prompt must be a text, a list of texts, or token ids", "prompt")
    if not all(isinstance(p, str) or (isinstance(p, list) and all(type(i) is int for i in p)) for p in prompts):
        raise Refused("prompt must be a text, a list of texts, or token ids", "prompt")
    return prompts


def _ids(prompt, tokenizer, length, field):
    """Returns token ids. As in the text of a chat template, a special token that is spelled out in a text becomes that token."""
    ids = prompt
    if isinstance(prompt, str):
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise Refused(f"{field} has half a surrogate pair, which is no character; send valid Unicode", field) from error
        ids = tokenizer.encode(prompt, allow_special=True)
    if not ids:
        raise Refused(f"{field} is empty; give at least one token", field)
    if not all(0 <= i < tokenizer.vocab_size for i in ids):
        raise Refused(f"{field} has ids outside the vocabulary of {tokenizer.vocab_size}", field)
    if len(ids) >= length:
        raise Refused(
            f"{field} has {len(ids)} tokens, and a prompt and its answer have room for {length}; shorten it",
            field,
            code="context_length_exceeded",
        )
    return ids


def _short(value, most=60):
    text = value if isinstance(value, str) and most > 60 else repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."
