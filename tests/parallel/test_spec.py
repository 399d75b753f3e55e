"""Initial values that depend on (seed, path, place) alone, and trees."""

import numpy as np
import pytest

from parallel import random, specs, trees
from parallel.specs import ParamSpec, init_array, init_params, normal, ones, zeros
from parallel.trees import tree_map, tree_paths, unflatten

WIDE = ParamSpec((6, 5, 7), ("experts", "embed", "ffn"), normal(0.5))


@pytest.mark.parametrize("index", [(0, 6, 0, 5, 0, 7), (2, 4, 0, 5, 0, 7), (0, 6, 1, 2, 3, 7), (5, 6, 4, 5, 6, 7), (3, 3, 0, 5, 0, 7)])
def test_a_slice_of_the_init_is_the_init_of_the_slice(index):
    index = tuple(slice(*index[i : i + 2]) for i in (0, 2, 4))
    whole = init_array(WIDE, "layers.0.w", 7)
    np.testing.assert_array_equal(init_array(WIDE, "layers.0.w", 7, index=index), whole[index])


def test_arrays_made_in_several_pieces_are_the_same_array():
    """Above a million elements the rows are made in pieces."""
    large = ParamSpec((5, 400_000), ("vocab", "embed"), normal(1.0))
    index = (slice(1, 5), slice(100_000, 100_040))
    np.testing.assert_array_equal(init_array(large, "embed", 0)[index], init_array(large, "embed", 0, index=index))


def test_init_is_the_same_in_every_version():
    """Written down once; a change of these numbers changes every run from a seed."""
    values = init_array(ParamSpec((4,), ("embed",), normal(1.0)), "layers.0.attention.wq", 42)
    np.testing.assert_allclose(values, [-0.7141288, -1.1129872, -0.9533193, 1.1846031], rtol=1e-5)


def test_the_hash_is_pcg():
    """Against the definition in Python's integers."""

    def pcg(x):
        state = (x * 747796405 + 2891336453) % 2**32
        word = ((state >> ((state >> 28) + 4)) ^ state) * 277803737 % 2**32
        return (word >> 22) ^ word

    x = np.random.default_rng(0).integers(0, 2**32, 1000, dtype=np.uint32)
    assert random.pcg(x).tolist() == [pcg(int(n)) for n in x]


def test_seeds_and_paths_give_other_numbers_and_other_leaves_do_not_matter():
    specs = {"a": WIDE, "b": WIDE}
    both, again, other = init_params(specs, 1), init_params({"b": WIDE}, 1), init_params(specs, 2)
    np.testing.assert_array_equal(both["b"], again["b"])
    assert not (both["a"] == both["b"]).any() and not (both["a"] == other["a"]).any()


def test_moments_are_those_of_a_normal_distribution():
    """Tolerances of five standard errors of 400,000 draws."""
    x = init_array(ParamSpec((400_000,), ("embed",), normal(2.0)), "x", 3) / 2
    error = 5 / np.sqrt(x.size)
    assert np.isfinite(x).all() and abs(x.mean()) < error and abs(x.var() - 1) < 2**0.5 * error
    assert abs((x**3).mean()) < 15**0.5 * error and abs((x**4).mean() - 3) < 96**0.5 * error
    share = (np.abs(x) > 3).mean()
    assert abs(share - 0.0026998) < error * 0.0026998**0.5
    assert len(np.unique(x)) > 0.95 * x.size  # 24 bits


def test_paths_seeds_and_neighbours_are_uncorrelated():
    """Every pair of 6 paths and 3 seeds, rows, and an array with itself moved by 1, 2 or a row."""
    flat = ParamSpec((64, 512), ("embed", "ffn"), normal(1.0))
    names = [f"layers.{i}.mlp.{w}" for i in (0, 1, 10) for w in ("w_up", "w_gate")]
    draws = np.stack([init_array(flat, name, seed).ravel() for name in names for seed in (0, 1, 2)])
    correlation = np.corrcoef(draws)
    limit = 5 / np.sqrt(flat.shape[0] * flat.shape[1])
    assert np.abs(correlation - np.eye(len(draws))).max() < limit
    for step in (1, 2, 512):
        assert np.abs((draws[:, step:] * draws[:, :-step]).mean(1)).max() < limit


def test_places_beyond_32_bits_have_numbers_of_their_own():
    place = np.arange(1000, dtype=np.uint64)
    low, high = (random.hash_normal(0, np.uint32(5), place + np.uint64(first)) for first in (0, 2**32))
    assert not (low == high).any() and abs(np.corrcoef(low, high)[0, 1]) < 0.16
    uniform = random.hash_uniform(0, np.uint32(5), place)
    assert uniform.min() > 0 and uniform.max() < 1


def test_ones_zeros_and_dtypes():
    for init, value in ((ones(), 1), (zeros(), 0)):
        out = init_array(ParamSpec((3, 2), ("embed", "ffn"), init), "w", 0, np.float16, (slice(1, 3), slice(0, 1)))
        assert out.dtype == np.float16 and out.shape == (2, 1) and (out == value).all()
    assert init_array(WIDE, "w", 0).dtype == np.float32


def test_every_dim_of_a_spec_has_a_name():
    with pytest.raises(AssertionError):
        ParamSpec((2, 3), ("embed",), ones())


TREE = {"a": [1, (2, {"b": 3})], "c": {}, "d": None}


def test_trees_keep_their_structure():
    assert tree_map(lambda x, y: (x, y), {"a": [1, 2]}, {"a": [3, 4]}) == {"a": [(1, 3), (2, 4)]}
    assert tree_paths(TREE) == [("a.0", 1), ("a.1.0", 2), ("a.1.1.b", 3), ("d", None)]
    assert unflatten(TREE, [5, 6, 7, 8]) == {"a": [5, (6, {"b": 7})], "c": {}, "d": 8}
    assert specs.count({"a": WIDE, "b": [np.zeros((2, 3))]}) == 6 * 5 * 7 + 6
    with pytest.raises(AssertionError, match="more leaves"):
        unflatten(TREE, range(5))


def test_uniform_values_fill_their_range_and_constants_are_what_they_say():
    values = init_array(ParamSpec((400, 50), ("embed", "rank"), specs.uniform(0.25)), "w", 1)
    assert -0.25 < values.min() < -0.24 and 0.24 < values.max() < 0.25 and abs(values.mean()) < 0.01
    assert np.array_equal(init_array(ParamSpec((2,), ("one",), specs.constant(3.0)), "w", 1), [3, 3])


def test_the_parts_of_a_tree_keep_their_paths_and_make_it_up_again():
    tree = {"a": 1, "layers": [{"w": 2, "b": 13}, {"w": 14, "b": 15}, {"w": 3, "b": 4}], "z": 12}
    small, large = trees.select(tree, lambda leaf: leaf < 10), trees.select(tree, lambda leaf: leaf >= 10)
    assert small == {"a": 1, "layers": {"0": {"w": 2}, "2": {"w": 3, "b": 4}}}
    assert dict(tree_paths(small)) | dict(tree_paths(large)) == dict(tree_paths(tree))
    assert trees.merge(tree, small, large) == trees.merge(tree, large, small) == tree
    assert trees.select(tree, lambda leaf: leaf > 99) is None and trees.merge(tree, tree, None) == tree
    assert trees.shallow(tree | {"layers": [{"x": {"w": 2}, "b": 13}]}) == {"a": 1, "layers": {"0": {"x.w": 2, "b": 13}}, "z": 12}
