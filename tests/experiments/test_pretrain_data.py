"""Runs of experiments.pretrain on every kind of data: text, a preprocessed pair, a blend of two, a stream."""

import json
import shutil

import numpy as np
import pytest

from experiments import pretrain
from experiments.configs import common
from experiments.data import corpus, encode, pairs, readers
from experiments.data.loader import first_rows
from experiments.data.megatron import best_dtype
from qwen3.tokenizer import train_bpe

SMALL = {"num_layers": 2, "hidden_size": 32, "head_dim": 16, "ffn_size": 48, "vocab_size": 320}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, two jsonl files, and the pairs that preprocessing makes of them."""
    folder = tmp_path_factory.mktemp("data")
    texts = {name: [f"def {name}_{j}(x):\n    return x + {j}\n" * (1 + j % 3) for j in range(120)] for name in ("one", "two")}
    train_bpe([t for part in texts.values() for t in part], 320).save(folder / "tokenizer")
    job = encode.Job(str(folder / "tokenizer"))
    for name, part in texts.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        batches = encode.encode(readers.records(path), job)
        pairs.write(str(folder / name), batches, {"text": best_dtype(320)}, path.stat().st_size, pairs.Skipped(False))
    return folder


def make_config(folder, path, **changes):
    c = common.get_config()
    path = path.format(folder) if isinstance(path, str) else [p.format(folder) if isinstance(p, str) else p for p in path]
    c.data.path, c.data.tokenizer = path, str(folder / "tokenizer")
    c.model_args.update(SMALL)
    c.train.steps, c.train.batch_size, c.train.seq_len, c.train.eval_rows = 2, 4, 32, 8
    c.train.sample_tokens, c.train.save_hf, c.optim.warmup_steps = 0, False, 1
    c.update_from_flattened_dict(changes)
    return c


PAIR = "{}/one_text_document"
BLEND = "0.3,{0}/one_text_document,0.7,{0}/two_text_document"
STREAM = {"data.stream": True, "data.held_out": 0.2}


@pytest.mark.parametrize("path, changes", [(PAIR, {}), (BLEND, {"data.reset_at_eod": False}), ("{}/one.jsonl", STREAM)])
def test_a_run_on_every_kind_of_data_leaves_its_metrics(path, changes, folder, tmp_path):
    pretrain.pretrain(make_config(folder, path, **changes), str(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"] and {"bits_per_byte", "bigram_loss"} <= set(lines[-1])


def test_the_ways_to_name_a_blend_are_the_same(folder):
    listed = [0.3, "{}/one_text_document.bin", 0.7, "{}/two_text_document.idx"]
    data = [corpus.load(make_config(folder, path), 320) for path in (BLEND, listed)]
    assert data[0].train.fingerprint == data[1].train.fingerprint
    a, b = (first_rows(d.train, 20, 0) for d in data)
    assert all(np.array_equal(a[k], b[k]) for k in a)


def test_a_prefix_may_have_a_comma_in_it(folder, tmp_path):
    for end in (".bin", ".idx"):
        shutil.copy(folder / f"one_text_document{end}", tmp_path / f"a,b{end}")
    assert corpus.load(make_config(folder, f"{tmp_path}/a,b"), 320).train.fingerprint.startswith("a,b[0:114]")


def test_held_out_rows_of_a_pair_are_of_its_valid_split(folder):
    data = corpus.load(make_config(folder, PAIR, **{"data.split": "50,50,0"}), 320)
    seen = [
        "".join(data.tokenizer.decode(r) for r in rows["tokens"]) for rows in (first_rows(data.train, len(data.train), 0), data.held_out)
    ]
    assert "one_59(" in seen[0] and "one_60(" not in seen[0] and "one_60(" in seen[1] and "one_59(" not in seen[1]


def test_the_bigram_baseline_counts_the_rows_that_the_run_saw(folder, monkeypatch):
    config = make_config(folder, PAIR)
    data = corpus.load(config, 320)
    assert len(corpus.rows_seen(data.train, config)["tokens"]) == 8
    monkeypatch.setattr(corpus, "BASELINE_TOKENS", 100)
    assert len(corpus.rows_seen(data.train, config)["tokens"]) == 3
    config.train.steps = 10**6
    monkeypatch.setattr(corpus, "BASELINE_TOKENS", 10**9)
    assert len(corpus.rows_seen(data.train, config)["tokens"]) == len(data.train)


@pytest.mark.parametrize(
    "path, changes, message",
    [
        (PAIR, {"data.tokenizer": ""}, "one_text_document' needs data.tokenizer.*--config.data.tokenizer=DIR"),
        ("{}/one.jsonl", {"data.stream": True, "data.tokenizer": ""}, "one.jsonl' needs data.tokenizer"),
        ("{}/one.jsonl", {}, "one.jsonl holds records; use --config.data.stream=true, or make a pair"),
        (PAIR, {"data.stream": True}, "data.stream=true reads text, and data.path=.* is a .bin/.idx pair"),
        ("", {"data.stream": True}, "data.stream=true needs data.path"),
        (PAIR, {"data.max_bytes": 5}, "data.max_bytes=5 is for text, and data.path=.* is a .bin/.idx pair"),
        (PAIR, {"data.held_out": 0.3}, "data.held_out=0.3 is for text or a stream, and"),
        ("", {"data.split": "50,50"}, "data.split='50,50' is for a .bin/.idx pair, and data.path='' is text"),
        ("{}/one.jsonl", {"data.stream": True, "data.cache_dir": "x"}, "data.cache_dir='x' is for a .bin/.idx pair, and .* is a stream"),
        (PAIR, {"data.split": "100,0,0"}, "data.split='100,0,0' leaves the valid split without one of the 120 sequences"),
        (PAIR, {"train.seq_len": 10**5}, "the train split has .* tokens, too few for one sample of train.seq_len=100000"),
        (PAIR, {"data.held_out": 0.05, "model_args.vocab_size": 270}, "data.tokenizer=.* tokens, more than the model's 270"),
        ("{}/three_text_document.idx", {}, "three_text_document.idx does not exist"),
        ("{}/three_text_document", {}, "three_text_document does not exist; give a text file or folder, the prefix of"),
        ("0.3,{0}/one_text_document,{0}/two_text_document", {}, "must be weight,prefix,weight,prefix with weights above 0"),
        ([-1, "{}/one_text_document"], {}, "must be weight,prefix,weight,prefix with weights above 0"),
    ],
)
def test_bad_data_is_a_clear_error(path, changes, message, folder):
    config = make_config(folder, path, **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        corpus.load(config, config.model_args.vocab_size)
