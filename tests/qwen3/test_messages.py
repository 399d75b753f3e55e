"""Messages, tools and calls in every form that people have them become one form, before any template sees them; nothing is dropped."""

import json
import warnings

import numpy as np
import pyarrow.parquet
import pytest

from experiments.data import readers
from experiments.generate import prompts
from experiments.serve import requests as serve_requests
from qwen3.chat import encode_chat, openai, prompt_text, sharegpt
from qwen3.messages import normal
from qwen3.tokenizer import Tokenizer, train_bpe

# As Qwen2.5's, which writes arguments as JSON again, and as Qwen3-Coder's, which goes through them by name.
TOJSON = "{{ call.function.name }}{{ call.function.arguments | tojson }}"
ITEMS = "{{ call.function.name }}{% for key, value in call.function.arguments | items %}<{{ key }}>{{ value }}{% endfor %}"
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.type }} {{ tool.function.name }}|{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}CALL{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FUNCTION = {"name": "light", "parameters": {"type": "object", "properties": {"room": {"type": "string"}}}}
USER = {"role": "user", "content": "x"}
ARGUMENTS = {"room": "attic", "on": None}


@pytest.fixture(scope="module")
def base():
    tok = train_bpe(["light in the attic is on: true"] * 3, 300)
    tok._backend.add_tokens(["<think>", "</think>"])
    return tok


def with_call(base, call):
    return Tokenizer(base._backend, {**base._config, "chat_template": TEMPLATE.replace("CALL", call)})


CALLS = {
    "OpenAI's": {"id": "1", "type": "function", "function": {"name": "light", "arguments": json.dumps(ARGUMENTS)}},
    "an object": {"type": "function", "function": {"name": "light", "arguments": ARGUMENTS}},
    "without a type": {"function": {"name": "light", "arguments": ARGUMENTS}},
    "the function alone": {"name": "light", "arguments": json.dumps(ARGUMENTS)},
}
EMPTY = ["", None, {}, "{}", " \n", "null", ...]


@pytest.mark.parametrize("form", CALLS)
@pytest.mark.parametrize("call, text", [(TOJSON, 'light{"room": "attic", "on": null}'), (ITEMS, "light<room>attic<on>None")])
def test_a_call_reaches_every_template_with_an_object_of_arguments(base, form, call, text):
    """In training, in generation and in the server."""
    tok, answer = with_call(base, call), {"role": "assistant", "content": None, "tool_calls": [CALLS[form]]}
    said = f"<|im_start|>assistant\n{text}<|im_end|>\n"
    assert tok.decode(encode_chat(tok, *openai({"messages": [USER, answer]}))[0]).endswith(said)
    assert tok.decode(encode_chat(tok, [USER, answer])[0]).endswith(said)
    assert said in tok.decode(prompts.encode(tok, {"messages": [USER, answer], "tools": None}))
    body = json.dumps({"model": "m", "messages": [USER, answer]}).encode()
    assert said in tok.decode(serve_requests.parse(body, "chat", tok, "m", 500, (7,), 10).prompts[0])


@pytest.mark.parametrize("nothing", EMPTY)
def test_a_call_without_arguments_has_an_empty_object_of_them(nothing):
    function = {"name": "f"} if nothing is ... else {"name": "f", "arguments": nothing}
    (message,), _ = normal([{"role": "assistant", "tool_calls": [{"function": function}]}])
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]


def test_older_and_packed_forms_of_calls_are_read():
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    old = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}}
    packed = {"role": "assistant", "content": "", "tool_calls": json.dumps([call])}
    for message in (old, packed):
        assert normal([message])[0] == [{"role": "assistant", "content": "", "tool_calls": [call]}]
    assert normal([{"role": "function", "name": "f", "content": "3"}])[0] == [{"role": "tool", "content": "3", "name": "f"}]


