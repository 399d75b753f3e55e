"""Conversations from files of records to rows: formats, masks, packing, what is held out, and targets that are the next token."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest

from experiments.configs import common
from experiments.data import conversations, instructions
from experiments.data.conversations import ConversationRows
from experiments.data.loader import Loader
from qwen3.tokenizer import Tokenizer, train_bpe

RECORDS = instructions.records(40, seed=3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([json.dumps(r) for r in RECORDS], 300).save(folder)
    return str(folder)


def settings(path="", format="messages", **changes):
    return SimpleNamespace(
        **{"path": str(path), "format": format, "enable_thinking": "none", "train_empty_think": False, "skip_bad": False}
        | {"max_samples": 0, "max_bytes": 0, **changes}
    )


def written(folder, records, kind):
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    elif kind == "json":
        path.write_text(json.dumps(records))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def in_format(record, name):
    question, answer = (m["content"] for m in record["messages"])
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"alpaca": {"instruction": question, "output": answer}, "sharegpt": {"conversations": turns}, "messages": record}[name]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip((a.ids, a.mask, a.ends), (b.ids, b.mask, b.ends)))


def test_every_format_and_kind_of_file_gives_the_same_conversations(tokenizer, tmp_path):
    want = conversations.load(settings(written(tmp_path, RECORDS, "jsonl")), tokenizer)
    assert len(want) == 40 and want.mask.any()
    for name in ("alpaca", "sharegpt", "messages"):
        for kind in ("jsonl", "json", "parquet"):
            path = written(tmp_path, [in_format(r, name) for r in RECORDS], kind)
            assert same(want, conversations.load(settings(path, name), tokenizer)), (name, kind)


def test_a_bad_record_is_named_or_left_out(tokenizer, tmp_path):
    path = written(tmp_path, [*RECORDS[:2], {"messages": []}, RECORDS[3]], "jsonl")
    with pytest.raises(ValueError, match="line 3: 'messages' is .*config.data.skip_bad=true"):
        conversations.load(settings(path), tokenizer)
    assert len(conversations.load(settings(path, skip_bad=True), tokenizer)) == 3


@pytest.fixture(scope="module")
def loaded(tokenizer):
    return conversations.load(settings(), tokenizer).select(range(60))


@pytest.mark.parametrize("packed", [True, False])
def test_a_target_is_the_token_after_its_place_and_has_weight_where_the_assistant_speaks(loaded, packed):
    """In each row, of each conversation: not the token at the place, nor the one after the next."""
    rows, seen = ConversationRows(loaded, 96, 0, packed=packed), []
    for i in range(len(rows)):
        row = rows.row(i)
        for segment in range(1, row["segment_ids"].max() + 1):
            at = np.flatnonzero(row["segment_ids"] == segment)
            ids = np.append(row["tokens"][at], row["targets"][at[-1]])
            number = next(k for k in range(60) if np.array_equal(loaded[k][0], ids))
            assert np.array_equal(row["targets"][at], loaded[number][0][1:])
            assert np.array_equal(row["loss_weights"][at], loaded[number][1][1:])
            assert np.array_equal(row["positions"][at], np.arange(len(at)))
            seen.append(number)
    assert sorted(seen) == list(range(60)) and (len(rows) == 60) == (not packed)


def test_held_out_conversations_are_not_trained_on_and_stay_when_more_come(loaded):
    train, held = conversations.split(loaded, 0.2)
    both = sorted(c[0].tobytes() for part in (train, held) for c in part)
    assert both == sorted(c[0].tobytes() for c in loaded) and 2 <= len(held) <= 30
    fewer = conversations.split(loaded.select(range(30)), 0.2)[1]
    assert {c[0].tobytes() for c in fewer} <= {c[0].tobytes() for c in held}
    with pytest.raises(ValueError, match="give two or more"):
        conversations.split(loaded.select([0]), 0.2)


def test_questions_end_where_the_answer_begins(loaded, tokenizer):
    tok = Tokenizer.load(tokenizer)
    for (question, answer), made in zip(conversations.questions(loaded, 5), instructions.records(conversations.GENERATED)):
        asked, said = (m["content"] for m in made["messages"])
        assert tok.decode(question) == f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
        assert tok.decode(answer) == f"{said}<|im_end|>"


def test_each_row_comes_once_an_epoch_on_any_number_of_ranks_and_goes_on_from_a_state(loaded):
    rows = ConversationRows(loaded, 64, 0, packed=False)
    with Loader(rows, 12, 5) as whole:
        batches = [next(whole) for _ in range(10)]
        state = whole.state()
        after = next(whole)
    for epoch in (batches[:5], batches[5:]):
        tokens = np.concatenate([b["tokens"] for b in epoch])
        assert len(np.unique(tokens, axis=0)) == len(np.unique([rows.row(i)["tokens"] for i in range(60)], axis=0))
    parts = []
    for rank in range(2):
        with Loader(rows, 12, 5, rank, 2, state=state) as part:
            parts.append(next(part)["tokens"])
    assert np.array_equal(np.concatenate(parts), after["tokens"])


def test_data_without_a_target_says_so(loaded):
    with pytest.raises(ValueError, match="no conversation with a target in train.seq_len=4 tokens"):
        ConversationRows(loaded, 4, 0)


def test_a_turn_with_a_weight_has_it_in_its_row_and_stays_a_whole_answer(tokenizer, tmp_path):
    record = {"messages": [dict(m, weight=0.25) if m["role"] == "assistant" else m for m in RECORDS[0]["messages"]]}
    found = conversations.load(settings(written(tmp_path, [record, RECORDS[1]], "jsonl")), tokenizer)
    plain = conversations.load(settings(written(tmp_path, RECORDS[:2], "jsonl")), tokenizer)
    assert np.array_equal(found.ids, plain.ids) and np.array_equal(found[0][1], plain[0][1] * 0.25) and same_pair(found[1], plain[1])
    weights = ConversationRows(found, 256, 0).row(0)["loss_weights"]
    assert set(weights.tolist()) == {0.0, 0.25, 1.0} and weights.dtype == np.float32
    assert conversations.questions(found, 2) == conversations.questions(plain, 2)
    mixed = {"messages": [*RECORDS[0]["messages"], {"role": "user", "content": "again"}, dict(record["messages"][-1])]}
    (question,) = conversations.questions(conversations.load(settings(written(tmp_path, [mixed], "jsonl")), tokenizer), 1)
    assert Tokenizer.load(tokenizer).decode(question[1]).startswith(RECORDS[0]["messages"][-1]["content"]) and len(question[0]) > len(
        plain[0][0]
    )


def same_pair(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b))


def test_instructions_have_the_right_answers():
    for record in instructions.records(400, seed=1):
        (task, *words), answer = record["messages"][0]["content"].split(), record["messages"][1]["content"].split()
        if task == "reverse":
            assert answer == words[::-1]
        elif task == "sort":
            assert answer == sorted(words)
        elif task == "add":
            assert int("".join(words[:2])) + int("".join(words[3:])) == int("".join(answer))
        else:
            assert answer == [str(instructions.TABLE[letter]) for letter in words[1:]]


def test_the_first_conversations_alone_are_read_where_that_is_asked(tmp_path):
    path = tmp_path / "chats.jsonl"
    lines = [json.dumps({"instruction": f"q{i}", "output": "a"}) for i in range(9)]
    path.write_text("\n".join(lines))
    data = common.get_config().data
    data.path, data.format = str(path), "alpaca"

    def found(**limits):
        data.update({"max_samples": 0, "max_bytes": 0, **limits})
        return [record.value["instruction"] for record in conversations.found_records(data)]

    every = [f"q{i}" for i in range(9)]
    assert found() == every and found(max_samples=4) == every[:4] and found(max_samples=99) == every
    size = len(lines[0])
    assert found(max_bytes=3 * size) == every[:3] and found(max_bytes=1) == every[:1]
    assert found(max_bytes=3 * size, max_samples=2) == every[:2]
