"""Reading files that come from outside: regular files alone, of bounded size, and JSON of bounded depth, each key of an object once."""

import os
import stat

from parallel.json_text import DuplicateKey, loads

MAX_JSON_BYTES = 256 << 20  # of a file that is read whole; a tokenizer.json has some 10 MB, the index of the largest models 10 MB
MAX_DEPTH = 64  # of lists and objects in one another: files and requests have a few, tools' JSON schemas perhaps ten


def parse_json(path, text):
    try:
        value = loads(text)
    except DuplicateKey as error:
        raise ValueError(f"{path}: {error}; keep one of them, or fetch the file again") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: broken JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is needed, not {type(value).__name__}; fetch the file again")
    return value


def depth(value):
    """How deep lists and objects are nested in a JSON value, counted without recursion; at most MAX_DEPTH + 1."""
    level, values = 0, [value]
    while values and level <= MAX_DEPTH:
        inner = [list(v.values()) if isinstance(v, dict) else v for v in values if isinstance(v, dict | list)]
        values = [v for group in inner for v in group]
        level += bool(inner)
    return level


def open_regular(path):
    """Opens a regular file to read its bytes. Pipes and devices are none: reading those may never end. FileNotFoundError or ValueError,
    which name the file."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} is missing; give the folder that holds it") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be opened ({error.strerror}); put the file itself there") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path} is no regular file; put the file itself there")
    return os.fdopen(handle, "rb")


def read_bytes(path, most=MAX_JSON_BYTES):
    """The bytes of a regular file. Errors: see open_regular; and ValueError for a file of more than `most` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"{path} has {size:,} bytes, and such a file at most {most:,}; fetch it again")
        return file.read(most)


def exists(path):
    """Whether there is anything of that name, be it a pipe or a link to nothing; read_bytes() says then what is wrong with it."""
    return os.path.lexists(path)


def read_text(path, most=MAX_JSON_BYTES):
    """The text of a regular file in UTF-8. Errors: see read_bytes; and ValueError for other bytes."""
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); fetch the file again") from None


def read_json(path):
    """A JSON object from a file. FileNotFoundError or ValueError naming the file."""
    value = parse_json(path, read_bytes(path))
    if depth(value) > MAX_DEPTH:
        raise ValueError(f"{path}: broken JSON (nested more than {MAX_DEPTH} deep); fetch the file again")
    return value
