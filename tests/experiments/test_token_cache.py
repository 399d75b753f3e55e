"""A text that was tokenised before gives the same tokens from the cache, and nothing else ever does."""

import os

import numpy as np
import pytest

from experiments.data import token_cache
from experiments.data.token_cache import tokenised
from qwen3.tokenizer import train_bpe

TRAIN, HELD = ["def f(x):\n    return x\n" * 20, "", "Größe = 1\n" * 9], ["class A: pass\n" * 5]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(token_cache, "LEAST", 0)
    return tmp_path / "qwen3_mindspore" / "tokens"


@pytest.fixture
def counted(monkeypatch):
    """The numbers of ids of the tokenizers that were trained."""
    sizes = []

    def train(texts, vocab_size):
        sizes.append(vocab_size)
        return train_bpe(texts, vocab_size)

    monkeypatch.setattr(token_cache, "train_bpe", train)
    return sizes


def same(a, b):
    assert a[0].to_json() == b[0].to_json() and a[0].vocab_size == b[0].vocab_size
    for ours, theirs in zip(a[1], b[1], strict=True):
        for x, y in zip(ours, theirs, strict=True):
            assert x.dtype == np.int32
            np.testing.assert_array_equal(x, y)


def test_the_second_time_no_tokenizer_is_trained_and_the_ids_are_those_of_the_first(folder, counted):
    first = tokenised([TRAIN, HELD], vocab_size=300)
    assert [ids.tolist() for ids in first[1][0]] == train_bpe(TRAIN, 300).encode_batch(TRAIN)
    same(tokenised([TRAIN, HELD], vocab_size=300), first)
    assert counted == [300] and len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    "parts, vocab_size",
    [([TRAIN, HELD], 301), ([[*TRAIN[:2], TRAIN[2] + "x"], HELD], 300), ([TRAIN, []], 300), ([[*TRAIN, *HELD]], 300)],
    ids=["another size", "another text", "a part less", "other parts"],
)
def test_another_text_or_tokenizer_has_a_file_of_its_own(parts, vocab_size, folder, counted):
    tokenised([TRAIN, HELD], vocab_size=300)
    found = tokenised(parts, vocab_size=vocab_size)
    assert len(counted) == 2 and [len(each) for each in found[1]] == list(map(len, parts))


def test_a_given_tokenizer_is_part_of_the_name(folder, counted):
    one, other = train_bpe(TRAIN, 300), train_bpe(HELD, 280)
    same(tokenised([TRAIN], one), tokenised([TRAIN], one))
    assert tokenised([TRAIN], other)[1][0][0].tolist() == other.encode(TRAIN[0])
    assert len(list(folder.iterdir())) == 2 and not counted


@pytest.mark.parametrize("harm", ["truncated", "changed", "other arrays", "a folder"])
def test_a_damaged_file_is_not_used(harm, folder, counted):
    first = tokenised([TRAIN, HELD], vocab_size=300)
    (path,) = folder.iterdir()
    data = path.read_bytes()
    if harm == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif harm == "changed":
        at = data.index(np.concatenate(first[1][0]).astype(np.uint16).tobytes()) + 40
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    elif harm == "other arrays":
        np.savez(path, x=np.zeros(3))
    else:
        path.unlink()
        path.mkdir()
    same(tokenised([TRAIN, HELD], vocab_size=300), first)
    assert counted == [300, 300]


def test_the_files_that_were_not_used_for_longest_are_removed(folder):
    for size in range(260, 260 + token_cache.KEPT):
        tokenised([TRAIN], vocab_size=size)
    for age, path in enumerate(sorted(folder.iterdir())):
        os.utime(path, (age, age))
    oldest = min(folder.iterdir())
    tokenised([TRAIN], vocab_size=299)
    assert len(list(folder.iterdir())) == token_cache.KEPT and not oldest.exists()


def test_without_a_cache_the_text_is_tokenised(tmp_path, monkeypatch, counted):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(token_cache, "LEAST", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    same(tokenised([TRAIN], vocab_size=300), tokenised([TRAIN], vocab_size=300))
    assert counted == [300, 300]


def test_a_short_text_has_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokenised([TRAIN], vocab_size=300)
    assert not list(tmp_path.iterdir())
