"""The files of experiments.embed: texts or pairs to read, vectors or scores to write."""

import io
import json
import os

import numpy as np

from parallel.checkpoint.files import write_bytes, write_text
from parallel.json_text import loads


def read(path, pairs=False):
    """Returns the texts of a file, or with `pairs` its (query, document). Raises ValueError or FileNotFoundError naming file and line."""
    if not path:
        raise ValueError("--input is missing; give a file of texts, one a line, or a .jsonl")
    if pairs and not path.endswith(".jsonl"):
        raise ValueError(f'--input={path} must be a .jsonl of {{"query": "...", "document": "..."}} for --rerank')
    full = os.path.expanduser(path)
    if not os.path.isfile(full):
        raise FileNotFoundError(f"--input={path} is not a file; give the path of one")
    with open(full, encoding="utf-8") as file:
        try:
            lines = [(number, line.rstrip("\r\n")) for number, line in enumerate(file, 1)]
        except UnicodeDecodeError as error:
            raise ValueError(f"--input={path} is not UTF-8 ({error.reason} at byte {error.start})") from error
    if not lines:
        raise ValueError(f"--input={path} is empty; give one text a line")
    out = []
    for number, line in lines:
        where = f"--input={path}, line {number}"
        found = _parsed(line, where) if path.endswith(".jsonl") else line
        out.append(_pair(found, where) if pairs else _text(found, where))
    return out


def _parsed(line, where):
    try:
        return loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def _text(found, where):
    text = found.get("text") if isinstance(found, dict) else found
    if not isinstance(text, str) or not text:
        raise ValueError(f'{where}: give a text that is not empty, in a .jsonl as a string or as {{"text": "..."}}')
    return text


def _pair(found, where):
    pair = tuple(found.get(key) for key in ("query", "document")) if isinstance(found, dict) else (None,)
    if not all(isinstance(part, str) and part for part in pair):
        raise ValueError(f'{where}: give {{"query": "...", "document": "..."}}, neither of them empty')
    return pair


def check_output(path, scores=False):
    """Raises ValueError for a path that write() cannot write."""
    if not path or not path.endswith((".npy", ".jsonl")):
        raise ValueError(f"--output={path} must be a file that ends in .npy or .jsonl, such as {'scores' if scores else 'vectors'}.npy")
    folder = os.path.dirname(os.path.abspath(os.path.expanduser(path)))
    if not os.path.isdir(folder):
        raise ValueError(f"--output={path}: the folder {folder} does not exist; make it first")


def write(path, found):
    """Writes vectors [n, D] or scores [n], float32. The file is there only when it is complete."""
    path = os.path.expanduser(path)
    if path.endswith(".jsonl"):
        key = "embedding" if found.ndim == 2 else "score"
        write_text(path, "".join(json.dumps({key: value}) + "\n" for value in found.tolist()))
        return
    made = io.BytesIO()
    np.save(made, found, allow_pickle=False)
    write_bytes(path, made.getbuffer())
