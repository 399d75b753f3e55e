"""Records of text files and tables, one by one: memory stays flat however large the input is.

A `.json` file is read as one array, as one object, or as objects after one another. Held whole: the document of a `.txt` file, an
article, a line of jsonl, an element of a json array, 256 rows of parquet or arrow. A compressed parquet or arrow file is unpacked to
a temporary file.
"""

import contextlib
import csv
import gzip
import io
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

from experiments.data import wikitext
from experiments.data.json_stream import JsonStream
from parallel.json_text import loads

ROWS = 256
KINDS = {
    **{f".{name}": name for name in ("jsonl", "json", "csv", "parquet", "arrow", "txt")},
    **{".tokens": "wikitext", ".raw": "wikitext"},
}
PACKED = (".gz", ".zst")
BROKEN = (OSError, EOFError, ValueError, NotImplementedError, zlib.error, csv.Error)  # pyarrow's own errors are of these types
NO_TEXT = "no text"  # what is wrong with a file that is left out without an error
BOM = b"\xef\xbb\xbf"
csv.field_size_limit(2**31 - 1)


class Record(NamedTuple):
    """value: a dict. where: file and line (or row, from 1), for messages. size: bytes of the input read so far, all files together."""

    value: dict
    where: str
    size: int


def records(path, *, per_line=False, detokenize=False, columns=None, bad=None, name="--input", any_text=False):
    """An iterator over the Records of a file, or of a folder's files in the order of their paths, all of one kind.

    Kinds: jsonl, json, csv, parquet, arrow (IPC file or stream), txt, WikiText (.tokens, .raw), each also as .gz or .zst. Text becomes
    {"text": ...}: a file a document; with per_line a line that is not blank; of WikiText an article, with detokenize as running text;
    there Windows line ends become "\\n".
    columns: the keys that matter, so that of parquet others are not read. bad(message): called for what cannot be read, which is then
    left out; without it that is a ValueError. Only jsonl, csv and text go on after it; of the others, it ends the file. What the system
    fails to read, such as a file without permission, is always a ValueError. FileNotFoundError for a missing path. name: of the option
    that gives the path, for messages. any_text: files of other names, such as .py, are read as .txt files are, as data.path of pre-training
    reads them: binary and blank ones are left out, and their number is printed.
    """
    files = find_files(path, name, any_text)
    kinds = {kind_of(file, name, any_text) for file in files}
    kind = "text" if "text" in kinds else kinds.pop()
    if per_line and kind != "txt":
        raise ValueError(f"per_line=True needs .txt files, and {files[0]} is {kind}; leave it out")
    if detokenize and kind != "wikitext":
        raise ValueError(f"detokenize=True needs WikiText's .tokens or .raw files, and {files[0]} is {kind}; leave it out")
    options = {"txt": {"per_line": per_line}, "wikitext": {"detokenize": detokenize}, "parquet": {"columns": columns}}
    return _records(files, kind, options.get(kind, {}), bad or _refuse)


def find_files(path, name="--input", any_text=False):
    """The files of a folder and those below it, hidden ones left out; of a file, itself. ValueError unless all are of one kind.

    name: of the option that gives the path, for messages. any_text: see records.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{name}={path} does not exist; give a file or a folder of files")
    if not path.is_dir():
        kind_of(path, name, any_text)
        if not path.is_file():
            raise ValueError(f"{name}={path} is no regular file; give a file or a folder of files")
        return [path]
    files = sorted(f for f in path.rglob("*") if f.is_file() and not any(p.startswith(".") for p in f.relative_to(path).parts))
    if not files:
        raise ValueError(f"{name}={path} has no files; give a file or a folder of files")
    kinds = {kind_of(file, name, any_text): file for file in reversed(files)}
    if len(kinds) > 1 and kinds.keys() != {"txt", "text"}:
        (one, a), (other, b) = sorted(kinds.items())[:2]
        raise ValueError(f"{name}={path} mixes kinds: {a} is {one}, {b} is {other}; give a folder of one kind")
    return files


def kind_of(path, name="--input", any_text=False):
    """One of KINDS, by the end of the file's name. If there is none, "text" with any_text, else a ValueError."""
    suffixes = [s.lower() for s in path.suffixes]
    while suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    if any_text and (not suffixes or suffixes[-1] not in KINDS):
        return "text"
    if not suffixes or suffixes[-1] not in KINDS:
        raise ValueError(
            f"{name}={path}: its name tells no kind of file; rename it to end in {', '.join(KINDS)}, or in one plus .gz or .zst"
        )
    return KINDS[suffixes[-1]]


