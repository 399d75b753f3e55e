"""The files of a Hugging Face folder: reads slices of safetensors files, finds shards through their index, writes one tensor at a time, and
replaces a folder in one step. Nothing is unpickled. The safetensors package reads every tensor, and writes small files. Source of the
format: github.com/huggingface/safetensors, "Format" in the README."""

import ctypes
import fcntl
import json
import math
import os
import re
import secrets
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mindspore.common.np_dtype import bfloat16
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from parallel.checkpoint.files import sync_file
from qwen3.config import MODEL_TYPES
from qwen3.json_files import exists, open_regular, parse_json, read_json
from qwen3.schema import IndexJson, checked, short

WEIGHTS, INDEX, GENERATION = "model.safetensors", "model.safetensors.index.json", "generation_config.json"
PREFIX = "model."  # of the names of all tensors of a language model but its head
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(bfloat16)}
INTEGERS = {"I8": np.dtype(np.int8), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}  # of quantised weights
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAPPED_BYTES = 64 << 20  # after reading tensors of this size, the file is closed and opened again
PACKAGE_BYTES = 16 << 20  # the largest file that the package writes; it needs all tensors of a file in memory
COLUMNS = 16  # of a block in which a transposed matrix is copied
MAX_NAME_BYTES = 255  # of a file, as Linux has it
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_WRITTEN = re.compile(r"(generation_)?config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


class Entry(NamedTuple):
    """One tensor of a file: the code of its dtype (F32, BF16, ...), its shape, and its bytes start:stop in the file."""

    code: str
    shape: tuple
    start: int
    stop: int


class TensorFile:
    """One safetensors file. Opening reads only the header: `entries`, {name: Entry}, and `metadata`. The package reads the tensors.

    Raises ValueError for a damaged file. The checks of this module run before those of the package, because they name the tensor and the
    fix.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.entries, self.metadata = _read_header(self.path)
        with self._open():  # the package checks the file before any data is read
            pass

    def array(self, name, index=()):
        """Reads the elements of one tensor that `index` selects. index: a tuple of slices of step 1; () is all."""
        (array,) = self.arrays([name], index)
        return array

    def arrays(self, names, index=()):
        """Yields array(name, index) for each name.

        The package maps the file into memory, and the pages that a slice touches count as memory of this process until the file is closed.
        A slice of rows touches only the pages of these rows, but a slice of columns touches all pages of the tensor. So the file is closed
        after the last name, and after every MAPPED_BYTES. It is not opened again for each name, because opening reads the header, which
        takes 7 ms with 1,300 tensors.
        """
        names = list(names)
        while names:
            mapped = 0
            with self._open() as opened:
                while names and mapped < MAPPED_BYTES:
                    name = names.pop(0)
                    mapped += self.entries[name].stop - self.entries[name].start
                    yield self._slice(opened, name, index)

    def _slice(self, opened, name, index):
        shape, dtype = self.entries[name].shape, self.dtype(name)
        slices = [slice(*s.indices(n)) for s, n in zip((*index, *[slice(None)] * (len(shape) - len(index))), shape)]
        assert len(index) <= len(shape) and all(s.step == 1 for s in slices), (name, index)  # releases before 0.8 ignore a step
        if any(s.start >= s.stop for s in slices):  # the package refuses an empty slice at the end of a dim
            return np.zeros([max(0, s.stop - s.start) for s in slices], dtype)
        # The package asks numpy for "bfloat16" by name, which is ml_dtypes' or MindSpore's type, whichever was imported last.
        return opened.get_slice(name)[tuple(slices)].view(dtype)

    def _open(self):
        try:
            return safe_open(self.path, framework="numpy")
        except SafetensorError as error:
            raise ValueError(
                f"{self.path}: the safetensors package refuses the file ({short(str(error), 200)}); fetch it again, or update safetensors"
            ) from None

    def dtype(self, name):
        code = self.entries[name].code
        return DTYPES[code] if code in DTYPES else INTEGERS[code]


def _read_header(path):
    with open_regular(path) as f:
        size = os.fstat(f.fileno()).st_size
        head = f.read(8)
        if head == b"version ":
            raise ValueError(f"{path} is a git-lfs pointer, not the weights; run `git lfs pull` in its folder")
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(
                f"{path}: a header of {length} bytes in a file of {size} bytes; no safetensors file, or damaged: fetch it again"
            )
        header = parse_json(path, f.read(length))
    metadata = header.pop("__metadata__", None)
    entries = {name: _entry(path, name, item, 8 + length) for name, item in header.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != end:
            raise ValueError(f"{path}: tensor {name} starts at byte {entry.start}, but the one before it ends at {end}; fetch it again")
        if entry.stop > size:
            raise ValueError(f"{path}: tensor {name} ends at byte {entry.stop} of {size}; the file is truncated: fetch it again")
        end = entry.stop
    if end != size:
        raise ValueError(f"{path}: the header accounts for {end} bytes of {size}; the file is damaged: fetch it again")
    return entries, metadata if isinstance(metadata, dict) else {}


def _entry(path, name, item, base):
    try:
        code, shape, (start, stop) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
        well_formed = isinstance(code, str) and all(type(n) is int and n >= 0 for n in (*shape, start, stop - start))
    except (KeyError, TypeError, ValueError):
        well_formed = False
    if not well_formed:
        raise ValueError(f"{path}: the header entry of tensor {name} is malformed ({str(item)[:80]}); fetch the file again")
    known = DTYPES.get(code) or INTEGERS.get(code)
    if known and stop - start != math.prod(shape) * known.itemsize:
        raise ValueError(f"{path}: tensor {name} of {code} {list(shape)} has {stop - start} bytes; the file is damaged: fetch it again")
    return Entry(code, shape, base + start, base + stop)


def open_weights(folder):
    """{tensor name: TensorFile} of a folder with one model.safetensors, or shards named by model.safetensors.index.json."""
    if exists(folder / WEIGHTS):
        file = TensorFile(inside(folder, WEIGHTS))
        return _with_prefix(dict.fromkeys(file.entries, file))
    index = folder / INDEX
    if not exists(index):
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        hint = f"; convert {pickles[0]} to safetensors: pickle files are not read" if pickles else "; is the download complete?"
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {INDEX}{hint}")
    where = checked(IndexJson, read_json(index), index).weight_map
    files = {name: _open_shard(folder, name) for name in sorted(set(where.values()))}
    for tensor, name in where.items():
        if tensor not in files[name].entries:
            raise ValueError(f"{index}: tensor {tensor} should be in {name}, which lacks it; fetch both files again")
    return _with_prefix({tensor: files[name] for tensor, name in where.items()})


def _with_prefix(files):
    """Returns {tensor name: TensorFile} with the names of a language model. transformers saves a model without its head, such as
    Qwen3-Embedding, without the "model." that the names of a language model begin with; it is added here."""
    if "embed_tokens.weight" not in files or "model.embed_tokens.weight" in files:
        return files
    flat = {file: _FlatFile(file) for file in files.values()}
    return {_full(name): flat[file] for name, file in files.items()}


def _full(name):
    return name if name == "lm_head.weight" else PREFIX + name


class _FlatFile:
    """A TensorFile whose names get the prefix that they lack."""

    def __init__(self, file):
        self._file, self.path, self.metadata = file, file.path, file.metadata
        self.entries = {_full(name): entry for name, entry in file.entries.items()}

    def array(self, name, index=()):
        return self._file.array(name.removeprefix(PREFIX), index)

    def arrays(self, names, index=()):
        return self._file.arrays([name.removeprefix(PREFIX) for name in names], index)

    def dtype(self, name):
        return self._file.dtype(name.removeprefix(PREFIX))


def _open_shard(folder, name):
    if len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES:
        raise ValueError(f"{folder / INDEX}: weight_map names the file {short(name)}, which is too long a name; fetch the file again")
    path = inside(folder, name)
    if not path.is_file():
        raise FileNotFoundError(f"{path}, named by {INDEX}, is missing; is the download complete?")
    return TensorFile(path)


def inside(folder, name):
    """Returns folder/name. Raises ValueError if the path leads outside of the folder; in a Hub cache, snapshots/X/name may link to
    blobs/."""
    real = folder.resolve()
    roots = [real] + ([real.parent.parent / "blobs"] if real.parent.name == "snapshots" else [])
    path = folder / name
    try:
        target = path.resolve()
    except (RuntimeError, OSError, ValueError) as error:  # links in a circle; a name that no file can have
        raise ValueError(f"{path} leads nowhere ({error}); put the file itself into the folder") from None
    if os.path.isabs(name) or ".." in Path(name).parts or not any(target.is_relative_to(root) for root in roots):
        raise ValueError(f"{path} leads outside of {folder}; put the file itself into the folder")
    return path


def write_tensors(path, entries, arrays, metadata=None):
    """Writes a safetensors file. entries: [(name, code, shape)]. arrays: an iterable with a numpy array for each entry. metadata: {name:
    text} for the header.

    The package writes files without metadata of up to PACKAGE_BYTES. This function writes the others itself, one array at a time, for two
    reasons: the package needs all arrays of a file in memory, up to 5 GB for a shard; and it writes several metadata texts in random order,
    so that writing the same data twice gives different files. The package's save_file is not used, because release 0.8 makes files that
    only their owner can read, whatever the umask.
    """
    arrays = _in_c_order(entries, arrays)
    if metadata is None and sum(_nbytes(code, shape) for _, code, shape in entries) <= PACKAGE_BYTES:
        tensors = {name: array for (name, _, _), array in zip(entries, arrays)}
        Path(path).write_bytes(save(tensors, {"format": "pt"}))
        return
    header, at = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    for name, code, shape in entries:
        end = at + _nbytes(code, shape)
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            f.write(array.reshape(-1).view(np.uint8))
            del array


def _in_c_order(entries, arrays):
    """Yields each array in C order, because release 0.8.0 of the package writes a transposed array wrongly."""
    arrays = iter(arrays)  # zip would keep an array in memory while the next one is made
    for name, code, shape in entries:
        array = next(arrays)
        assert array.dtype == DTYPES[code] and array.shape == tuple(shape), (name, array.dtype, array.shape)
        yield in_c_order(array)
        del array


def in_c_order(array):
    """Returns a numpy array in C order."""
    if array.flags.c_contiguous:
        return array
    out = np.empty(array.shape, array.dtype)
    copy(array, out)
    return out


def copy(array, out):
    """Copies an array of one dim or more into `out`. A transposed one goes in blocks of columns, twice as fast as numpy copies it."""
    step = COLUMNS if array.strides[-1] != array.itemsize else max(1, array.shape[-1])
    for start in range(0, array.shape[-1], step):
        out[..., start : start + step] = array[..., start : start + step]


def _nbytes(code, shape):
    return math.prod(shape) * DTYPES[code].itemsize


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def tokenizer_files(folder):
    """The tokenizer's files in a folder; ValueError for one that links outside."""
    return [inside(folder, name) for name in TOKENIZER_FILES if os.path.islink(folder / name) or (folder / name).is_file()]


def copy_file(source, folder):
    with open_regular(source) as file, open(folder / source.name, "wb") as copy:
        shutil.copyfileobj(file, copy)


def check_replaceable(folder):
    """Raises ValueError unless `folder` is absent, is empty, or contains a Qwen model and only files that `save` writes."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder to save into")
    other = sorted(p.name for p in folder.iterdir() if not (_WRITTEN.fullmatch(p.name) or p.name in TOKENIZER_FILES))
    if other:
        raise ValueError(f"{folder} holds {', '.join(other[:4])}, which saving would delete; give an empty folder or another name")
    config = folder / "config.json"
    if not config.is_file() or read_json(config).get("model_type") not in MODEL_TYPES:
        raise ValueError(f"{folder} holds something other than a Qwen model; give an empty folder or another name")


@contextmanager
def replacing(folder, check=check_replaceable):
    """A context manager that gives a new folder beside `folder`. When the block ends and everything is on disk, the new folder takes the
    place of `folder`; if the block fails, `folder` does not change. Entering it first repairs what a killed process left beside `folder`.
    check(folder) raises ValueError for a folder that must not be replaced."""
    folder = folder.resolve()
    _recover(folder)
    check(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = f"{os.getpid()}-{secrets.token_hex(4)}"
    new, old = (folder.with_name(f".{folder.name}.{mark}.{what}") for what in ("new", "old"))
    new.mkdir()
    lock = _lock(new)
    try:
        yield new
        for path in (*new.rglob("*"), new):
            sync_file(path)
        check(folder)
        _swap(new, folder, old)
        sync_file(folder.parent)
    finally:
        os.close(lock)
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _recover(folder):
    """Renames the old folder back if a process was killed between the two renames, and removes new folders whose process has ended."""
    left = re.compile(rf"\.{re.escape(folder.name)}\.\d+-[0-9a-f]{{8}}\.(new|old)")
    for path in folder.parent.glob(".*") if folder.parent.is_dir() else ():
        match = left.fullmatch(path.name)
        if match and match[1] == "old" and not folder.exists():
            os.rename(path, folder)
        elif match:
            lock = _lock(path)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _lock(folder):
    """Locks a folder until the returned handle is closed or this process ends. Returns None if another process has the lock."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _swap(new, folder, old):
    """Renames `new` to `folder`: in one step if the system can exchange two names, after which `new` names the old folder; else the old
    folder is first renamed to `old`."""
    if not folder.exists():
        os.rename(new, folder)
    elif not _exchange(new, folder):
        os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            os.rename(old, folder)
            raise


def _exchange(a, b):
    """Exchanges two names (Linux's renameat2 with RENAME_EXCHANGE). Returns False if the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0
