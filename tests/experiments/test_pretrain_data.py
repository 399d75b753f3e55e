"""Runs of experiments.pretrain on every kind of data: text, a preprocessed pair, a blend of two, conversations, a stream."""

import json
import shutil

import numpy as np
import pytest

from experiments import pretrain
from experiments.configs import common
from experiments.data import corpus, encode, pairs, readers
from experiments.data.loader import Loader, first_rows
from experiments.data.megatron import Writer, best_dtype
from qwen3.chat import alpaca, encode_chat
from qwen3.tokenizer import train_bpe
from tests.experiments.test_resume import stopping_after

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
    (folder / "folder").mkdir()
    shutil.copy(folder / "one.jsonl", folder / "folder")
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(chat(j)) + "\n" for j in range(60)))
    batches = encode.encode(readers.records(path), job._replace(format="alpaca"))
    pairs.write(str(folder / "chats"), batches, {"text": best_dtype(320), "loss": np.uint8}, path.stat().st_size, pairs.Skipped(False))
    return folder


def chat(j):
    return {"instruction": f"def {j}", "output": f"return {j}" + " + x" * (-j % 30)}


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
STREAM = {"data.stream": True, "data.held_out": 0.2, "data.shuffle_buffer": 20, "data.skip_bad": True}
CHATS = ("{}/chats_text_document", {"data.conversations": True, "train.seq_len": 48})


