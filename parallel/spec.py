"""ParamSpec, the single source of a parameter's shape, initialisation, sharding and checkpoint layout; and trees of them.

A tree is a nested dict or list whose leaves are arrays or specs. A path is the tuple of keys to a leaf, written with dots:
`layers.0.attention.wq`.
"""

import zlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ParamSpec:
    """shape: global sizes. dims: the logical name of each dim. init: normal(std), uniform(bound), constant(value), ones() or zeros().

    optimizer: "adamw" for what a run's optimizer trains, whichever it is, or "sign" for a value moved by a fixed step against the sign of
    its gradient (the router's bias), or "none" for a frozen one, which has no gradient and no optimizer state.
    parts: for each dim, into how many equal parts it can be cut, such as heads; None where every element is one. Default: all None.
    """

    shape: tuple
    dims: tuple
    init: tuple
    optimizer: str = "adamw"
    parts: tuple = ()

    def __post_init__(self):
        assert len(self.shape) == len(self.dims), (self.shape, self.dims)

    def parts_of(self, i):
        """Into how many parts dim i can be cut."""
        return (self.parts[i] if self.parts else None) or self.shape[i]

    @property
    def trains(self):
        return self.optimizer != "none"


def normal(std):
    return ("normal", std)


def uniform(bound):
    """Between -bound and bound."""
    return ("uniform", bound)


def constant(value):
    return ("constant", value)


def ones():
    return ("ones",)


def zeros():
    return ("zeros",)


def is_leaf(tree):
    return not isinstance(tree, (dict, list, tuple))


def tree_map(fn, tree, *rest):
    """fn(leaf, *leaves of rest) over trees of one structure, keeping dicts, lists and tuples."""
    if isinstance(tree, dict):
        return {k: tree_map(fn, v, *(r[k] for r in rest)) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(tree_map(fn, v, *(r[i] for r in rest)) for i, v in enumerate(tree))
    return fn(tree, *rest)


def tree_paths(tree, path=()):
    """[(path, leaf)], depth first, in the tree's own order."""
    if isinstance(tree, dict):
        return [item for k, v in tree.items() for item in tree_paths(v, path + (k,))]
    if isinstance(tree, (list, tuple)):
        return [item for i, v in enumerate(tree) for item in tree_paths(v, path + (str(i),))]
    return [(".".join(path), tree)]


def tree_leaves(tree):
    return [leaf for _, leaf in tree_paths(tree)]


def select(tree, keep):
    """The part of a tree whose leaves keep(leaf) says, with the same paths; None where there are none.

    A list that loses an element becomes a dict by number.
    """
    if is_leaf(tree):
        return tree if keep(tree) else None
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    kept = {str(k): part for k, v in items if (part := select(v, keep)) is not None}
    if not isinstance(tree, dict) and len(kept) == len(tree):
        return type(tree)(kept.values())
    return kept or None


def shallow(tree):
    """A tree with the same paths, in which each numbered part, such as a layer, is one flat dict: MindSpore takes six levels of nesting."""
    if is_leaf(tree):
        return tree
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree))
    numbered = all(str(key).isdigit() for key, _ in items)
    return {str(key): dict(tree_paths(part)) if numbered else shallow(part) for key, part in items}


def merge(like, *trees):
    """The tree of `like`'s structure of which trees, which may be None, have the leaves, by path."""
    found = {path: leaf for tree in trees if tree is not None for path, leaf in tree_paths(tree)}
    return unflatten(like, [found[path] for path, _ in tree_paths(like)])


def unflatten(like, leaves):
    """The tree of `like`'s structure whose leaves are taken from the sequence `leaves` in order."""
    it = iter(leaves)
    out = tree_map(lambda _: next(it), like)
    assert next(it, None) is None, "more leaves than the tree has places"
    return out


def count(specs):
    """Number of elements in a tree of specs or arrays."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in tree_leaves(specs))


def init_array(spec, path, seed, dtype=np.float32, index=None):
    """One parameter's initial value as a numpy array; `index`, a tuple of slices with bounds, gives only that part.

    An element depends on (seed, path, its place in the global array) alone, so every sharding starts from the same numbers.
    """
    index = index or tuple(slice(0, n) for n in spec.shape)
    shape = tuple(s.stop - s.start for s in index)
    kind = spec.init[0]
    if kind not in ("normal", "uniform"):
        return np.full(shape, {"ones": 1, "zeros": 0}.get(kind, spec.init[-1]), dtype)
    draw = hash_normal if kind == "normal" else _hash_symmetric
    key = np.uint32(zlib.crc32(path.encode()))
    out = np.empty(shape, dtype)
    rows = max(1, (1 << 20) // max(1, int(np.prod(shape[1:]))))  # bounds the working memory at a few MB
    for first in range(0, shape[0], rows):
        part = (slice(index[0].start + first, min(index[0].start + first + rows, index[0].stop)),) + index[1:]
        place = _places(spec.shape, part)
        out[first : first + rows] = draw(seed, key, place) * spec.init[1]
    return out


def init_params(specs, seed, dtype=np.float32):
    """A tree of numpy arrays for a tree of specs. Deterministic in `seed`; see init_array."""
    return unflatten(specs, [init_array(spec, path, seed, dtype) for path, spec in tree_paths(specs)])


def _places(shape, index):
    """uint64 row-major positions in an array of `shape` of the elements that `index` selects."""
    place = np.zeros((1,) * len(shape), np.uint64)
    for i, (n, s) in enumerate(zip(shape, index)):
        along = np.arange(s.start, s.stop, dtype=np.uint64).reshape((-1,) + (1,) * (len(shape) - i - 1))
        place = place * np.uint64(n) + along
    return place


def pcg(x):
    """PCG-RXS-M-XS hash of uint32 numpy values. Source: O'Neill 2014; Jarzynski and Olano 2020."""
    state = x * np.uint32(747796405) + np.uint32(2891336453)
    word = ((state >> ((state >> np.uint32(28)) + np.uint32(4))) ^ state) * np.uint32(277803737)
    return (word >> np.uint32(22)) ^ word


def hash_uniform(seed, key, place):
    """Floats in (0, 1) from a seed, a uint32 key and uint64 positions; 24 bits each."""
    bits = hash_bits(seed, key, place)
    return ((bits >> np.uint32(8)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-24)


def hash_bits(seed, key, place):
    """uint32 from a seed, a uint32 key and uint64 positions."""
    place = np.asarray(place, np.uint64)
    with np.errstate(over="ignore"):
        start = pcg(np.asarray(seed & 0xFFFFFFFF, np.uint32) ^ pcg(np.asarray(key, np.uint32)))
        low = pcg((place & np.uint64(0xFFFFFFFF)).astype(np.uint32) + start)
        return pcg(low ^ pcg((place >> np.uint64(32)).astype(np.uint32) + np.uint32(0x9E3779B9)))


def _hash_symmetric(seed, key, place):
    return 2 * hash_uniform(seed, key, place) - 1


def hash_normal(seed, key, place):
    """Standard normal float32 values, one a position, by the Box-Muller transform of two hashes."""
    place = np.asarray(place, np.uint64) * np.uint64(2)
    radius = np.sqrt(-2 * np.log(hash_uniform(seed, key, place)))
    return radius * np.cos(np.float32(2 * np.pi) * hash_uniform(seed, key, place + np.uint64(1)))
