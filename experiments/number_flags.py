"""Flags that are numbers: each has a range, and NaN and infinity are in none. The error names the flag, its value and the range."""

import math

from absl import flags

from qwen3.schema import LARGEST

MOST_PROCESSES = 4096  # on one machine
MOST_S = 1e9  # seconds that a flag can ask for; timers take no more
flags.disclaim_key_flags()  # --help lists them under the main that defines them


class _Number(flags.ArgumentParser):
    """kind: int or float. above: `least` itself is not in the range."""

    def __init__(self, kind, least, most, above=False):
        super().__init__()
        self.kind, self.least, self.most, self.above = kind, least, most, above
        if kind is int:
            self.syntactic_help = f"a whole number from {least} to {most}"
        else:
            self.syntactic_help = f"a number {f'above {least:g}, up' if above else f'from {least:g}'} to {most:g}"

    def parse(self, argument):
        try:
            value = self.kind(argument) if not isinstance(argument, bool) else math.nan
            inside = self.least < value <= self.most if self.above else self.least <= value <= self.most
        except (ValueError, TypeError, OverflowError):
            inside = False
        if not inside or (self.kind is int and value != argument and isinstance(argument, float)):
            raise ValueError(f"it must be {self.syntactic_help}")
        return value

    def flag_type(self):
        return self.kind.__name__


def integer(name, default, text, least, most=LARGEST, flag_values=flags.FLAGS):
    """Defines a flag of a whole number from `least` to `most`; its default may be None."""
    flags.DEFINE(_Number(int, least, most), name, default, text, flag_values, flags.ArgumentSerializer())


def integers(name, default, text, least, most=LARGEST):
    """Defines a flag that may be repeated, of whole numbers from `least` to `most`."""
    flags.DEFINE_multi(_Number(int, least, most), flags.ArgumentSerializer(), name, default, text)


def real(name, default, text, least, most, above=False):
    """Defines a flag of a finite number from `least` to `most`; above: larger than `least`."""
    flags.DEFINE(_Number(float, least, most, above), name, default, text, serializer=flags.ArgumentSerializer())
