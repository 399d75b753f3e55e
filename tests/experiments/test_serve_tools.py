"""Tool calls, reasoning, grammars and penalties in requests and answers of experiments.serve, judged by the official client's objects."""

import json
import random
from types import SimpleNamespace

import pytest

from experiments.serve import requests as serve_requests
from experiments.serve.refused import Refused
from experiments.serve.replies import Choice, Reply
from qwen3 import grammars
from qwen3.answers import Forms, forms_of, thinking_at
from qwen3.engine import Event
from qwen3.tokenizer import Tokenizer, train_bpe
from tests.scripted_answers import CASES, ONE, TOOLS, X_OSLO

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}<tool_call>{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
USER = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def tokenizer():
    made = train_bpe(["def f(x): return {}\n" * 20], 300)
    return Tokenizer(made._backend, {**made._config, "chat_template": TEMPLATE})


@pytest.fixture(scope="module")
def compiler(tokenizer):
    pytest.importorskip("llguidance")
    return grammars.Grammars(tokenizer, tokenizer.vocab_size)


def parse(tokenizer, kind="chat", compiler=None, **body):
    given = {"model": "m", **({"messages": USER} if kind == "chat" else {"prompt": "a"}), **body}
    return serve_requests.parse(json.dumps(given).encode(), kind, tokenizer, "m", 2000, (7, 8), 10, None, None, compiler)


def refused(tokenizer, *args, **body):
    with pytest.raises(Refused) as error:
        parse(tokenizer, *args, **body)
    return error.value.param, str(error.value)


def answered(case, cuts=(), live=False, reason="stop"):
    """(the chunks of a stream, the whole answer) where the engine's tokens are the parts of a text that end at `cuts`."""
    form, begins, text, *_ = case
    parts, at = [], 0
    for cut in [*cuts, len(text)]:
        parts.append(text[at:cut].encode())
        at = cut
    words = SimpleNamespace(bytes_of=lambda i, skip=False: parts[i])
    answer = {"form": form, "tools": TOOLS, "thinking": begins, "live": live}
    asked = serve_requests.Asked([[1]], 1, {}, (), None, stream=True, include_usage=True, answer=answer)
    choice, reply = Choice(words, asked), Reply("chat", "m", asked)
    chunks = [reply.opening(0)]
    for i in range(len(parts) + (reason == "stop")):
        last = i == len(parts) - (reason != "stop")
        chunks += reply.chunks(0, choice, *choice.push(Event(0, i, finish_reason=reason if last else None)))
    return [*chunks, reply.last([choice])], reply.whole([choice])


def collected(chunks):
    """The message and the finish reason that the official client makes of a stream."""
    from openai.lib.streaming.chat import ChatCompletionStreamState
    from openai.types.chat import ChatCompletionChunk

    state = ChatCompletionStreamState()
    for chunk in chunks:
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    return plain(state.current_completion_snapshot.choices[0])


def plain(choice):
    """What a client sees of a choice."""
    found = choice.message.model_dump(exclude_unset=True, exclude_none=True)
    calls = [(call["id"], call["type"], call["function"]["name"], call["function"]["arguments"]) for call in found.get("tool_calls") or []]
    return found["role"], found.get("reasoning_content"), choice.message.content, calls, choice.finish_reason


def of_whole(answer):
    from openai.types.chat import ChatCompletion

    return plain(ChatCompletion.model_validate(answer).choices[0])


def check(case, cuts, **options):
    chunks, whole = answered(case, cuts, **options)
    want = of_whole(whole)
    assert collected(chunks) == want, cuts
    _, _, _, reasoning, content, calls = case
    assert want[:3] == ("assistant", reasoning, content) and [(name, json.loads(text)) for _, _, name, text in want[3]] == calls
    assert want[4] == ("tool_calls" if calls else "stop") and len({i for i, *_ in want[3]}) == len(calls)


@pytest.mark.parametrize("name", CASES)
def test_the_official_client_has_the_message_that_was_meant(name):
    """Of a whole answer, and of streams with a few cuts."""
    pytest.importorskip("openai")
    case, rng = CASES[name], random.Random(name)
    for cuts in ([], range(len(case[2])), *(sorted(rng.choices(range(len(case[2]) + 1), k=3)) for _ in range(4))):
        check(case, cuts)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_official_client_has_the_same_message_of_every_cut(name):
    pytest.importorskip("openai")
    for cut in range(len(CASES[name][2])):
        check(CASES[name], [cut])


@pytest.mark.parametrize("text", [f"{ONE}\n{ONE}", f"{X_OSLO}\n{X_OSLO}"])
def test_a_call_that_a_grammar_makes_certain_is_streamed_while_it_grows(text):
    """Its name and id come first and once, its arguments in pieces."""
    pytest.importorskip("openai")
    case = ("hermes" if text.startswith(ONE) else "qwen3_coder", "answer", text)
    chunks, whole = answered(case, range(len(text)), live=True)
    assert collected(chunks) == of_whole(whole)
    deltas = [call for chunk in chunks for choice in chunk["choices"] for call in choice["delta"].get("tool_calls", [])]
    for number in (0, 1):
        first, *rest = [call for call in deltas if call["index"] == number]
        assert first["id"] and first["function"] == {"name": "weather", "arguments": ""} and first["type"] == "function"
        assert len(rest) > 1 and all(set(call) == {"index", "function"} and set(call["function"]) == {"arguments"} for call in rest)
    chunks, whole = answered((case[0], "answer", text[: len(text) // 3]), [5], live=True, reason="length")
    assert collected(chunks) == of_whole(whole) and of_whole(whole)[4] == "length"


def test_a_request_says_how_its_answer_is_read(tokenizer):
    asked = parse(tokenizer, tools=TOOLS)
    assert asked.answer == {"form": "hermes", "tools": TOOLS, "thinking": "before", "live": False, "most_calls": None}
    assert asked.options["guide"] is None
    assert parse(tokenizer, tools=TOOLS, parallel_tool_calls=False).answer["most_calls"] == 1
    assert parse(tokenizer, tools=TOOLS, tool_choice="none").answer["form"] is None
    assert parse(tokenizer, chat_template_kwargs={"enable_thinking": False}).answer["thinking"] == "answer"
    assert parse(tokenizer, "completion").answer is None
    assert forms_of(TEMPLATE) == Forms("hermes", True)


def test_reasoning_has_a_budget_or_an_effort(tokenizer):
    budget = lambda **body: parse(tokenizer, **body).options["guide"]
    assert budget(thinking_budget=5).budget == 5 and budget(reasoning_effort="low").budget == 2048
    assert budget(reasoning_effort="low", thinking_budget=0).budget == 0 and budget(reasoning_effort="high") is None
    quiet = parse(tokenizer, reasoning_effort="none")
    assert quiet.options["guide"] is None and tokenizer.decode(quiet.prompts[0]).endswith("<think>\n\n</think>\n\n")
    assert refused(tokenizer, reasoning_effort="none", chat_template_kwargs={"enable_thinking": True})[0] == "reasoning_effort"
    assert refused(tokenizer, reasoning_effort="much")[0] == "reasoning_effort"
    assert refused(tokenizer, thinking_budget=-1)[0] == "thinking_budget"
    plain = Tokenizer(tokenizer._backend, {**tokenizer._config, "chat_template": "{{ messages[0].content }}"})
    assert refused(plain, thinking_budget=5)[0] == "thinking_budget" and refused(plain, reasoning_effort="low")[0] == "reasoning_effort"
    assert parse(plain, reasoning_effort="none").options["guide"] is None


def test_an_assistants_message_is_continued(tokenizer):
    begun = [*USER, {"role": "assistant", "content": "one tw"}]
    text = tokenizer.decode(parse(tokenizer, messages=begun, continue_final_message=True, add_generation_prompt=False).prompts[0])
    assert text.endswith("<|im_start|>assistant\none tw")
    text = tokenizer.decode(parse(tokenizer, messages=begun, add_generation_prompt=False).prompts[0])
    assert text.endswith("one tw<|im_end|>\n")
    thought = [*USER, {"role": "assistant", "content": "", "reasoning_content": "Hm"}]
    text = tokenizer.decode(parse(tokenizer, messages=thought, continue_final_message=True).prompts[0])
    assert text.endswith("<think>\nHm\n</think>\n\n") and thinking_at(text) == "answer"
    assert refused(tokenizer, messages=USER, continue_final_message=True)[0] == "messages"
    assert refused(tokenizer, messages=begun, continue_final_message=True, add_generation_prompt=True)[0] == "continue_final_message"


def test_a_developer_is_the_system(tokenizer):
    text = tokenizer.decode(parse(tokenizer, messages=[{"role": "developer", "content": "be kind"}, *USER]).prompts[0])
    assert text.startswith("<|im_start|>system\nbe kind<|im_end|>")


def test_penalties_biases_and_least_lengths_reach_the_engine(tokenizer):
    body = {"presence_penalty": 0.5, "frequency_penalty": -1, "logit_bias": {"3": -100, "5": 2.5}, "min_tokens": 4}
    for kind in ("chat", "completion"):
        options = parse(tokenizer, kind, **body).options
        assert (options["presence_penalty"], options["frequency_penalty"], options["min_tokens"]) == (0.5, -1, 4)
        assert options["logit_bias"] == ((3, -100), (5, 2.5)) and options["stop_ids"] == (7, 8)
        assert parse(tokenizer, kind, ignore_eos=True).options["stop_ids"] == ()
    wrong = {
        "presence_penalty": 2.1,
        "frequency_penalty": "1",
        "logit_bias": {"a": 1},
        "min_tokens": 3000,
        "ignore_eos": 1,
    }
    for key, value in wrong.items():
        assert refused(tokenizer, **{key: value})[0] == key
    assert refused(tokenizer, logit_bias={"3": 101})[0] == refused(tokenizer, logit_bias={"999": 1})[0] == "logit_bias"


def test_a_completion_may_begin_with_its_prompt(tokenizer):
    asked = parse(tokenizer, "completion", prompt=["one", tokenizer.encode("two")], echo=True, n=2)
    assert asked.echo == ("one", "two")
    choices = [Choice(tokenizer, asked) for _ in range(4)]
    new = tokenizer.encode("a")[0]
    for choice in choices:
        choice.push(Event(0, new, finish_reason="length"))
    reply = Reply("completion", "m", asked)
    assert [choice["text"] for choice in reply.whole(choices)["choices"]] == ["onea", "onea", "twoa", "twoa"]
    assert [reply.opening(i)["choices"][0]["text"] for i in range(4)] == ["one", "one", "two", "two"]
    assert refused(tokenizer, "completion", echo=True, logprobs=1)[0] == "echo" and refused(tokenizer, echo=True)[0] == "echo"


SCHEMA = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "strin"}}}}


