"""How an error message ends: with what would work."""

import difflib


def divisors(n):
    """ "1, 2, 3, 6" for 6."""
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def nearest(name, known):
    """ "; did you mean 'x'?", or nothing where no known name is near."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""