def test_what_parquet_invents_is_not_there(tmp_path):
    """A struct column has every key of every row; a null that a JSON file has stays."""
    calls = [{"function": {"name": "light", "arguments": a}} for a in ({"room": "attic"}, {"zone": 3})]
    tools = [
        {"type": "function", "function": {"name": n, "parameters": {"properties": p}}}
        for n, p in (("f", {"a": {"d": 1}}), ("g", {"b": {"c": 1}}))
    ]
    records = [{"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}], "tools": tools} for call in calls]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    got, want = ([openai(r.value) for r in readers.records(tmp_path / name)] for name in ("a.parquet", "a.jsonl"))
    assert [messages for messages, _ in got] == [messages for messages, _ in want]
    assert [m[1]["tool_calls"][0]["function"]["arguments"] for m, _ in got] == [{"room": "attic"}, {"zone": 3}]
    assert all("b" not in t[0]["function"]["parameters"]["properties"] for _, t in got)
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": [USER, {"role": "assistant", "tool_calls": [CALLS["an object"]]}]}))
    (record,) = readers.records(tmp_path / "b.jsonl")
    assert openai(record.value)[0][1]["tool_calls"][0]["function"]["arguments"] == ARGUMENTS


@pytest.mark.parametrize(
    "tools", [[FUNCTION], json.dumps([FUNCTION]), [json.dumps(FUNCTION)], [{"type": "function", "function": FUNCTION}]]
)
def test_tools_may_be_functions_alone(base, tools):
    tok = with_call(base, TOJSON)
    turns = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    messages, found = sharegpt({"conversations": turns, "tools": tools})
    assert found == [{"type": "function", "function": FUNCTION}]
    assert prompt_text(tok, [USER], tools).startswith("function light|<|im_start|>user")
    assert tok.decode(encode_chat(tok, messages, tools)[0]).startswith("function light|")
    assert openai({"messages": [USER], "functions": [FUNCTION]})[1] == found


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_three_names(base, key):
    tok = with_call(base, TOJSON)
    messages = [USER, {"role": "assistant", "content": "y", key: "why"}]
    ids, mask = encode_chat(tok, messages)
    assert tok.decode(ids[mask == 1]) == "<think>why</think>y<|im_end|>"
    body = json.dumps({"model": "m", "messages": [*messages, USER]}).encode()
    assert "<think>why</think>y" in tok.decode(serve_requests.parse(body, "chat", tok, "m", 500, (7,), 10).prompts[0])


@pytest.mark.parametrize("key", ["weight", "loss", "train", "training"])
@pytest.mark.parametrize("no", [0, False, 0.0])
def test_a_turn_of_weight_0_has_no_loss(base, key, no):
    tok = with_call(base, TOJSON)
    first, second = ({"role": "assistant", "content": text} for text in ("yes", "no"))
    ids, mask = encode_chat(tok, [USER, {**first, key: no}, USER, {**second, key: 1}])
    whole, _ = encode_chat(tok, [USER, first, USER, second])
    assert np.array_equal(ids, whole) and tok.decode(ids[mask == 1]) == "no<|im_end|>"
    turns = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "yes", key: no}, {"from": "human", "value": "x"}]
    messages, _ = sharegpt({"conversations": [*turns, {"from": "gpt", "value": "no"}]})
    assert np.array_equal(encode_chat(tok, messages)[1], mask)
    with pytest.raises(ValueError, match="no assistant turn with loss"):
        encode_chat(tok, [USER, {**first, key: no}])


@pytest.mark.parametrize("more", [{"weight": 0.5}, {"loss_scale": 0.5}, {"weight": 0.5, "train": True}])
def test_the_loss_of_a_turn_counts_by_its_weight(base, more):
    tok = with_call(base, TOJSON)
    first, second = ({"role": "assistant", "content": text} for text in ("yes", "no"))
    ids, mask = encode_chat(tok, [USER, {**first, **more}, USER, second])
    plain, ones = encode_chat(tok, [USER, first, USER, second])
    assert np.array_equal(ids, plain) and ones.dtype == np.uint8 and mask.dtype == np.float32
    assert tok.decode(ids[mask == 0.5]) == "yes<|im_end|>" and tok.decode(ids[mask == 1]) == "no<|im_end|>"
    assert np.array_equal(mask > 0, ones > 0)
    _, twice = encode_chat(tok, [USER, {**first, "weight": 2}])
    assert set(twice.tolist()) == {0.0, 2.0}


def test_a_tagged_template_takes_weights_too(base):
    turn = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}"
    tagged = "{% for m in messages %}{{ m.role }} TURN{% endfor %}".replace("TURN", turn)
    tok = Tokenizer(base._backend, {**base._config, "chat_template": tagged})
    ids, mask = encode_chat(tok, [USER, {"role": "assistant", "content": "yes", "weight": 0}, {"role": "assistant", "content": "no"}])
    assert tok.decode(ids[mask == 1]).strip() == "no"


