"""The released Qwen3 tokenizer, in the folder that QWEN3_TOKENIZER names: ids, decoding, streaming, templates with tools and thinking,
masks, preprocessing, requests. Judged by what transformers gave, which is stored. Skipped without the folder."""

import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from experiments.data import encode
from experiments.data.readers import Record
from experiments.generate import defaults
from experiments.generate import prompts as generate_prompts
from experiments.serve import requests as serve_requests
from qwen3.answers import Answer, Forms, forms_of, message, thinking_at
from qwen3.chat import encode_chat, turn_ends
from qwen3.config import SIZES
from qwen3.grammars import Grammars
from qwen3.guide import Plan
from qwen3.schema import GenerationJson
from qwen3.text_stream import TextStream
from qwen3.tokenizer import Tokenizer
from tests import scripted_answers as scripted
from tests.golden.make_peers import digest
from tests.qwen3 import test_chat
from tests.qwen3.test_tokenizer import ODD_TEXTS

FOLDER = os.environ.get("QWEN3_TOKENIZER")
pytestmark = pytest.mark.skipif(not FOLDER, reason="QWEN3_TOKENIZER names no folder with the released tokenizer")
STORED = Path(__file__).parents[1] / "golden" / "peers" / "released.json"
TEXTS = [
    *ODD_TEXTS,
    "def f(x):\n    return x + 1\n",
    "<think>\n\n</think>\n\n<tool_call>{}</tool_call><|im_end|>",
    "1234567890 \u00bd \u2168",
]
LAST = "<|im_start|>assistant\n"


def conversations():
    """{name: (messages, tools)} in the one form of qwen3/messages.py, which transformers renders as it is."""
    skipped = ("same text", "empty")
    chats = {name: messages for name, messages in test_chat.CONVERSATIONS.items() if name not in skipped}
    return {
        f"{name}, tools {bool(tools)}": (messages, tools)
        for (name, messages), tools in itertools.product(chats.items(), (None, test_chat.TOOLS))
    }


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.load(FOLDER)


@pytest.fixture(scope="module")
def stored():
    return json.loads(STORED.read_text())


def test_sizes_and_ids_of_the_released_tokenizer(tok):
    assert (tok.vocab_size, tok.eod_id, tok.eos_id, tok.pad_id) == (151669, 151643, 151645, 151643)
    assert turn_ends(tok) == (151645,)
    assert defaults.stop_ids(GenerationJson(), SIZES["qwen3-0.6b"], tok) == {151643, 151645}


def test_ids_are_those_of_transformers_and_decode_to_the_text_whole_and_streamed(tok, stored):
    for text, ids in zip(TEXTS, stored["ids"], strict=True):
        assert tok.encode(text, allow_special=True) == ids
        stream = TextStream(tok, skip_special=False)
        assert "".join([*map(stream.push, ids), stream.finish()]) == tok.decode(ids)


@pytest.mark.parametrize("prompt, thinking", list(itertools.product((False, True), (None, True, False))))
def test_conversations_are_rendered_as_transformers_renders_them(tok, stored, prompt, thinking):
    for name, (messages, tools) in conversations().items():
        text = tok.apply_chat_template(messages, tools, add_generation_prompt=prompt, enable_thinking=thinking)
        assert digest(text) == stored["hashes"][f"{name}, prompt {prompt}, thinking {thinking}"], name


def test_calls_and_reasoning_are_read_and_kept_by_grammars(tok):
    """In the form that the released template writes; its tags are tokens of their own."""
    pytest.importorskip("llguidance")
    assert forms_of(tok.chat_template) == Forms("hermes", True)
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in (scripted.OSLO, scripted.NOW)]
    said = {"role": "assistant", "content": "", "reasoning_content": "Hm.\n\nYes.", "tool_calls": calls}
    messages = [{"role": "user", "content": "x"}, said]
    before = tok.apply_chat_template(messages[:1], scripted.TOOLS, add_generation_prompt=True)
    text = tok.apply_chat_template(messages, scripted.TOOLS)[len(before) :].removesuffix("<|im_end|>\n")
    answer = Answer("hermes", scripted.TOOLS, thinking_at(before))
    found = message(answer.push(text) + answer.finish())
    assert found["reasoning_content"] == said["reasoning_content"] and found["content"] is None
    for call, want in zip(found["tool_calls"], calls, strict=True):
        assert json.loads(call["function"]["arguments"]) == want["function"]["arguments"]
    compiler = Grammars(tok, SIZES["qwen3-0.6b"].vocab_size)
    guide = Plan(tok, compiler.calls("hermes", scripted.TOOLS), "before", None, (tok.eos_id,)).start()
    for token in tok.encode(text, allow_special=True):
        allowed = guide.allowed(151936)
        assert allowed is None or allowed[token], tok.decode([token])
        guide.take(token)
    assert guide.allowed(151936)[tok.eos_id]


def by_hand(tok, text, empty):
    """The mask of a text in which no message fakes a turn: what comes after each start of the assistant's turn, up to its end."""
    ids, start, end = tok.encode_offsets(text)
    mask = np.zeros(len(ids), np.uint8)
    for found in re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text, re.DOTALL):
        first, last = found.span(1)
        block = re.match(r"<think>\n\n</think>\n\n", text[first:])
        mask[(start >= first + (block.end() if block and not empty else 0)) & (end <= last)] = 1
    return mask


@pytest.mark.parametrize("empty", [False, True])
def test_masks_are_what_the_assistant_says(tok, empty):
    for name, (messages, tools) in conversations().items():
        if name.startswith(("fake", "ends as", "edges")):
            continue
        ids, mask = encode_chat(tok, messages, tools, train_empty_think=empty)
        text = tok.apply_chat_template(messages, tools)
        assert ids.tolist() == tok.encode(text, allow_special=True)
        np.testing.assert_array_equal(mask, by_hand(tok, text, empty), err_msg=name)
    assert not empty or "<think>\n\n</think>\n\n" in tok.decode(ids[mask == 1])


def test_preprocessing_generation_and_the_server_see_one_conversation(tok):
    """With a call as OpenAI's API has it."""
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    record = {"messages": [*messages, {"role": "assistant", "content": "2"}], "tools": [test_chat.TOOLS[0]["function"]]}
    job = encode.Job(FOLDER, append_eod=False, format="messages")
    (batch,) = encode.encode([Record(record, "line 1", 1)], job)
    ids, text = batch.outputs["text"][0], tok.decode(batch.outputs["text"][0])
    assert not batch.bad and '{"name": "add", "arguments": {"a": 1}}' in text and text.endswith("2<|im_end|>\n")
    assert tok.decode(ids[batch.outputs["loss"][0] == 1]).endswith("</tool_call><|im_end|>2<|im_end|>")
    prompt = generate_prompts.encode(tok, {"messages": messages, "tools": record["tools"]}).tolist()
    body = json.dumps({"model": "m", "messages": messages, "tools": record["tools"]}).encode()
    assert serve_requests.parse(body, "chat", tok, "m", 4096, (151645,), 4).prompts == [prompt]
    assert tok.decode(prompt).endswith(LAST) and ids[: len(prompt)].tolist() == prompt
    quiet = json.dumps({"model": "m", "messages": messages[:1], "chat_template_kwargs": {"enable_thinking": False}}).encode()
    said = serve_requests.parse(quiet, "chat", tok, "m", 4096, (151645,), 4).prompts[0]
    assert tok.decode(said).endswith(f"{LAST}<think>\n\n</think>\n\n")
