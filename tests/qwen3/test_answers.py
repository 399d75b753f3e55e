"""Reasoning, content and tool calls of a text, the same wherever it is cut."""

import json
import random
import time

import pytest

from qwen3 import tool_calls
from qwen3.answers import Answer, Forms, forms_of, message, thinking_at
from tests.scripted_answers import CASES, TOOLS, coder, hermes

CALL = hermes("weather", '{"city": "Oslo"}')


def split(case, cuts=(), **options):
    """The pieces of a case's text, given in parts that end at `cuts`."""
    form, begins, text, *_ = case
    answer, at, pieces = Answer(form, TOOLS, begins, **options), 0, []
    for cut in [*cuts, len(text)]:
        pieces += answer.push(text[at:cut])
        at = cut
    return pieces + answer.finish()


def plain(found):
    """A message without the spelling of its arguments."""
    calls = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in found.get("tool_calls", [])]
    return found.get("reasoning_content"), found["content"], calls


@pytest.mark.parametrize("name", CASES)
def test_an_answer_is_the_message_that_was_meant_wherever_it_is_cut(name):
    """In two parts at every place, character by character, and in random parts."""
    case = CASES[name]
    form, begins, text, *want = case
    whole = message(split(case))
    assert plain(whole) == tuple(want)
    rng = random.Random(name)
    cuts = [[cut] for cut in range(len(text))] + [range(len(text))]
    cuts += [sorted(rng.choices(range(len(text) + 1), k=5)) for _ in range(30)]
    for each in cuts:
        assert message(split(case, each)) == whole, each


def test_nothing_is_held_back_that_is_certain():
    """A text without tags comes at once; of a call everything is held back until it is whole, unless it is sure to be one."""
    answer = Answer("hermes", TOOLS, "before")
    assert answer.push("<thi") == [] and answer.push("nk>\n") == []
    assert answer.push("one") == [("reasoning", "one")]
    assert answer.push("\n</thi") == [] and answer.push("s") == [("reasoning", "\n</this")]
    assert answer.push("</think>\n\nAnd") == [("content", "And")]
    assert answer.push(" then\n<") == [("content", " then")]
    assert answer.push("b>") == [("content", "\n<b>")]
    assert answer.push(f"\n{CALL[:-1]}") == [] and answer.push(">") == [("call", "weather"), ("arguments", '{"city": "Oslo"}')]
    live, at = Answer("hermes", TOOLS, live=True), CALL.index('{"city"')
    assert live.push(CALL[:at]) == [("call", "weather")] and live.push(CALL[at : at + 5]) == [("arguments", CALL[at : at + 5])]
    assert live.push(CALL[at + 5 : at + 8]) == [("arguments", CALL[at + 5 : at + 8])]


@pytest.mark.parametrize("text", [f"{CALL}\n{hermes('now', '{}')}", coder("weather", city="Oslo", days="3")])
def test_a_call_that_is_sure_comes_in_pieces(text):
    """And gives what it gives as a whole; one that the limit of tokens cuts stays a call, as in OpenAI's API."""
    form = "hermes" if "arguments" in text else "qwen3_coder"
    case = (form, "answer", text)
    want = message(split(case))
    for cuts in [[cut] for cut in range(len(text))] + [range(len(text))]:
        assert message(split(case, cuts, live=True)) == want
    assert len(split(case, range(len(text)), live=True)) > len(split(case))
    cut = message(split((form, "answer", text[: text.index("Oslo") + (100 if form == "qwen3_coder" else 2)]), live=True))
    assert cut["content"] is None and cut["tool_calls"][0]["function"]["arguments"].startswith('{"city": "Os')


def test_an_answer_may_end_after_its_first_call():
    answer = Answer("hermes", TOOLS, most_calls=1)
    pieces = answer.push(f"A {CALL}{CALL} more")
    assert [kind for kind, _ in pieces] == ["content", "call", "arguments"] and answer.ended
    assert answer.push("x") == answer.finish() == []


def test_forms_follow_from_chat_templates():
    assert tool_calls.form_of('within <tool_call></tool_call> tags: {"name"') == "hermes"
    assert tool_calls.form_of("<tool_call>\n<function=example>") == "qwen3_coder"
    assert tool_calls.form_of(None) is None and tool_calls.form_of("{{ messages }}") is None
    assert forms_of("x.split('</think>')") == Forms(None, True) and forms_of(None) == Forms(None, False)
    assert forms_of("<tool_call>", "qwen3_coder", "tags") == Forms("qwen3_coder", True) and forms_of("<tool_call>", "none").calls is None
    turn = "<|im_start|>user\n<think></think><|im_end|>\n<|im_start|>assistant\n"
    begins = {"": "before", "<think>\n": "inside", "<think>\n\n</think>\n\n": "answer", "<think>a</think><think>b": "inside"}
    assert {text: thinking_at(turn + text) for text in begins} == begins


def test_broken_calls_cost_no_more_than_their_length():
    for start in (
        '<tool_call>{"',
        '<tool_call>{"a\\"',
        '<tool_call>{"a":[',
        "<tool_call><function=f><parameter=a>",
        "<tool_call>",
        '<tool_call>{"a":1',
    ):
        for form in tool_calls.CALLS:
            text = start * (40_000 // len(start))
            began = time.monotonic()
            found = message(split((form, "answer", text), range(0, len(text), 50)))
            assert found["content"] == text and time.monotonic() - began < 3, (start, form)


def test_random_texts_of_tags_are_the_same_in_every_cut():
    """And their parts together have every character that is no blank."""
    rng = random.Random(1)
    parts = [
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        '{"name": "f", "arguments": {}}',
        '{"name"',
        ' "',
        "\n",
        "a",
        "{",
        "}",
        "[",
        "]",
    ]
    parts += ["<function=f>", "</function>", "<parameter=a>", "</parameter>", "<", "\\", ":", ",", "1", "true"]
    for _ in range(1500):
        form, begins = rng.choice(list(tool_calls.CALLS)), rng.choice(["before", "inside", "answer"])
        case = (form, begins, "".join(rng.choices(parts, k=rng.randrange(12))))
        whole = message(split(case))
        for _ in range(3):
            cuts = sorted(rng.choices(range(len(case[2]) + 1), k=4))
            assert message(split(case, cuts)) == whole, (case, cuts)
        if not whole.get("tool_calls") and "think>" not in case[2]:
            said = (whole.get("reasoning_content") or "") + (whole["content"] or "")
            assert "".join(said.split()) == "".join(case[2].split())