def test_a_call_after_a_think_block_is_read(base):
    """As sharegpt files of thinking models have it."""
    tok = with_call(base, TOJSON)
    value = '<think>\nI need light\n</think>\n\n{"name": "light", "arguments": {"room": "attic"}}'
    turns = [{"from": "human", "value": "x"}, {"from": "function_call", "value": value}, {"from": "observation", "value": "on"}]
    messages, _ = sharegpt({"conversations": turns})
    assert messages[1]["reasoning_content"] == "I need light"
    ids, mask = encode_chat(tok, messages)
    assert tok.decode(ids[mask == 1]) == '<think>I need light</think>light{"room": "attic"}<|im_end|>'
    several = [{"from": "human", "value": "x"}, {"from": "function_call", "value": '<think>a</think>[{"name": "f"}, {"name": "g"}]'}]
    assert [call["function"]["name"] for call in sharegpt({"conversations": several})[0][1]["tool_calls"]] == ["f", "g"]


def bot(**fields):
    return {"role": "assistant", "content": "y", **fields}


WRONG = {
    "messages[1].mask is read in two ways": bot(mask=1),
    "messages[1].loss=0.5 must be 0 or 1": bot(loss=0.5),
    "messages[1].weight=-1 must be a number from 0 to 100": bot(weight=-1),
    "messages[1].weight='x' must be a number from 0 to 100": bot(weight="x"),
    "messages[1] has weight and loss_scale, which differ": bot(weight=0.5, loss_scale=2),
    "messages[1] has weight and loss, which differ": bot(weight=0.5, loss=0),
    "messages[1].loss_scale=2.0: only an assistant's turn has loss": {"role": "user", "content": "y", "loss_scale": 2},
    "messages[1] has weight and train, which differ": bot(weight=0, train=True),
    "messages[1].train=True: only an assistant's turn has loss": {"role": "user", "content": "y", "train": True},
    "messages[1] has reasoning and thinking, which differ": bot(reasoning="a", thinking="b"),
    "messages[1].reasoning is for the assistant; the message's role is user": {"role": "user", "content": "y", "reasoning": "a"},
    "messages[1].tool_calls is for the assistant": {"role": "user", "content": "y", "tool_calls": [CALLS["an object"]]},
    "messages[1].tool_calls[0] names no function": bot(tool_calls=[{"id": "1"}]),
    "messages[1].tool_calls[0].function.name is missing": bot(tool_calls=[{"function": {"arguments": {}}}]),
    "messages[1].tool_calls[0].function.arguments: [1] is no object of arguments": bot(
        tool_calls=[{"function": {"name": "f", "arguments": [1]}}]
    ),
    "messages[1].tool_calls[0].function.arguments: 'the text' is not JSON": bot(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
    "messages[1].tool_calls[0].type='web' must be 'function'": bot(tool_calls=[{"type": "web", "function": {"name": "f"}}]),
    "messages[1].reasoning=3 must be text": bot(reasoning=3),
    "messages[1]=7 must be an object": 7,
}


@pytest.mark.parametrize("said", WRONG)
def test_what_cannot_be_honoured_is_refused_by_name(said):
    with pytest.raises(ValueError) as error:
        normal([USER, WRONG[said]])
    assert said in str(error.value)


def test_what_a_template_has_no_place_for_is_refused_and_other_keys_are_told_of_once(base):
    plain = Tokenizer(
        base._backend, {**base._config, "chat_template": "{% for m in messages %}{{ m.role }}{{ m.content }}<|im_end|>{% endfor %}"}
    )
    for fields, said in (({"reasoning": "a"}, "reasoning_content"), ({"tool_calls": [CALLS["an object"]]}, "tool_calls")):
        with pytest.raises(ValueError, match=rf"messages\[1\].{said}: the chat template has no place for it"):
            encode_chat(plain, [USER, bot(**fields)])
    with pytest.raises(ValueError, match="the chat template has no place for tools"):
        encode_chat(plain, [USER, bot()], [FUNCTION])
    with pytest.warns(UserWarning, match="messages have the key 'score', which neither"):
        encode_chat(plain, [USER, bot(score=3)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_chat(plain, [USER, bot(refusal=None, annotations=[], name="a")])
    body = json.dumps({"model": "m", "messages": [USER, bot(score=3)]}).encode()
    with pytest.raises(serve_requests.Refused, match=r"messages\[1\]: there is no key 'score'") as refused:
        serve_requests.parse(body, "chat", plain, "m", 500, (7,), 10)
    assert refused.value.param == "messages"
