"""The commands of experiments.convert that write no weights: inspect, diff and verify."""

import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.convert.weights import bar
from ops import cache
from qwen3 import hf, hf_files
from qwen3.schema import IndexJson, checked

_SUM = re.compile(r"([0-9a-f]{64}) [ *](?:\./)?(.+)", re.IGNORECASE)


def inspect(weights, norms):
    """Returns lines of text: two about the weights, then a table with each array's name, shape, dtype and size; with `norms` also its norm,
    sqrt(sum of squares), and its largest absolute value."""
    parameters = [math.prod(shape) for name, (shape, _) in weights.arrays.items() if not name.startswith(("m/", "v/"))]
    arrays = f"{sum(parameters):,} parameters in {len(weights.arrays)} arrays, {_size(weights.total_bytes)}"
    width = max(map(len, weights.arrays))
    lines = [str(weights), f"{weights.config.model_type}: {arrays}; {weights.describe_tokenizer()}"]
    lines.append(f"{'array':{width}}  {'shape':20}  {'dtype':8}  {'size':>10}" + f"  {'norm':>10}  {'largest':>10}" * norms)
    with bar("inspect", weights.total_bytes * norms) as progress:
        for name, (shape, dtype) in weights.arrays.items():
            line = f"{name:{width}}  {'x'.join(map(str, shape)):20}  {dtype:8}  {_size(weights.nbytes(name)):>10}"
            if norms:
                norm, largest = _norm(weights, name, progress)
                line += f"  {norm:10.4g}  {largest:10.4g}"
            lines.append(line)
    return lines


def _size(nbytes):
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.2f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:,.2f} kB"


def _norm(weights, name, progress):
    """Returns an array's (norm, largest absolute value), read block by block and summed in float64."""
    squares, largest = 0.0, 0.0
    for block in weights.blocks(name):
        data = weights.read(name, block)
        progress.update(data.nbytes)
        data = data.astype(np.float32, copy=False).reshape(-1)
        squares += float(np.einsum("i,i->", data, data, dtype=np.float64))
        largest = max(largest, float(np.abs(data).max(initial=0)))
    return math.sqrt(squares), largest


class Difference(NamedTuple):
    """The difference of an array. absolute: max|a - b|. relative: absolute / max|a|. differing: how many of `count` elements differ."""

    name: str
    absolute: float
    relative: float
    differing: int
    count: int


def diff(a, b, dtype=None):
    """Compares two Weights. Returns ([Difference], largest relative one first; [text] about each array that only one has, or whose shapes
    differ).

    dtype: both are rounded to it first, or None. They are compared as float32. Two NaNs or two equal infinities are equal; a NaN or
    infinity differs infinitely from any other value.
    """
    names = [name for name in a.arrays if name in b.arrays and a.arrays[name][0] == b.arrays[name][0]]
    other = [f"{name} is only in {x.folder}" for x, y in ((a, b), (b, a)) for name in x.arrays if name not in y.arrays]
    other += [
        f"{name} is {list(a.arrays[name][0])} in {a.folder} and {list(b.arrays[name][0])} in {b.folder}"
        for name in a.arrays
        if name in b.arrays and name not in names
    ]
    with bar("diff", sum(map(a.nbytes, names))) as progress:
        found = [_difference(a, b, name, dtype, progress) for name in names]
    return sorted(found, key=lambda d: (-d.relative, d.name)), other


def describe(found, other, top, max_diff):
    """Returns (lines of text about the results of diff(), whether they exceed max_diff). top: arrays to show, 0 for all. max_diff: the
    largest relative difference that passes; None passes all."""
    width, shown = max([0, *(len(d.name) for d in found)]), found[: top or None]
    lines = [f"differs    {text}" for text in other]
    lines += [
        f"{d.name:{width}}  {d.relative:.3g} of the largest, {d.absolute:.3g}; {d.differing:,} of {d.count:,} elements" for d in shown
    ]
    largest = found[0].relative if found else 0.0
    lines.append(f"{sum(d.differing > 0 for d in found)} of {len(found)} arrays differ, by {largest:.3g} at most")
    return lines, max_diff is not None and (bool(other) or largest > max_diff)


