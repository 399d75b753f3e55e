"""Checks the requests of the OpenAI API, and turns a JSON body into prompts of token ids and options of the engine.

Nothing in a body is trusted. A field that is unknown, wrong or not supported raises a Refused that names it.
"""

import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from experiments.serve import chats
from experiments.serve.chats import EFFORTS
from experiments.serve.refused import Refused
from parallel.json_text import DuplicateKey, loads
from qwen3.answers import forms_of
from qwen3.json_files import MAX_DEPTH, depth
from qwen3.schema import LARGEST, FieldError, Fields, Object, Sampling, Text, Yes, checked, real, short, told, whole

MAX_STOPS, MAX_STOP_CHARACTERS, MAX_TOP_LOGPROBS, COMPLETION_TOKENS = 16, 256, 20, 16
MAX_BIASES, MAX_BIAS, MAX_PENALTY = 1024, 100, 2
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = told(Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)], f"up to {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters")


class StreamOptions(Fields):
    model_config = ConfigDict(extra="forbid")
    include_usage: Yes = False


class TemplateOptions(Fields):
    model_config = ConfigDict(extra="forbid")
    enable_thinking: Yes = None


class NamedFunction(Fields):
    name: Text


class NamedTool(Fields):
    type: told(Literal["function"], "'function'")
    function: told(NamedFunction, "an object with name")


class ResponseFormat(Fields):
    model_config = ConfigDict(extra="forbid")
    type: told(Literal["text", "json_object", "json_schema"], "'text', 'json_object' or 'json_schema'")
    json_schema: Object = None


Bias = Annotated[dict[Annotated[str, Field(pattern=r"^\d{1,10}$")], real(-MAX_BIAS, MAX_BIAS)], Field(max_length=MAX_BIASES)]


class Body(Sampling):
    """The fields of both kinds of requests."""

    model_config = ConfigDict(extra="forbid")
    model: Any = None
    user: Any = None
    n: whole(1, 128) = 1
    seed: whole(-(2**63), 2**63 - 1) = None
    max_tokens: whole(1, LARGEST) = None
    max_completion_tokens: whole(1, LARGEST) = None
    stop: Stops = ()
    stream: Yes = False
    stream_options: told(StreamOptions, "an object with include_usage only") = None
    presence_penalty: real(-MAX_PENALTY, MAX_PENALTY) = 0.0
    frequency_penalty: real(-MAX_PENALTY, MAX_PENALTY) = 0.0
    logit_bias: told(Bias, f"an object of up to {MAX_BIASES} token ids with numbers from -{MAX_BIAS} to {MAX_BIAS}") = {}
    min_tokens: whole(0, LARGEST) = 0
    ignore_eos: Yes = False


class Chat(Body):
    messages: told(Annotated[list[dict[str, Any]], Field(min_length=1)], "a list with at least one message")
    tools: told(list[dict[str, Any]], "a list of objects") = None
    tool_choice: told(
        Literal["auto", "none", "required"] | NamedTool,
        "'auto', 'none', 'required', or {'type': 'function', 'function': {'name': ...}}",
    ) = "auto"
    parallel_tool_calls: Yes = True
    response_format: told(ResponseFormat, "an object with type, and json_schema where that is the type") = None
    reasoning_effort: told(Literal[tuple(EFFORTS)], f"one of {', '.join(EFFORTS)}") = None
    thinking_budget: whole(0, LARGEST) = None
    add_generation_prompt: Yes = True
    continue_final_message: Yes = False
    logprobs: Yes = False
    top_logprobs: whole(0, MAX_TOP_LOGPROBS) = None
    chat_template_kwargs: told(TemplateOptions, "an object with enable_thinking only") = TemplateOptions()


class Completion(Body):
    prompt: told(Text | Annotated[list[int] | list[str | list[int]], Field(min_length=1)], "a text, a list of texts, or token ids")
    logprobs: whole(0, MAX_TOP_LOGPROBS) = None
    echo: Yes = False


