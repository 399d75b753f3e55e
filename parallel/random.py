"""Random numbers as a hash of (seed, key, position), on the host in numpy.

A number depends only on these three, so each rank can draw its own shard of an array, in any order, and gets the values of the whole array.
"""

import numpy as np


def pcg(x):
    """Returns the PCG-RXS-M-XS hash of uint32 numpy values. Source: O'Neill 2014; Jarzynski and Olano 2020."""
    state = x * np.uint32(747796405) + np.uint32(2891336453)
    word = ((state >> ((state >> np.uint32(28)) + np.uint32(4))) ^ state) * np.uint32(277803737)
    return (word >> np.uint32(22)) ^ word


def hash_bits(seed, key, place):
    """Returns uint32 values for a seed, a uint32 key and uint64 positions."""
    place = np.asarray(place, np.uint64)
    with np.errstate(over="ignore"):
        start = pcg(np.asarray(seed & 0xFFFFFFFF, np.uint32) ^ pcg(np.asarray(key, np.uint32)))
        low = pcg((place & np.uint64(0xFFFFFFFF)).astype(np.uint32) + start)
        return pcg(low ^ pcg((place >> np.uint64(32)).astype(np.uint32) + np.uint32(0x9E3779B9)))


def hash_uniform(seed, key, place):
    """Returns float32 values in (0, 1), of 24 random bits each, for a seed, a uint32 key and uint64 positions."""
    bits = hash_bits(seed, key, place)
    return ((bits >> np.uint32(8)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-24)


def hash_symmetric(seed, key, place):
    """Returns uniform float32 values in (-1, 1)."""
    return 2 * hash_uniform(seed, key, place) - 1


def hash_normal(seed, key, place):
    """Returns standard normal float32 values, one for each position, by the Box-Muller transform of two hashes."""
    place = np.asarray(place, np.uint64) * np.uint64(2)
    radius = np.sqrt(-2 * np.log(hash_uniform(seed, key, place)))
    return radius * np.cos(np.float32(2 * np.pi) * hash_uniform(seed, key, place + np.uint64(1)))
