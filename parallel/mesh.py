"""The named mesh of ranks: axes dp (data), tp (tensor), pp (pipeline), cp (context) and ep (expert) parallel.

World = pp x dp x cp x tp, outermost first, so the ranks of a tp group are neighbours. ep overlays: its groups are cut from dp, then cp,
then tp, the innermost ranks of each. A mesh knows no processes: it is a rank's coordinates, and says who shares them.
"""

import math
import os
from dataclasses import dataclass
from functools import cached_property

from parallel.hints import divisors

AXES = ("dp", "tp", "pp", "cp", "ep")
WORLD = ("pp", "dp", "cp", "tp")  # outermost first


@dataclass(frozen=True)
class Mesh:
    """Size of each axis, and which rank this is. kv_repeat: neighbouring tp ranks that hold the same kv head. ulysses: neighbouring cp
    ranks that exchange heads for tokens in attention; the others of cp form rings.

    An axis may be named in part: `tp/ep` is what ep takes of tp and `tp-ep` what it leaves, `tp/kv` the ranks that repeat kv heads and
    `tp-kv` the others, `cp/ul` the ranks that exchange heads and `cp-ul` those of a ring. Raises ValueError for sizes that do not fit
    together.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    kv_repeat: int = 1
    ulysses: int = 1
    rank: int = 0

    def __post_init__(self):
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise ValueError(f"parallel.{axis}={getattr(self, axis)} must be 1 or more")
        members = self.dp * self.cp * self.tp
        if members % self.ep:
            raise ValueError(
                f"parallel.ep={self.ep} must divide dp x cp x tp = {self.dp} x {self.cp} x {self.tp} = {members}; use {divisors(members)}"
            )
        assert self.tp % self.kv_repeat == 0 and self.cp % self.ulysses == 0 and 0 <= self.rank < self.world, self

    @property
    def world(self):
        return self.pp * self.dp * self.cp * self.tp

    @cached_property
    def sizes(self):
        """{atom: size}, outermost first: the axes cut so finely that every named part of an axis is a run of atoms."""
        out = {}
        for axis in WORLD:
            inner = self._inner(axis)
            cuts = sorted({1, getattr(self, axis), *inner.values()})
            if any(b % a for a, b in zip(cuts, cuts[1:])):
                raise ValueError(
                    f"parallel.{axis}={getattr(self, axis)}: ep takes {inner.get('ep', 1)} neighbouring ranks of it and"
                    f" {'kv heads repeat over' if 'kv' in inner else 'cp_ulysses'} {inner.get('kv', inner.get('ul', 1))};"
                    " one must divide the other. Use another ep"
                )
            factors = [b // a for a, b in zip(cuts, cuts[1:])][::-1]
            out.update({f"{axis}{i}": n for i, n in enumerate(factors)})
        return out

    def _inner(self, axis):
        """{part: how many of the axis' innermost ranks it takes}"""
        left, taken = self.ep, {}
        for name in ("dp", "cp", "tp"):
            taken[name] = math.gcd(left, getattr(self, name))
            left //= taken[name]
        inner = {"ep": taken[axis]} if axis in taken else {}
        own = {"tp": {"kv": self.kv_repeat}, "cp": {"ul": self.ulysses}}
        return {**inner, **own.get(axis, {})}

    def atoms(self, axes):
        """The atoms of a tuple of axes, or parts of axes, outermost first; those of size 1 do not exist."""
        return tuple(atom for axis in axes for atom in self._atoms(axis))

    def _atoms(self, axis):
        if axis == "ep":
            return self.atoms(("dp/ep", "cp/ep", "tp/ep"))
        name, part = axis[:2], axis[2:]
        own = [atom for atom in self.sizes if atom.startswith(name)]
        inner, split = self._inner(name).get(part[1:], 1), len(own)
        while part and math.prod(self.sizes[atom] for atom in own[split:]) < inner:
            split -= 1
        return tuple(own[:split] if part.startswith("-") else own[split:] if part else own)

    def size(self, axes):
        """Number of ranks along a tuple of axes or atoms."""
        return math.prod(self.sizes[atom] for atom in self._as_atoms(axes))

    def index(self, axes):
        """This rank's place among the ranks along a tuple of axes or atoms, the first outermost."""
        place = 0
        for atom in self._as_atoms(axes):
            place = place * self.sizes[atom] + self.coordinates[atom]
        return place

    def _as_atoms(self, axes):
        return tuple(a for axis in axes for a in ((axis,) if axis in self.sizes else self._atoms(axis)))

    @cached_property
    def coordinates(self):
        """{atom: place along it}"""
        out, rest = {}, self.rank
        for atom in reversed(self.sizes):
            rest, out[atom] = divmod(rest, self.sizes[atom])
        return out

    def members(self, axes):
        """The ranks that differ from this one along these axes or atoms only, in the order of index()."""
        mine, atoms = set(self._as_atoms(axes)), list(self.sizes)
        ranks = [0]
        for atom in atoms:
            along = range(self.sizes[atom]) if atom in mine else (self.coordinates[atom],)
            ranks = [r * self.sizes[atom] + i for r in ranks for i in along]
        return tuple(ranks)


ONE_DEVICE = Mesh()


def axis_sizes(parallel, world=None):
    """{axis: size} from config.parallel, in which one axis of dp, tp, pp, cp may be -1, for `world` ranks (default: as many as asked).

    Raises ValueError where they do not make up the world.
    """
    sizes = {axis: parallel[axis] for axis in AXES}
    for axis, n in sizes.items():
        if n < 1 and (n != -1 or axis == "ep"):
            raise ValueError(f"parallel.{axis}={n} must be 1 or more" + ("" if axis == "ep" else ", or -1 for what is left of the ranks"))
    free = [axis for axis in WORLD if sizes[axis] == -1]
    if len(free) > 1:
        raise ValueError(f"parallel.{free[0]} and parallel.{free[1]} are both -1; one axis may be")
    fixed = math.prod(n for axis, n in sizes.items() if n > 0 and axis != "ep")
    text = " x ".join(f"{axis}={sizes[axis]}" for axis in WORLD if sizes[axis] > 1) or "dp=1"
    if free:
        world = fixed if world is None else world
        if world % fixed:
            raise ValueError(
                f"parallel.{free[0]}=-1: {world} ranks cannot be shared out to {text}, which takes {fixed}; use {divisors(world)}"
            )
        sizes[free[0]] = world // fixed
    elif world is not None and fixed != world:
        raise ValueError(
            f"{text} is {fixed} rank{'s' * (fixed > 1)}, and the job has {world}; start it with"
            f" `python -m experiments.launch --nproc={fixed} -- ...`, or set one axis to -1, such as --dp=-1"
        )
    Mesh(**sizes)  # checks ep
    return sizes


def world_size():
    """Ranks of the job that this process belongs to: 1 unless a launcher started it."""
    return int(os.environ.get("MS_WORKER_NUM", "1"))
