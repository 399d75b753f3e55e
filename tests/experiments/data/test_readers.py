"""Readers of text and tables: every kind gives back what was written, and what is broken is named by file and line."""

import csv
import errno
import gzip
import io
import json
import random
import tracemalloc

import pytest

from experiments.data import json_stream, readers, sources, wikitext
from experiments.data.readers import records

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = [
    "plain",
    "",
    "naïve 日本 👩\u200d👧 e\u0301",
    'a "quoted", comma',
    "two\nlines",
    "cr\r\nlf\rcr",
    "\u2028\u0085\ufeff",
    "long " * 20000,
    " ",
]
ROWS = [{"text": text, "title": f"t{i}"} for i, text in enumerate(TEXTS)]
LINE_END = {"unix": "\n", "windows": "\r\n"}


def jsonl(end="\n"):
    return "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + end for i, row in enumerate(ROWS)).encode()


def table_bytes(kind):
    table, sink = pa.Table.from_pylist(ROWS), io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, sink, row_group_size=4)
    else:
        make = pa.ipc.new_file if kind == "arrow file" else pa.ipc.new_stream
        with make(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    return sink.getvalue()


def csv_bytes(end):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["text", "title"], lineterminator=end)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


CONTENTS = {
    **{f"jsonl, {name}": ("a.jsonl", jsonl(end)) for name, end in LINE_END.items()},
    "jsonl, blank lines": ("a.jsonl", b"\n \n" + jsonl().replace(b"\n", b"\n\n")),
    "json array": ("a.json", json.dumps(ROWS).encode()),
    "json array over lines": ("a.json", json.dumps(ROWS, indent=2, ensure_ascii=False).replace("\n", "\r\n").encode()),
    "json objects": ("a.json", jsonl()),
    **{f"csv, {name}": ("a.csv", csv_bytes(end)) for name, end in LINE_END.items()},
    "parquet": ("a.parquet", table_bytes("parquet")),
    "arrow file": ("a.arrow", table_bytes("arrow file")),
    "arrow stream": ("a.arrow", table_bytes("arrow stream")),
}
PACK = {
    "": lambda data: data,
    ".gz": lambda data: gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :]),
    ".zst": lambda data: pa.compress(data[:9], "zstd", asbytes=True) + pa.compress(data[9:], "zstd", asbytes=True),
}


def values(path, **kw):
    return [r.value for r in records(path, **kw)]


def texts(path, **kw):
    return [v["text"] for v in values(path, **kw)]


