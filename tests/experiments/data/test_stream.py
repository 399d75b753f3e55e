"""Text read while training: the rows of packing.pack, in order, each once, from any place on."""

import itertools
import json

import numpy as np
import pytest

from experiments.data.loader import Loader, first_rows
from experiments.data.packing import pack
from experiments.data.pairs import Skipped
from experiments.data.stream import TextStream
from qwen3.tokenizer import train_bpe

TEXTS = [f"Document {i}: " + "Übung macht den Meister 修行. " * (i * i % 9) for i in range(40)] + ["", "\r\n", "a", "z" * 500]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, 300)


def write_jsonl(folder, parts=3, texts=TEXTS, key="text"):
    folder.mkdir()
    for part in range(parts):
        lines = [json.dumps({"id": i, key: t}) for i, t in enumerate(texts) if i * parts // len(texts) == part]
        (folder / f"part_{part}.jsonl").write_text("\r\n".join(lines) + "\n")
    return folder


def write_parquet(folder, texts=TEXTS):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir()
    parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "text": texts}), folder / "a.parquet")
    return folder


def epoch_length(stream):
    return next(i for i, (_, state) in enumerate(stream.rows(0)) if state["epoch"] == 1)


def same(a, b):
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("seq_len", [1, 7, 16, 100, 10_000])
@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_every_epoch_is_what_pack_makes_of_all_documents(write, seq_len, reset, tmp_path, tokenizer):
    want = pack(tokenizer.encode_batch(TEXTS), seq_len, tokenizer.eod_id, reset)
    stream = TextStream(write(tmp_path / "data"), tokenizer, seq_len, reset=reset)
    count = len(want["tokens"])
    assert epoch_length(stream) == count
    same(first_rows(stream, 2 * count, 0), {k: np.concatenate([v, v]) for k, v in want.items()})


@pytest.mark.parametrize("shuffle_buffer", [0, 1, 7, 100])
@pytest.mark.parametrize("group", [1, 3, 256])
def test_restored_after_any_row_it_goes_on_with_the_next(group, shuffle_buffer, tmp_path, tokenizer, monkeypatch):
    stream = TextStream(write_jsonl(tmp_path / "data"), tokenizer, 16, held_out=0.1, shuffle_buffer=shuffle_buffer)
    count = epoch_length(stream)
    monkeypatch.setattr("experiments.data.stream.GROUP_RECORDS", group)
    rows = stream.rows(seed=5)
    run = [next(rows) for _ in range(count + 4)]
    assert [state["sample"] for _, state in run] == list(range(1, count + 5))
    for at in range(0, count + 2, 1 if group == 3 else 7):
        again = stream.rows(5, json.loads(json.dumps(run[at][1])))
        for row, state in run[at + 1 : at + 3]:
            other, other_state = next(again)
            same(row, other)
            assert state == other_state


