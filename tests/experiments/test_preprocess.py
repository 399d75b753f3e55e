"""The preprocessing main: what its pairs hold, that workers change nothing, what a kill leaves, and the one line a mistake gets."""

import csv
import functools
import gzip
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from experiments.data import encode, pairs
from experiments.data.megatron import IndexedDataset
from experiments.data.readers import Record, records
from qwen3.chat import alpaca, encode_chat
from qwen3.tokenizer import Tokenizer, train_bpe

MAIN = [sys.executable, "-m", "experiments.preprocess"]
TEXTS = ["plain words", "", "naïve 日本 👩\u200d👧 e\u0301", "win\r\ndows\r\n", "<|endoftext|> is text here", "long words " * 3000, " "]
CHAT = [
    {"instruction": "add", "input": "1 2", "output": "3", "system": "be brief"},
    {"instruction": "é?", "input": "", "output": "<think>\nhm\n</think>\n\nyes", "history": [["a", "b"]]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["plain words and long words naïve be brief add\n" * 9], 320).save(path)
    return path


@pytest.fixture(scope="module")
def tok(folder):
    return Tokenizer.load(folder)


FORKS = """
import json, os, runpy, sys
from experiments import flags
from experiments.data import encode, megatron, pairs, readers
for line in sys.stdin:
    args, folder = json.loads(line)
    if not os.fork():
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT), number)
        sys.argv = ["preprocess", *args]
        runpy.run_module("experiments.preprocess", run_name="__main__", alter_sys=True)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@functools.cache
def forking():
    """A process that has imported what the main imports, and runs the main in a fork of its own for each line that it reads."""
    return subprocess.Popen([sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run(*args, status=0):
    """Output of the main, or of `error:` its line."""
    process = forking()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps([list(map(str, args)), folder]), file=process.stdin, flush=True)
        code = process.stdout.readline()
        out, err = (Path(folder, name).read_text() for name in ("out", "err"))
    assert code == f"{status}\n", out + err
    return out if status == 0 else next(line for line in err.splitlines() if line.startswith("error: "))


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def documents(prefix):
    pair = IndexedDataset(prefix)
    ends = pair.document_indices
    return [[i for s in range(a, b) for i in pair.tokens(s).tolist()] for a, b in zip(ends, ends[1:])]


def wanted(tok, texts, end=True):
    return [ids + [tok.eod_id] * end if ids else [] for ids in tok.encode_batch(texts)]


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".bin", ".idx")}


def test_every_key_has_a_whole_pair(tmp_path, folder, tok):
    rows = [{"text": t, "title": f"title {i}", "n": i} for i, t in enumerate(TEXTS)]
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(jsonl(tmp_path / "in.jsonl", rows).read_bytes().replace(b"\n", b"\r\n")))
    out = run(f"--input={tmp_path / 'in.jsonl.gz'}", f"--output_prefix={tmp_path}/o/p", f"--tokenizer={folder}", "--json_keys=text,title")
    assert documents(f"{tmp_path}/o/p_text_document") == wanted(tok, TEXTS)
    assert documents(f"{tmp_path}/o/p_title_document") == wanted(tok, [r["title"] for r in rows])
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [f"p_{k}_document.{e}" for k in ("text", "title") for e in ("bin", "idx")]
    assert IndexedDataset(f"{tmp_path}/o/p_text_document").dtype == np.uint16
    assert f"p_text_document: {len(TEXTS)} documents" in out and "left out 0 bad records" in out


def test_a_line_that_the_tokenizer_cannot_take_is_a_bad_record(tmp_path, folder, tok):
    """Its neighbours, tokenised in one call with it, are kept."""
    rows = [{"text": "one"}, {"text": "a" + " " * 3_000_000}, {"text": "two"}]
    common = f"--input={jsonl(tmp_path / 'in.jsonl', rows)}", f"--tokenizer={folder}", f"--output_prefix={tmp_path}/p"
    said = run(*common, status=2)
    assert "in.jsonl, line 2: the text 'a" in said and "has 3,000,001 characters in a row without a place to cut it" in said
    assert "left out 1 bad records" in run(*common, "--skip_bad")
    assert documents(f"{tmp_path}/p_text_document") == wanted(tok, ["one", "two"])


SEVERAL = ("jsonl", "json", "csv", "parquet", "arrow")


@pytest.mark.parametrize("kind", [*SEVERAL, "txt", "tokens"])
@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_every_kind_becomes_documents_that_decode_to_its_texts(tmp_path, folder, tok, kind, packing):
    texts = TEXTS if kind in SEVERAL else [TEXTS[2] + "\r\n"] if kind == "txt" else [" = T = \n \n win\n dows"]
    table = pyarrow.Table.from_pylist([{"n": i, "text": t} for i, t in enumerate(texts)])
    path, sink = tmp_path / f"in.{kind}{packing}", io.BytesIO()
    if kind in ("json", "jsonl"):
        sink.write("\r\n".join(map(json.dumps, table.to_pylist())).encode())
    elif kind == "csv":
        file = io.TextIOWrapper(sink, newline="", encoding="utf-8", write_through=True)
        csv.writer(file).writerows([["n", "text"], *([i, t] for i, t in enumerate(texts))])
        file.detach()
    elif kind == "parquet":
        pyarrow.parquet.write_table(table, sink)
    elif kind == "arrow":
        with pyarrow.ipc.new_file(sink, table.schema) as out:
            out.write_table(table)
    else:
        sink.write(texts[0].replace("\n", "\r\n" if kind == "tokens" else "\n").encode())
    pack = {"": bytes, ".gz": gzip.compress, ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True)}[packing]
    path.write_bytes(pack(sink.getvalue()))
    batches = encode.encode(records(path), encode.Job(str(folder), append_eod=False))
    pairs.write(f"{tmp_path}/p", batches, {"text": np.uint16}, path.stat().st_size, pairs.Skipped(False))
    want = [unicodedata.normalize("NFC", t) for t in texts]
    if kind in ("txt", "tokens"):
        want = [t.replace("\r\n", "\n").strip(" \n" if kind == "tokens" else "") for t in want]
    assert [tok.decode(ids) for ids in documents(f"{tmp_path}/p_text_document")] == want


def test_conversations_of_a_table_are_those_of_lines(tmp_path, folder):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}, {"role": "user", "content": "c"}]
    rows = [{"messages": [*turns, {"role": "assistant", "content": f"é{i}"}]} for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")  # keys that a message lacks become None
    job = encode.Job(str(folder), format="messages")
    (table,), (lines,) = (list(encode.encode(records(p), job)) for p in (tmp_path / "a.parquet", jsonl(tmp_path / "a.jsonl", rows)))
    assert not table.bad and not lines.bad
    for name in ("text", "loss"):
        assert all(map(np.array_equal, table.outputs[name], lines.outputs[name]))


def test_options_of_texts(tmp_path, folder, tok):
    rows = jsonl(tmp_path / "in.jsonl", [{"body": t, "other": 1} for t in TEXTS])
    common = (f"--input={rows}", f"--output_prefix={tmp_path}/p", f"--tokenizer={folder}")
    run(*common, "--map_keys=body:text", "--noappend_eod", "--max_samples=3")
    assert documents(f"{tmp_path}/p_text_document") == wanted(tok, TEXTS[:3], end=False)
    (tmp_path / "a.txt").write_text("one\r\n\r\ntwo\n")
    run(f"--input={tmp_path / 'a.txt'}", *common[1:], "--per_line")
    assert documents(f"{tmp_path}/p_text_document") == wanted(tok, ["one", "two"])
    (tmp_path / "wiki.test.tokens").write_text(" = A = \n \n a @-@ b . \n = B = \n \n c \n")
    run(f"--input={tmp_path / 'wiki.test.tokens'}", *common[1:], "--detokenize")
    assert documents(f"{tmp_path}/p_text_document") == wanted(tok, ["A\n\na-b.", "B\n\nc"])


def test_bad_records_are_errors_or_left_out_of_every_key(tmp_path, folder, tok):
    path = jsonl(tmp_path / "in.jsonl", [{"text": "a", "b": "1"}, {"text": "b"}, {"text": 3, "b": ""}, {"text": "\ud800", "b": "2"}])
    path.write_text(path.read_text() + '{"text": "c"\n' + '{"text": "d", "b": "3"}')
    common = (f"--input={path}", f"--output_prefix={tmp_path}/p", f"--tokenizer={folder}", "--json_keys=text,b")
    assert run(*common, status=2) == f"error: {path}, line 5: not JSON: Expecting ',' delimiter: line 1 column 13 (char 12)" + (
        "; mend it, or leave such records out with --skip_bad"
    )
    assert not content(tmp_path)
    assert "left out 4 bad records" in run(*common, "--skip_bad")
    assert documents(f"{tmp_path}/p_text_document") == wanted(tok, ["a", "d"])
    assert documents(f"{tmp_path}/p_b_document") == wanted(tok, ["1", "3"])


def test_a_key_that_is_renamed_replaces_one_of_that_name(folder, tok):
    rows = [Record(value, "here", 1) for value in ({"text": "x", "body": "y"}, {"body": "y", "text": "x"}, {"body": "y"})]
    for names, key, want in (({"body": "text"}, "text", "y"), ({"body": "text", "text": "title"}, "title", "x")):
        (batch,) = encode.encode(rows[: 3 if key == "text" else 2], encode.Job(str(folder), (key,), map_keys=names))
        assert not batch.bad and batch.outputs[key][0].tolist() == len(batch.outputs[key][1]) * wanted(tok, [want])[0]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "row, message",
    [({"a": 1, "b": 2}, "key 'text' is missing; the keys are a, b"), ({"text": None}, "'text' is NoneType; give text")]
    + [({"text": "x\udc00"}, "'text' has half a surrogate pair"), ({"text": ["a"]}, "'text' is list; give text")],
)
def test_what_a_worker_cannot_encode_is_named_by_file_and_line(tmp_path, folder, workers, row, message):
    path = jsonl(tmp_path / "in.jsonl", [{"text": "a"}, row])
    (batch,) = encode.encode(records(path), encode.Job(str(folder)), workers)
    assert batch.bad == [f"{path}, line 2: {batch.bad[0].split(': ', 1)[1]}"] and message in batch.bad[0]
    assert batch.outputs["text"][1].tolist() == [2]


@pytest.mark.extended(but=("alpaca",))
@pytest.mark.parametrize("form", [None, "alpaca"])
def test_workers_change_no_byte(tmp_path, folder, form, monkeypatch):
    monkeypatch.setattr(encode, "BATCH_RECORDS", 7)
    rng = random.Random(0)
    rows = [{"text": rng.choice(TEXTS), **rng.choice(CHAT)} for _ in range(200)]
    path = jsonl(tmp_path / "in.jsonl", rows)
    job = encode.Job(str(folder), format=form)
    dtypes = {output: np.int32 for output in job.outputs}
    for workers in (1, 2):
        batches = encode.encode(records(path), job, workers)
        counts = pairs.write(f"{tmp_path}/{workers}/p", batches, dtypes, path.stat().st_size, pairs.Skipped(False))
        assert counts[0] == len(rows)
    assert content(tmp_path / "1") == content(tmp_path / "2") and len(content(tmp_path / "1")) == 2 * len(dtypes)


def test_error_in_a_worker_ends_the_run(folder):
    def broken():
        yield from records_of(["a"] * 2000)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(encode.encode(broken(), encode.Job(str(folder)), workers=2))
    with pytest.raises(ValueError, match="workers=0 must be 1 or more"):
        encode.encode([], encode.Job(str(folder)), workers=0)


def records_of(texts):
    return [Record({"text": text}, f"line {i}", i) for i, text in enumerate(texts, 1)]


def test_worker_that_is_killed_ends_the_run(folder):
    batches = encode.encode(records_of(["words"] * 100 * encode.BATCH_RECORDS), encode.Job(str(folder)), workers=2)
    next(batches)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(RuntimeError, match="a worker process ended at line .* use fewer workers"):
        list(batches)


def test_input_is_read_only_as_far_ahead_as_workers_need(folder):
    taken = []

    def source():
        for i, record in enumerate(records_of(["words " * 200] * 40 * encode.BATCH_RECORDS)):
            taken.append(i)
            yield record

    batches = encode.encode(source(), encode.Job(str(folder)), workers=2)
    next(batches)
    assert len(taken) <= 6 * encode.BATCH_RECORDS
    batches.close()


@pytest.mark.extended
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_run_leaves_no_pair_and_runs_again(tmp_path, folder, workers):
    path = jsonl(tmp_path / "in.jsonl", [{"text": "plain words " * 50, "b": "x"}] * 30000)
    args = [f"--input={path}", f"--output_prefix={tmp_path}/p", f"--tokenizer={folder}", "--json_keys=text,b", f"--workers={workers}"]
    process = subprocess.Popen([*MAIN, *args], stderr=subprocess.DEVNULL, start_new_session=True)
    partial = tmp_path / "p_text_document.bin.partial"
    until(lambda: (partial.exists() and partial.stat().st_size) or process.poll() is not None)
    assert process.poll() is None, "finished before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not content(tmp_path)
    with pytest.raises(FileNotFoundError):
        IndexedDataset(f"{tmp_path}/p_text_document")
    until(lambda: not group_members(process.pid))
    run(*args, "--max_samples=5")
    assert [len(documents(f"{tmp_path}/p_{key}_document")) for key in ("text", "b")] == [5, 5]
    assert not list(tmp_path.glob("*.partial"))


def until(condition, limit_s=60):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def group_members(group):
    """Processes of the killed run that are still there."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_failed_run_leaves_an_older_pair_alone(tmp_path, folder):
    common = (f"--output_prefix={tmp_path}/p", f"--tokenizer={folder}")
    run(f"--input={jsonl(tmp_path / 'a.jsonl', [{'text': 'a'}])}", *common)
    before = content(tmp_path)
    run(f"--input={jsonl(tmp_path / 'b.jsonl', [{'text': 'a'}, {}])}", *common, status=2)
    assert content(tmp_path) == before and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("form", ["alpaca", "sharegpt", "messages"])
@pytest.mark.parametrize("thinking", ["none", "false"])
def test_conversations_become_tokens_and_their_loss_masks(tmp_path, folder, tok, form, thinking):
    conversations = [alpaca(row)[0] for row in CHAT]
    rows = {
        "alpaca": CHAT,
        "sharegpt": [{"conversations": [{"from": m["role"], "value": m["content"]} for m in c]} for c in conversations],
        "messages": [{"messages": c} for c in conversations],
    }[form]
    path = jsonl(tmp_path / "in.jsonl", rows)
    run(f"--input={path}", f"--output_prefix={tmp_path}/p", f"--tokenizer={folder}", f"--format={form}", f"--enable_thinking={thinking}")
    expected = [encode_chat(tok, c, None, {"none": None, "false": False}[thinking]) for c in conversations]
    assert documents(f"{tmp_path}/p_text_document") == [ids.tolist() + [tok.eod_id] for ids, _ in expected]
    assert documents(f"{tmp_path}/p_loss_document") == [mask.tolist() + [0] for _, mask in expected]
    assert IndexedDataset(f"{tmp_path}/p_loss_document").dtype == np.uint8


def test_conversation_that_cannot_be_used_is_named_by_file_and_line(tmp_path, folder):
    path = jsonl(tmp_path / "in.jsonl", [{"messages": [{"role": "assistant", "content": "a"}], "tools": [{"name": "f"}]}])
    common = (f"--input={path}", f"--output_prefix={tmp_path}/p", f"--tokenizer={folder}", "--format=messages")
    assert run(*common, status=2).startswith(f"error: {path}, line 1: chat template: this tokenizer was trained without tool tokens")
    path.write_text('{"text": "a"}')
    assert run(*common, status=2).startswith(f"error: {path}, line 1: key 'messages' is missing; the keys are text")


def test_a_weight_that_a_pair_cannot_hold_is_refused(tmp_path, folder):
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0.5}]
    path = jsonl(tmp_path / "in.jsonl", [{"messages": turns}])
    said = run(f"--input={path}", f"--output_prefix={tmp_path}/p", f"--tokenizer={folder}", "--format=messages", status=2)
    assert said.startswith(f"error: {path}, line 1: a turn has a weight of 0.5, and the masks beside a pair are 0 or 1")


