"""Files and folders of checkpoints: what is on disk for certain, which checkpoints a run has, and what an error of the disk means."""

import contextlib
import json
import os
import re
import secrets
import shutil

FOLDER = "checkpoints"  # in that of a run
COMPRESSIONS = ("none", "zstd")
_STEP = re.compile(r"step_(\d+)")
_LEFTOVER = re.compile(r"\.step_\d+\.[0-9a-f]+\.(tmp|old)")
_CAUSES = (  # texts of the system and of tensorstore, and what helps
    (
        ("No space left", "ENOSPC", "quota", "File too large"),
        "the disk or a quota is full",
        "make room, or lower checkpoint.keep_last",
    ),
    (("Permission denied", "PERMISSION_DENIED", "EACCES", "EPERM"), "permission is denied", "give this user the right to {what} there"),
    (("Read-only", "EROFS"), "the disk is read-only", "mount it for writing, or use another folder"),
    (("No such file", "NOT_FOUND", "ENOENT"), "a folder or file has vanished", "put it back, or look at what removes files there"),
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read, with its path, why, and what to do."""


def reason(error, path, what):
    """The message of a CheckpointError for an error of the disk. what: read or write."""
    text = str(error)
    for signs, cause, fix in _CAUSES:
        if any(sign in text for sign in signs):
            return f"{path}: cannot {what} the checkpoint: {cause} ({_short(text)}); {fix.format(what=what)}"
    return f"{path}: cannot {what} the checkpoint ({_short(text)})"


def _short(text):
    """tensorstore adds where in its sources an error arose."""
    text = re.sub(r"\s*\[[^\]]*(tensorstore|source locations)[^\]]*\]", "", " ".join(text.split()))
    return text if len(text) < 300 else f"{text[:200]} ... {text[-90:]}"


def step_folder(run, step):
    return os.path.join(run, FOLDER, f"step_{step:06}")


def steps(run):
    """The steps of the checkpoints that a run has, from the oldest. Whatever has such a name is whole."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(int(match[1]) for name in os.listdir(os.path.join(run, FOLDER)) if (match := _STEP.fullmatch(name)))
    return []


def temporary(run, step, token):
    """The folder in which a checkpoint is written. token: of this attempt, hexadecimal."""
    return os.path.join(run, FOLDER, f".step_{step:06}.{token}.tmp")


def clean(run):
    """Removes what runs that were killed had begun to write or to delete. Only for who holds the run's lock."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(os.path.join(run, FOLDER)):
            if _LEFTOVER.fullmatch(name):
                shutil.rmtree(os.path.join(run, FOLDER, name), ignore_errors=True)


def remove(folder):
    """Deletes a checkpoint. It has lost its name before it has lost a file."""
    parent, name = os.path.split(os.path.abspath(folder))
    old = os.path.join(parent, f".{name}.{secrets.token_hex(4)}.old")
    os.rename(folder, old)
    shutil.rmtree(old, ignore_errors=True)


def superseded(found, keep_last, keep_every):
    """Of the steps `found`, those to delete: not the last keep_last (0 = all stay), nor multiples of keep_every (0 = none)."""
    old = sorted(found)[:-keep_last] if keep_last else []
    return [step for step in old if not keep_every or step % keep_every]


def write_json(path, value):
    """Atomic: `path` is the old text or the new, and the new is on disk."""
    write_text(path, json.dumps(value, indent=1))


def write_text(path, text):
    aside = f"{path}.{secrets.token_hex(4)}.new"
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.rename(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(aside)
        raise
    sync_folder(os.path.dirname(os.path.abspath(path)))


def sizes(folder):
    """{path within the folder: bytes} of all files."""
    return {
        os.path.relpath(os.path.join(place, name), folder): os.path.getsize(os.path.join(place, name))
        for place, _, names in os.walk(folder, onerror=_raise)
        for name in names
    }


def _raise(error):
    raise error


def sync_file(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


sync_folder = sync_file


def sync_folders(folder):
    """The entries of a folder and of all that are in it."""
    for place, _, _ in os.walk(folder):
        sync_folder(place)
