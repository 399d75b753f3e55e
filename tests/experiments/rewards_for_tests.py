"""Rewards that do what a reward must not do, by the number at the end of a text."""

import os
import time


def bad(prompt, text, record):
    print("a reward may print")
    if text == "raise":
        raise RuntimeError("no reward for this")
    if text == "hang":
        while True:
            time.sleep(0.01)
    if text == "nan":
        return float("nan")
    if text == "end":
        os._exit(3)
    if text == "none":
        return None
    return len(text) + record["more"] + len(prompt)


def sometimes(prompt, text, record):
    """Raises for about half of the answers, by their first character."""
    if text and ord(text[0]) % 2:
        raise RuntimeError("odd")
    return float(len(text) % 3)


def spread(prompt, text, record):
    """A reward in which random answers differ: the share of characters of the answer that are beyond the middle of ASCII."""
    return sum(ord(c) > 64 for c in text) / max(len(text), 1)


constant = 3