def written(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("kind", CONTENTS)
def test_every_kind_gives_back_its_records(tmp_path, kind, packing):
    name, data = CONTENTS[kind]
    path = written(tmp_path / (name + packing), PACK[packing](data))
    found = list(records(path))
    assert [r.value for r in found] == ROWS
    sizes = [r.size for r in found]
    assert sizes == sorted(sizes) and 0 < sizes[-1] <= path.stat().st_size
    assert all(str(path) in r.where for r in found)


@pytest.mark.parametrize("kind", [k for k in CONTENTS if k.split(",")[0].split()[0] in ("jsonl", "json", "csv")])
def test_byte_order_mark_is_no_text(tmp_path, kind):
    name, data = CONTENTS[kind]
    assert values(written(tmp_path / name, b"\xef\xbb\xbf" + data)) == ROWS


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_json_is_read_in_chunks_of_any_size(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    rows = [
        {"text": t[:50], "n": [1.5e-3, -12, True, None, {"é": "\\u00e9\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")}]}
        for t in TEXTS
    ]
    for data in (json.dumps(rows), json.dumps(rows, indent=1, ensure_ascii=False), "\n".join(map(json.dumps, rows))):
        assert values(written(tmp_path / "a.json", data)) == rows


def test_lines_and_rows_are_counted_from_one(tmp_path):
    path = written(tmp_path / "a.jsonl", b'\n{"text": "a"}\n\n{"text": "b"}\n')
    assert [r.where for r in records(path)] == [f"{path}, line 2", f"{path}, line 4"]
    path = written(tmp_path / "a.json", '[\n{"text":\n"a"},\n\n{"text": "b"}]')
    assert [r.where for r in records(path)] == [f"{path}, line 2", f"{path}, line 5"]
    path = written(tmp_path / "a.csv", 'text\n"a\nb"\nc\n')
    assert [r.where for r in records(path)] == [f"{path}, line 2", f"{path}, line 4"]
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    assert [r.where[-5:] for r in records(tmp_path / "a.parquet")] == ["row 1", "row 2"]


def test_txt_is_one_document_or_one_a_line(tmp_path):
    path = written(tmp_path / "a.txt", "\ufeffone é\r\n\r\n  two\u2028three \r\nlast")
    assert texts(path) == ["one é\n\n  two\u2028three \nlast"]
    assert texts(path, per_line=True) == ["one é", "  two\u2028three ", "last"]
    assert texts(written(tmp_path / "b.txt", "")) == [""]


def test_folder_is_read_in_order_of_paths(tmp_path):
    (tmp_path / "b").mkdir()
    written(tmp_path / "c.jsonl.gz", gzip.compress(b'{"text": "3"}'))
    written(tmp_path / "b" / "x.jsonl", '{"text": "2"}')
    written(tmp_path / "a.jsonl", '{"text": "1"}\n')
    written(tmp_path / ".hidden", "x")
    found = list(records(tmp_path))
    assert [r.value["text"] for r in found] == ["1", "2", "3"]
    assert found[-1].size == sum(p.stat().st_size for p in tmp_path.rglob("*.jsonl*"))


def test_parquet_reads_only_the_columns_asked_for(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet", columns=["title"]) == [{"title": r["title"]} for r in ROWS]
    assert values(tmp_path / "a.parquet", columns=["titel"]) == ROWS  # so that the message can name the ones there are


WIKI = """
 = Robert <unk> =

 Robert <unk> is an actor , born in 1 @,@ 980 .

 = = Career = =

 He was well @-@ known ; it cost $ 3 @.@ 5 ( about " ten " ) . He didn 't say : " it 's over ! "

 = = = 2000 – 2005 = = =

 the cats ' home [ a ]
 = E = mc² =

 Energy .
""".replace("\n", " \n")


def test_wikitext_is_split_by_titles_and_not_by_sections(tmp_path):
    path = written(tmp_path / "wiki.train.tokens", WIKI)
    found = list(records(path))
    assert [r.value["text"].split("\n")[0].strip() for r in found] == ["= Robert <unk> =", "= E = mc² ="]
    assert "\n".join(r.value["text"] for r in found).split() == WIKI.split()
    assert [r.where for r in found] == [f"{path}, line 2", f"{path}, line 13"]
    assert texts(written(tmp_path / "wiki.valid.tokens", WIKI.replace("\n", "\r\n"))) == [r.value["text"] for r in found]
    assert texts(written(tmp_path / "x.tokens", " \n no title \n more \n")) == ["no title \n more"]


def test_wikitext_detokenized(tmp_path):
    path = written(tmp_path / "wiki.train.tokens", WIKI)
    assert texts(path, detokenize=True) == [
        'Robert <unk>\n\nRobert <unk> is an actor, born in 1,980.\n\nCareer\n\nHe was well-known; it cost $3.5 (about "ten").'
        " He didn't say: \"it's over!\"\n\n2000–2005\n\nthe cats' home [a]",
        "E = mc²\n\nEnergy.",
    ]


@pytest.mark.parametrize(
    "line, wanted",
    [(" = A = ", True), ("= A =", True), (" = = A = = ", False), (" a = b ", False), (" = ", False), (" = = ", False), ("", False)]
    + [(" = A = = ", False), (" = A", False), (" =A= ", False)],
)
def test_titles(line, wanted):
    assert wikitext.is_title(line) is wanted


BAD_LINES = [
    (b'{"text": "a"', "not JSON: Expecting ',' delimiter"),
    (b'{"text": "\xff"}', "not UTF-8: invalid start byte at byte 10"),
    (b"[1, 2]", "list, not an object"),
    (b'"text"', "str, not an object"),
    (b"null", "NoneType, not an object"),
    (b'{"text": "a"} {"text": "b"}', "not JSON: Extra data"),
    (b"[" * 100000, "not JSON: maximum recursion depth"),
    (b'{"a": ' + b"1" * 5000 + b"}", "not JSON: Exceeds the limit"),
    (b'\xef\xbb\xbf{"text": "a"}', "not JSON: Unexpected UTF-8 BOM"),
]


@pytest.mark.parametrize("line, message", BAD_LINES)
def test_malformed_jsonl_line_is_named_or_counted(tmp_path, line, message):
    path = written(tmp_path / "a.jsonl", b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(ValueError) as error:
        values(path)
    assert f"{path}, line 2: {message}" in str(error.value) and "skip_bad" in str(error.value)
    bad = []
    assert texts(path, bad=bad.append) == ["a", "b"]
    assert len(bad) == 1 and message in bad[0]


BAD_FILES = [
    ("a.json", b'[{"text": "a"},\n{"text" "b"}]', "line 2: not JSON: Expecting ':' delimiter"),
    ("a.json", b'[{"text": "a"},\n{"text": "b"}', "line 2: the array has no end"),
    ("a.json", b'[{"text": "a"}\n{"text": "b"}]', "line 2: not JSON: '{' where the array"),
    ("a.json", b'[{"text": "a"}]\n[1]', "line 2: not JSON: more text after"),
    ("a.json", b'[{"text": "a"},\n3]', "line 2: int, not an object"),
    ("a.json", b'[{"text": "a"},\n]', "line 2: not JSON: Expecting value"),
    ("a.json", b'[{"text": "a"},\n{"text": "\xff"}]', "line 2: not UTF-8"),
    ("a.json", b'{"text": "a"}\n{"text": "b', "line 2: not JSON: Unterminated string"),
    ("a.json", b'[{"text": "a"},\n' + b"[" * 100000, "line 2: not JSON: maximum recursion"),
    ("a.csv", b"text,b\na,1\nb\n", "line 3: 1 fields, but the header has 2"),
    ("a.csv", b"text,b\na,1\nb,1,2\n", "line 3: 3 fields, but the header has 2"),
    ("a.csv", b'text,b\na,1\n"b"x,1\n', "line 3: not CSV: ',' expected after"),
    ("a.csv", b'text,b\na,1\n"b,1\n', "line 3: not CSV: unexpected end of data"),
    ("a.csv", b"text,b\na,1\n\xff,1\n", "line 3: not UTF-8"),
    ("a.txt", b"a\nb\n\xff", "line 3: not UTF-8"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9], "EOFError"),
    ("a.jsonl.gz", b"no gzip at all", "BadGzipFile"),
    ("a.jsonl.zst", pa.compress(b'{"text": "a"}\n' * 9, "zstd", asbytes=True)[:-3], "OSError"),
    ("a.parquet", b"no parquet", "ArrowInvalid"),
    ("a.parquet", CONTENTS["parquet"][1][:-200], "ArrowInvalid"),
    ("a.arrow", CONTENTS["arrow stream"][1][:-200], "not read from here on"),
    ("a.arrow", b"ARROW1 and nothing", "ArrowInvalid"),
]


@pytest.mark.parametrize("name, data, message", BAD_FILES)
def test_malformed_file_is_named_or_counted(tmp_path, name, data, message):
    path = written(tmp_path / name, data)
    with pytest.raises(ValueError) as error:
        values(path)
    assert message in str(error.value) and str(path) in str(error.value) and "skip_bad" in str(error.value)
    bad = []
    values(path, bad=bad.append)
    assert len(bad) == 1


def test_failure_of_the_system_is_an_error_and_leaves_nothing_out(tmp_path, monkeypatch):
    def failing(file, **_):
        yield 1, {"text": "a"}, None, 1
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setitem(readers.READERS, "jsonl", failing)
    path, bad = written(tmp_path / "a.jsonl", "{}"), []
    for options in ({}, {"bad": bad.append}):
        with pytest.raises(ValueError, match="a.jsonl cannot be read: .*Input/output error"):
            values(path, **options)
    assert not bad


def test_bad_row_of_csv_or_parquet_costs_that_row_alone(tmp_path):
    bad = []
    path = written(tmp_path / "a.csv", b'text\na\n\xff\n"b"x\nc\n')
    assert texts(path, bad=bad.append) == ["a", "c"] and len(bad) == 2
    broken = pa.Array.from_buffers(pa.string(), 3, [None, *pa.array([b"ab", b"\xff\xff", b"cd"]).buffers()[1:]])
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", bad=bad.append) == ["ab", "cd"]
    assert bad[2:] == [f"{tmp_path / 'a.parquet'}, row 2: not UTF-8: invalid start byte at byte 0"]


def test_wrong_inputs_name_the_fix(tmp_path):
    with pytest.raises(FileNotFoundError, match="no_such.jsonl does not exist"):
        records(tmp_path / "no_such.jsonl")
    with pytest.raises(ValueError, match="has no files"):
        records(tmp_path)
    text = written(tmp_path / "a.txt", "a")
    with pytest.raises(ValueError, match=r"detokenize=True needs WikiText.*a.txt is txt"):
        records(text, detokenize=True)
    written(tmp_path / "b.jsonl", "{}")
    with pytest.raises(ValueError, match=r"mixes kinds: .*b.jsonl is jsonl, .*a.txt is txt; give a folder of one kind"):
        records(tmp_path)
    with pytest.raises(ValueError, match=r"per_line=True needs .txt files"):
        records(tmp_path / "b.jsonl", per_line=True)
    with pytest.raises(ValueError, match=r"b.doc: its name tells no kind of file; rename it to end in .jsonl"):
        records(written(tmp_path / "b.doc", "x"))
    with pytest.raises(ValueError, match="names a column twice: a, a"):
        values(written(tmp_path / "c.csv", "a,a\n1,2\n"))


def test_mutated_lines_give_records_or_errors_only(tmp_path):
    rng = random.Random(0)
    for name in ("a.jsonl", "a.json", "a.csv"):
        data = b"".join(json.dumps({"text": t[:40]}).encode() + b"\n" for t in TEXTS) if name != "a.csv" else CONTENTS["csv, unix"][1][:300]
        for _ in range(150):
            mutated = bytearray(data)
            for _ in range(rng.randrange(1, 6)):
                place = rng.randrange(len(mutated))
                mutated[place : place + rng.randrange(3)] = rng.choice(
                    [b"", b"\0", b"\xff", b'"', b"{", b"}", b"\\", b"\n", b"\\ud800", b"9" * 30]
                )
            bad = []
            for record in records(written(tmp_path / name, bytes(mutated)), bad=bad.append):
                assert isinstance(record.value, dict)
            assert all(isinstance(message, str) for message in bad)


@pytest.mark.extended
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.arrow"])
def test_memory_stays_flat(tmp_path, name, monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK", 1 << 14)
    rows = [{"text": f"{i} " * 500} for i in range(8000)]
    lines = [json.dumps(r) for r in rows]
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    elif name == "a.arrow":
        with pa.ipc.new_stream(tmp_path / name, pa.schema([("text", pa.string())])) as sink:
            sink.write_table(pa.Table.from_pylist(rows))
    elif name == "a.csv":
        written(tmp_path / name, "text\n" + "\n".join(r["text"] for r in rows))
    else:
        data = ("[" + ",".join(lines) + "]" if name == "a.json" else "\n".join(lines)).encode()
        written(tmp_path / name, gzip.compress(data, 1) if name.endswith("gz") else data)
    del lines
    found = records(tmp_path / name)
    next(found)
    tracemalloc.start()
    count = sum(1 for _ in found)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == len(rows) - 1
    assert peak < 6 << 20, peak  # 19 MB of text


def test_a_folder_of_other_text_files_is_read_as_pre_training_reads_it(tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    texts = {"a.py": "\ufeffdef a():\r\n    pass\n", "b.txt": "b\n", "sub/Makefile": "all:\n"}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    for name, data in (("c.py", b" \n"), ("d.png", b"\x89PNG\0"), ("e.py", b"\xff\xfe")):
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match="its name tells no kind of file"):
        list(readers.records(tmp_path))
    found = [record.value["text"] for record in readers.records(tmp_path, any_text=True)]
    assert "left out 3 of 6 files, which are binary or blank" in capsys.readouterr().out
    assert found == [document.text for document in sources.find_documents(tmp_path)]
    with pytest.raises(ValueError, match="d.png is binary or blank; give files with UTF-8 text"):
        list(readers.records(tmp_path / "d.png", any_text=True))
    (tmp_path / "f.jsonl").write_text('{"text": "a"}')
    with pytest.raises(ValueError, match="mixes kinds"):
        list(readers.records(tmp_path, any_text=True))
