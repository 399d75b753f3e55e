"""Opens the weights of a Hugging Face folder or of our checkpoints behind one interface, and converts each format to the other."""

import contextlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorstore as ts
from tqdm import tqdm

from experiments import run_tokenizer
from parallel.checkpoint import store as checkpoint_store
from parallel.checkpoint.arrays import match
from parallel.checkpoint.files import FOLDER, step_folder
from parallel.checkpoint.read import Reader, find
from parallel.trees import tree_paths, unflatten
from qwen3 import hf, hf_files
from qwen3.config import Qwen3Config
from qwen3.model import param_specs

BLOCK_BYTES = 64 << 20  # about how much of an array is read at a time


@dataclass(frozen=True)
class Weights:
    """Opened weights. kind: "Hugging Face folder" or "checkpoint". arrays: {name: (shape, dtype)}; a name is the path of a parameter, such
    as "embed", and m/path and v/path are its optimizer state. read(name, slices) -> those elements as numpy; slices=None reads all. config:
    the Qwen3Config. tokenizer: the folder of the tokenizer's files, or None. text: more about them, such as "step 100". checked: the Reader
    of a checkpoint, else None. hugging_face: the qwen3.hf.Reader of a Hugging Face folder, else None."""

    kind: str
    folder: Path
    arrays: dict
    read: object
    config: Qwen3Config
    tokenizer: Path | None
    text: str = ""
    checked: Reader | None = None
    hugging_face: hf.Reader | None = None

    def __str__(self):
        return f"{self.kind} {self.folder}{', ' * bool(self.text)}{self.text}"

    def describe_tokenizer(self):
        return f"tokenizer of {self.tokenizer}" if self.tokenizer else "without a tokenizer, as there is none"

    @property
    def total_bytes(self):
        return sum(map(self.nbytes, self.arrays))

    def nbytes(self, name):
        return math.prod(self.arrays[name][0]) * _itemsize(self.arrays[name][1])

    def blocks(self, name, rows=1):
        """Returns [slices] of blocks of about BLOCK_BYTES along an array's first dim, each of a multiple of `rows` rows but the last."""
        shape, _ = self.arrays[name]
        step = max(1, BLOCK_BYTES * shape[0] // max(1, self.nbytes(name)) // rows) * rows
        rest = tuple(slice(0, n) for n in shape[1:])
        return [(slice(i, min(i + step, shape[0])), *rest) for i in range(0, shape[0], step)]


def _itemsize(dtype):
    return hf_files.DTYPES[hf_files.CODES[dtype]].itemsize


def open_weights(key, path, dtype=None, state=False, head=True):
    """Opens the Weights in a folder: a Hugging Face model, a run (its newest checkpoint) or a checkpoint.

    dtype: of the arrays that read() returns from a Hugging Face folder; None is the folder's own. state: include a checkpoint's optimizer
    state. head: see hf.Reader. Raises ValueError or FileNotFoundError, with the flag's name `key`, for a folder that cannot be used.
    """
    if not path:
        raise ValueError(f"--{key} is missing; give the folder of a Hugging Face model, of a run, or of a checkpoint")
    path = Path(os.path.expanduser(path))
    if not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"--{key}={path} {problem}; give the folder of a Hugging Face model, of a run, or of a checkpoint")
    with _named(key, path):
        if native := find(str(path)):
            return _native(Path(native), state)
        if (path / FOLDER).is_dir():
            raise ValueError(f"it has no checkpoint in {FOLDER}/; give a run that has saved one")
        if state:
            raise ValueError("a Hugging Face folder has no optimizer state; leave --state out")
        return _hugging_face(path, dtype, head)


@contextlib.contextmanager
def _named(key, path):
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"--{key}={path}: {error}") from error


def _hugging_face(folder, dtype, head):
    found = hf.Reader(folder, dtype, head=head)
    arrays = {path: (found.shape(path), found.dtype(path)) for path in found.paths}
    tokenizer = folder if hf_files.tokenizer_files(folder) else None
    return Weights("Hugging Face folder", folder, arrays, found.read, found.config, tokenizer, hugging_face=found)


