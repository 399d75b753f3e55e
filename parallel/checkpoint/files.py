"""Files and folders of checkpoints: atomic writes, syncing to disk, the list of checkpoints of a run, and messages for disk errors."""

import contextlib
import json
import os
import re
import secrets
import shutil

FOLDER = "checkpoints"  # in the folder of a run
COMPRESSIONS = ("none", "zstd")
_STEP = re.compile(r"step_(\d+)")
_LEFTOVER = re.compile(r"\.step_\d+\.[0-9a-f]+\.(tmp|old)")
_CAUSES = (  # (texts in the errors of the system and of tensorstore, the cause, the fix)
    (
        ("No space left", "ENOSPC", "quota", "File too large"),
        "the disk or a quota is full",
        "make room, or lower checkpoint.keep_last",
    ),
    (("Permission denied", "PERMISSION_DENIED", "EACCES", "EPERM"), "permission is denied", "give this user the right to {what} there"),
    (("Read-only", "EROFS"), "the disk is read-only", "mount it for writing, or use another folder"),
    (("No such file", "NOT_FOUND", "ENOENT"), "a folder or file has vanished", "put it back, or find the program that removes files there"),
)


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read. The message has its path, the cause and the fix."""


def reason(error, path, what):
    """Returns the message of a CheckpointError for a disk error. what: "read" or "write"."""
    text = str(error)
    for signs, cause, fix in _CAUSES:
        if any(sign in text for sign in signs):
            return f"{path}: cannot {what} the checkpoint: {cause} ({_short(text)}); {fix.format(what=what)}"
    return f"{path}: cannot {what} the checkpoint ({_short(text)})"


def _short(text):
    """Shortens an error text, and removes the places in its source code that tensorstore adds."""
    text = re.sub(r"\s*\[[^\]]*(tensorstore|source locations)[^\]]*\]", "", " ".join(text.split()))
    return text if len(text) < 300 else f"{text[:200]} ... {text[-90:]}"


def step_folder(run, step):
    """Returns the path of the checkpoint of a step."""
    return os.path.join(run, FOLDER, f"step_{step:06}")


def steps(run):
    """Returns the steps of the checkpoints of a run, oldest first. A folder gets its name last, so each of these is complete."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(int(match[1]) for name in os.listdir(os.path.join(run, FOLDER)) if (match := _STEP.fullmatch(name)))
    return []


def temporary(run, step, token):
    """Returns the folder in which a checkpoint is written before it is renamed. token: a hexadecimal name of this attempt."""
    return os.path.join(run, FOLDER, f".step_{step:06}.{token}.tmp")


def clean(run):
    """Removes unfinished and half-deleted checkpoints of runs that were killed. Call it only with the lock of the run."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(os.path.join(run, FOLDER)):
            if _LEFTOVER.fullmatch(name):
                shutil.rmtree(os.path.join(run, FOLDER, name), ignore_errors=True)


def remove(folder):
    """Deletes a checkpoint. It is renamed first, so that no folder with a checkpoint's name lacks files."""
    parent, name = os.path.split(os.path.abspath(folder))
    old = os.path.join(parent, f".{name}.{secrets.token_hex(4)}.old")
    os.rename(folder, old)
    sync_folder(parent)  # else the disk may have the loss of a file and still the old name
    shutil.rmtree(old, ignore_errors=True)


def superseded(found, keep_last, keep_every):
    """Returns the steps of `found` to delete: all but the last keep_last (0 keeps all) and the multiples of keep_every (0 keeps none)."""
    old = sorted(found)[:-keep_last] if keep_last else []
    return [step for step in old if not keep_every or step % keep_every]


def write_json(path, value):
    """Writes a value as JSON with write_text."""
    write_text(path, json.dumps(value, indent=1))


def write_text(path, text):
    """Writes a file of text as write_bytes() does."""
    write_bytes(path, text.encode())


def write_bytes(path, data):
    """Writes a file atomically: at any time `path` has the old contents or the new. The new ones are on disk when this returns."""
    aside = f"{path}.{secrets.token_hex(4)}.new"
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(aside)
        raise
    sync_folder(os.path.dirname(os.path.abspath(path)))


def sizes(folder):
    """Returns {path relative to the folder: bytes} of all files in a folder and its subfolders."""
    return {
        os.path.relpath(os.path.join(place, name), folder): os.path.getsize(os.path.join(place, name))
        for place, _, names in os.walk(folder, onerror=_raise)
        for name in names
    }


def _raise(error):
    raise error


def sync_file(path):
    """Waits until a file, or the list of entries of a folder, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


sync_folder = sync_file


def sync_folders(folder):
    """Waits until the entries of a folder and of all its subfolders are on disk."""
    for place, _, _ in os.walk(folder):
        sync_folder(place)
