"""Grammars hold in the engine: JSON schemas, tool calls, budgets of reasoning; and the rows beside them keep their tokens."""

import json
import time

import numpy as np
import pytest

from qwen3 import grammars
from qwen3.answers import Answer, message, thinking_at
from qwen3.engine import Engine, Request
from qwen3.guide import AT_ONCE, ENOUGH, Plan
from qwen3.tokenizer import Tokenizer, train_bpe
from tests.schemas import SCHEMAS
from tests.scripted_answers import TOOLS, coder, hermes
from tests.tiny import DENSE, random_params

pytest.importorskip("llguidance")
TEXT = 'def f(x): return {"a": [1, 2], "name": "weather"}\n<tool_call> {"b": true}, null, false\n'
USUAL = ("reference",)
LENGTH = 512


@pytest.fixture(scope="module")
def tokenizer():
    """With the tags of reasoning and of calls as tokens of their own, as Qwen3's."""
    made = train_bpe([TEXT * 20], 320)
    made._backend.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    return Tokenizer(made._backend, made._config)


@pytest.fixture(scope="module")
def model(tokenizer):
    cfg = DENSE.replace(vocab_size=tokenizer.vocab_size + 5, max_position=LENGTH, eos_id=tokenizer.eos_id)  # ids without a token
    return cfg, random_params(cfg)


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model[1], model[0], slots=4, length=LENGTH, prefill_chunk=32)


@pytest.fixture(scope="module")
def compiler(tokenizer, model):
    return grammars.Grammars(tokenizer, model[0].vocab_size)


def run(engine, requests):
    """The (tokens, finish reason) of each request."""
    numbers, events = [engine.submit(request) for request in requests], {}
    while engine.busy():
        for event in engine.step(8):
            events.setdefault(event.id, []).append(event)
    return [([event.token for event in events[number]], events[number][-1].finish_reason) for number in numbers]


def texts(tokenizer, engine, requests):
    found = run(engine, requests)
    assert {reason for _, reason in found} == {"stop"}, [tokenizer.decode(tokens) for tokens, _ in found]
    return [tokenizer.decode(tokens, skip_special=True) for tokens, _ in found]


def sampled(tokenizer, plan, count, prompt=(5, 6, 7), **options):
    given = {"max_new_tokens": 450, "temperature": 1.0, "stop_ids": (tokenizer.eos_id,), **options}
    return [Request(list(prompt), seed=3, sample=i, guide=plan, **given) for i in range(count)]


@pytest.mark.parametrize(
    "name, slow", [(name, False) for name in USUAL] + [pytest.param(name, True, marks=pytest.mark.slow) for name in SCHEMAS]
)
def test_a_random_model_meets_a_schema_in_every_sample(name, slow, tokenizer, engine, compiler):
    jsonschema = pytest.importorskip("jsonschema")
    schema = SCHEMAS[name]
    for text in texts(tokenizer, engine, sampled(tokenizer, Plan(tokenizer, compiler.json(schema)), 8 if slow else 4)):
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


@pytest.mark.parametrize("form", ["hermes", pytest.param("qwen3_coder", marks=pytest.mark.slow)])
def test_a_random_model_calls_tools_that_are_required(form, tokenizer, engine, compiler):
    """Each with the arguments that its schema has, in the form that the parser reads."""
    jsonschema = pytest.importorskip("jsonschema")
    tools = [
        {"type": "function", "function": {"name": "look", "parameters": SCHEMAS["object"]}},
        {"type": "function", "function": {"name": "move", "parameters": SCHEMAS["optional"]}},
    ]
    if form == "qwen3_coder":  # a text has no limit there, and a random model's none
        tools = json.loads(json.dumps(tools).replace('{"type": "string", "maxLength": 12}', '{"type": "string", "enum": ["x\\ny", "z"]}'))
        tools = json.loads(json.dumps(tools).replace('{"type": "string", "maxLength": 4}', '{"enum": [1, null]}'))
    parameters, called = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}, set()
    for text in texts(tokenizer, engine, sampled(tokenizer, Plan(tokenizer, compiler.calls(form, tools, 2)), 4)):
        answer = Answer(form, tools, live=True)
        found = message(answer.push(text) + answer.finish())
        assert found["content"] is None and 1 <= len(found["tool_calls"]) <= 2
        for call in found["tool_calls"]:
            jsonschema.validate(json.loads(call["function"]["arguments"]), parameters[call["function"]["name"]])
            called.add(call["function"]["name"])
    assert called and called <= set(parameters)
    (only,) = texts(tokenizer, engine, sampled(tokenizer, Plan(tokenizer, compiler.calls(form, tools[1:], 1)), 1))
    assert only.count("<tool_call>") == 1 and "look" not in only


@pytest.mark.extended
def test_neither_a_request_nor_its_neighbours_depend_on_grammars_beside_them(tokenizer, engine, compiler):
    free = [Request([9, 8, 7 + i], 40, temperature=0.9, seed=i) for i in range(3)]
    bound = sampled(tokenizer, Plan(tokenizer, compiler.json(SCHEMAS["object"])), 2)
    alone = [run(engine, [request])[0] for request in (*free, *bound)]
    assert run(engine, [free[0], bound[0], free[1], bound[1], free[2]]) == [alone[0], alone[3], alone[1], alone[4], alone[2]]


