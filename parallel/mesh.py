"""The named mesh of ranks: axes dp (data), tp (tensor), pp (pipeline), cp (context) and ep (expert) parallel.

World = pp x dp x cp x tp, outermost first, so the ranks of a tp group are neighbours. ep is not a further factor of the world: an ep group
takes ranks of dp first, then of cp, then of tp, the innermost ones of each. For example, with dp=2, tp=4 and ep=4 the experts are spread
over both dp ranks and over two neighbouring tp ranks.

Each axis is factored into sub-axes, here called atoms, so that every sub-axis with a name is a product of atoms. For example, with tp=4 and
ep=2 on tp alone, tp has the atoms tp0 (size 2) and tp1 (size 2): `tp-ep` is tp0 and `tp/ep` is tp1.

A mesh is arithmetic on rank numbers. It starts no processes and makes no process groups.
"""

import math
import os
from dataclasses import dataclass
from functools import cached_property

from parallel.hints import divisors

AXES = ("dp", "tp", "pp", "cp", "ep")
WORLD = ("pp", "dp", "cp", "tp")  # outermost first
MOST_RANKS = 2**20  # of a job, more than any machine has; what is made for each rank stays in proportion


@dataclass(frozen=True)
class Mesh:
    """The size of each axis and the number of this rank.

    kv_repeat: the number of neighbouring tp ranks that have a copy of the same kv head. ulysses: the number of neighbouring cp ranks that
    exchange heads for tokens in attention; the remaining factor of cp is the size of an attention ring.

    Methods that take `axes` also take the names of sub-axes:
      tp/ep, cp/ep, dp/ep   the inner factor of the axis that ep takes; tp-ep, cp-ep, dp-ep is the outer factor that is left
      tp/kv, tp-kv          the ranks that repeat one kv head, and the ranks with different kv heads
      cp/ul, cp-ul          the ranks that exchange heads, and the ranks of a ring
    Raises ValueError for sizes that do not fit together.
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
        """The number of ranks."""
        return self.pp * self.dp * self.cp * self.tp

    @cached_property
    def sizes(self):
        """{atom: size}, outermost first, such as {"dp0": 2, "tp0": 2, "tp1": 2}. Factors of size 1 are left out."""
        out = {}
        for axis in WORLD:
            inner = self._inner(axis)
            products = sorted({1, getattr(self, axis), *inner.values()})  # of the innermost atoms
            if any(b % a for a, b in zip(products, products[1:])):
                raise ValueError(
                    f"parallel.{axis}={getattr(self, axis)}: ep takes {inner.get('ep', 1)} neighbouring ranks of it and"
                    f" {'kv heads repeat over' if 'kv' in inner else 'cp_ulysses'} {inner.get('kv', inner.get('ul', 1))};"
                    " one must divide the other. Use another ep"
                )
            factors = [b // a for a, b in zip(products, products[1:])][::-1]
            out.update({f"{axis}{i}": n for i, n in enumerate(factors)})
        return out

    def _inner(self, axis):
        """{sub-axis: size} of the inner sub-axes of an axis, such as {"ep": 2, "kv": 4} for tp."""
        left, taken = self.ep, {}
        for name in ("dp", "cp", "tp"):
            taken[name] = math.gcd(left, getattr(self, name))
            left //= taken[name]
        inner = {"ep": taken[axis]} if axis in taken else {}
        own = {"tp": {"kv": self.kv_repeat}, "cp": {"ul": self.ulysses}}
        return {**inner, **own.get(axis, {})}

    def atoms(self, axes):
        """Returns the atoms of a tuple of axes and sub-axes, such as ("tp0", "tp1") for ("tp",). The order of `axes` is kept."""
        return tuple(atom for axis in axes for atom in self._atoms(axis))

    def _atoms(self, axis):
        if axis == "ep":
            return self.atoms(("dp/ep", "cp/ep", "tp/ep"))
        name, sub_axis = axis[:2], axis[2:]
        own = [atom for atom in self.sizes if atom.startswith(name)]
        inner, split = self._inner(name).get(sub_axis[1:], 1), len(own)
        while sub_axis and math.prod(self.sizes[atom] for atom in own[split:]) < inner:
            split -= 1
        return tuple(own[:split] if sub_axis.startswith("-") else own[split:] if sub_axis else own)

    def size(self, axes):
        """Returns the number of ranks along a tuple of axes or atoms."""
        return math.prod(self.sizes[atom] for atom in self._as_atoms(axes))

    def index(self, axes):
        """Returns the index of this rank among the ranks along a tuple of axes or atoms, the first of which is the outermost."""
        place = 0
        for atom in self._as_atoms(axes):
            place = place * self.sizes[atom] + self.coordinates[atom]
        return place

    def _as_atoms(self, axes):
        return tuple(a for axis in axes for a in ((axis,) if axis in self.sizes else self._atoms(axis)))

    @cached_property
    def coordinates(self):
        """{atom: index of this rank along it}"""
        out, rest = {}, self.rank
        for atom in reversed(self.sizes):
            rest, out[atom] = divmod(rest, self.sizes[atom])
        return out

    def members(self, axes):
        """Returns the ranks whose coordinates equal this rank's except along these axes or atoms, in the order of index()."""
        mine, atoms = set(self._as_atoms(axes)), list(self.sizes)
        ranks = [0]
        for atom in atoms:
            along = range(self.sizes[atom]) if atom in mine else (self.coordinates[atom],)
            ranks = [r * self.sizes[atom] + i for r in ranks for i in along]
        return tuple(ranks)


