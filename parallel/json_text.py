"""Parses JSON text, and refuses a key that an object has twice: json.loads() would keep the last of its values without a word."""

import json


class DuplicateKey(ValueError):
    """An object has a key twice. key: that key."""

    def __init__(self, key):
        name = repr(key) if len(key) <= 60 else f"{key[:60]!r}..."
        super().__init__(f"the key {name} is there twice in one object")
        self.key = key


def distinct(pairs):
    """Returns the dict of an object's (key, value) pairs: the object_pairs_hook of the json module. Raises DuplicateKey."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set()
        raise DuplicateKey(next(key for key, _ in pairs if key in seen or seen.add(key)))
    return found


def loads(text):
    """Returns the value of a JSON text, str or bytes. Raises DuplicateKey, another ValueError for broken text, or RecursionError."""
    return json.loads(text, object_pairs_hook=distinct)
