"""The one form of messages, tools and tool calls that chat templates are given, whatever form a file or a request has them in.

    messages, tools = normal(messages, tools)

A message then has a role, a content that is text, and perhaps reasoning_content, tool_calls, tool_call_id, name and weight, by which the
loss of the turn is multiplied (0: it has none). A call is {"type": "function", "function": {"name", "arguments"}} with an object of
arguments, a tool {"type": "function", "function": {"name", ...}}. Source: OpenAI's chat API and its format for fine-tuning; what other
tools write.
"""

import re
import warnings
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict

from parallel.json_text import loads
from qwen3.schema import FieldError, Fields, Object, Text, checked, real, short, told

ROLES = ("system", "user", "assistant", "tool")
OTHER_ROLES = {"function": "tool", "developer": "system"}  # the older name of a tool's answer; OpenAI's newer one of the system's message
SPELLINGS = {"reasoning": "reasoning_content", "thinking": "reasoning_content"}  # as transformers 5.24 reads them
WEIGHTS = ("weight", "loss_scale")  # by which the loss of a turn is multiplied: OpenAI, where it is 0 or 1, and ms-swift
TRAINED = (*WEIGHTS, "loss", "train", "training")  # what says of a message whether it has loss: the former, ms-swift, axolotl
MOST_WEIGHT = 100
UNUSED = ("role", "content", "tool_call_id", "name")  # a template need not use these


def parse_json(key, text):
    """The value of a JSON text; None for an empty one. Raises ValueError with the key."""
    try:
        return loads(text) if text.strip() else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key!r} is not JSON: {short(str(error), 100)}") from error


def _from_text(value):
    """A list or object, which a file without such types holds as JSON text."""
    return parse_json("the text", value) if isinstance(value, str) else value


def _arguments(value):
    value = {} if value is None else parse_json("the text", value) if isinstance(value, str) else value
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise ValueError(f"{short(value)} is no object of arguments")
    return value


class Function(Fields):
    name: Text
    arguments: Annotated[told(dict[str, Any], "an object of arguments, or its JSON text"), BeforeValidator(_arguments)] = {}


class Call(Fields):
    """A tool call; or its function alone."""

    id: Text = None
    type: told(Literal["function"], "'function'") = "function"
    function: told(Function, "an object with name and arguments") = None
    name: Text = None
    arguments: Annotated[told(dict[str, Any], "an object of arguments, or its JSON text"), BeforeValidator(_arguments)] = {}


class Part(Fields):
    type: told(Literal["text"], "'text': only text is supported") = "text"
    text: Text


Flag = told(bool | real(0, 1), "0, 1, true or false")
Weight = told(bool | real(0, MOST_WEIGHT), f"a number from 0 to {MOST_WEIGHT}, true or false")


class Message(Fields):
    model_config = ConfigDict(extra="allow")

    role: told(Literal[ROLES], f"one of {', '.join(ROLES)}")
    content: told(str | list[Part], "text, or a list of text parts; only text is supported") = None
    reasoning_content: Text = None
    reasoning: Text = None
    thinking: Text = None
    tool_calls: Annotated[told(list[Call], "a list of calls, each an object with a function"), BeforeValidator(_from_text)] = None
    function_call: Annotated[told(Call, "an object with name and arguments"), BeforeValidator(_from_text)] = None
    tool_call_id: Text = None
    name: Text = None
    weight: Weight = None
    loss_scale: Weight = None
    loss: Flag = None
    train: Flag = None
    training: Flag = None


class Tool(Fields):
    """A tool; or its function alone."""

    type: told(Literal["function"], "'function'") = "function"
    function: Object = None
    name: Text = None