def _difference(a, b, name, dtype, progress):
    absolute, largest, differing = 0.0, 0.0, 0
    for block in a.blocks(name):
        x = a.read(name, block)
        progress.update(x.nbytes)
        x, y = (hf.cast(hf.cast(v, dtype or v.dtype.name, name), "float32", name) for v in (x, b.read(name, block)))
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        with np.errstate(invalid="ignore", over="ignore"):
            apart = np.where(same, np.float32(0), np.abs(x - y))
        absolute = max(absolute, float(np.nan_to_num(apart, nan=np.inf, posinf=np.inf).max(initial=0)))
        largest = max(largest, float(np.abs(x[np.isfinite(x)]).max(initial=0)))
        differing += int(x.size - same.sum())
    relative = absolute / largest if largest else (math.inf if absolute else 0.0)
    return Difference(name, absolute, relative, differing, math.prod(a.arrays[name][0]))


def verify_native(weights):
    """Checks every byte of a checkpoint against its checksums. Returns [text], one for each error."""
    with bar("verify", weights.checked.nbytes) as progress:
        return weights.checked.verify(progress.update)


def verify_hugging_face(folder, sums):
    """Checks a Hugging Face folder that opens without errors: its sizes against the index, and its files against `sums`, a file that
    sha256sum wrote, or None. Returns [text], one for each error."""
    wrong, files = [], hf_files.open_weights(folder)
    used = {file.path.name: file for file in files.values()}
    if (folder / hf_files.INDEX).is_file() and hf_files.WEIGHTS not in used:
        total = checked(IndexJson, hf_files.read_json(folder / hf_files.INDEX), folder / hf_files.INDEX).metadata.get("total_size")
        found = sum(entry.stop - entry.start for file in used.values() for entry in file.entries.values())
        if total not in (None, found):
            wrong.append(f"{folder / hf_files.INDEX} gives total_size={total}, and the tensors have {found} bytes; fetch the folder again")
        unnamed = {name for file in used.values() for name in file.entries} - files.keys()
        wrong += [f"tensor {name} is in a file, but not in {hf_files.INDEX}; fetch the folder again" for name in sorted(unnamed)]
    stray = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in used)
    wrong += [f"{folder / name} is not used by the model in this folder; remove it, or fetch {hf_files.INDEX} again" for name in stray]
    return wrong + (_check_sums(folder, Path(sums), set(used)) if sums else [])


def _check_sums(folder, sums, needed):
    listed = read_sums(sums)
    wrong = [f"{name} is not in --sha256={sums}; give a list that has it" for name in sorted(needed - listed.keys())]
    paths = {name: hf_files.inside(folder, name) for name in listed}
    gone = [name for name, path in paths.items() if not path.is_file()]
    wrong += [f"{paths[name]}, listed in --sha256={sums}, is missing; fetch it again" for name in gone]
    there = {name: path for name, path in paths.items() if name not in gone}
    total = sum(path.stat().st_size for path in there.values())
    with bar("sha256", total) as progress:
        for name, path in there.items():
            found = cache.digest(path, progress.update)
            if found != listed[name]:
                wrong.append(f"{path} has sha256 {found}, and --sha256={sums} says {listed[name]}; fetch it again")
    return wrong


def read_sums(path):
    """Reads a file that sha256sum wrote. Returns {file name: sha256}. Raises ValueError for any other file."""
    if not path.is_file():
        raise ValueError(f"--sha256={path} is not a file; give one as `sha256sum *` writes it")
    out = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        match = _SUM.fullmatch(line)
        if line.strip() and not match:
            raise ValueError(
                f"--sha256={path}, line {number}: {line[:60]!r} is no line of sha256sum, 64 hexadecimal digits and a file name"
            )
        if match:
            out[match[2]] = match[1].lower()
    if not out:
        raise ValueError(f"--sha256={path} is empty; give one as `sha256sum *` writes it")
    return out
