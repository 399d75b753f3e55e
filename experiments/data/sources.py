"""Documents from text files, and which of them are held out."""

import os
import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

NOT_LIBRARY = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")


class Document(NamedTuple):
    """name: the path below the folder it was found in, with forward slashes."""

    name: str
    text: str


def find_documents(path=None):
    """Documents at `data.path`, sorted by name: of a text file, of every text file below a folder, or of Python's own library.

    In a folder, hidden, binary and empty files are left out, the last two with a printed count. Raises FileNotFoundError or ValueError.
    """
    if path is None or path == "":
        root = Path(sysconfig.get_paths()["stdlib"])
        return _read_folder(root, "*.py", NOT_LIBRARY)
    root = Path(path).expanduser()
    if root.is_dir():
        return _read_folder(root, "*", ())
    if not root.exists():
        raise FileNotFoundError(
            f"data.path={path} does not exist; give a text file or folder, the prefix of a .bin/.idx pair, or nothing for Python's library"
        )
    if not root.is_file():
        raise ValueError(f"data.path={path} is neither a file nor a folder; give a text file or folder")
    text = _read_text(root)
    if text is None:
        raise ValueError(f"data.path={path} is not UTF-8 text; convert it, or give another file")
    if not text.strip():
        raise ValueError(f"data.path={path} is empty; give a file with text")
    return [Document(root.name, text)]


def split(documents, held_out=0.05):
    """(train, held out), two lists of documents, by a hash of the name, so that a new file moves no other one.

    Both have at least one document. One document alone is cut between two lines, its last part held out.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out} must be between 0 and 1; use 0.05")
    if len(documents) == 1:
        return _cut(documents[0], held_out)
    if not documents:
        raise ValueError("data.path has no documents to split; give a text file or folder")
    ranked = sorted(documents, key=lambda d: (zlib.crc32(d.name.encode("utf-8", "surrogateescape")), d.name))
    count = sum(zlib.crc32(d.name.encode("utf-8", "surrogateescape")) < held_out * 2**32 for d in documents)
    count = min(max(count, 1), len(documents) - 1)
    held = {d.name for d in ranked[:count]}
    return [d for d in documents if d.name not in held], [d for d in documents if d.name in held]


def _cut(document, held_out):
    """One document in two at the line break nearest to the wanted place."""
    name, text = document
    place = int(len(text) * (1 - held_out))
    breaks = {text.rfind("\n", 0, place) + 1, text.find("\n", place) + 1} - {0}
    at = min(breaks, key=lambda b: (abs(b - place), b), default=0)
    if not text[:at].strip() or not text[at:].strip():
        raise ValueError(f"data.path: {name} cannot be cut by lines into train and held-out text; give more lines or a folder")
    return [Document(name, text[:at])], [Document(name, text[at:])]


def _read_folder(root, pattern, skip):
    documents, binary, empty = [], 0, 0
    for file in _files(root, skip):
        if not file.match(pattern):
            continue
        text = _read_text(file)
        if text is None:
            binary += 1
        elif not text.strip():
            empty += 1
        else:
            documents.append(Document(file.relative_to(root).as_posix(), text))
    if not documents:
        raise ValueError(f"data.path={root} has no text file ({binary} binary, {empty} empty); give a folder with UTF-8 text files")
    if binary or empty:
        print(f"data.path={root}: {len(documents)} documents; left out {binary} binary and {empty} empty files", flush=True)
    return sorted(documents)


def _files(root, skip):
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [n for n in subfolders if n not in skip and not n.startswith(".")]
        for name in names:
            file = Path(folder, name)
            if not name.startswith(".") and file.is_file():
                yield file


def _read_text(file):
    """The text of a UTF-8 file, its byte-order mark dropped, or None if it is binary."""
    data = file.read_bytes()
    try:
        return None if b"\0" in data else data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