def normal(messages, tools=None):
    """(messages, tools) in the one form; tools is None where there are none. Raises ValueError, which names the message and its key."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"messages={short(messages)} must be a list of messages, at least one")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)], normal_tools(tools)


def _message(message, where):
    if isinstance(message, dict) and str(message.get("role")) in OTHER_ROLES:
        message = {**message, "role": OTHER_ROLES[message["role"]]}
    try:
        found = checked(Message, message, "")
    except FieldError as error:
        raise ValueError(f"{where}.{error}" if error.key else f"{where}={error}") from None
    content = found.content if isinstance(found.content, str | None) else "".join(part.text for part in found.content)
    out = {"role": found.role, "content": content or ""}
    said = {key: text for key in ("reasoning_content", *SPELLINGS) if (text := getattr(found, key)) is not None}
    if len(set(said.values())) > 1:
        raise ValueError(f"{where} has {' and '.join(said)}, which differ; keep one")
    calls = _calls(found, where)
    if found.role != "assistant" and (calls or any(said.values())):
        raise ValueError(f"{where}.{'tool_calls' if calls else next(iter(said))} is for the assistant; the message's role is {found.role}")
    if said:
        out["reasoning_content"] = next(iter(said.values()))
    if calls:
        out["tool_calls"] = calls
    if content is None and not calls and not any(said.values()):
        raise ValueError(f"{where}: a message of role {found.role!r} has neither content nor tool calls; leave it out")
    out.update({key: getattr(found, key) for key in ("tool_call_id", "name") if getattr(found, key) is not None})
    if (weight := _weight(found, where)) != 1:
        out["weight"] = weight
    return {**out, **{key: value for key, value in (found.model_extra or {}).items() if value not in ([], {}, "")}}


def _calls(message, where):
    given = list(message.tool_calls or []) + ([message.function_call] if message.function_call else [])
    out = []
    for i, call in enumerate(given):
        function = call.function or (Function(name=call.name, arguments=call.arguments) if call.name else None)
        if function is None:
            raise ValueError(f"{where}.tool_calls[{i}] names no function; give {{'function': {{'name': ..., 'arguments': {{}}}}}}")
        made = {"type": "function", "function": {"name": function.name, "arguments": function.arguments}}
        out.append({**made, "id": call.id} if call.id is not None else made)
    return out


def _weight(message, where):
    """The factor of the loss on a message, as far as it says so itself; else 1."""
    given = {key: value for key in TRAINED if (value := getattr(message, key)) is not None}
    if "mask" in (message.model_extra or {}):
        raise ValueError(f"{where}.mask is read in two ways, as what has loss and as what has none; say weight: 0 for a turn without loss")
    for key, value in given.items():
        if key not in WEIGHTS and value not in (0, 1):
            raise ValueError(f"{where}.{key}={value} must be 0 or 1; use weight for a loss that counts less or more")
        if value and message.role != "assistant":
            raise ValueError(f"{where}.{key}={value}: only an assistant's turn has loss, and the message's role is {message.role}")
    weights = {key: float(given[key]) for key in WEIGHTS if key in given}
    if len(set(map(bool, given.values()))) > 1 or len(set(weights.values())) > 1:
        raise ValueError(f"{where} has {' and '.join(given)}, which differ; keep one")
    weight = next(iter(weights.values()), 1.0) if all(given.values()) else 0.0
    return int(weight) if weight == int(weight) else weight


def normal_tools(tools):
    """Tools in the one form, None for none: a list of them, or of their functions alone, or the JSON text of such a list."""
    if isinstance(tools, str):
        tools = parse_json("tools", tools)
    if not tools and tools in (None, [], {}):
        return None
    if not isinstance(tools, list):
        raise ValueError(f"tools={short(tools)} must be a list of tools, each {{'type': 'function', 'function': {{'name': ...}}}}")
    out = []
    for i, tool in enumerate(tools):
        tool = parse_json(f"tools[{i}]", tool) if isinstance(tool, str) else tool
        try:
            found = checked(Tool, tool, "")
        except FieldError as error:
            raise ValueError(f"tools[{i}].{error}" if error.key else f"tools[{i}]={error}") from None
        function = found.function or ({key: value for key, value in tool.items() if key != "type"} if found.name else None)
        if function is None or not isinstance(function.get("name"), str):
            raise ValueError(f"tools[{i}]={short(tool)} names no function; give {{'type': 'function', 'function': {{'name': ...}}}}")
        out.append(tool if found.function and "type" in tool else {"type": "function", "function": function})
    return out


def check_template(messages, tools, template, strict):
    """Raises ValueError where a template has no place for what normal messages hold: tools, tool calls, reasoning; and with `strict` for
    any key that it does not name. Else such a key is told of once, by a warning."""

    def names(key):
        return re.search(rf"\b{re.escape(key)}\b", template)

    if tools and not names("tools"):
        raise ValueError("the chat template has no place for tools; leave them out, or use a tokenizer whose template has one")
    for i, message in enumerate(messages):
        for key in message:
            if key in UNUSED or key == "weight" or names(key):
                continue
            if key in ("tool_calls", "reasoning_content"):
                raise ValueError(
                    f"messages[{i}].{key}: the chat template has no place for it, and would drop it; put it into the content, or use a"
                    " tokenizer whose template has one"
                )
            if strict:
                raise ValueError(f"messages[{i}]: there is no key {short(key)} of a message, and the chat template has none; leave it out")
            warnings.warn(f"messages have the key {short(key)}, which neither this project nor the chat template reads", stacklevel=2)
