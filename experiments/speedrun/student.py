"""Student's t test of one mean, from Python's own library. Source: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4."""

import math
import statistics


def p_below(values, target):
    """Returns the one-sided p value: how likely so low a mean of `values` is, if the true mean is the target. Needs two values or more.

    Values that are all equal have no spread to test by, so their p is 1.
    """
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    if spread == 0:
        return 1.0
    return upper_tail((target - mean) / (spread / math.sqrt(len(values))), len(values) - 1)


def upper_tail(t, freedom):
    """Returns P(T > t) of Student's t distribution with `freedom` degrees of freedom, a whole number above 0. Exact but for rounding, so
    that values below 1e-12 mean about 0."""
    angle = math.atan(t / math.sqrt(freedom))
    sin, cos = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = total = cos if odd else 1.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cos * cos * (k - 1) / k
        total += term
    if freedom == 1:
        total = 0.0
    between = 2 / math.pi * (angle + sin * total) if odd else sin * total  # P(-t < T < t), negative for a negative t
    return min(1.0, max(0.0, (1 - between) / 2))
