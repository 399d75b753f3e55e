"""The tokenizer in a run's folder, and whether its files are those that the run wrote. Nothing here imports MindSpore."""

import hashlib
import os

from parallel.checkpoint.read import Reader, find
from qwen3.json_files import exists, read_bytes

FOLDER = "tokenizer"
READ = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # what Tokenizer.load reads


def digests(run):
    """Returns {file: SHA-256} of the tokenizer in a run's folder, for the metadata of its checkpoints."""
    paths = {name: os.path.join(run, FOLDER, name) for name in READ}
    return {name: hashlib.sha256(read_bytes(path)).hexdigest() for name, path in paths.items() if exists(path)}


def of(run):
    """Returns the folder of a run's tokenizer; None if it has none. Raises ValueError for files that are not those of its newest
    checkpoint."""
    folder = os.path.join(run, FOLDER)
    if not os.path.isdir(folder):
        return None
    newest = find(run)
    check(run, Reader(newest).meta.get("tokenizer") if newest else None)
    return folder


def check(run, wanted):
    """Raises ValueError unless the files of a run's tokenizer have the digests that a checkpoint notes. wanted: {file: SHA-256}, or None of
    a checkpoint that notes none."""
    if not wanted or not os.path.isdir(os.path.join(run, FOLDER)):
        return
    found = digests(run)
    for name in READ:
        if found.get(name) != wanted.get(name):
            wrong = "is missing" if name not in found else "is not of the run" if name not in wanted else "is not as the run wrote it"
            folder = os.path.join(run, FOLDER)
            raise ValueError(
                f"{os.path.join(folder, name)} {wrong}; put the run's own tokenizer back, or remove {folder}: training goes on without, and"
                " writes it again"
            )