ONE_DEVICE = Mesh()


def axis_sizes(parallel, world=None):
    """Returns {axis: size} from config.parallel, in which one of dp, tp, pp, cp may be -1: the ranks that the other axes leave.

    world: the number of ranks; None takes the product of the sizes that are given. Raises ValueError where the product is not `world`.
    """
    sizes = {axis: parallel[axis] for axis in AXES}
    for axis, n in sizes.items():
        if n < 1 and (n != -1 or axis == "ep"):
            raise ValueError(f"parallel.{axis}={n} must be 1 or more" + ("" if axis == "ep" else ", or -1 for all remaining ranks"))
    free = [axis for axis in WORLD if sizes[axis] == -1]
    if len(free) > 1:
        raise ValueError(f"parallel.{free[0]} and parallel.{free[1]} are both -1; set one of them to a number")
    fixed = math.prod(n for axis, n in sizes.items() if n > 0 and axis != "ep")
    text = " x ".join(f"{axis}={sizes[axis]}" for axis in WORLD if sizes[axis] > 1) or "dp=1"
    if fixed > MOST_RANKS:
        raise ValueError(f"parallel.{text} is {fixed} ranks, and a job has at most {MOST_RANKS}; lower one of them")
    if free:
        world = fixed if world is None else world
        if world % fixed:
            raise ValueError(
                f"parallel.{free[0]}=-1: {world} ranks are not a multiple of {text}, which takes {fixed};"
                f" the product of the other axes must be one of {divisors(world)}"
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
    """Returns the number of ranks of the job of this process: 1 unless experiments.launch or another launcher started it (see
    parallel/launch/joined.py, whose join() is called first), or MindSpore simulates a cluster."""
    if is_simulated():
        return int(os.environ.get("RANK_SIZE", 1))
    return int(os.environ.get("MS_WORKER_NUM", 1))


def job_rank():
    """Returns the rank of this process in its job. It asks only the environment, so that it can be called before MindSpore is imported."""
    return int(os.environ.get("RANK_ID", 0)) if world_size() > 1 else 0


def is_simulated():
    """Whether this process is a simulated rank: MindSpore compiles for it, and all numbers that ranks exchange are 0."""
    return os.environ.get("MS_SIMULATION_LEVEL", "0") != "0"
