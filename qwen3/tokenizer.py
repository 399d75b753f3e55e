"""Byte-level BPE tokenizer: reads Hugging Face's tokenizer.json and chat template, and trains a small tokenizer from text.

Source: the Qwen2 tokenizer of the released models, and `apply_chat_template` of transformers.
"""

import json
import re
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from qwen3 import template
from qwen3.json_files import exists, parse_json, read_bytes, read_json, read_text
from qwen3.schema import Token, TokenizerJson, checked, short

EOD, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
AFTER = " \n,;，。、；：！？"
# Places where SPLIT always splits, whatever the text around them: after a newline before a visible ASCII character, and between a letter or
# digit and one of AFTER, none of which NFC joins. The letters are those that every version of Unicode has.
CUT = re.compile(rf"\n(?=[!-~])|[0-9A-Za-zÀ-ÖØ-öø-ɏЀ-ҁぁ-ゖァ-ヺ一-龥가-힣](?=[{AFTER}])")
PIECE, GROUP = 1 << 16, 1 << 22  # characters of a piece, and of a group of pieces that is encoded in one call
LONGEST, LONGEST_UNCUT = 1 << 20, 1 << 23  # the most characters without such a place; of a text that cannot be cut at all
HOLES = 1 << 16  # ids that a vocabulary may leave out, beside as many as it has: what is made for each id stays in proportion to the file
CHAT_TEMPLATE = """\
{%- if tools %}
    {{- raise_exception('this tokenizer was trained without tool tokens; use one of the released tokenizers') }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def _byte_alphabet():
    """Returns {character: byte} of the byte-level alphabet: a printable byte is its own character, the others are U+0100, U+0101, ..."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}


BYTES = _byte_alphabet()