def _refuse(message):
    raise ValueError(f"{message}; mend it, or leave it out with skip_bad")


def _records(files, kind, options, bad):
    unit = "row" if kind in ("parquet", "arrow") else "line"
    done, left_out = 0, 0
    for file in files:
        try:
            for number, value, wrong, size in _guarded(READERS[kind](file, **options)):
                where = f"{file}, {unit} {number}"
                if wrong == NO_TEXT:
                    left_out += 1
                elif wrong:
                    bad(f"{where}: {wrong}")
                else:
                    yield Record(value, where, done + size)
        except OSError as e:  # of the system, and so perhaps gone on another try
            raise ValueError(f"{file} cannot be read: {e}; mend that, nothing of it is left out") from e
        done += os.path.getsize(file)
    if left_out == len(files):
        raise ValueError(f"{files[0]} {'and the other files are' if left_out > 1 else 'is'} binary or blank; give files with UTF-8 text")
    if left_out:
        print(f"left out {left_out} of {len(files)} files, which are binary or blank", flush=True)


def _guarded(items):
    """The items, and what stops them as the last one; an error of the system is raised."""
    number = 0
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except BROKEN as e:
            if getattr(e, "errno", None):
                raise
            yield getattr(e, "line", number + 1), None, f"{e} ({type(e).__name__}; the file is not read from here on)", 0
            return
        number = item[0]
        yield item


@contextlib.contextmanager
def _opened(file):
    """(a buffered binary stream of the unpacked bytes, a function that tells how many bytes of the file are read)."""
    with open(file, "rb", buffering=0) as raw:
        if file.suffix == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        elif file.suffix == ".zst":
            import pyarrow

            stream = io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"), 1 << 20)
        else:
            stream = io.BufferedReader(raw, 1 << 20)
        yield stream, raw.tell


def _lines(file):
    """(number, line as text or None, what is wrong, bytes read); line ends and a byte-order mark are dropped."""
    with _opened(file) as (stream, tell):
        for number, line in enumerate(stream, 1):
            if number == 1 and line.startswith(BOM):
                line = line[len(BOM) :]
            try:
                text = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as e:
                yield number, None, _not_utf8(e), tell()
            else:
                yield number, text, None, tell()


def _not_utf8(error):
    return f"not UTF-8: {error.reason} at byte {error.start}"


def _jsonl(file):
    for number, line, wrong, size in _lines(file):
        value = None
        if not wrong and not line.strip():
            continue
        if not wrong:
            try:
                value = loads(line)
            except (ValueError, RecursionError) as e:
                wrong = f"not JSON: {e}"
            else:
                wrong = _not_a_dict(value)
        yield number, value, wrong, size


def _not_a_dict(value):
    return None if isinstance(value, dict) else f"{type(value).__name__}, not an object with keys"


def _json(file):
    with _opened(file) as (stream, tell):
        for line, value in JsonStream(stream).records():
            yield line, value, _not_a_dict(value), tell()