def _native(folder, state):
    saved = Reader(str(folder))
    if not isinstance(saved.meta.get("model"), dict):
        raise ValueError(f"{folder} does not name its model; give a checkpoint that a run or hf-to-native has saved")
    if base := saved.meta.get("base"):
        raise ValueError(f"{folder} has only adapters, for the base {base['path']}; merge them with experiments.convert merge-lora first")
    config = Qwen3Config.from_hf(saved.meta["model"])
    shapes = {f"params/{path}": spec.shape for path, spec in tree_paths(param_specs(config))}
    match(saved, shapes, kinds=("params",))
    names = [*shapes, *(name for kind in ("m", "v") for p in shapes if (name := p.replace("params", kind, 1)) in saved.names)]
    if state and len(names) == len(shapes):
        raise ValueError(f"{folder} has no optimizer state; leave --state out")
    names = names if state else list(shapes)
    arrays = {name.removeprefix("params/"): (saved.shape(name), saved.dtype(name)) for name in names}

    def read(name, slices=None):
        return _as_numpy(saved.read(name if name.startswith(("m/", "v/")) else f"params/{name}", slices))

    beside = folder.parent.parent / run_tokenizer.FOLDER
    tokenizer = beside if folder.parent.name == FOLDER and beside.is_dir() and hf_files.tokenizer_files(beside) else None
    if tokenizer:
        run_tokenizer.check(folder.parent.parent, saved.meta.get("tokenizer"))
    config = config.replace(param_dtype=arrays["embed"][1])
    text = f"step {saved.meta.get('step', 0)}"
    return Weights("checkpoint", folder, arrays, read, config, tokenizer, text, saved)


def _as_numpy(array):
    """Views tensorstore's bfloat16 as MindSpore's; they are two numpy types for the same bits."""
    return array.view(hf_files.DTYPES["BF16"]) if array.dtype.name == "bfloat16" else array


def _as_tensorstore(array):
    return array.view(ts.bfloat16.numpy_dtype) if array.dtype.name == "bfloat16" else array


def bar(what, total):
    """Returns a progress bar over `total` bytes, which shows on a terminal only."""
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, dynamic_ncols=True, disable=None)


def check_output(path):
    """Returns the folder to write, as a Path. Raises ValueError where it is not given, or exists and is not empty."""
    if not path:
        raise ValueError("--output is missing; give the folder to write, which must not exist yet")
    path = Path(os.path.expanduser(path))
    _check_new(path)
    return path


def _check_new(path):
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"--output={path} exists already; give another name, or remove it")


def write(command, source, output, dtype):
    """Runs the command hf-to-native or native-to-hf, from the folder `source` to `output`. Yields lines of text about the work done."""
    folder, native = check_output(output), command == "native-to-hf"
    weights, wanted = open_weights("input", source, dtype), "checkpoint" if native else "Hugging Face folder"
    if weights.kind != wanted:
        other = "hf-to-native" if native else "native-to-hf"
        raise ValueError(f"--input={source} is a {weights.kind}, and {command} takes a {wanted}; use {other}, or give another folder")
    if native:
        to_hugging_face(weights, folder, dtype)
    else:
        to_native(weights, folder)
    yield f"read       {weights}"
    yield f"wrote      {folder}, {hf.who_opens(weights.config) if native else f'for --init_from={folder}'}; {weights.describe_tokenizer()}"


def to_native(weights, output):
    """Writes a folder like a run's: one checkpoint, of step 0, without optimizer state; and tokenizer/. It appears under its name only when
    all is on disk."""
    meta = {"step": 0, "model": weights.config.to_hf()}
    with hf_files.replacing(output, _check_new) as new, bar("hf-to-native", weights.total_bytes) as progress:
        if weights.tokenizer:
            (new / run_tokenizer.FOLDER).mkdir()
            for file in hf.carried_files(weights.tokenizer):
                hf_files.copy_file(file, new / run_tokenizer.FOLDER)
        (new / FOLDER).mkdir()
        checkpoint_store.save(step_folder(str(new), 0), _pieces(weights, progress), meta)


def _pieces(weights, progress):
    """Yields the blocks of all arrays, as Pieces for the checkpoint."""
    for name, (shape, dtype) in weights.arrays.items():
        chunk = checkpoint_store.chunk_shape(shape, _itemsize(dtype))
        for block in weights.blocks(name, chunk[0]):
            data = _as_tensorstore(weights.read(name, block))
            yield checkpoint_store.Piece(f"params/{name}", shape, chunk, tuple(s.start for s in block), data)
            progress.update(data.nbytes)


class Leaf:
    """A parameter that is read only when hf.save calls asnumpy(). models: opened weights, whose arrays `mixed`, a function of an iterator,
    makes one of; default: the first model's. dtype: of the result; default: that of the first model."""

    def __init__(self, models, path, progress, mixed=next, dtype=None):
        self.shape, stored = models[0].arrays[path]
        self.dtype = np.dtype(hf_files.DTYPES[hf_files.CODES[dtype or stored]])
        self._models, self._path, self._progress, self._mixed = models, path, progress, mixed

    def asnumpy(self):
        return self._mixed(map(self._read, self._models))

    def _read(self, model):
        out = model.read(self._path)
        self._progress.update(out.nbytes)
        return out


def to_hugging_face(weights, output, dtype):
    """Writes a folder that transformers opens. It appears under its name only when all is on disk."""
    specs = param_specs(weights.config)
    with bar("native-to-hf", weights.total_bytes) as progress:
        leaves = unflatten(specs, [Leaf([weights], path, progress) for path, _ in tree_paths(specs)])
        hf.save(output, weights.config, leaves, tokenizer_dir=weights.tokenizer, dtype=dtype)