def test_inspect(tmp_path, folder, tok):
    path = jsonl(tmp_path / "in.jsonl", CHAT + [{"instruction": "x", "output": "y"}])
    run(f"--input={path}", f"--output_prefix={tmp_path}/p", f"--tokenizer={folder}", "--format=alpaca")
    prefix = f"{tmp_path}/p_text_document"
    out = run("inspect", f"--tokenizer={folder}", prefix, "--document=2")
    counts = [len(d) for d in documents(prefix)]
    assert "documents  3, 0 of them empty, in 3 sequences" in out
    assert f"tokens     {sum(counts):,}, uint16" in out
    assert f"0% {min(counts)}, " in out and f"100% {max(counts)}; mean {np.mean(counts):.1f}" in out
    assert f"loss       on {sum(map(sum, documents(f'{tmp_path}/p_loss_document')))} tokens" in out
    assert out.endswith("tokens:\n[<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n]y<|im_end|>[\n<|endoftext|>]\n")
    assert run("inspect", f"{tmp_path}/p_loss_document").splitlines()[-1] == " ".join(map(str, documents(f"{tmp_path}/p_loss_document")[0]))
    assert run("inspect", prefix, "--document=3", status=2) == f"error: document=3: {prefix} has 3 documents, numbered from 0"
    assert run("inspect", status=2).startswith("error: inspect needs the prefix of a pair")
    assert "p_none.idx does not exist" in run("inspect", f"{tmp_path}/p_none", status=2)


