"""The tokenizer: round trips, special tokens, chat templates, training, and agreement with transformers."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.data.sources import find_documents
from qwen3 import tokenizer as module
from qwen3.tokenizer import Tokenizer, train_bpe

ODD_TEXTS = [
    "",
    " ",
    "\n",
    "a\r\n\r\n  b\t\tc  ",
    "naïve café — “quotes” … ½",
    "日本語 テキスト 한국어 नमस्ते مرحبا",
    "👩\u200d👩\u200d👧 🏳️\u200d🌈 \U0001f9d1\U0001f3fd",
    "zero\u200bwidth\ufeff\u2028line\u0085next\x1c\x00end",
    "I'LL they've 12345 x+=1\n\n\n    return",
    "\U0010ffff \ufffd \ue000",
]
TEMPLATE = """
  {% if messages %}
  indented
  {% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages[::-1] %}
    {%- if m.role == 'user' and ns.last < 0 %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- if tools %}
    {{- 'tools: ' }}
    {%- for tool in tools %}{{- tool | tojson }}{{- tool | tojson(indent=2, sort_keys=true) }}{% endfor %}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'skip' %}{% continue %}{% endif %}
    {%- if m.role == 'bad' %}{{ raise_exception('role bad is not known') }}{% endif %}
    {%- if m.content is defined %}
        {{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ eos_token ~ '\\n' }}
    {%- else %}
        {{- '(no content)' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' ~ ns.last }}
    {%- if enable_thinking is defined %}{{- 'thinking ' ~ enable_thinking }}{% endif %}
    {{- flavour }} {{ strftime_now('%Y') | length }}
{%- endif %}
"""
MESSAGES = [
    {"role": "system", "content": "<b>'é'</b>"},
    {"role": "skip", "content": "unseen"},
    {"role": "user", "content": "日本?"},
    {"role": "assistant", "content": None},
]
TOOLS = [{"type": "function", "function": {"name": "f<é>", "parameters": {"z": 1, "a": None}}}]


PEERS = Path(__file__).parents[1] / "golden" / "peers"
RENDERED = ([None, TOOLS], [False, True], [{}, {"enable_thinking": False}, {"enable_thinking": True, "flavour": "sweet"}])
TURNS = [{"role": "user", "content": "日本?\n"}, {"role": "assistant", "content": " <yes> "}]


def make_tokenizer():
    return train_bpe(ODD_TEXTS, 300)


def test_texts_of_templates_are_those_that_transformers_gave():
    """Stored, so that this is judged without the peer too."""
    tok, stored = make_tokenizer(), json.loads((PEERS / "renderings.json").read_text())
    for text, (tools, prompt, more) in zip(stored["plain"], itertools.product(*RENDERED), strict=True):
        loaded = Tokenizer(tok._backend, {**tok._config, "chat_template": TEMPLATE})
        assert loaded.apply_chat_template(MESSAGES, tools=tools, add_generation_prompt=prompt, **more) == text
    for text, (template, prompt) in zip(stored["tagged"], itertools.product(TAGGED, (False, True)), strict=True):
        loaded = Tokenizer(tok._backend, {**tok._config, "chat_template": template})
        assert loaded.apply_chat_template(TURNS, add_generation_prompt=prompt) == text


@pytest.fixture(scope="module")
def texts():
    return [d.text for d in find_documents()[:40]] + ODD_TEXTS


@pytest.fixture(scope="module")
def tok(texts):
    return train_bpe(texts, 600)


def with_config(tok, path, **changes):
    """The tokenizer saved to path with some keys of tokenizer_config.json changed; ... deletes a key."""
    tok.save(path)
    file = path / "tokenizer_config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return path


def test_a_text_cut_anywhere_has_the_tokens_of_the_whole(tok, monkeypatch):
    """Random texts of what may join over a cut: spaces, newlines, marks, contractions, digits, special tokens and parts of them."""
    parts = [
        *" \n\r\t,;.'a1sé，。あ一가Ж²",
        "\u0301",
        "\u1161",
        "\u00a0",
        "  ",
        "\n\n",
        "'ll",
        "the",
        "<|im_end|>",
        "<|im_",
        "_start|>",
        "end",
    ]
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(parts, 40)) for _ in range(300)]
    whole = [(tok.encode(t), tok.encode(t, allow_special=True), tok.encode_offsets(t)) for t in texts]
    monkeypatch.setattr(module, "PIECE", 1)
    assert sum(len(list(module._pieces(t))) for t in texts) > 1000
    for text, (plain, special, offsets) in zip(texts, whole):
        assert (tok.encode(text), tok.encode(text, allow_special=True)) == (plain, special), repr(text)
        assert all(np.array_equal(a, b) for a, b in zip(tok.encode_offsets(text), offsets)), repr(text)
        assert tok.encode(text, most=len(plain)) == plain
        short = tok.encode(text, most=3)
        assert len(short) > 3 or short == plain


def test_a_text_that_is_far_too_long_is_not_read_to_its_end(tok, monkeypatch):
    """Neither one with places to cut nor one without."""
    calls, encoded = [], module._encoded
    monkeypatch.setattr(module, "_encoded", lambda backend, pieces: calls.append(sum(map(len, pieces))) or encoded(backend, pieces))
    for text in ("a b, c\n" * 200_000, "x" * 1_000_000, "ä" * 1_000_000):
        calls.clear()
        assert len(tok.encode(text, allow_special=True, most=100)) > 100 and sum(calls) < 20_000


def test_what_the_library_cannot_take_is_named(tok, monkeypatch):
    monkeypatch.setattr(module, "LONGEST", 1000)
    monkeypatch.setattr(module, "PIECE", 100)
    fine = "a b " * 1000
    assert tok.encode_batch([fine]) and tok.encode_offsets(fine)[0].size
    for call in (tok.encode, tok.encode_offsets):
        with pytest.raises(ValueError, match=r"the text 'a {11}'\.\.\. has 5,00\d characters in a row without a place to cut it"):
            call("a" + " " * 5000)

    class Panic(BaseException):
        pass

    class Broken:
        def encode_batch_fast(self, *_, **more):
            raise Panic("out of range")

    monkeypatch.setattr(tok, "_plain", Broken())
    with pytest.raises(
        ValueError, match=r"the tokenizer fails \('out of range'\) at one of 2 texts, the longest of which has 3 characters"
    ):
        tok.encode_batch(["a", "bcd"])


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_decode_gives_back_the_encoded_text(tok, text):
    assert tok.decode(tok.encode(text)) == text
    assert tok.decode(np.array(tok.encode(text), np.int32)) == text


def test_text_is_normalised_to_nfc(tok):
    assert tok.decode(tok.encode("e\u0301")) == "\u00e9"


def test_batch_equals_one_at_a_time(tok):
    assert tok.encode_batch(ODD_TEXTS) == [tok.encode(t) for t in ODD_TEXTS]
    assert tok.encode_batch([]) == []


def test_long_texts_encode_as_if_in_one_piece(tok, texts, monkeypatch):
    whole = tok.encode_batch(texts)
    monkeypatch.setattr(module, "PIECE", 1)
    monkeypatch.setattr(module, "GROUP", 1000)
    pieces = list(module._pieces(texts[0]))
    assert len(pieces) > 20 and "".join(pieces) == texts[0]
    assert tok.encode_batch(texts) == whole


def test_special_tokens_in_plain_text_stay_plain(tok):
    text = "a<|im_end|>b<|endoftext|><|im_start|>"
    ids = tok.encode(text)
    assert not {tok.eod_id, tok.eos_id} & set(ids)
    assert tok.decode(ids, skip_special=True) == text


def test_allow_special_reads_special_tokens(tok):
    ids = tok.encode("a<|im_end|>b<|endoftext|>", allow_special=True)
    assert ids == [*tok.encode("a"), tok.eos_id, *tok.encode("b"), tok.eod_id]
    assert tok.decode(ids) == "a<|im_end|>b<|endoftext|>"
    assert tok.decode(ids, skip_special=True) == "ab"


def test_added_tokens_not_marked_special_stay_plain_too(tok, tmp_path):
    tok.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    spec = json.loads(file.read_text())
    spec["added_tokens"].append({**spec["added_tokens"][-1], "id": tok.vocab_size, "content": "<think>", "special": False})
    file.write_text(json.dumps(spec))
    thinker = Tokenizer.load(tmp_path)
    assert thinker.vocab_size == tok.vocab_size + 1
    assert thinker.encode("<think>") == tok.encode("<think>")
    assert thinker.encode("<think>", allow_special=True) == [tok.vocab_size]
    assert thinker.token_bytes()[tok.vocab_size] == 0


def test_token_bytes_sum_to_the_length_in_utf8(tok):
    size = tok.token_bytes()
    assert size.dtype == np.int32 and size.shape == (tok.vocab_size,)
    for text in ODD_TEXTS:
        assert size[tok.encode(text)].sum() == len(text.encode())
    assert size[tok.encode("<|im_end|>x", allow_special=True)].sum() == 1
    assert (size > 0).sum() == tok.vocab_size - 3


def test_token_bytes_are_0_for_an_added_token_of_the_ordinary_vocabulary(tok, tmp_path):
    tok.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    spec = json.loads(file.read_text())
    (word,) = [token for token, i in spec["model"]["vocab"].items() if i == 300]
    spec["added_tokens"].insert(0, {**spec["added_tokens"][0], "id": 300, "content": word})
    file.write_text(json.dumps(spec))
    before, after = tok.token_bytes(), Tokenizer.load(tmp_path).token_bytes()
    assert before[300] == len(word) and after[300] == 0
    assert np.flatnonzero(before != after).tolist() == [300]


@pytest.mark.parametrize("vocab_size", [259, 260, 300, 600])
def test_training_gives_exactly_the_vocabulary_asked_for(texts, vocab_size):
    tok = train_bpe(texts, vocab_size)
    assert tok.vocab_size == vocab_size
    special = tok.encode("<|endoftext|><|im_start|><|im_end|>", allow_special=True)
    assert special == [vocab_size - 3, vocab_size - 2, vocab_size - 1]
    assert (tok.eod_id, tok.eos_id, tok.pad_id) == (vocab_size - 3, vocab_size - 1, vocab_size - 3)


def test_training_on_little_text_gives_a_smaller_vocabulary():
    tok = train_bpe(["ab ab <|im_end|>"], 10_000)
    assert 259 < tok.vocab_size < 300
    assert tok.decode(tok.encode("héllo")) == "héllo"


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size=258.*259"):
        train_bpe(["text"], 258)


def test_training_is_deterministic_across_processes(tok, texts, tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    program = "import json, sys; from qwen3.tokenizer import train_bpe; train_bpe(json.load(open(sys.argv[1])), 600).save(sys.argv[2])"
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "texts.json"), str(tmp_path / "b")], check=True)
    tok.save(tmp_path / "a")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_saved_tokenizer_loads_the_same(tok, texts, tmp_path):
    tok.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.encode_batch(texts) == tok.encode_batch(texts)
    keys = ("vocab_size", "eod_id", "eos_id", "pad_id", "chat_template")
    assert [getattr(again, k) for k in keys] == [getattr(tok, k) for k in keys]


def test_template_file_wins_over_the_config_and_save_keeps_it(tok, tmp_path):
    with_config(tok, tmp_path / "a", chat_template="config")
    (tmp_path / "a" / "chat_template.jinja").write_text("file")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "chat_template.jinja").write_text("older")
    Tokenizer.load(tmp_path / "a").save(tmp_path / "b")
    assert Tokenizer.load(tmp_path / "b").apply_chat_template([{"role": "user", "content": "x"}]) == "file"


def test_truncation_and_padding_of_the_file_are_dropped(tok, tmp_path):
    tok.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    spec = json.loads(file.read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(spec))
    assert len(Tokenizer.load(tmp_path).encode("a b c d", allow_special=True)) == len(tok.encode("a b c d")) > 2


def test_token_names_are_read_as_strings_or_dicts_and_pad_falls_back_to_end_of_document(tok, tmp_path):
    path = with_config(tok, tmp_path, eos_token={"content": "<|im_start|>", "special": True}, pad_token=...)
    loaded = Tokenizer.load(path)
    assert loaded.eos_id == tok.vocab_size - 2
    assert loaded.pad_id == tok.eod_id


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_missing_file_is_named(tok, tmp_path, name):
    tok.save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_broken_file_is_named(tok, tmp_path, name, content):
    tok.save(tmp_path)
    (tmp_path / name).write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=name):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"eos_token": "<|none|>"}, r"eos_token='<\|none\|>'"),
        ({"eos_token": ...}, "eos_token=None"),
        ({"pad_token": "<|none|>"}, r"pad_token='<\|none\|>'"),
        ({"chat_template": [{"name": "default", "template": "x"}]}, "chat_template"),
        ({"added_tokens_decoder": {"7": {"content": "<|im_end|>"}}}, r"'<\|im_end\|>' the id 7"),
    ],
)
def test_config_that_does_not_fit_is_refused(tok, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        Tokenizer.load(with_config(tok, tmp_path, **changes))


def test_tokenizer_that_is_not_byte_level_bpe_is_refused(tok, tmp_path):
    tok.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**spec, "decoder": None}))
    with pytest.raises(ValueError, match="only byte-level BPE"):
        Tokenizer.load(tmp_path)


def test_chat_of_a_trained_tokenizer_is_chatml(tok):
    messages = [{"role": "user", "content": "hi\n"}, {"role": "assistant", "content": "yo"}]
    text = tok.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi\n<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n<|im_start|>assistant\n"
    assert tok.encode(text, allow_special=True).count(tok.eos_id) == 2


def test_tools_are_refused_by_a_template_that_has_no_place_for_them(tok):
    with pytest.raises(ValueError, match="tool"):
        tok.apply_chat_template(MESSAGES[:1], tools=TOOLS)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ ('{0.__class__}' | attr('format'))(messages) }}",
        "{{ messages | map(attribute='__class__') | list }}{{ messages.append(1) }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_template_cannot_leave_its_sandbox(tok, tmp_path, template):
    loaded = Tokenizer.load(with_config(tok, tmp_path, chat_template=template))
    with pytest.raises(ValueError, match="chat template"):
        loaded.apply_chat_template([{"role": "user", "content": "x"}])


def test_template_sees_data_only(tok, tmp_path):
    loaded = Tokenizer.load(with_config(tok, tmp_path, chat_template="{{ helper.run() }}"))
    with pytest.raises(ValueError, match="JSON serializable"):
        loaded.apply_chat_template([{"role": "user", "content": "x"}], helper=subprocess)


@pytest.mark.parametrize("template, words", [("{% if %}", "Expected"), ("{{ 1 / 0 }}", "zero"), ("{{ a.b.c }}", "undefined")])
def test_failing_template_is_a_value_error(tok, tmp_path, template, words):
    loaded = Tokenizer.load(with_config(tok, tmp_path, chat_template=template))
    with pytest.raises(ValueError, match=f"chat template.*{words}"):
        loaded.apply_chat_template([{"role": "user", "content": "x"}])


def test_chat_without_a_template_or_messages_is_refused(tok, tmp_path):
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer.load(with_config(tok, tmp_path, chat_template=...)).apply_chat_template(MESSAGES)
    with pytest.raises(ValueError, match="messages"):
        tok.apply_chat_template([])


def test_enable_thinking_is_undefined_unless_given(tok, tmp_path):
    loaded = Tokenizer.load(with_config(tok, tmp_path, chat_template="{{ enable_thinking is defined }} {{ enable_thinking }}"))
    chat = [{"role": "user", "content": "x"}]
    assert loaded.apply_chat_template(chat) == "False "
    assert loaded.apply_chat_template(chat, enable_thinking=False) == "True False"


def test_transformers_gives_the_same_ids(tok, texts, tmp_path):
    transformers = pytest.importorskip("transformers")
    tok.save(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(peer) == tok.vocab_size
    assert (peer.eos_token_id, peer.pad_token_id) == (tok.eos_id, tok.pad_id)
    assert [peer.encode(t) for t in texts] == tok.encode_batch(texts, allow_special=True)
    chat = "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>"
    assert peer.encode(chat) == tok.encode(chat, allow_special=True)
    assert peer.decode(tok.encode(chat, allow_special=True)) == tok.decode(tok.encode(chat, allow_special=True)) == chat


def test_transformers_saves_a_folder_that_loads_the_same(tok, texts, tmp_path):
    transformers = pytest.importorskip("transformers")
    tok.save(tmp_path / "a")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    again = Tokenizer.load(tmp_path / "b")
    assert again.encode_batch(texts) == tok.encode_batch(texts)
    assert (again.vocab_size, again.eod_id, again.eos_id, again.pad_id) == (tok.vocab_size, tok.eod_id, tok.eos_id, tok.pad_id)
    assert again.apply_chat_template(MESSAGES[:1]) == tok.apply_chat_template(MESSAGES[:1])


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("more", [{}, {"enable_thinking": False}, {"enable_thinking": True, "flavour": "sweet"}])
def test_transformers_renders_the_same_chat(tok, tmp_path, tools, prompt, more):
    transformers = pytest.importorskip("transformers")
    path = with_config(tok, tmp_path, chat_template=TEMPLATE)
    peer = transformers.AutoTokenizer.from_pretrained(path)
    loaded = Tokenizer.load(path)
    kw = dict(tools=tools, add_generation_prompt=prompt, **more)
    text = loaded.apply_chat_template(MESSAGES, **kw)
    assert text == peer.apply_chat_template(MESSAGES, tokenize=False, **kw)
    assert loaded.encode(text, allow_special=True) == peer.apply_chat_template(MESSAGES, return_dict=False, **kw)


TAGGED = [
    "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "{% for m in messages %}\n  {%- generation -%}  {{ m.content }}  {%- endgeneration %}\n  x\n{% endfor %}",
    "{% for m in messages %}\n  {%+ generation +%}\n  {{ m.content }}\n  {%+ endgeneration %}\n{% endfor %}",
    "{% set a = 1 %}{% set n = namespace(b=1) %}{% generation %}{% set a = 2 %}{% set n.b = 2 %}{{ a }}{% endgeneration %}{{ a }}{{ n.b }}",
    "{% if messages %}{% generation %}{% if add_generation_prompt %}prompt{% endif %}{{ eos_token }}{% endgeneration %}{% endif %}",
    "{% macro say(m) %}{% generation %}<{{ m.content }}>{% endgeneration %}{% endmacro %}{{ say(messages[1]) | upper }}",
    "{% raw %}{% generation %}{% endraw %}{# {% generation %} #} generation",
]


@pytest.mark.parametrize("template", TAGGED)
def test_transformers_renders_tagged_templates_the_same(tok, tmp_path, template):
    transformers = pytest.importorskip("transformers")
    path = with_config(tok, tmp_path, chat_template=template)
    peer, loaded = transformers.AutoTokenizer.from_pretrained(path), Tokenizer.load(path)
    for prompt in (False, True):
        text = loaded.apply_chat_template(TURNS, add_generation_prompt=prompt)
        assert text == peer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=prompt)


def test_what_a_template_tags_can_be_marked(tok, tmp_path):
    loaded = Tokenizer.load(with_config(tok, tmp_path, chat_template=TAGGED[0]))
    assert loaded.apply_chat_template([{"role": "a", "content": "b"}], generation_marks=["<", ">"]) == "a: <b>"
    with pytest.raises(ValueError, match="chat template: .*endgeneration"):
        Tokenizer.load(with_config(tok, tmp_path, chat_template="{% generation %}")).apply_chat_template([{"role": "a", "content": "b"}])


def test_template_refusal_reaches_the_user(tok, tmp_path):
    loaded = Tokenizer.load(with_config(tok, tmp_path, chat_template=TEMPLATE))
    with pytest.raises(ValueError, match="role bad is not known"):
        loaded.apply_chat_template([{"role": "bad", "content": ""}])
