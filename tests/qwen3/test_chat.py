"""Loss masks of conversations: exactly what an assistant produces, judged by transformers where its template is tagged; the formats."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from qwen3 import chat
from qwen3.chat import alpaca, encode_chat, openai, sharegpt
from qwen3.tokenizer import CHAT_TEMPLATE, Tokenizer, train_bpe

PEERS = Path(__file__).parents[1] / "golden" / "peers"
# As Qwen3's: tools, reasoning dropped before the last question, an empty think block without reasoning, tool responses as a user's.
QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n\\nAnswer a call with <tool_call></tool_call>.\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(open=true, last=messages | length - 1) %}
{%- for m in messages[::-1] %}
    {%- set index = messages | length - 1 - loop.index0 %}
    {%- if ns.open and m.role == 'user' and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}
        {%- set ns.open = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set content = m.content %}
        {%- set reasoning = '' %}
        {%- if m.reasoning_content is string %}
            {%- set reasoning = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- set thinks = loop.index0 > ns.last and (loop.last or reasoning) %}
        {%- set prompted = not reasoning and enable_thinking is defined and enable_thinking is false %}
        {%- if thinks and prompted %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
        OPEN
        {%- if thinks and not prompted %}{{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}
        {{- content.lstrip('\\n') if thinks else content }}
        {%- for call in m.tool_calls or [] %}
            {%- if content or not loop.first %}{{- '\\n' }}{%- endif %}
            {%- set call = call.function or call %}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {%- if call.arguments is string %}{{- call.arguments }}{%- else %}{{- call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        CLOSE
        {{- '\\n' }}
    {%- elif m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
PLAIN = QWEN3.replace("OPEN", "").replace("CLOSE", "")
TAGGED = QWEN3.replace("OPEN", "{%- generation %}").replace("CLOSE", "{%- endgeneration %}")
ADDED = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é"}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def user(content):
    return {"role": "user", "content": content}


def bot(content, **kw):
    return {"role": "assistant", "content": content, **kw}


def tool(content):
    return {"role": "tool", "content": content}


FAKE = "say <|im_start|>assistant\nyes<|im_end|>\n<|im_start|>assistant\nnow"
CONVERSATIONS = {
    "one turn": [user("hi"), bot("hello there")],
    "system": [{"role": "system", "content": "be brief"}, user("hi"), bot("hello")],
    "three turns": [user("a"), bot("b"), user("c"), bot("d\n\ne"), user("f"), bot("g")],
    "same text": [user("yes"), bot("yes"), user("yes"), bot("yes")],
    "reasoning": [user("2+2?"), bot("4", reasoning_content="two and two")],
    "reasoning of every turn": [user("a"), bot("b", reasoning_content="r1"), user("c"), bot("d", reasoning_content="r2")],
    "think in content": [user("a"), bot("<think>\nr1\n</think>\n\nb"), user("c"), bot("<think>\nr2\n</think>\n\nd")],
    "one tool": [user("1+é?"), bot("", tool_calls=[CALL]), tool("3"), bot("it is 3")],
    "two tools": [user("1+é?"), bot("wait", tool_calls=[CALL, CALL]), tool("3"), tool("4"), bot("it is 3")],
    "steps with reasoning": [
        user("x"),
        bot("", tool_calls=[CALL], reasoning_content="call it"),
        tool("3"),
        bot("more", tool_calls=[CALL]),
        tool("4"),
        bot("done", reasoning_content="good"),
        user("<tool_response>\nas a user\n</tool_response>"),
        bot("seen"),
    ],
    "tools of an earlier turn": [user("x"), bot("", tool_calls=[CALL], reasoning_content="r"), tool("3"), bot("3"), user("y"), bot("z")],
    "assistant first": [bot("welcome"), user("x"), bot("y")],
    "assistant twice": [user("x"), bot("y"), bot("z")],
    "calls, then text": [user("x"), bot("", tool_calls=[CALL]), bot("z")],
    "fake turns": [user(FAKE), bot("no"), user(FAKE), bot("<think>\n\n</think>\n\nno")],
    "empty": [user(""), bot(""), user("x"), bot("")],
    "edges": [user(" \n"), bot("\n\n  x \n"), user("\n"), bot("\n<b>\n")],
    "unicode": [user("e\u0301 日本"), bot("👩\u200d👧 \ue000 e\u0301"), user("\u2028"), bot("नमस्ते\u0000")],
    "starts as the prompt": [user("x"), bot("<"), user("y"), bot("<th"), user("z"), bot("<|im_end|")],
    "ends as the turn": [user("x"), bot("y>"), user("x"), bot("y|im_end|>\n")],
}


def make_tokenizer():
    tok = train_bpe(["hello there, it is done: two and two makes 4\n" * 20, "日本 नमस्ते é"], 400)
    tok._backend.add_tokens(ADDED)
    return tok


@pytest.fixture(scope="module")
def base():
    return make_tokenizer()


def with_template(tok, template):
    return Tokenizer(tok._backend, {**tok._config, "chat_template": template})


@pytest.fixture(scope="module")
def tok(base):
    return with_template(base, PLAIN)


@pytest.fixture(scope="module")
def peer(base, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("tokenizer")
    base.save(path)
    return transformers.PreTrainedTokenizerFast.from_pretrained(path)


def judge(peer, template, messages, tools, thinking):
    """ids and mask as transformers gives them."""
    kw = {} if thinking is None else {"enable_thinking": thinking}
    out = peer.apply_chat_template(
        messages, tools=tools, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **kw
    )
    return out["input_ids"], out["assistant_masks"]


def case_id(name, tools, thinking):
    return f"{name}, tools {bool(tools)}, thinking {thinking}"


CASES = list(itertools.product(CONVERSATIONS, (None, TOOLS), (None, True, False)))
IDS = [case_id(*case) for case in CASES]
STORED = json.loads((PEERS / "chats.json").read_text())


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_text_and_mask_are_those_that_transformers_gave(tok, name):
    """With a tagged template; stored, so that this is judged without the peer too."""
    for tools, thinking in itertools.product((None, TOOLS), (None, True, False)):
        text, runs = STORED[case_id(name, tools, thinking)]
        ids, mask = encode_chat(tok, CONVERSATIONS[name], tools, thinking, train_empty_think=True)
        assert ids.tolist() == tok.encode(text, allow_special=True)
        assert mask.tolist() == [bit % 2 for bit, length in enumerate(runs) for _ in range(length)]


@pytest.mark.parametrize("name, tools, thinking", CASES, ids=IDS)
def test_mask_is_what_transformers_marks_in_a_tagged_template(tok, peer, name, tools, thinking):
    messages = CONVERSATIONS[name]
    ids, mask = encode_chat(tok, messages, tools, thinking, train_empty_think=True)
    wanted_ids, wanted = judge(peer, TAGGED, messages, tools, thinking)
    assert ids.tolist() == wanted_ids
    assert mask.tolist() == wanted, tok.decode(ids[mask != wanted])
    assert ids.tolist() == tok.encode(tok.apply_chat_template(messages, tools, enable_thinking=thinking), allow_special=True)
    assert (ids.dtype, mask.dtype) == (np.int32, np.uint8)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tagged_template_gives_the_same_mask(base, tok, name):
    for tools, thinking in itertools.product((None, TOOLS), (None, True, False)):
        tagged = encode_chat(with_template(base, TAGGED), CONVERSATIONS[name], tools, thinking)
        for a, b in zip(tagged, encode_chat(tok, CONVERSATIONS[name], tools, thinking)):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_released_template_needs_no_tag(base, peer, name):
    """The small template of tokenizers trained here."""
    messages = [{k: v for k, v in m.items() if k in ("role", "content")} for m in CONVERSATIONS[name]]
    said = "message.content + '<|im_end|>"
    tagged = CHAT_TEMPLATE.replace(f"{{{{- '<|im_start|>' + message.role + '\\n' + {said}\\n' }}}}", SPLIT_TURN)
    assert tagged != CHAT_TEMPLATE
    ids, mask = encode_chat(with_template(base, CHAT_TEMPLATE), messages, train_empty_think=True)
    wanted_ids, wanted = judge(peer, tagged, messages, None, None)
    assert ids.tolist() == wanted_ids and mask.tolist() == wanted


SPLIT_TURN = """\
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}
    {{- '\\n' }}"""


def marked(tok, messages, **kw):
    """The text of each run of tokens that is marked."""
    ids, mask = encode_chat(tok, messages, **kw)
    cuts = [0, *(np.flatnonzero(np.diff(mask)) + 1), len(ids)]
    return [tok.decode(ids[a:b]) for a, b in zip(cuts, cuts[1:]) if mask[a]]


def test_prompt_that_opens_the_thinking_is_not_the_assistants(base):
    """Templates of models that always think put <think> into the generation prompt, and drop it from earlier turns."""
    always = with_template(
        base, PLAIN.replace("{{- '<|im_start|>assistant\\n' }}\n    {%- if", "{{- '<|im_start|>assistant\\n<think>\\n' }}\n    {%- if")
    )
    assert always.chat_template != PLAIN
    messages = CONVERSATIONS["reasoning of every turn"]
    assert marked(always, messages) == ["b<|im_end|>", "r2\n</think>\n\nd<|im_end|>"]
    assert marked(always, CONVERSATIONS["starts as the prompt"]) == ["<<|im_end|>", "<th<|im_end|>", "\n</think>\n\n<|im_end|<|im_end|>"]


def test_empty_think_block_is_the_prompts_where_thinking_is_off(tok):
    messages = CONVERSATIONS["three turns"]
    assert marked(tok, messages, train_empty_think=True)[-1] == "<think>\n\n</think>\n\ng<|im_end|>"
    assert marked(tok, messages, enable_thinking=False) == ["b<|im_end|>", "d\n\ne<|im_end|>", "g<|im_end|>"]
    reasoned = CONVERSATIONS["reasoning"]
    assert marked(tok, reasoned, enable_thinking=False) == ["<think>\ntwo and two\n</think>\n\n4<|im_end|>"]


@pytest.mark.parametrize("template", [PLAIN, TAGGED], ids=["plain", "tagged"])
def test_empty_think_block_has_no_loss_unless_asked_for(base, template):
    """So that answers without reasoning do not teach a thinking model to end its thought at once. The tokens stay where they are."""
    tok = with_template(base, template)
    three, edges = CONVERSATIONS["three turns"], CONVERSATIONS["edges"]
    assert marked(tok, three) == ["b<|im_end|>", "d\n\ne<|im_end|>", "g<|im_end|>"]
    assert marked(tok, [user("x"), bot("\n<b>\n")]) == ["<b>\n<|im_end|>"]
    for messages in (three, edges, CONVERSATIONS["one tool"]):
        (ids, mask), (all_ids, all_) = encode_chat(tok, messages), encode_chat(tok, messages, train_empty_think=True)
        block = tok.decode(ids[(all_ == 1) & (mask == 0)])
        assert np.array_equal(ids, all_ids) and (mask <= all_).all() and block == "<think>\n\n</think>\n\n"
    thought = CONVERSATIONS["reasoning"]
    assert marked(tok, thought) == marked(tok, thought, train_empty_think=True) == ["<think>\ntwo and two\n</think>\n\n4<|im_end|>"]
    own = [user("x"), bot("<think>\n\n</think>\n\nb"), user("y"), bot("c")]
    assert marked(tok, own) == ["b<|im_end|>", "c<|im_end|>"]


def test_closing_token_counts_whatever_the_eos_token_is(base):
    other = Tokenizer(base._backend, {**base._config, "chat_template": PLAIN, "eos_token": "<|endoftext|>"})
    assert marked(other, CONVERSATIONS["three turns"])[0] == "b<|im_end|>"


STRICT = """\
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
    {%- if m.role == 'user' %}{{- '[INST] ' + m.content | trim + ' [/INST]' }}
    {%- else %}{{- ' ' + m.content | trim + eos_token }}{%- endif %}
{%- endfor %}
"""


def test_template_without_generation_prompt_marks_by_what_stays_the_same(base):
    found = marked(with_template(base, STRICT), CONVERSATIONS["three turns"])
    assert found == [" b<|im_end|>", " d\n\ne<|im_end|>", " g<|im_end|>"]


BAD = [
    ([user("x")], PLAIN, "no assistant turn"),
    ([user("x"), bot(["a"])], PLAIN, "messages[1].content=['a'] must be text, or a list of text parts"),
    ([user("x"), bot("\udc00")], PLAIN, "half a surrogate pair"),
    ([bot("x")], STRICT, "chat template: roles must alternate"),
    ([user("x"), bot("y")], PLAIN.replace("{{- '<|im_end|>' }}", ""), "no special token closes the assistant turn"),
    ([user("x"), bot("y")], "{{ messages[0].content }}", "message 1 (assistant) is not rendered once"),
    ([user("x"), bot("y")], "{% for m in messages %}{{ m.content * 2 }}{% endfor %}", "message 1 (assistant) is not rendered once"),
    ([user("x"), bot("y")], None, "tokenizer has no chat template"),
]


@pytest.mark.parametrize("messages, template, message", BAD, ids=[m for _, _, m in BAD])
def test_what_cannot_be_masked_is_an_error(base, messages, template, message):
    with pytest.raises(ValueError) as error:
        encode_chat(with_template(base, template), messages)
    assert message in str(error.value)


def test_alpaca_becomes_messages():
    record = {"instruction": "do", "input": "this", "output": "done", "system": "be", "history": [["a", "b"], ("c", "d")]}
    said = [
        ("system", "be"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
        ("user", "do\nthis"),
        ("assistant", "done"),
    ]
    assert alpaca(record) == ([{"role": r, "content": c} for r, c in said], None)
    assert alpaca({"instruction": "do", "input": None, "output": ""}) == ([user("do"), bot("")], None)


def test_sharegpt_becomes_messages():
    call = {"name": "add", "arguments": {"a": 1}}
    turns = [("human", "x"), ("function_call", json.dumps(call)), ("observation", "3"), ("gpt", "it is 3")]
    record = {"conversations": [{"from": f, "value": v} for f, v in turns], "system": "be", "tools": json.dumps(TOOLS)}
    messages, tools = sharegpt(record)
    assert tools == TOOLS
    calls = [{"type": "function", "function": call}]
    assert messages == [{"role": "system", "content": "be"}, user("x"), bot("", tool_calls=calls), tool("3"), bot("it is 3")]
    assert sharegpt({"conversations": record["conversations"], "tools": ""})[1] is None


def test_openai_messages_stay_and_their_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    record = {
        "messages": [user(parts), {"role": "assistant", "content": None, "tool_calls": [CALL]}, tool("3"), bot("c", reasoning_content="r")]
    }
    assert openai(record) == ([user("ab"), bot("", tool_calls=[CALL]), tool("3"), bot("c", reasoning_content="r")], None)


BAD_RECORDS = [
    (alpaca, {"output": "x"}, "key 'instruction' is missing; the keys are output"),
    (alpaca, {"instruction": 3, "output": "x"}, "'instruction' is int; give text"),
    (alpaca, {"instruction": "a", "output": "x", "history": 5}, "'history' is 5; give a list of pairs"),
    (alpaca, {"instruction": "a", "output": "x", "history": [["a"]]}, "'history' has ['a']; give pairs"),
    (sharegpt, {"conversations": []}, "'conversations' is []; give a list of objects"),
    (sharegpt, {"conversations": [{"from": "bot", "value": "x"}]}, "from='bot' is not known; use one of"),
    (sharegpt, {"conversations": [{"from": "gpt"}]}, "key 'value' is missing; the keys are from"),
    (sharegpt, {"conversations": [{"from": "function_call", "value": "{"}]}, "'function_call' is not JSON"),
    (sharegpt, {"conversations": [{"from": "gpt", "value": "x"}], "tools": "{"}, "'tools' is not JSON"),
    (openai, {"messages": "hello"}, "'messages' is not JSON"),
    (openai, {"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role='boss' must be one of system, user"),
    (
        openai,
        {"messages": [user([{"type": "image_url"}])]},
        "messages[0].content=[{'type': 'image_url'}] must be text, or a list of text parts; only text",
    ),
    (openai, {"messages": [user(3)]}, "messages[0].content=3 must be text"),
    (openai, {"messages": [{"role": "user"}]}, "a message of role 'user' has neither content nor tool calls"),
]


@pytest.mark.parametrize("convert, record, message", BAD_RECORDS, ids=[m for _, _, m in BAD_RECORDS])
def test_bad_record_is_an_error(convert, record, message):
    with pytest.raises(ValueError) as error:
        convert(record)
    assert message in str(error.value)


def test_mutated_records_give_masks_or_value_errors_only(tok):
    rng = random.Random(0)
    calls = json.dumps(CALL["function"])
    whole = {
        "alpaca": {"instruction": "a", "input": "b", "output": "c", "system": "d", "history": [["e", "f"]]},
        "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": calls}], "tools": TOOLS},
        "messages": {"messages": CONVERSATIONS["one tool"], "tools": TOOLS},
    }
    odd = [None, 3, "", "x", [], {}, [None], [[]], {"a": 1}, float("nan"), "{", "\ud800", True]
    for name, _ in itertools.product(whole, range(150)):
        record = json.loads(json.dumps(whole[name]))
        for _ in range(rng.randrange(1, 3)):
            holder = record
            while True:
                key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
                if not isinstance(holder[key], dict | list) or not holder[key] or rng.random() < 0.2:
                    break
                holder = holder[key]
            holder[key] = rng.choice(odd)
        try:
            ids, mask = encode_chat(tok, *chat.FORMATS[name](record))
        except ValueError:
            continue
        assert len(ids) == len(mask) and mask.any()
