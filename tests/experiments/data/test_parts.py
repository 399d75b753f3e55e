"""Datasets of Hugging Face's `datasets` on disk as a stream: the rows of packing.pack, resumed from any row; mistakes named."""

import itertools
import json
import sys
import types

import numpy as np
import pytest

from experiments.data import parts
from experiments.data.loader import Loader, first_rows
from experiments.data.packing import pack
from experiments.data.stream import TextStream
from qwen3.tokenizer import train_bpe

TEXTS = [f"Document {i}: " + "übung " * (i * i % 9) for i in range(45)] + ["", "z" * 300]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, 300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One dataset in each of the forms that are on disks."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("hf")
    data = datasets.Dataset.from_dict({"n": list(range(len(TEXTS))), "text": TEXTS})
    data.save_to_disk(folder / "saved", num_shards=3)
    backwards = data.select(range(len(TEXTS) - 1, -1, -1)).select(range(len(TEXTS) - 1, -1, -1))  # an index over the rows is saved too
    datasets.DatasetDict({"train": backwards, "test": data.select(range(5))}).save_to_disk(folder / "splits")
    (folder / "files").mkdir()
    data.select(range(20)).to_parquet(folder / "files" / "train-00000-of-00002.parquet")
    data.select(range(20, len(TEXTS))).to_parquet(folder / "files" / "train-00001-of-00002.parquet")
    data.select(range(5)).to_parquet(folder / "files" / "test-00000-of-00001.parquet")
    for name in ("one", "two"):
        (folder / "configs" / name).mkdir(parents=True)
        (folder / "configs" / name / "a.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in TEXTS))
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("one", "two"))
    (folder / "configs" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return folder


FORMS = {"saved": "text", "splits": "text", "splits#train": "text", "files": "text", "configs#two/train": "body"}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_what_pack_makes_of_its_texts(form, folder, tokenizer):
    want = pack(tokenizer.encode_batch(TEXTS), 16, tokenizer.eod_id)
    stream = TextStream(f"hf:{folder / form}", tokenizer, 16, key=FORMS[form])
    rows = first_rows(stream, 2 * len(want["tokens"]), 0)
    for key, value in want.items():
        np.testing.assert_array_equal(rows[key], np.concatenate([value, value]), err_msg=key)


@pytest.mark.parametrize("shuffle_buffer", [0, 8])
@pytest.mark.parametrize("form", ["saved", "files"])
def test_restored_after_any_row_on_other_ranks_it_goes_on_with_the_next(form, shuffle_buffer, folder, tokenizer):
    stream = TextStream(f"hf:{folder / form}", tokenizer, 16, held_out=0.2, shuffle_buffer=shuffle_buffer)
    run = [item for item, _ in zip(stream.rows(7), range(120))]
    assert run[-1][1]["epoch"] >= 2
    for at in range(0, 110, 9):
        again = TextStream(f"hf:{folder / form}", tokenizer, 16, held_out=0.2, shuffle_buffer=shuffle_buffer)
        state = {**json.loads(json.dumps(run[at][1])), "data": stream.fingerprint, "seed": 7}
        loaders = [Loader(again, 2, 7, rank, 2, state=state) for rank in range(2)]
        for (row, _), loader in zip(run[at + 1 : at + 9], itertools.cycle(loaders)):
            np.testing.assert_array_equal(row["tokens"], next(loader)["tokens"][0])
        assert loaders[1].state() == {**run[at + 8][1], "data": stream.fingerprint, "seed": 7}
        [loader.close() for loader in loaders]


def test_shuffled_epochs_have_each_record_once(folder, tokenizer):
    stream = TextStream(f"hf:{folder / 'saved'}", tokenizer, 10_000, shuffle_buffer=8)
    epochs = []
    for row, _ in itertools.islice(stream.rows(0), 3):
        epochs.append(tokenizer.decode(row["tokens"][row["segment_ids"] > 0]).split("<|endoftext|>"))
    assert [sorted(filter(None, e)) for e in epochs] == [sorted(filter(None, TEXTS))] * 3 and epochs[0] != epochs[1] != epochs[2]


def test_other_data_has_another_fingerprint(folder, tokenizer):
    names = [TextStream(f"hf:{folder / name}", tokenizer, 16).fingerprint for name in ("saved", "splits", "splits#test", "files")]
    assert len(set(names)) == 4 and TextStream(f"hf:{folder / 'saved'}", tokenizer, 16).fingerprint == names[0]


def test_a_file_that_breaks_off_is_an_error_or_left_out_from_there(tmp_path, tokenizer, capsys):
    pytest.importorskip("datasets")
    lines = [json.dumps({"text": t}) for t in TEXTS]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"text":']))
    (tmp_path / "b.jsonl").write_text("\n".join([*lines, '{"text": null}']))
    with pytest.raises(ValueError, match=r"hf:.*, part 0, row \d+: .* the part is not read from here on.*skip_bad"):
        first_rows(TextStream(f"hf:{tmp_path}", tokenizer, 16), 200, 0)
    stream = TextStream(f"hf:{tmp_path}", tokenizer, 16, skip_bad=True)
    first_rows(stream, 400, 0)
    assert stream.bad.count == 2
    assert "part 1, row 48: key 'text' is NoneType, not text" in capsys.readouterr().err


MISTAKES = [
    ("nowhere", "text", "hf:.*nowhere: .*nowhere is no folder; give hf:FOLDER with a dataset on this disk"),
    ("splits#valid", "text", "there is no split 'valid', only train, test; use hf:.*splits#train"),
    ("saved#train", "text", "the folder holds one dataset without splits; use hf:.*saved"),
    ("files#valid", "text", "there is no split 'valid', only train, test"),
    ("files", "body", "has no column 'body'; the columns are n, text; use data.json_key"),
    ("configs", "body", r"Config name is missing.*'one', 'two'.*to choose, use hf:FOLDER#CONFIG/SPLIT"),
    ("configs#three/train", "body", "'three' not found. Available: .'one', 'two'."),
]


@pytest.mark.parametrize("form, key, message", MISTAKES, ids=[form for form, *_ in MISTAKES])
def test_mistakes_are_named(form, key, message, folder):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        parts.find(f"hf:{folder / form}", key)


@pytest.mark.parametrize(
    "module, message",
    [
        (None, "needs the package datasets .*: pip install 'datasets>=4' 'numpy<2' 'pyarrow<26'"),
        (types.SimpleNamespace(__version__="3.6.0"), "needs datasets 4 or later, and 3.6.0 is installed: pip install 'datasets>=4'"),
    ],
)
def test_a_missing_or_old_package_is_named_with_the_command(module, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(ValueError, match=f"data.path=hf:... {message}"):
        parts.find(f"hf:{tmp_path}", "text")