def test_forms_of_the_answer_that_cannot_be_are_refused_with_their_place(tokenizer, compiler):
    ask = lambda **body: refused(tokenizer, "chat", compiler, **body)
    schema = lambda schema: {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    param, words = ask(response_format=schema(SCHEMA))
    assert param == "response_format" and words == "response_format.json_schema.schema.properties.a.items: Invalid type: strin"
    assert ask(response_format=schema({"type": "integer", "multipleOf": 1e9}))[1].startswith(
        "response_format.json_schema.schema: multipleOf"
    )
    tools = [TOOLS[1], {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
    param, words = ask(tools=tools, tool_choice="required")
    assert param == "tools" and words.startswith("tools[1].function.parameters.properties.a.items: ")
    assert ask(tools=tools, tool_choice={"type": "function", "function": {"name": "g"}})[0] == "tool_choice"
    assert ask(tool_choice="required")[0] == ask(tools=tools, tool_choice="some")[0] == "tool_choice"
    for wrong in ({"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"name": "x"}}, "json", schema([1])):
        assert ask(response_format=wrong)[0] == "response_format", wrong
    assert ask(response_format={"type": "json_object"}, tools=TOOLS)[0] == "response_format"
    assert ask(response_format={"type": "json_object"}, ignore_eos=True)[0] == "ignore_eos"
    assert ask(response_format={"type": "json_object"}, min_tokens=2)[0] == "min_tokens"
    param, words = refused(tokenizer, response_format={"type": "json_object"})
    assert param == "response_format" and "needs llguidance: pip install -e '.[serve]'" in words
    assert parse(tokenizer, response_format={"type": "text"}).options["guide"] is None


def test_a_named_tool_is_called_once(tokenizer, compiler):
    named = {"type": "function", "function": {"name": "now"}}
    asked = parse(tokenizer, "chat", compiler, tools=TOOLS, tool_choice=named)
    assert asked.answer["live"] and asked.answer["most_calls"] == 1 and asked.options["guide"].grammar is not None
    assert parse(tokenizer, "chat", compiler, tools=TOOLS, tool_choice="required").answer["most_calls"] is None