class Tokenizer:
    """Converts text to token ids and back. It is immutable.

    vocab_size: highest id + 1, added tokens included. eod_id: the id of `<|endoftext|>`, the end of a document. eos_id: the id of the
    config's eos_token, at which generation stops. pad_id: the id of the config's pad_token, or eod_id if it has none. end_ids: the list of
    ids that tokenizer.json appends to a text, which encode() leaves out: [eod_id] for Qwen3-Embedding, else mostly none.
    """

    def __init__(self, backend, config):
        """backend: a tokenizers.Tokenizer, which the caller must not use afterwards. config: the dict of tokenizer_config.json, with
        chat_template."""
        backend.no_truncation()
        backend.no_padding()
        self._backend, self._config = backend, dict(config)
        found = checked(TokenizerJson, config, "tokenizer_config.json")
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)
        if self.vocab_size > 2 * len(vocabulary) + HOLES:
            raise ValueError(
                f"tokenizer.json: the highest id is {self.vocab_size - 1:,} of {len(vocabulary):,} tokens; ids with such holes are not"
                " supported, number the tokens anew"
            )
        if not (isinstance(backend.model, models.BPE) and isinstance(backend.decoder, decoders.ByteLevel)):
            raise ValueError(f"tokenizer.json: model type {type(backend.model).__name__!r} is not supported; only byte-level BPE is")
        added = backend.get_added_tokens_decoder()
        self._added, self._special = frozenset(added), frozenset(i for i, token in added.items() if token.special)
        # `encode_special_tokens` would still match the added tokens not marked special, such as <think>.
        self._plain = _without_added(backend)
        self._can_cut = backend.pre_tokenizer is not None and json.dumps(SPLIT).encode() in backend.pre_tokenizer.__getstate__()
        # An added token must be on one side of a cut, and must not take spaces from the other side.
        self._can_cut_chats = self._can_cut and not any(t.lstrip or t.rstrip or set(t.content) & set(AFTER) for t in added.values())
        added = {t.content for t in added.values()}
        self._longest = max((len(t.encode()) if t in added else len(t) for t in vocabulary), default=1)  # bytes of the longest token
        self.eod_id = self._id("the end of a document", EOD)
        self.eos_id = self._id("eos_token", _content(found.eos_token))
        pad = _content(found.pad_token)
        self.pad_id = self.eod_id if pad is None else self._id("pad_token", pad)
        self.end_ids = _appended(backend)
        self.chat_template = found.chat_template
        if not isinstance(self.chat_template, str | None):
            raise ValueError("tokenizer_config.json: chat_template must be one Jinja string; keep the one named 'default'")
        for i, token in found.added_tokens_decoder.items():
            if backend.token_to_id(token.content) != int(i):
                raise ValueError(
                    f"tokenizer_config.json: added_tokens_decoder gives {short(token.content)} the id {i}, tokenizer.json gives it "
                    f"{backend.token_to_id(token.content)}; save both again with transformers' AutoTokenizer"
                )

    def _id(self, key, token):
        i = None if token is None else self._backend.token_to_id(token)
        if i is None:
            raise ValueError(f"tokenizer: {key}={short(token)} is not in the vocabulary; correct it in tokenizer_config.json")
        return i

    @classmethod
    def load(cls, path):
        """Loads the tokenizer of a folder with tokenizer.json, tokenizer_config.json and, optionally, chat_template.jinja.

        Raises FileNotFoundError for a missing file, ValueError for a file that cannot be read.
        """
        path = Path(path)
        text, config = read_bytes(path / "tokenizer.json"), read_json(path / "tokenizer_config.json")
        try:
            backend = tokenizers.Tokenizer.from_buffer(text)
        except BaseException as e:  # the library raises no narrower type, and of its own panics none that is an Exception
            if isinstance(e, KeyboardInterrupt | SystemExit):
                raise
            raise ValueError(f"{path / 'tokenizer.json'} cannot be read: {short(str(e), 200)}; copy or save it again") from e
        parse_json(path / "tokenizer.json", text)  # the library takes the last of two values of a key
        if exists(path / "chat_template.jinja"):
            config["chat_template"] = read_text(path / "chat_template.jinja")
        try:
            return cls(backend, config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path):
        """Writes tokenizer.json and tokenizer_config.json. transformers opens them with the same ids and chat template."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(path / "tokenizer.json"))
        text = json.dumps(self._config, ensure_ascii=False, indent=2)
        (path / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
        (path / "chat_template.jinja").unlink(missing_ok=True)  # a file from an earlier save would override the template in the config

    def to_json(self):
        """Returns the text of tokenizer.json."""
        return self._backend.to_str()

    def encode(self, text, allow_special=False, most=None):
        """Returns the token ids of a text. allow_special: text such as "<|im_end|>" becomes the added token of that name, as a chat needs
        it. most: of a text with more tokens than this, only the first ones are returned, `most` + 1 or more; the rest costs no time."""
        if most is None:
            return self.encode_batch([text], allow_special)[0]
        if len(text) > most * self._longest * (1 if text.isascii() else 3):  # NFC makes one character of at most three
            return [self.eod_id] * (most + 1)
        backend, ids = self._backend if allow_special else self._plain, []
        for piece in self._cut(text, allow_special, min(PIECE, 4 * most + 64)):
            ids += _encoded(backend, [piece])[0].ids
            if len(ids) > most:
                break
        return ids

    def encode_batch(self, texts, allow_special=False):
        """Returns a list of token ids for each text. Uses all cores. Raises ValueError for a text that has no place to cut it for too long,
        and where the library fails."""
        texts = list(texts)
        backend = self._backend if allow_special else self._plain
        out = [[] for _ in texts]
        for group in _groups(self._cut(text, allow_special) for text in texts):
            for (i, _), encoding in zip(group, _encoded(backend, [piece for _, piece in group])):
                out[i] += encoding.ids
        return out

    def encode_offsets(self, text):
        """Returns (ids int32 [n], starts int64 [n], ends int64 [n]) of a chat's text: the tokens, and the characters start:end of each."""
        ids, offsets, at = [], [np.zeros((0, 2), np.int64)], 0
        for piece in self._cut(text, True):
            encoding = _encoded(self._backend, [piece], offsets=True)[0]
            ids.append(np.array(encoding.ids, np.int32))
            offsets.append(np.array(encoding.offsets, np.int64).reshape(-1, 2) + at)
            at += len(piece)
        starts, ends = np.concatenate(offsets).T
        return np.concatenate([np.zeros(0, np.int32), *ids]), starts, ends

    def check(self, text):
        """Raises ValueError for a text that encode_batch refuses for its length; it takes little time."""
        if len(text) > LONGEST:
            for _ in self._cut(text, False):
                pass

    def _cut(self, text, allow_special, size=None):
        """Yields a text in pieces, which together have its tokens. Raises ValueError for one of too many characters."""
        cut = self._can_cut_chats if allow_special else self._can_cut
        most = LONGEST if cut else LONGEST_UNCUT
        for piece in _pieces(text, size or PIECE) if cut else [text]:
            if len(piece) > most:
                raise ValueError(
                    f"the text {piece[:12]!r}... has {len(piece):,} characters in a row without a place to cut it, such as a word before"
                    f" a space; the most is {most:,}: split it, or leave it out"
                )
            yield piece

    def is_added(self, i):
        """Returns whether id i is an added token, such as `<|im_end|>` or `<think>`."""
        return int(i) in self._added

    def decode(self, ids, skip_special=False):
        """Returns the text of token ids. Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary give no text."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def vocabulary(self):
        """Returns {token: id} of all tokens."""
        return self._backend.get_vocab(with_added_tokens=True)

    def bytes_of(self, i, skip_special=False):
        """Returns the bytes that id i adds to decode(); b"" for an id outside the vocabulary."""
        token = None if skip_special and i in self._special else self._backend.id_to_token(int(i))
        if token is None:
            return b""
        if any(c not in BYTES for c in token):  # an added token is plain text
            return token.encode()
        return bytes(BYTES[c] for c in token)

    def token_bytes(self):
        """Returns int32 [vocab_size]: the number of UTF-8 bytes of each id, 0 for added tokens. Over the ids of a text they sum to the
        length of its NFC form."""
        out = np.zeros(self.vocab_size, np.int32)
        for token, i in self._backend.get_vocab(with_added_tokens=False).items():
            out[i] = len(token)  # one character of the byte-level alphabet is one byte
        out[list(self._added)] = 0
        return out

    def apply_chat_template(self, messages, tools=None, add_generation_prompt=False, enable_thinking=None, **kw):
        """Returns the text of a conversation, for encode(..., allow_special=True). messages, tools: lists of dicts of JSON data.

        The template decides what enable_thinking=None means. With generation_marks=[before, after], text that the template encloses in
        `generation` tags is rendered between these two marks. Raises ValueError if the template fails or tries to leave its sandbox.
        """
        if self.chat_template is None:
            raise ValueError("tokenizer has no chat template; add chat_template.jinja to its folder, or give plain text")
        if not messages:
            raise ValueError("messages=[] has nothing to render; give at least one message")
        # transformers also treats a key whose value is None as a missing key.
        messages = [{k: v for k, v in m.items() if v is not None} for m in messages]
        named = {k: text for k, v in self._config.items() if k.endswith("_token") and (text := _content(v)) is not None}
        context = {**named, "messages": messages, "tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
        if enable_thinking is not None:
            context["enable_thinking"] = enable_thinking
        try:
            return template.render(self.chat_template, {**context, **kw})
        except (ValueError, TypeError, RecursionError) as e:  # also of data that are not JSON
            raise ValueError(f"chat template: {e}; check the messages against the template") from e


def train_bpe(texts, vocab_size):
    """Trains a Tokenizer of at most vocab_size ids: 256 bytes, merges, then 3 special tokens. It has fewer ids if no pairs are left to
    merge.

    Training is deterministic. Pre-tokenizer, normalizer and special tokens are those of Qwen2.
    """
    special = [EOD, IM_START, IM_END]
    if vocab_size < 256 + len(special):
        raise ValueError(f"vocab_size={vocab_size} has no room for 256 bytes and {len(special)} special tokens; use 259 or more")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(special), initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens(special)
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": EOD,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return Tokenizer(backend, config)


def _appended(backend):
    """Returns the list of ids that the post-processor of a tokenizers.Tokenizer puts after a text."""
    plain, processed = backend.encode("a", add_special_tokens=False).ids, backend.encode("a").ids
    return processed[len(plain) :] if processed[: len(plain)] == plain else []


def _without_added(backend):
    """Returns a tokenizers.Tokenizer with the model of another one, which both then share, and without its added tokens."""
    plain = tokenizers.Tokenizer(backend.model)
    plain.normalizer, plain.pre_tokenizer, plain.decoder = backend.normalizer, backend.pre_tokenizer, backend.decoder
    return plain


def _encoded(backend, pieces, offsets=False):
    """Returns the library's encodings of texts. Raises ValueError where it fails; its own panics are no Exceptions."""
    encode = backend.encode_batch if offsets else backend.encode_batch_fast
    try:
        return encode(pieces, add_special_tokens=False)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        longest = max(pieces, key=len)
        raise ValueError(
            f"the tokenizer fails ({short(str(error), 100)}) at one of {len(pieces)} texts, the longest of which has {len(longest):,}"
            f" characters and begins with {short(longest[:80])}; leave it out"
        ) from None


def _groups(texts):
    """Yields lists of (index of the text, piece of it), of about GROUP characters: the library needs 100 bytes per character of one
    call. texts: of each, its pieces."""
    group, size = [], 0
    for i, pieces in enumerate(texts):
        for piece in pieces:
            group.append((i, piece))
            size += len(piece)
            if size >= GROUP:
                yield group
                group, size = [], 0
    yield group


def _pieces(text, size=None):
    """Yields a text in pieces of about `size` characters, default PIECE, which end only where CUT matches, so that together they have the
    tokens of the text."""
    start = 0
    while found := CUT.search(text, start + (size or PIECE)):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def _content(token):
    """The text of a token that the config gives as a text or as an object; None where it gives none."""
    token = token.content if isinstance(token, Token) else token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
