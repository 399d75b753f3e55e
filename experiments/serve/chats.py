"""What is particular to the requests of chats: tools, reasoning, and the form of the answer."""

import re

from experiments.serve.refused import Refused
from qwen3 import answers, chat, grammars
from qwen3.grammars import SchemaError
from qwen3.guide import Plan
from qwen3.messages import normal_tools
from qwen3.schema import short

EFFORTS = {"none": 0, "minimal": 512, "low": 2048, "medium": 8192, "high": None, "xhigh": None}  # the most tokens of reasoning
SCHEMA_KEYS = ("name", "description", "schema", "strict")


def read(body, tokenizer, forms, compiler, stop_ids):
    """Returns (the text of the prompt, the options of an answers.Answer or None, a guide.Plan or None) of the checked body of a chat.
    forms: an answers.Forms. compiler: a qwen3.grammars.Grammars, or None where its library is not installed. Raises Refused."""
    try:
        tools = None if body.tool_choice == "none" else normal_tools(body.tools)
    except ValueError as error:
        raise Refused(str(error)[:300], "tools") from error
    enable_thinking, budget = _reasoning(body, forms, tokenizer.chat_template or "")
    grammar = _grammar(body, tools, forms, compiler)
    text = _text(body, tokenizer, tools, enable_thinking)
    thinking = answers.thinking_at(text) if forms.thinks else "answer"
    form = forms.calls if tools else None
    answer = None
    if form or forms.thinks:
        single = not body.parallel_tool_calls or _named(body)
        answer = {"form": form, "tools": tools, "thinking": thinking, "live": grammar is not None, "most_calls": 1 if single else None}
    guided = grammar is not None or (budget is not None and thinking != "answer")
    return text, answer, Plan(tokenizer, grammar, thinking, budget, tuple(stop_ids)) if guided else None


def _text(body, tokenizer, tools, enable_thinking):
    if body.continue_final_message and body.add_generation_prompt and "add_generation_prompt" in body.model_fields_set:
        raise Refused(
            "continue_final_message goes on with a turn, and add_generation_prompt begins one; keep one", "continue_final_message"
        )
    options = {"strict": True, "begin_turn": body.add_generation_prompt, "continue_last": body.continue_final_message}
    try:
        return chat.prompt_text(tokenizer, body.messages, tools, enable_thinking, **options)
    except (ValueError, RecursionError) as error:
        raise Refused(str(error)[:300], "messages") from error


def _reasoning(body, forms, template):
    """Returns (enable_thinking for the chat template, the most tokens of reasoning; each None where the request does not say)."""
    asked, effort, budget = body.chat_template_kwargs.enable_thinking, body.reasoning_effort, body.thinking_budget
    if not forms.thinks:
        if budget is not None or effort not in (None, "none"):
            field = "thinking_budget" if budget is not None else "reasoning_effort"
            raise Refused(f"{field} is for models that reason, and the chat template of this one has no reasoning; leave it out", field)
        return asked, None
    if effort is None:
        return asked, budget
    if asked is not None and asked != (effort != "none"):
        raise Refused(f"reasoning_effort={effort!r} and enable_thinking={asked} differ; keep one", "reasoning_effort")
    if effort != "none":
        return True, EFFORTS[effort] if budget is None else budget
    return False, None if re.search(r"\benable_thinking\b", template) else 0


def _named(body):
    return None if isinstance(body.tool_choice, str) else body.tool_choice.function.name


def _grammar(body, tools, forms, compiler):
    """Returns the Grammar that the answer has to follow, or None."""
    name, kind = _named(body), body.response_format.type if body.response_format else "text"
    forced = name is not None or body.tool_choice == "required"
    if forced and not tools:
        raise Refused("tool_choice needs tools", "tool_choice")
    if kind != "text" and tools:
        raise Refused(f"response_format={kind!r} and tools cannot both hold; leave out one, or give tool_choice='none'", "response_format")
    if not forced and kind == "text":
        return None
    field = "tool_choice" if forced else "response_format"
    if compiler is None:
        raise Refused(f"{field} {grammars.MISSING}, at the server", field, code="unsupported_parameter")
    for other in ("ignore_eos", "min_tokens"):
        if getattr(body, other):
            raise Refused(f"{other} and {field} cannot both hold, since the text ends where its form does; leave out one", other)
    if forced:
        return _calls(body, name, tools, forms, compiler)
    schema = {"type": "object"} if kind == "json_object" else _schema(body.response_format.json_schema)
    try:
        return compiler.json(schema)
    except SchemaError as error:
        raise Refused(f"response_format.json_schema.schema{error.path}: {error}", "response_format") from error


def _calls(body, name, tools, forms, compiler):
    if forms.calls is None:
        raise Refused("tool_choice: the chat template has no form of tool calls that is known; see --tool_calls", "tool_choice")
    chosen = [tool for tool in tools if name in (None, tool["function"]["name"])]
    if not chosen:
        raise Refused(f"tool_choice names {short(name)}, which is not in tools", "tool_choice")
    many = {"most": 1} if name is not None or not body.parallel_tool_calls else {}
    try:
        return compiler.calls(forms.calls, chosen, **many)
    except SchemaError as error:
        place = f"tools[{tools.index(chosen[error.at])}]{error.path}" if error.at is not None else "tools"
        raise Refused(f"{place}: {error}", "tools") from error


def _schema(given):
    """The schema of response_format.json_schema."""
    if given is None or not isinstance(given.get("schema"), dict | bool):
        raise Refused("response_format.json_schema must be an object with schema, a JSON schema", "response_format")
    for key in given:
        if key not in SCHEMA_KEYS:
            raise Refused(f"response_format.json_schema: there is no field {short(key)}; leave it out", "response_format")
    return given["schema"]