# Unsupported fields that clients send with a value that changes nothing: field -> the values that are accepted.
NEUTRAL = {
    "best_of": (1, None),
    "echo": (False, None),
    "suffix": (None, ""),
    "store": (False, None),
    "response_format": (None, {"type": "text"}),
    "parallel_tool_calls": (None, True),
    "service_tier": (None, "auto", "default"),
    "metadata": (None, {}),
}


@dataclass(frozen=True)
class Asked:
    """A checked request. prompts: lists of token ids. options: fields of qwen3.engine.Request without prompt and sample. n: texts for each
    prompt. model: the name that the request has.

    logprobs: None, or how many of the likeliest tokens each entry lists. include_usage: whether a stream ends with the token counts.
    answer: the options of a qwen3.answers.Answer by which the text is split; None for a text that is not split. echo: of each prompt the
    text that the answer begins with; () for none.
    """

    prompts: list
    n: int
    options: dict
    stop: tuple
    logprobs: int | None
    stream: bool
    include_usage: bool
    answer: dict | None = None
    echo: tuple = ()
    model: str = ""

    @property
    def prompt_tokens(self):
        return sum(map(len, self.prompts))


def number_of(name, model, adapters):
    """Returns the number of a model: 0 of the base with the name `model`, or that of an adapter, counted from 1. Raises Refused."""
    names = (model, *adapters)
    if name not in names:
        raise Refused(f"the model {short(name)} does not exist; use {' or '.join(map(repr, names))}", "model", 404, "model_not_found")
    return names.index(name)


def parse(data, kind, tokenizer, model, length, stop_ids, most, defaults=None, forms=None, compiler=None, adapters=()):
    """Returns the Asked of a body, which is JSON as bytes. kind: "chat" or "completion". length: the most tokens of a prompt and its answer
    together. most: the most texts of one request. defaults: options in place of OpenAI's defaults, which may include max_new_tokens. forms:
    see qwen3.answers.Forms; default: those of the chat template. compiler: a qwen3.grammars.Grammars, or None where its library is not
    installed. model, adapters: the names of the base and of its adapters. Raises Refused."""
    body = _body(data, Chat if kind == "chat" else Completion)
    number = number_of(body.model, model, adapters)
    stop_ids, answer, guide = () if body.ignore_eos else tuple(stop_ids), None, None
    if kind == "chat":
        text, answer, guide = chats.read(body, tokenizer, forms or forms_of(tokenizer.chat_template), compiler, stop_ids)
    texts = [text] if kind == "chat" else _prompts(body.prompt)
    field = "messages" if kind == "chat" else "prompt"
    if len(texts) * body.n > most:
        raise Refused(f"{len(texts)} prompts with n={body.n} are more than {most} texts, the most of a request", "n")
    if body.stream_options and not body.stream:
        raise Refused("stream_options needs stream=true", "stream_options")
    prompts = [_ids(text, tokenizer, length, field) for text in texts]
    options = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0, "repetition_penalty": 1.0, **(defaults or {})}
    usual = options.pop("max_new_tokens", None)
    options.update({key: value for key in options if (value := getattr(body, key)) is not None})
    options["top_k"] = max(options["top_k"], 0)  # some clients send -1 for all
    options["seed"] = secrets.randbits(32) if body.seed is None else body.seed
    options["max_new_tokens"] = _max_tokens(body, kind, usual, length - max(map(len, prompts)))
    options["logprobs"], options["stop_ids"], options["guide"], options["adapter"] = _logprobs(body, kind), stop_ids, guide, number
    options |= {"presence_penalty": body.presence_penalty, "frequency_penalty": body.frequency_penalty, "min_tokens": body.min_tokens}
    options["logit_bias"] = tuple((_in_vocabulary(int(i), tokenizer), bias) for i, bias in body.logit_bias.items())
    if body.min_tokens > options["max_new_tokens"]:
        raise Refused(f"min_tokens={body.min_tokens} must be at most {options['max_new_tokens']}, the most new tokens", "min_tokens")
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    echo = _echo(body, texts, tokenizer) if kind == "completion" and body.echo else ()
    return Asked(prompts, body.n, options, stop, options["logprobs"], body.stream, include_usage, answer, echo, body.model)