@pytest.mark.extended(but=("0.3*",))
@pytest.mark.parametrize("path, changes", [(PAIR, {}), (BLEND, {"data.reset_at_eod": False}), ("{}/one.jsonl", STREAM), CHATS])
def test_a_run_on_every_kind_of_data_leaves_its_metrics(path, changes, folder, tmp_path):
    pretrain.pretrain(make_config(folder, path, **changes), str(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert lines[-1]["final_loss"] < lines[0]["eval_loss"] and {"final_bits_per_byte", "bigram_loss"} <= set(lines[-1])


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_conversations_are_whole_with_loss_on_the_assistants_tokens_and_the_long_ones_counted(too_long, folder, capsys):
    data = corpus.load(make_config(folder, CHATS[0], **CHATS[1], **{"data.too_long": too_long}), 320)
    tokenizer, train = data.tokenizer, data.train
    rows = first_rows(train, len(train), 0)
    found = []
    for row in range(len(train)):
        for segment in range(1, rows["segment_ids"][row].max() + 1):
            place = rows["segment_ids"][row] == segment
            ids, targets = rows["tokens"][row][place], rows["targets"][row][place]
            said = tokenizer.decode(targets[rows["loss_weights"][row][place] > 0])
            found.append((tokenizer.decode([*ids, targets[-1]]), said))
    lengths, want = [], []
    for j in range(57):  # 95 % of 60
        messages, _ = alpaca(chat(j))
        ids, mask = encode_chat(tokenizer, messages)
        lengths.append(len(ids) + 1)
        if lengths[-1] <= 49 or too_long == "truncate":
            ids, mask = np.append(ids, tokenizer.eod_id)[:49], np.append(mask, 0)[:49]
            want.append((tokenizer.decode(ids), tokenizer.decode(ids[mask > 0])))
    long = [n for n in lengths if n > 49]
    assert sorted(found) == sorted(want) and 0 < len(long) < 57
    assert all(f"def {j}<" in "".join(map(tokenizer.decode, data.held_out["tokens"])) for j in (57, 58, 59))
    cut = sum(long) - 49 * len(long) if too_long == "truncate" else sum(long)
    counts = [len(long), 0] if too_long == "truncate" else [0, len(long)]
    report, held = (line for line in capsys.readouterr().out.splitlines() if "chats_text_document, " in line)
    assert "valid: 3 of 3 conversations" in held
    assert f"train: {len(want)} of 57 conversations in {len(train)} rows" in report
    assert f"{counts[0]} truncated and {counts[1]} dropped as longer than a row ({cut:,} tokens), 0 left out without a target" in report


def test_conversations_restore_on_other_ranks_and_blend(folder):
    data = corpus.load(make_config(folder, "1,{0}/chats_text_document,2,{0}/chats_text_document", **CHATS[1]), 320)
    want = first_rows(data.train, 36, 5)
    with Loader(data.train, 12, 5) as loader:
        next(loader)
        state = json.loads(json.dumps(loader.state()))
    loaders = [Loader(data.train, 8, 5, rank, 2, state=state) for rank in range(2)]
    rows = [next(loader)["tokens"] for _ in range(3) for loader in loaders]
    [loader.close() for loader in loaders]
    assert np.array_equal(np.concatenate(rows), want["tokens"][12:])


def test_a_dataset_of_hugging_face_is_a_stream(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    texts = [json.loads(line)["text"] for line in (folder / "one.jsonl").read_text().splitlines()]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    found = [corpus.load(make_config(folder, path, **STREAM), 320) for path in (f"hf:{tmp_path}/saved", "{}/one.jsonl")]
    assert found[0].train.fingerprint.startswith("stream of hf:")
    used = [sorted(first_rows(data.train, 100, 0)["tokens"].ravel().tolist()) for data in found]
    assert len(used[0]) == len(used[1])


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


@pytest.mark.parametrize("lengths, split", [([60] * 10, ((0, 9), (9, 10))), ([20] * 10, ((0, 8), (8, 10))), ([50], ((0, 1), (0, 1)))])
def test_of_a_small_pair_few_sequences_are_held_out_or_none_and_a_line_says_so(lengths, split, folder, tmp_path, capsys):
    """The default split would leave the valid part without a row, and a first try should run."""
    with Writer(str(tmp_path / "small"), np.uint16) as writer:
        for n in lengths:
            writer.add_document([np.full(n, 5)])
    config = make_config(folder, f"{tmp_path}/small")
    data = corpus.load(config, 320)
    out = capsys.readouterr().out
    assert data.train.span == split[0] and len(data.held_out["tokens"]) >= 1
    said = (
        "none is held out, and eval_loss is of training data"
        if split[0] == split[1]
        else f"held out are the last {split[1][1] - split[1][0]}"
    )
    assert f"{len(lengths)} sequences are too few for data.split=95,5,0; {said}" in out
    with pytest.raises(ValueError, match="leaves the valid split without one of the"):  # which the user chose
        corpus.load(make_config(folder, f"{tmp_path}/small", **{"data.split": "98,1,1"}), 320)


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
        ("hf:{}", {}, "data.path=hf:.* holds records; use --config.data.stream=true"),
        ("{}/folder", {}, "data.path=.*/folder holds records; use --config.data.stream=true"),
        ("{}/nothing.jsonl", {"data.stream": True}, "data.path=.*nothing.jsonl does not exist"),
        ("{}/one.jsonl", {"data.stream": True, "data.shuffle_buffer": -1}, "data.shuffle_buffer=-1 must be 0 or more"),
        (PAIR, {"data.shuffle_buffer": 9}, "data.shuffle_buffer=9 is for a stream, and data.path=.* is a .bin/.idx pair"),
        (PAIR, {"data.too_long": "drop"}, r"data.too_long='drop' is for conversations \(data.conversations=true\) or conversations"),
        (PAIR, {"data.conversations": True}, "needs .*one_loss_document beside .*one_text_document: experiments.preprocess --format"),
        (
            "{}/one.jsonl",
            {"data.conversations": True},
            "data.conversations=true reads a .bin/.idx pair, and .*one.jsonl' is none",
        ),
        (CHATS[0], {**CHATS[1], "data.too_long": "cut"}, "data.too_long='cut' is not one of truncate, drop, error"),
        (CHATS[0], {**CHATS[1], "data.too_long": "error"}, "example .* has .* tokens, more than train.seq_len=48"),
        (CHATS[0], {**CHATS[1], "data.reset_at_eod": False}, "data.reset_at_eod=False is for text or a .bin/.idx pair or a stream, and"),
        (
            CHATS[0],
            {**CHATS[1], "train.seq_len": 3},
            "train split has no conversation with a target in train.seq_len=3 tokens: 0 of 57",
        ),
        (CHATS[0], {**CHATS[1], "data.split": "1,0,0"}, "data.split='1,0,0' leaves the valid split without one of the 60 sequences"),
        (PAIR, {"data.stream": True}, "data.stream=true reads text, and data.path=.* is a .bin/.idx pair"),
        ("", {"data.stream": True}, "data.stream=true needs data.path"),
        (PAIR, {"data.max_bytes": 5}, "data.max_bytes=5 is for text or conversations .*, and data.path=.* is a .bin/.idx pair"),
        (PAIR, {"data.held_out": 0.3}, "data.held_out=0.3 is for text or a stream or conversations"),
        ("", {"data.split": "50,50"}, "data.split='50,50' is for a .bin/.idx pair or conversations .*, and data.path='' is text"),
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


@pytest.mark.extended
def test_a_run_stopped_within_an_epoch_of_a_blend_of_packed_documents_takes_each_sample_once(folder, tmp_path, monkeypatch):
    """And, of a step that is watched, with the loss of each source."""
    changes, taken, take = {"train.steps": 6, "train.log_every": 1, "train.monitor_every": 6}, [], Loader.__next__
    config = make_config(folder, BLEND, **changes)

    def spied(self):
        taken.append(take(self))
        return taken[-1]

    monkeypatch.setattr(Loader, "__next__", spied)
    with monkeypatch.context() as patch:
        stopping_after(3, patch)
        pretrain.pretrain(config, str(tmp_path / "run"))
    assert len(taken) == 3
    pretrain.pretrain(config, str(tmp_path / "run"))
    expected = first_rows(corpus.load(config, 320).train, 24, config.train.seed)
    assert len({row.tobytes() for row in expected["tokens"]}) == 24 and expected["segment_ids"].max() > 1
    for key, rows in expected.items():
        assert np.array_equal(np.concatenate([batch[key] for batch in taken]), rows)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (watched,) = (line for line in lines if "loss/one_text_document" in line)
    (loss,) = (line["loss"] for line in lines if line["step"] == watched["step"] == 6 and "loss" in line)
    low, high = sorted(watched[f"loss/{name}_text_document"] for name in ("one", "two"))
    assert low < loss < high and watched["activation_norm/layers.1"] > 0