def _csv(file):
    with _opened(file) as (stream, tell):
        # Bytes that are not UTF-8 stay where they are as surrogates, so that only their row is lost.
        rows = csv.reader((line.decode("utf-8", "surrogateescape") for line in stream), strict=True)
        header = next(rows, [])
        header = [name.removeprefix("\ufeff") for name in header]
        if len(set(header)) < len(header):
            raise ValueError(f"the header names a column twice: {', '.join(header)}; rename one")
        while True:
            number = rows.line_num + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as e:
                yield number, None, f"not CSV: {e}", tell()
                continue
            if row:
                wrong = f"{len(row)} fields, but the header has {len(header)}" if len(row) != len(header) else None
                if not wrong and not _is_utf8(row):
                    wrong = "not UTF-8"
                yield number, dict(zip(header, row)), wrong, tell()


def _is_utf8(row):
    try:
        "".join(row).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _txt(file, per_line):
    if per_line:
        for number, line, wrong, size in _lines(file):
            if wrong or line.strip():
                yield number, {"text": line}, wrong, size
        return
    with _opened(file) as (stream, tell):
        data = stream.read()
        try:
            text = data.removeprefix(BOM).decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError as e:
            yield 1 + data.count(b"\n", 0, e.start), None, _not_utf8(e), tell()
        else:
            yield 1, {"text": text}, None, tell()


def _text(file):
    """As sources.find_documents reads the files of a folder."""
    with _opened(file) as (stream, tell):
        data = stream.read()
        try:
            text = None if b"\0" in data else data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = None
        yield 1, {"text": text}, None if text and text.strip() else NO_TEXT, tell()


def _wikitext(file, detokenize):
    start, lines, size = 1, [], 0

    def article():
        text = "\n".join(lines).strip()
        return start, {"text": wikitext.detokenize(text) if detokenize else text}, None, size

    for number, line, wrong, size in _lines(file):
        if wrong:
            yield number, None, wrong, size
            continue
        if wikitext.is_title(line):
            if any(map(str.strip, lines)):
                yield article()
            start, lines = number, []
        lines.append(line)
    if any(map(str.strip, lines)):
        yield article()


def _parquet(file, columns):
    import pyarrow.parquet

    with _on_disk(file) as path, pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as table:
        if not set(columns or ()) <= set(table.schema_arrow.names):
            columns = None  # so that a message on the missing one can name those there are
        total, done, size = table.metadata.num_rows, 0, os.path.getsize(file)
        for batch in table.iter_batches(ROWS, columns=columns):
            for value, wrong in _rows(batch):
                done += 1
                yield done, value, wrong, size * done // total


def _arrow(file):
    import pyarrow

    number, size = 0, os.path.getsize(file)
    with _on_disk(file) as path, pyarrow.OSFile(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for count, batch in enumerate(batches, 1):
            place = size * count // reader.num_record_batches if is_file else source.tell() * size // max(source.size(), 1)
            for start in range(0, batch.num_rows, ROWS):
                for value, wrong in _rows(batch.slice(start, ROWS)):
                    number += 1
                    yield number, value, wrong, place


def _rows(batch):
    """(dict or None, what is wrong) of each row."""
    try:
        yield from [(_without_invented(row), None) for row in batch.to_pylist()]
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                yield _without_invented(batch.slice(i, 1).to_pylist()[0]), None
            except UnicodeDecodeError as e:
                yield None, _not_utf8(e)


def _without_invented(row):
    """A row without the nulls inside its objects: a struct column has every key of every row, so a null there is a missing key."""
    return {key: _known(value) for key, value in row.items()}


def _known(value):
    if isinstance(value, dict):
        return {key: _known(inner) for key, inner in value.items() if inner is not None}
    return [_known(inner) for inner in value] if isinstance(value, list) else value


@contextlib.contextmanager
def _on_disk(file):
    """The path of the unpacked file."""
    if file.suffix not in PACKED:
        yield file
        return
    with _opened(file) as (stream, _), tempfile.NamedTemporaryFile() as copy:
        shutil.copyfileobj(stream, copy, 1 << 20)
        copy.flush()
        yield Path(copy.name)


READERS = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
    "txt": _txt,
    "text": _text,
    "wikitext": _wikitext,
}