def _body(data, kind):
    """The checked fields of a body, of a class declared above."""
    try:
        body = loads(data)
    except DuplicateKey as error:
        raise Refused(f"the body is not clear: {error}; send each key once", error.key[:64]) from error
    except (ValueError, RecursionError) as error:
        raise Refused("the body is not JSON in UTF-8") from error
    if not isinstance(body, dict):
        raise Refused("the body is not a JSON object")
    if depth(body) > MAX_DEPTH:
        raise Refused(f"the body is nested more than {MAX_DEPTH} deep")
    for field, value in list(body.items()):
        if field in NEUTRAL and field not in kind.model_fields:
            if not any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL[field]):
                raise Refused(f"{field}={short(value)} is not supported; leave it out", field, code="unsupported_parameter")
            del body[field]
        elif field not in kind.model_fields:
            raise Refused(f"there is no field {short(field)}; leave it out", field[:64], code="unsupported_parameter")
    try:
        return checked(kind, body, "")
    except FieldError as error:
        raise Refused(str(error), error.key) from error


def _logprobs(body, kind):
    """Returns how many of the likeliest tokens each logprobs entry lists, or None without logprobs."""
    if kind != "chat":
        return body.logprobs
    if body.top_logprobs is not None and not body.logprobs:
        raise Refused("top_logprobs needs logprobs=true", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _in_vocabulary(i, tokenizer):
    if i >= tokenizer.vocab_size:
        raise Refused(f"logit_bias has the id {i}, which is outside the vocabulary of {tokenizer.vocab_size}", "logit_bias")
    return i


def _echo(body, texts, tokenizer):
    """The texts of the prompts, which their answers begin with."""
    if body.logprobs is not None:
        raise Refused("echo and logprobs cannot both hold, since the tokens of the prompt have none; leave out one", "echo")
    return tuple(text if isinstance(text, str) else tokenizer.decode(text, skip_special=True) for text in texts)


def _max_tokens(body, kind, usual, room):
    """Returns the most new tokens. The default is `usual`, as far as there is room; where it is None, all the room that is left for a chat,
    and OpenAI's 16 for a completion."""
    field = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    asked = getattr(body, field)
    if asked is None:
        return min(room, usual or (room if kind == "chat" else COMPLETION_TOKENS))
    if asked > room:
        raise Refused(f"{field}={asked} must be at most {room}, the room that the prompt leaves", field, code="context_length_exceeded")
    return asked


def _prompts(prompt):
    """Returns the prompts as a list, in which each is a text or a list of token ids."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def _ids(prompt, tokenizer, length, field):
    """Returns token ids. As in the text of a chat template, a special token that is spelled out in a text becomes that token.
    A text that is far too long is not read to its end, so that it costs other clients no time."""
    ids = prompt
    if isinstance(prompt, str):
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise Refused(f"{field} has half a surrogate pair, which is no character; send valid Unicode", field) from error
        try:
            ids = tokenizer.encode(prompt, allow_special=True, most=length)
        except ValueError as error:
            raise Refused(str(error)[:300], field) from error
    if not ids:
        raise Refused(f"{field} is empty; give at least one token", field)
    if not all(0 <= i < tokenizer.vocab_size for i in ids):
        raise Refused(f"{field} has ids outside the vocabulary of {tokenizer.vocab_size}", field)
    if len(ids) >= length:
        count = len(ids) if len(ids) == length else f"more than {length}"
        raise Refused(
            f"{field} has {count} tokens, and a prompt and its answer have room for {length}; shorten it",
            field,
            code="context_length_exceeded",
        )
    return ids
