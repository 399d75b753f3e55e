"""Text as its tokens come: what decode gives of all of them, whole characters only, cut before a stop string wherever tokens cut it."""

import random
from types import SimpleNamespace

import pytest

from qwen3.text_stream import TextStream, printable
from qwen3.tokenizer import train_bpe

TEXT = "Grüße, 你好 🙂!\n\nThe second paragraph. <|im_end|> End: END"


@pytest.fixture(scope="module")
def tok():
    return train_bpe([TEXT] * 3, 310)


def streamed(tok, ids, **options):
    """(the pieces, the stream)"""
    stream = TextStream(tok, **options)
    return [*(stream.push(i) for i in ids), stream.finish()], stream


def test_the_pieces_are_the_text_of_all_ids(tok):
    """Of random ids too, most of whose bytes are no characters; with added tokens, and with ids outside the vocabulary."""
    rng = random.Random(0)
    for _ in range(500):
        ids = [rng.randrange(tok.vocab_size + 2) for _ in range(rng.randrange(30))]
        for skip in (True, False):
            assert "".join(streamed(tok, ids, skip_special=skip)[0]) == tok.decode(ids, skip)


def test_only_whole_characters_are_given(tok):
    ids = [byte for byte in range(tok.vocab_size) if len(tok.bytes_of(byte)) == 1]
    by_byte = {tok.bytes_of(i): i for i in ids}
    pieces, _ = streamed(tok, [by_byte[bytes([b])] for b in "é🙂x".encode()])
    assert pieces == ["", "é", "", "", "", "🙂", "x", ""]
    assert streamed(tok, [by_byte[b"\xf0"], by_byte[b"\x9f"]])[0] == ["", "", "\ufffd"]  # cut short


@pytest.mark.parametrize(
    "text, stop, kept",
    [
        ("one END two", ("END",), "one "),
        ("one EN", ("END",), "one EN"),  # it never came
        ("EEEND", ("EEND",), "E"),
        ("a\n\nb", ("\n\n", "b"), "a"),
        ("xabcy", ("abc", "b"), "xa"),  # complete first
        ("xabcy", ("bc", "abc"), "x"),  # complete together: the longer one
        ("你好🙂", ("🙂",), "你好"),
        ("END", ("END",), ""),
    ],
)
def test_a_stop_string_ends_the_text_however_tokens_cut_it(tok, text, stop, kept):
    by_byte = {tok.bytes_of(i): i for i in range(tok.vocab_size) if len(tok.bytes_of(i)) == 1}
    whole, single = tok.encode(text), [by_byte[bytes([b])] for b in text.encode()]
    for ids in (whole, single):
        pieces, stream = streamed(tok, ids, stop=stop)
        assert "".join(pieces) == kept and stream.stopped == (kept != text)
    shown = ""
    for i, piece in enumerate(streamed(tok, single, stop=stop)[0]):  # and nothing is held back that no stop string begins with
        shown += piece
        rest = text.encode()[: i + 1].decode(errors="ignore")[len(shown) :]
        assert len(shown) == len(kept) or any(s.startswith(rest) for s in stop)


@pytest.mark.parametrize("cuts", [[5], [1, 4], [2, 3], [1, 1, 1, 1, 1]])
def test_the_stop_string_that_is_complete_first_counts_however_a_token_holds_both(cuts):
    """ "abcd" begins first, and "c" is complete first; with one token of both as with one token a character."""
    text, pieces = "xabcd", []
    for size in cuts:
        pieces.append(text[:size].encode())
        text = text[size:]
    tok = SimpleNamespace(bytes_of=lambda i, skip: pieces[i])
    shown, stream = streamed(tok, range(len(pieces)), stop=("abcd", "c"))
    assert "".join(shown) == "xab" and stream.stopped


def test_nothing_comes_after_a_stop_string(tok):
    stream = TextStream(tok, stop=("END",))
    for i in tok.encode("x END"):
        stream.push(i)
    assert stream.stopped and stream.push(tok.encode("y")[0]) == "" and stream.finish() == ""


def test_an_empty_stop_string_is_refused(tok):
    with pytest.raises(ValueError, match="stop='' is empty"):
        TextStream(tok, stop=("a", ""))


def test_what_is_printed_cannot_move_the_cursor():
    text = "a\n\tb\x1b[2J\x07\r\x00\x9b31m\u202e\u2028é你\udcff"
    assert printable(text) == "a\n\tb\\x1b[2J\\x07\\r\\x00\\x9b31m\\u202e\\u2028é你\\udcff"
    assert printable("plain 🙂\\n") == "plain 🙂\\n"