@pytest.mark.parametrize("stop", [1, 5, 9])
@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
@pytest.mark.parametrize("options", [{}, {"shuffle_buffer": 10}])
def test_a_stream_stopped_and_restored_mid_epoch_yields_each_sample_once(stop, ranks, options, tmp_path, tokenizer):
    stream = TextStream(write_jsonl(tmp_path / "data"), tokenizer, 8, **options)
    count = epoch_length(stream) // 6 * 6
    want = first_rows(stream, count, 0)
    first = [Loader(stream, 2, 0, rank, 2) for rank in range(2)]
    rows = [next(loader)["tokens"] for _ in range(stop * 3) for loader in first]
    state = json.loads(json.dumps(first[0].state()))
    assert state == first[1].state() and state["epoch"] == 0 and 0 < state["sample"] == stop * 6 < count
    second = [Loader(TextStream(tmp_path / "data", tokenizer, 8, **options), 6, 0, rank, ranks, state=state) for rank in range(ranks)]
    rows += [next(loader)["tokens"] for _ in range(count // 6 - stop) for loader in second]
    [loader.close() for loader in first + second]
    np.testing.assert_array_equal(np.concatenate(rows), want["tokens"])


def texts_of(stream, seed, epochs=1):
    """The texts of each epoch, in order."""
    rows = itertools.takewhile(lambda item: item[1]["epoch"] < epochs, stream.rows(seed))
    found = [[] for _ in range(epochs)]
    for row, state in rows:
        found[state["epoch"]] += row["tokens"][row["segment_ids"] > 0].tolist()
    decoded = [stream.tokenizer.decode(ids).split("<|endoftext|>") for ids in found]
    return [texts[:-1] if texts[-1] == "" else texts for texts in decoded]


@pytest.mark.parametrize("buffer", [1, 5, 1000])
def test_shuffled_every_epoch_has_each_record_once_in_an_order_of_its_own(buffer, tmp_path, tokenizer):
    texts = [f"text {i}" for i in range(60)]
    stream = TextStream(write_jsonl(tmp_path / "data", texts=texts), tokenizer, 10_000, shuffle_buffer=buffer)
    epochs = texts_of(stream, seed=3, epochs=6)
    for epoch in epochs:
        assert sorted(epoch) == sorted(texts)
        files = [epoch[at : at + 20] for at in range(0, 60, 20)]
        if buffer == 5:  # 20 records a file: each 5 records are those of 5 that follow one another
            for at in range(0, 60, 5):
                numbers = sorted(int(t.split()[1]) for t in epoch[at : at + 5])
                assert numbers == list(range(numbers[0], numbers[0] + 5)) and numbers[0] % 5 == 0
        if buffer == 1:
            assert sorted(files) == sorted([texts[:20], texts[20:40], texts[40:]])
    assert len(set(map(tuple, epochs))) > 2
    assert texts_of(stream, seed=3, epochs=2) == epochs[:2] and texts_of(stream, seed=4, epochs=6) != epochs


def test_shuffled_order_stays_the_same_between_releases(tmp_path, tokenizer):
    stream = TextStream(write_jsonl(tmp_path / "data", texts=[f"{i}" for i in range(9)]), tokenizer, 10_000, shuffle_buffer=4)
    assert "".join(texts_of(stream, seed=0)[0]) == "061287435"


def test_a_record_that_the_tokenizer_cannot_take_is_a_bad_one(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("qwen3.tokenizer.LONGEST", 1000)
    monkeypatch.setattr("qwen3.tokenizer.PIECE", 100)
    texts = ["one " * 500, "a" + " " * 3000, "two"]
    folder = write_jsonl(tmp_path / "data", parts=1, texts=texts)
    with pytest.raises(ValueError, match=r"part_0.jsonl, line 2: the text 'a {11}'... has 3,001 characters in a row without a place"):
        epoch_length(TextStream(folder, tokenizer, 16))
    assert texts_of(TextStream(folder, tokenizer, 16, skip_bad=True), seed=0)[0] == [texts[0], texts[2]]


def test_held_out_records_are_in_no_training_row(tmp_path, tokenizer):
    stream = TextStream(write_jsonl(tmp_path / "data"), tokenizer, 16, held_out=0.3)
    held, text = stream.held_rows(1000)
    rows = first_rows(stream, epoch_length(stream), 0)
    assert text in TEXTS
    found = ["".join(tokenizer.decode(part[k][part["segment_ids"] > 0]) for k in ["tokens"]) for part in (held, rows)]
    in_held = [t for t in TEXTS[:40] if t + "<|endoftext|>" in found[0]]
    in_train = [t for t in TEXTS[:40] if t + "<|endoftext|>" in found[1]]
    assert in_held and not set(in_held) & set(in_train) and set(in_held) | set(in_train) >= set(TEXTS[1:39])
    assert len(stream.held_rows(2)[0]["tokens"]) == 2


def test_other_files_tokenizers_and_settings_have_other_fingerprints(tmp_path, tokenizer):
    folder, other = write_jsonl(tmp_path / "data"), write_jsonl(tmp_path / "other", texts=TEXTS[1:])
    streams = [
        TextStream(folder, tokenizer, 16),
        TextStream(folder, tokenizer, 17),
        TextStream(folder, tokenizer, 16, held_out=0.1),
        TextStream(folder, tokenizer, 16, shuffle_buffer=9),
        TextStream(folder, train_bpe(TEXTS, 290), 16),
        TextStream(other, tokenizer, 16),
    ]
    assert len({s.fingerprint for s in streams}) == len(streams)
    assert TextStream(folder, tokenizer, 16).fingerprint == streams[0].fingerprint
    with Loader(streams[0], 2, 0) as loader:
        state = loader.state()
    with pytest.raises(ValueError, match="the state is of the data 'stream of data.*but data.path gives 'stream of other"):
        Loader(streams[5], 2, 0, state=state)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{broken", r"data.jsonl, line 2: not JSON"),
        ('{"body": "x"}', r"data.jsonl, line 2: key 'text' is missing; the keys are body; use data.json_key"),
        ('{"text": 7}', r"data.jsonl, line 2: key 'text' is int, not text"),
        (r'{"text": "\ud800"}', r"data.jsonl, line 2: 'text' has half a surrogate pair"),
    ],
)
def test_a_bad_record_is_an_error_naming_its_line(line, message, tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with Loader(TextStream(path, tokenizer, 4), 1, 0) as loader:
        with pytest.raises(ValueError, match=message):
            for _ in range(9):
                next(loader)


@pytest.mark.parametrize("shuffle_buffer", [0, 6])
def test_bad_records_are_left_out_counted_once_and_named_if_asked(shuffle_buffer, tmp_path, tokenizer, capsys):
    bad = ["{broken", '{"body": "x"}', '{"text": 7}', r'{"text": "\ud800"}', "[1]"]
    good = [json.dumps({"text": t}) for t in TEXTS]
    lines = [*good[:10], bad[0], *good[10:20], *bad[1:4], *good[20:], bad[4]]
    for name, content in (("good", good), ("mixed", lines)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text("\n".join(content) + "\n")
    options = {"shuffle_buffer": shuffle_buffer, "skip_bad": True}
    clean, stream = (TextStream(tmp_path / name, tokenizer, 16, **options) for name in ("good", "mixed"))
    for epoch, other in zip(texts_of(clean, 0, 3), texts_of(stream, 0, 3)):
        assert epoch == other if not shuffle_buffer else sorted(epoch) == sorted(other)
    for _, state in list(itertools.islice(stream.rows(0), 20))[::4]:  # from the middle on
        list(itertools.islice(stream.rows(0, state), 50))
    assert stream.bad.count == len(bad)
    left_out = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out: ")]
    assert [int(line.split("a.jsonl, line ")[1].split(":")[0]) for line in left_out] == [11, 22, 23, 24, 49]


@pytest.mark.parametrize("shuffle_buffer", [0, 50])
def test_a_run_that_stopped_at_a_bad_record_goes_on_without_it(shuffle_buffer, tmp_path, tokenizer):
    texts = [json.dumps({"text": f"text {i}"}) for i in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join([*texts, "{broken", *texts]))
    with Loader(TextStream(tmp_path / "a.jsonl", tokenizer, 16, shuffle_buffer=shuffle_buffer), 2, 0) as loader:
        with pytest.raises(ValueError, match="a.jsonl, line 301: .*leave such records out with --config.data.skip_bad=true"):
            [next(loader) for _ in range(10**6)]
        state = loader.state()
    assert state["sample"] > 0
    stream = TextStream(tmp_path / "a.jsonl", tokenizer, 16, shuffle_buffer=shuffle_buffer, skip_bad=True)
    with Loader(stream, 2, 0, state=state) as loader:
        after = [next(loader)["tokens"] for _ in range(20)]
    want = first_rows(stream, state["sample"] + 40, 0)["tokens"]
    np.testing.assert_array_equal(np.concatenate(after), want[state["sample"] :])


def test_reports_of_many_bad_records_grow_rarer(capsys):
    skipped = Skipped(True)
    for i in range(1, 1235):
        skipped(f"line {i}")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[3].rstrip(";") for line in lines] == [*map(str, range(1, 11)), "100", "1000"]
    assert lines[-1] == "left out: line 1000; 1,000 bad records so far" and skipped.count == 1234


def test_no_text_at_all_is_an_error_not_a_wait(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": ""}\n')
    with Loader(TextStream(path, tokenizer, 4), 1, 0) as loader:
        with pytest.raises(ValueError, match="data.jsonl: data.path has no pair of tokens"):
            next(loader)
    with pytest.raises(ValueError, match="data.held_out=0.01 holds out no text of .*data.jsonl"):
        TextStream(path, tokenizer, 4, held_out=0.01).held_rows(4)


def test_of_a_few_records_none_may_be_held_out_and_a_line_says_so(tmp_path, tokenizer, capsys):
    """A first try should run."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:3]))
    rows, first = TextStream(path, tokenizer, 4, held_out=0.001).held_rows(4)
    assert len(rows["tokens"]) == 4 and first == TEXTS[0]
    assert "data.held_out=0.001 holds out no text of data.jsonl; eval_loss is of training data" in capsys.readouterr().out


@pytest.mark.parametrize("most", [1, 7, 15, 30, 44, 99])
@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_a_stream_of_the_first_records_is_one_of_a_file_of_them(write, most, tmp_path, tokenizer):
    """Three files of 15, 15 and 14 records, or one."""
    folder = write(tmp_path / "data")
    stream = TextStream(folder, tokenizer, 16, most=most)
    want = pack(tokenizer.encode_batch(TEXTS[:most]), 16, tokenizer.eod_id, True)
    assert epoch_length(stream) == len(want["tokens"])
    same(first_rows(stream, len(want["tokens"]), 0), want)
    shuffled = TextStream(folder, tokenizer, 16, most=most, shuffle_buffer=5)
    assert sorted(texts_of_an_epoch(shuffled)) == sorted(TEXTS[:most])
    held = TextStream(folder, tokenizer, 16, most=most, held_out=0.3)
    taken = texts_of_an_epoch(held) if most > 1 else []
    assert set(taken) <= set(TEXTS[:most]) and (most < 7 or len(taken) < min(most, len(TEXTS)))
    assert TextStream(folder, tokenizer, 16).fingerprint != stream.fingerprint


def texts_of_an_epoch(stream):
    return [text for text, _ in stream._in_order(0, 0, 0, 0, 0)]


def test_of_the_first_records_no_later_file_is_read(tmp_path, tokenizer):
    folder = write_jsonl(tmp_path / "data")
    (folder / "part_2.jsonl").write_text("{broken")
    rows = TextStream(folder, tokenizer, 16, most=20).rows(0)
    assert all(state["epoch"] < 3 for _, (_, state) in zip(range(60), rows))
    with pytest.raises(ValueError, match="part_2.jsonl, line 1: not JSON"):
        first_rows(TextStream(folder, tokenizer, 16, most=31), 900, 0)


@pytest.mark.parametrize("shuffle_buffer", [0, 6])
def test_of_the_first_records_a_restored_loader_goes_on(shuffle_buffer, tmp_path, tokenizer):
    folder, options = write_jsonl(tmp_path / "data"), {"most": 20, "shuffle_buffer": shuffle_buffer}
    want = list(itertools.islice(TextStream(folder, tokenizer, 16, **options).rows(0), 80))
    for at in (0, 7, 30, 55):
        for (row, state), (again, after) in zip(want[at + 1 :], TextStream(folder, tokenizer, 16, **options).rows(0, want[at][1])):
            same(row, again)
            assert state == after


def test_without_held_out_records_none_are_looked_for(tmp_path, tokenizer):
    (tmp_path / "data.jsonl").write_text("never read")
    with pytest.raises(ValueError, match="data.held_out=0.0 holds out no text of data.jsonl; raise it"):
        TextStream(tmp_path / "data.jsonl", tokenizer, 4).held_rows(4)
