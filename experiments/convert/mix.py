"""Mixes the weights of several models of one shape: their average, or the spherical interpolation of two.

Parameters are read one at a time from each model, and mixed in float32. Sources: Wortsman et al. 2022 (averages, "model soups"); Shoemake
1985 (slerp).
"""

import dataclasses

import numpy as np

from experiments.convert.weights import Leaf, bar, check_output, open_weights
from parallel.trees import tree_paths, unflatten
from qwen3 import hf
from qwen3.model import param_specs

METHODS = ("linear", "slerp")
PARALLEL = 1e-6  # 1 - |cosine| of two tensors below which slerp is the linear interpolation
MAY_DIFFER = ("param_dtype", "compute_dtype", "bos_id", "eos_id", "pad_id", "initializer_range")  # fields that change no weight's meaning


def average(sources, output, factors, dtype):
    """Writes the weighted average of models as a Hugging Face folder. factors: one for each, above 0; they are divided by their sum. Yields
    lines of text about the work done."""
    if len(sources) < 2:
        raise ValueError("average: give two models or more, such as RUN/checkpoints/step_000100 RUN/checkpoints/step_000200")
    factors = factors or [1.0] * len(sources)
    if len(factors) != len(sources) or not all(0 < factor < float("inf") for factor in factors):
        raise ValueError(f"--factors={','.join(f'{x:g}' for x in factors)}: give a number above 0 for each of the {len(sources)} models")
    shares = np.array(factors, np.float64) / sum(factors)
    how = ", ".join(f"{share:.3g} of {source}" for share, source in zip(shares, sources))
    return _mix(sources, output, dtype, lambda arrays: linear(arrays, shares), how)


def merge(sources, output, method, t, dtype):
    """Writes a model between two: at t=0 the first one, at t=1 the second one. method: one of METHODS. Yields lines of text."""
    if len(sources) != 2:
        raise ValueError(f"merge takes two models, and {len(sources)} are given; use average for more")
    if not 0 <= t <= 1:
        raise ValueError(f"--t={t:g} must be from 0, the first model, to 1, the second one")
    if method == "slerp":
        return _mix(sources, output, dtype, lambda arrays: slerp(*arrays, t), f"slerp at t={t:g}")
    return _mix(sources, output, dtype, lambda arrays: linear(arrays, (1 - t, t)), f"linear at t={t:g}")


def linear(arrays, shares):
    """The sum of arrays, each times its share, in float32. arrays: an iterable, of which one is in memory at a time."""
    total = None
    for array, share in zip(arrays, shares):
        part = np.float32(share) * array.astype(np.float32)
        total = part if total is None else total + part
    return total


def slerp(a, b, t):
    """The point at t on the arc from a to b, of which each is taken as one vector; its length is the interpolation of theirs. Parallel
    vectors, and vectors of zeros, are interpolated linearly."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    flat_a, flat_b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    sizes = np.linalg.norm(flat_a), np.linalg.norm(flat_b)
    cosine = flat_a @ flat_b / (sizes[0] * sizes[1]) if all(sizes) else 1.0
    if 1 - abs(cosine) < PARALLEL:
        return linear((a, b), (1 - t, t))
    angle = np.arccos(np.clip(cosine, -1, 1))
    of_a, of_b = np.sin((1 - t) * angle) / np.sin(angle), np.sin(t * angle) / np.sin(angle)
    size = (1 - t) * sizes[0] + t * sizes[1]
    return (size * (of_a * flat_a / sizes[0] + of_b * flat_b / sizes[1])).astype(np.float32).reshape(a.shape)


def _mix(sources, output, dtype, mixed, how):
    folder = check_output(output)
    models = [open_weights("inputs", source) for source in sources]
    first, specs = models[0], param_specs(models[0].config)
    for other in models[1:]:
        _check_alike(first, other)
    with bar("mix", sum(model.total_bytes for model in models)) as progress:
        leaves = [Leaf(models, path, progress, mixed, "float32") for path, _ in tree_paths(specs)]
        hf.save(folder, first.config, unflatten(specs, leaves), tokenizer_dir=first.tokenizer, dtype=dtype or first.config.param_dtype)
    yield from (f"read       {model}" for model in models)
    yield f"wrote      {folder}, {how}, {hf.who_opens(first.config)}; {first.describe_tokenizer()}"


def _check_alike(first, other):
    """Raises ValueError for models whose parameters are not the same ones, or whose numbers mean something else."""
    for path in sorted(first.arrays.keys() | other.arrays.keys()):
        shapes = [model.arrays[path][0] if path in model.arrays else None for model in (first, other)]
        if shapes[0] != shapes[1]:
            have, lack = ("is missing" if shape is None else f"has the shape {list(shape)}" for shape in shapes)
            raise ValueError(f"{path} {have} in {first.folder}, and {lack} in {other.folder}; give models of one shape")
    for field in dataclasses.fields(first.config):
        values = [getattr(model.config, field.name) for model in (first, other)]
        if field.name not in MAY_DIFFER and values[0] != values[1]:
            raise ValueError(f"{field.name}={values[0]} in {first.folder}, and {values[1]} in {other.folder}; give models of one kind")
