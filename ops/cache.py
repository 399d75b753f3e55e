"""The folder of files that can be made again, such as libraries that are built on first use.

Libraries from it are loaded into the process, so nobody but its user may write there, and a library is loaded only if it is the one that
was built: its digest lies beside it.
"""

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

NAME = "qwen3_mindspore"
BLOCK_BYTES = 1 << 22


def folder(name):
    """Returns the path of the folder `name` in $XDG_CACHE_HOME/qwen3_mindspore, by default in ~/.cache/qwen3_mindspore; makes it if needed.

    It is its user's alone (mode 0700). If others could write into a folder that exists, all files in it are removed first. Raises
    RuntimeError for a folder of another user. A relative XDG_CACHE_HOME is ignored, as its specification says.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or "")
    if not home.is_absolute():
        home = Path.home() / ".cache"
    for path in (*reversed(home.parents), home):
        _make(path)
    for path in (home / NAME, home / NAME / name):
        _make(path)
        _own(path)
    return home / NAME / name


def _make(path):
    try:
        os.mkdir(path, 0o700)
    except OSError:
        if not path.is_dir():
            raise


def _own(path):
    """Makes sure that `path` is a folder of this user in which nobody else can write."""
    for found in (os.lstat(path), os.stat(path)):  # of a link, and of the folder that it names
        if found.st_uid != os.geteuid():
            raise RuntimeError(
                f"the cache folder {path} belongs to user {found.st_uid}, and this is user {os.geteuid()}; libraries in it are loaded,"
                " so set XDG_CACHE_HOME to a folder of your own"
            )
    if stat.S_IMODE(found.st_mode) & 0o022:
        os.chmod(path, 0o700)
        for entry in os.scandir(path):
            shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)


def library(path, build):
    """Returns `path` as text, a library in a folder of `folder`. build(file) makes it, if it is missing or not the one that was built.

    If several processes need it at once, one builds it and the others wait.
    """
    if _is_built(path):
        return str(path)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_built(path):
            with tempfile.TemporaryDirectory(dir=path.parent, suffix=".new") as aside:
                made, beside = Path(aside) / path.name, Path(aside) / "digest"
                build(made)
                beside.write_text(digest(made))
                os.chmod(made, 0o700)
                os.replace(beside, _digest_path(path))
                os.replace(made, path)
    return str(path)


def _digest_path(path):
    return path.with_suffix(".sha256")


def digest(path, tell=None):
    """Returns the sha256 of a file, which is read in blocks. tell(bytes), if given, is called after each."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            found.update(block)
            if tell:
                tell(len(block))
    return found.hexdigest()


def _is_built(path):
    try:
        for file in (path, _digest_path(path)):
            found = os.lstat(file)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
                return False
        return _digest_path(path).read_text() == digest(path)
    except (OSError, UnicodeDecodeError):
        return False
