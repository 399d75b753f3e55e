"""Refuses what this machine's memory cannot hold, before it is allocated: Linux lends memory that it does not have, and kills later."""

import re


def machine_bytes(path="/proc/meminfo"):
    """Returns the bytes of memory and swap of this machine, in use or not; None where the system does not say it."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            found = dict(re.findall(r"(?m)^(MemTotal|SwapTotal):\s+(\d+) kB", file.read()))
    except OSError:
        return None
    return sum(int(kib) << 10 for kib in found.values()) if "MemTotal" in found else None


def check(needed, fix):
    """Raises ValueError if things need more memory than this machine has in all. needed: {what it is, with its keys: the least bytes}.
    fix: how to need less."""
    have, total = machine_bytes(), sum(needed.values())
    if have is not None and total > have:
        largest = sorted((item for item in needed.items() if item[1]), key=lambda item: -item[1])
        parts = "; ".join(f"{what}: {_gib(size)}" for what, size in largest)
        raise ValueError(f"{_gib(total)} of memory or more are needed, and this machine has {_gib(have)} ({parts}); {fix}")


def _gib(size):
    return f"{size / 2**30:,.1f} GiB"
