"""Endings of error messages that name values which would work."""

import difflib
import math


def divisors(n):
    """Returns the divisors of n as text: "1, 2, 3, 6" for 6."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return ", ".join(map(str, sorted({*low, *(n // d for d in low)})))


def nearest(name, known):
    """Returns "; did you mean 'x'?" with the known name closest to `name`, or "" if none is close."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""
