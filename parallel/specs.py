"""ParamSpec, the single source of a parameter's shape, initialisation, sharding and checkpoint layout.

A tree of specs has the same paths as the tree of parameters, such as `layers.0.attention.wq`.
"""

import zlib
from dataclasses import dataclass

import numpy as np

from parallel.random import hash_normal, hash_symmetric
from parallel.trees import tree_leaves, tree_paths, unflatten


@dataclass(frozen=True)
class ParamSpec:
    """The specification of one parameter.

    shape: global sizes. dims: the logical name of each dim. init: normal(std), uniform(bound), constant(value), ones() or zeros().
    optimizer: "adamw" for the optimizer of the run, whichever it is; "sign" for a fixed step against the sign of the gradient (the bias of
        the router); "none" for a frozen parameter, which has no gradient and no optimizer state.
    parts: for each dim the number of equal parts that must not be split further, such as the number of heads in a dim of heads x head_dim;
        None where each element is a part. Default: all None.
    lr: the factor of the learning rate, of AdamW and Lion; experiments/train/optim.py has that of Muon. See qwen3/mup.py.
    dtype: that in which a training run keeps the parameter, float32 for all that trains.
    """

    shape: tuple
    dims: tuple
    init: tuple
    optimizer: str = "adamw"
    parts: tuple = ()
    dtype: str = "float32"
    lr: float = 1.0

    def __post_init__(self):
        assert len(self.shape) == len(self.dims), (self.shape, self.dims)

    def parts_of(self, i):
        """Returns the number of equal parts of dim i, which is the largest number of shards."""
        return (self.parts[i] if self.parts else None) or self.shape[i]

    @property
    def trains(self):
        """Whether the parameter has a gradient."""
        return self.optimizer != "none"


def normal(std):
    """Init: normal values of mean 0 and standard deviation std."""
    return ("normal", std)


def uniform(bound):
    """Init: uniform values between -bound and bound."""
    return ("uniform", bound)


def constant(value):
    return ("constant", value)


def ones():
    return ("ones",)


def zeros():
    return ("zeros",)


def count(specs):
    """Returns the number of elements in a tree of specs or arrays."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in tree_leaves(specs))


def init_array(spec, path, seed, dtype=np.float32, index=None):
    """Returns the initial value of a parameter as a numpy array.

    index: a tuple of slices with bounds; only these elements of the global array are returned. Default: all.
    An element depends only on the seed, the path and its position in the global array, so all layouts start from equal values.
    """
    index = index or tuple(slice(0, n) for n in spec.shape)
    shape = tuple(s.stop - s.start for s in index)
    kind = spec.init[0]
    if kind not in ("normal", "uniform"):
        return np.full(shape, {"ones": 1, "zeros": 0}.get(kind, spec.init[-1]), dtype)
    draw = hash_normal if kind == "normal" else hash_symmetric
    key = np.uint32(zlib.crc32(path.encode()))
    out = np.empty(shape, dtype)
    rows = max(1, (1 << 20) // max(1, int(np.prod(shape[1:]))))  # bounds the working memory at a few MB
    for first in range(0, shape[0], rows):
        part = (slice(index[0].start + first, min(index[0].start + first + rows, index[0].stop)),) + index[1:]
        place = _places(spec.shape, part)
        out[first : first + rows] = draw(seed, key, place) * spec.init[1]
    return out


def init_params(specs, seed, dtype=np.float32):
    """Returns a tree of numpy arrays for a tree of specs, deterministic in `seed`; see init_array."""
    return unflatten(specs, [init_array(spec, path, seed, dtype) for path, spec in tree_paths(specs)])


def _places(shape, index):
    """Returns uint64 row-major positions, in an array of `shape`, of the elements that `index` selects."""
    place = np.zeros((1,) * len(shape), np.uint64)
    for i, (n, s) in enumerate(zip(shape, index)):
        along = np.arange(s.start, s.stop, dtype=np.uint64).reshape((-1,) + (1,) * (len(shape) - i - 1))
        place = place * np.uint64(n) + along
    return place