@pytest.mark.extended
@pytest.mark.parametrize("begins, budget", [("before", 6), pytest.param("inside", 6, marks=pytest.mark.slow), ("inside", 0)])
def test_reasoning_ends_at_its_budget(begins, budget, tokenizer, engine, compiler):
    """By the forced words, after which the answer is free; or follows its grammar."""
    begun = tokenizer.encode("<think>", allow_special=True)
    prompt = [5, 6, *begun] if begins == "inside" else [5, 6]
    bias = {"logit_bias": ((begun[0], 100.0),)} if begins == "before" else {}
    words = ENOUGH if budget else AT_ONCE
    for grammar in (None, compiler.json(SCHEMAS["object"])):
        plan = Plan(tokenizer, grammar, begins, budget, (tokenizer.eos_id,))
        first = {} if grammar else {"max_new_tokens": 160, "stop_ids": ()}
        (tokens, reason), *_ = run(engine, sampled(tokenizer, plan, 1, prompt, **{**bias, **first}))
        text = tokenizer.decode(tokens, skip_special=True)
        forced = tokenizer.encode(words, allow_special=True)
        at = next(i for i in range(len(tokens)) if tokens[i : i + len(forced)] == forced)
        assert at == budget + (begins == "before"), text
        answer = tokenizer.decode(tokens[at + len(forced) :], skip_special=True)
        if grammar:
            assert reason == "stop" and set(json.loads(answer)) == {"name", "age", "good"}


def test_an_answer_may_do_without_reasoning_before_its_grammar(tokenizer, engine, compiler):
    plan = Plan(tokenizer, compiler.json(SCHEMAS["boolean"]), "before", None, (tokenizer.eos_id,))
    begun = tokenizer.encode("<think>", allow_special=True)[0]
    (text,) = texts(tokenizer, engine, sampled(tokenizer, plan, 1, logit_bias=((begun, -100.0),)))
    assert text.strip() in ("true", "false")
    ended = tokenizer.encode("</think>", allow_special=True)[0]
    (text,) = texts(tokenizer, engine, sampled(tokenizer, plan, 1, logit_bias=((begun, 12.0), (ended, 12.0))))
    thought, _, answer = text.partition("</think>")
    assert thought.startswith("<think>") and answer.strip() in ("true", "false") and thinking_at(text) == "answer"


@pytest.mark.parametrize("form", ["hermes", "qwen3_coder"])
@pytest.mark.parametrize("added", [True, False])
def test_calls_as_a_tokenizer_writes_them_follow_their_grammar(form, added, tokenizer):
    """Whether their tags are tokens or are spelled."""
    tok = tokenizer if added else train_bpe([TEXT * 20], 320)
    call = hermes("weather", '{"city": "Oslo", "days": 3}') if form == "hermes" else coder("weather", city="Oslo\nx", days="3")
    matcher = grammars.Grammars(tok, tok.vocab_size).calls(form, TOOLS).start()
    for token in tok.encode(f"\n\n{call}\n{call}", allow_special=True):
        assert matcher.allowed(tok.vocab_size)[token], tok.decode([token])
        matcher.take(token)
    assert matcher.allowed(tok.vocab_size)[tok.eos_id]


def test_a_schema_that_takes_too_long_is_refused_in_time(compiler, monkeypatch):
    monkeypatch.setattr(grammars, "LIMIT_S", 0.2)
    monkeypatch.setattr(grammars, "LONG_S", 0.1)
    monkeypatch.setattr(grammars.Grammars, "_compile", lambda self, text: time.sleep(1))
    with pytest.raises(grammars.SchemaError, match="it takes longer than 0.2 s to compile"):
        compiler.json({"type": "string", "maxLength": 17})


def test_compiled_grammars_are_kept(compiler):
    assert compiler.json({"type": "string", "maxLength": 3}) is compiler.json({"type": "string", "maxLength": 3})


def test_white_space_has_an_end(tokenizer, model, compiler):
    """Else a model could go on with it for ever."""
    matcher = compiler.json(SCHEMAS["object"]).start()
    for _ in range(60):
        allowed = matcher.allowed(model[0].vocab_size)
        blank = next((i for i in np.flatnonzero(allowed) if not tokenizer.bytes_of(i).strip()), None)
        if blank is None:
            return
        matcher.take(int(blank))
    raise AssertionError("60 blank tokens in a row are allowed")


def test_names_that_a_grammar_cannot_hold_are_refused(compiler):
    for name in ('a"b', "a b", "", "x" * 200, "<"):
        with pytest.raises(grammars.SchemaError, match="cannot be called for certain"):
            compiler.calls("hermes", [{"type": "function", "function": {"name": name}}])
    assert compiler.calls("hermes", TOOLS) and compiler.calls("qwen3_coder", TOOLS)
