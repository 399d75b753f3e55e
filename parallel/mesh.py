"""The named mesh of devices: axes dp (data), tp (tensor), pp (pipeline), cp (context) and ep (expert) parallel."""

from dataclasses import dataclass

AXES = ("dp", "tp", "pp", "cp", "ep")


@dataclass(frozen=True)
class Mesh:
    """Size of each mesh axis. This version runs on one device, so every size is 1; others are a ValueError."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1

    def __post_init__(self):
        for axis in AXES:
            size = getattr(self, axis)
            if size != 1:
                raise ValueError(f"parallel.{axis}={size} is not built yet: this version runs on one device; use --{axis}=1")

    def size(self, axes):
        """Number of devices along a tuple of axes."""
        n = 1
        for axis in axes:
            n *= getattr(self, axis)
        return n


ONE_DEVICE = Mesh()