MISTAKES = [
    ((), "--input is missing; a file or a folder"),
    (("--input=no.jsonl",), "--output_prefix is missing"),
    (("--input=no.jsonl", "--output_prefix=p", "--tokenizer=none"), "input=no.jsonl does not exist"),
    (("--input=setup.cfg", "--output_prefix=p", "--tokenizer=none", "--format=alpaca"), "setup.cfg: its name tells no kind of file"),
    (("--input=a", "--output_prefix=p", "--tokenizer=t", "--format=messages", "--json_keys=a"), "--json_keys=a has no use with"),
    (("--input=a", "--output_prefix=p", "--tokenizer=t", "--enable_thinking=true"), "--enable_thinking=true needs --format"),
    (
        ("--input=a", "--output_prefix=p", "--tokenizer=t", "--max_samples=-1"),
        "flag --max_samples=-1: it must be a whole number from 0 to 2147483647",
    ),
    (("--input=a", "--output_prefix=p", "--tokenizer=t", "--map_keys=a"), "--map_keys=a must be from:to"),
    (("--input=a", "--output_prefix=p", "--tokenizer=t", "--map_keys=a:b,c:b"), "each name once"),
    (("--input=a", "--output_prefix=p", "--tokenizer=t", "--json_keys=a,a"), "--json_keys=a,a must name at least one key"),
    (("stray",), "unexpected argument 'stray'"),
]


@pytest.mark.parametrize("args, message", MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistake_gets_one_line(args, message):
    assert message in run(*args, status=2)


def test_empty_input_is_an_error(tmp_path, folder):
    (tmp_path / "in.jsonl").write_text("\n")
    line = run(f"--input={tmp_path / 'in.jsonl'}", f"--output_prefix={tmp_path}/p", f"--tokenizer={folder}", status=2)
    assert "no record" in line and not content(tmp_path)
