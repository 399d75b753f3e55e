"""Reads the tensors of quantised Hugging Face folders as float32 weights: GPTQ, AWQ (gemm) and compressed-tensors.

A quantised module has no tensor `weight`, but integers, scales and zero points: weight[n, k] = (q - zero) * scale, where zero and scale
belong to the group of input k. With pf = 32 / bits numbers in an int32, the lowest bits first, the tensors are, for N outputs, K inputs
and G groups:

    gptq            qweight [K / pf, N], qzeros [G, N / pf], scales [G, N], g_idx [K]: the group of each input
    awq             qweight [K, N / 8], qzeros [G, N / 8], scales [G, N]; the 8 numbers of an int32 are those of columns AWQ_ORDER
    pack-quantized  weight_packed [N, K / pf], weight_scale [N, G], weight_shape [2] = N, K; weight_zero_point [N / pf, G], where there are
                    zero points, packed along N; numbers and zero points are stored plus 2 ** (bits - 1)
    int-quantized   weight int8 [N, K], weight_scale [N, G], and perhaps weight_zero_point int8 [N, G]

Sources: AutoGPTQ's qlinear_cuda.py (QuantLinear.pack and forward), AutoAWQ's packing_utils.py and WQLinear_GEMM, compressed-tensors'
pack_quantized.py (pack_to_int32) and naive_quantized.py.
"""

import math
from itertools import groupby
from pathlib import Path

import numpy as np

from ops.int8 import group_of
from qwen3.hf_files import DTYPES, Entry

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column, of 8 neighbours, of each number in an int32
FLOATS = tuple(DTYPES)
PARTS = {  # method: {part of a module: dtype codes}, and the part that every quantised module has
    "gptq": ({"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS, "g_idx": ("I32",)}, "qweight"),
    "awq": ({"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS}, "qweight"),
    "pack-quantized": (
        {
            "weight_packed": ("I32",),
            "weight_scale": FLOATS,
            "weight_shape": ("I64", "I32"),
            "weight_zero_point": ("I32", "I8"),
            "weight_g_idx": ("I32",),
        },
        "weight_packed",
    ),
    "int-quantized": (
        {"weight": ("I8",), "weight_scale": FLOATS, "weight_zero_point": ("I8",), "weight_g_idx": ("I32",)},
        "weight_scale",
    ),
}
MAY_LACK = ("g_idx", "weight_zero_point", "weight_g_idx")


def with_floats(folder, files, scheme):
    """Returns {tensor name: file} in which the tensors of each quantised module are replaced by `weight`, a float32 tensor of a
    FloatWeights. files: the same of the folder's own tensors. scheme: a qwen3.quantization.Scheme.

    Raises ValueError that names the tensor for one that is missing, or that has a wrong dtype or shape.
    """
    parts, mark = PARTS[scheme.method]
    modules = [name.removesuffix(f".{mark}") for name in files if name.endswith(f".{mark}")]
    if not modules:
        raise ValueError(f"{folder}: config.json says that its weights are quantised ({scheme.method}), and no tensor ends in .{mark}")
    weights = FloatWeights(folder, files, scheme, modules)
    own = {f"{module}.{part}" for module in modules for part in parts}
    return {**{name: file for name, file in files.items() if name not in own}, **dict.fromkeys(weights.entries, weights)}


def is_zero_bias(files, name):
    """Whether a tensor is a bias of zeros of a quantised module, as some versions of AutoGPTQ write for modules that have none."""
    weights = files.get(f"{name.removesuffix('.bias')}.weight")
    return name.endswith(".bias") and isinstance(weights, FloatWeights) and not files[name].array(name).astype(np.float32).any()


class FloatWeights:
    """The weights [N, K] of quantised modules, with the interface of hf_files.TensorFile: entries, path, dtype(), array() and arrays()."""

    def __init__(self, folder, files, scheme, modules):
        self.path, self._files, self._scheme, self.entries, self._has = Path(folder), files, scheme, {}, {}
        for module in modules:
            self._has[module] = [part for part in PARTS[scheme.method][0] if f"{module}.{part}" in files]
            self._check_parts(module)
        packed = scheme.method == "pack-quantized"
        given = self._each(modules, "weight_shape", ()) if packed else (None for _ in modules)  # in one go: there may be thousands
        for module, shape in zip(modules, given):
            shape = self._shape(module, shape.tolist() if packed else None)
            self._check_shapes(module, *shape)
            self.entries[f"{module}.weight"] = Entry("F32", shape, 0, 4 * math.prod(shape))

    def dtype(self, name):
        return DTYPES["F32"]

    def array(self, name, index=()):
        """Returns the elements of one weight that `index`, a tuple of slices of step 1, selects; () is all."""
        (array,) = self.arrays([name], index)
        return array

    def arrays(self, names, index=()):
        """Yields array(name, index) for each name. The weights have one shape."""
        modules = [name.removesuffix(".weight") for name in names]
        for _, alike in groupby(modules, key=self._has.get):  # which have the same parts, so that each kind is read in one go
            for numbers, scale, group in self._read(list(alike), index):
                yield numbers.astype(np.float32) * scale[:, group]

    def int8_group(self, name):
        """Returns how many inputs share a scale where the numbers of a weight fit in int8 (ops/int8.py); None where they do not, as the
        inputs of a group are no neighbours, or as 8 bits less a zero point take 9."""
        if self._scheme.ordered or (self._scheme.bits == 8 and not self._scheme.symmetric):
            return None
        inputs = self._scheme.group or self.entries[name].shape[1]
        return group_of(inputs) if self.entries[name].shape[1] % inputs == 0 else None

    def int8_arrays(self, names, index):
        """Yields (numbers int8 [n, k], scales float32 [n, k / int8_group(name)]) for each name, with the values of arrays(). index: slices
        that begin and end with a group. Raises ValueError for numbers that do not fit, as sym=true promises."""
        each = self.int8_group(names[0])
        for name, (numbers, scale, group) in zip(names, self._read([name.removesuffix(".weight") for name in names], index)):
            if numbers.size and (numbers.min() < -128 or numbers.max() > 127 or (group != np.repeat(group[::each], each)).any()):
                raise ValueError(f"{self.path}: {name} has zero points or groups that config.json does not tell; use --weights=float")
            if not np.isfinite(scale).all():
                raise ValueError(f"{self.path}: {name} has scales that are NaN or infinite; copy the file again")
            yield numbers.astype(np.int8), scale[:, group[::each]]

    def _read(self, modules, index):
        """Yields (numbers less zero points [n, k], scales float32 [n, G], the group of each input [k]) of the selected part of each
        module."""
        N, K = self.entries[f"{modules[0]}.weight"].shape
        rows, columns = (slice(*s.indices(size)[:2]) for s, size in zip((*index, slice(None), slice(None)), (N, K)))
        read = {"gptq": self._gptq, "awq": self._awq, "pack-quantized": self._packed, "int-quantized": self._integers}
        yield from read[self._scheme.method](modules, rows, columns)

    def _gptq(self, modules, rows, columns):
        pf, G = 32 // self._scheme.bits, self._groups(modules[0])
        numbers = self._each(modules, "qweight", (_packed(columns, pf), rows))
        zeros = self._each(modules, "qzeros", (slice(0, G), _packed(rows, pf)))
        scales, order = self._each(modules, "scales", (slice(0, G), rows)), self._orders(modules, "g_idx", columns)
        for q, z, scale, group in zip(numbers, zeros, scales, order):
            q = _unpack(q, self._scheme.bits, 0, columns).T
            z = (_unpack(z, self._scheme.bits, 1, rows) + self._scheme.offset).T
            yield q - z[:, group], scale.astype(np.float32).T, group

    def _awq(self, modules, rows, columns):
        G = self._groups(modules[0])
        numbers = self._each(modules, "qweight", (columns, _packed(rows, 8)))
        zeros = self._each(modules, "qzeros", (slice(0, G), _packed(rows, 8)))
        scales, order = self._each(modules, "scales", (slice(0, G), rows)), self._orders(modules, None, columns)
        for q, z, scale, group in zip(numbers, zeros, scales, order):
            q, z = _unpack(q, 4, 1, rows, AWQ_ORDER).T, _unpack(z, 4, 1, rows, AWQ_ORDER).T
            yield q - z[:, group], scale.astype(np.float32).T, group

    def _packed(self, modules, rows, columns):
        bits, G = self._scheme.bits, self._groups(modules[0])
        numbers = self._each(modules, "weight_packed", (rows, _packed(columns, 32 // bits)))
        for q, (z, scale, group) in zip(numbers, self._scaled(modules, rows, columns, G)):
            yield _unpack(q, bits, 1, columns) - (1 << (bits - 1)) - z[:, group], scale, group

    def _integers(self, modules, rows, columns):
        numbers = self._each(modules, "weight", (rows, columns))
        for q, (z, scale, group) in zip(numbers, self._scaled(modules, rows, columns, self._groups(modules[0]))):
            yield q.astype(np.int32) - z[:, group], scale, group

    def _scaled(self, modules, rows, columns, G):
        """Yields (zero points int32 [n, G], scales float32 [n, G], groups [k]) of modules of compressed-tensors."""
        one, bits = self._scheme.group == 0, self._scheme.bits
        scales = self._each(modules, "weight_scale", () if one else (rows, slice(0, G)))
        order, zeros = self._orders(modules, "weight_g_idx", columns), (None for _ in modules)
        name = f"{modules[0]}.weight_zero_point"
        packed = name in self._files and self._files[name].entries[name].code == "I32"
        if name in self._files:
            part = () if one else (_packed(rows, 32 // bits) if packed else rows, slice(0, G))
            zeros = self._each(modules, "weight_zero_point", part)
        count = rows.stop - rows.start
        for z, scale, group in zip(zeros, scales, order):
            scale = np.broadcast_to(scale.astype(np.float32).reshape(-1, G), (count, G))
            if z is None:
                z = np.zeros((1, 1), np.int32)
            elif packed:
                z = _unpack(z, bits, 0, rows) - (1 << (bits - 1))
            yield np.broadcast_to(z.astype(np.int32).reshape(-1, z.shape[-1]), (count, G)), scale, group

    def _orders(self, modules, part, columns):
        """Yields the group of each selected input of each module."""
        K, G = self.entries[f"{modules[0]}.weight"].shape[1], self._groups(modules[0])
        if part is None or part not in self._has[modules[0]]:
            size = self._scheme.group or K
            for _ in modules:
                yield np.arange(columns.start, columns.stop) // size
            return
        for module, group in zip(modules, self._each(modules, part, (columns,))):
            if group.size and not 0 <= group.min() <= group.max() < G:
                name = f"{module}.{part}"
                raise ValueError(f"{self._files[name].path}: tensor {name} names groups outside 0..{G - 1}; fetch the file again")
            yield group

    def _each(self, modules, part, index):
        """Yields the elements of a part of each module; neighbours in one file are read in one go."""
        for file, names in groupby((f"{module}.{part}" for module in modules), key=self._files.get):
            yield from file.arrays(names, index)

    def _groups(self, module):
        """Returns the number of groups G of a module."""
        K, size = self.entries[f"{module}.weight"].shape[1], self._scheme.group
        return -(-K // size) if size else 1

    def _check_parts(self, module):
        """Raises ValueError for a part of a module that is missing, or that has a wrong dtype or number of dims."""
        codes, mark = PARTS[self._scheme.method]
        for part in codes:
            needed = part not in MAY_LACK
            needed = needed or (part in ("g_idx", "weight_g_idx") and self._scheme.ordered)
            needed = needed or (part == "weight_zero_point" and not self._scheme.symmetric)
            if part not in self._has[module]:
                if needed:
                    raise ValueError(f"{self.path}: tensor {module}.{part} is missing beside {module}.{mark}; is a shard missing?")
                continue
            entry = self._entry(module, part)
            allowed = ("I8",) if part == "weight_zero_point" and self._scheme.group == 0 else codes[part]
            if entry.code not in allowed:
                raise self._wrong(module, part, f"is {entry.code}", f"has to be {' or '.join(allowed)}")
            rank = 1 if part in ("g_idx", "weight_g_idx", "weight_shape") else 2
            if len(entry.shape) != rank and not (self._scheme.group == 0 and part in ("weight_scale", "weight_zero_point")):
                raise self._wrong(module, part, f"has shape {list(entry.shape)}", f"has to have {rank} dims")

    def _shape(self, module, given):
        """Returns the shape (N, K) of a module's weight. given: the numbers in weight_shape, where there are some."""
        pf = 32 // self._scheme.bits
        if self._scheme.method == "gptq":
            words, N = self._entry(module, "qweight").shape
            return N, words * pf
        if self._scheme.method == "awq":
            K, words = self._entry(module, "qweight").shape
            return words * pf, K
        if self._scheme.method == "int-quantized":
            return self._entry(module, "weight").shape
        N, words = self._entry(module, "weight_packed").shape
        if len(given) != 2 or given[0] != N or not pf * (words - 1) < given[1] <= pf * words:
            raise self._wrong(module, "weight_shape", f"holds {given}", f"has to fit {module}.weight_packed of {[N, words]}")
        return N, given[1]

    def _check_shapes(self, module, N, K):
        """Raises ValueError for a part of a module whose shape does not fit a weight [N, K]."""
        pf, size, compressed = 32 // self._scheme.bits, self._scheme.group, self._scheme.method in ("pack-quantized", "int-quantized")
        if compressed and size and K % size:
            raise ValueError(f"{self.path}: {module} has {K} inputs, which group_size={size} does not divide")
        G = -(-K // size) if size else 1
        packed_zeros = "weight_zero_point" in self._has[module] and self._entry(module, "weight_zero_point").code == "I32"
        wanted = {
            "qzeros": (G, -(-N // pf)),
            "scales": (G, N),
            "g_idx": (K,),
            "weight_scale": (N, G),
            "weight_zero_point": (-(-N // pf) if packed_zeros else N, G),
            "weight_g_idx": (K,),
        }
        for part in self._has[module]:
            shape = self._entry(module, part).shape
            if size == 0 and part in ("weight_scale", "weight_zero_point"):
                if math.prod(shape) != 1:
                    raise self._wrong(module, part, f"has shape {list(shape)}", "has to have one element")
            elif part in wanted and shape != wanted[part]:
                raise self._wrong(module, part, f"has shape {list(shape)}", f"has to have {list(wanted[part])}")

    def _entry(self, module, part):
        name = f"{module}.{part}"
        return self._files[name].entries[name]

    def _wrong(self, module, part, what, wanted):
        name = f"{module}.{part}"
        return ValueError(f"{self._files[name].path}: tensor {name} {what} and {wanted}; is config.json of these weights?")


def _packed(part, pf):
    """Returns the slice of the int32 that hold the numbers of a slice."""
    return slice(part.start // pf, -(-part.stop // pf))


def _unpack(words, bits, axis, part, order=None):
    """Returns the numbers of the slice `part`, int32, from the words int32 of _packed(part) along an axis. order: the place of each number
    of a word among its neighbours, if not their own order."""
    pf = 32 // bits
    places = order or range(pf)
    out = np.empty((*words.shape, pf), np.int32)
    for i, place in enumerate(places):
        out[..., place] = (words >> (bits * i)) & ((1 << bits) - 1)
    out = np.moveaxis(out, -1, axis + 1)
    shape = list(words.shape)
    shape[axis] *= pf
    first = part.start - part.start // pf * pf
    numbers = out.reshape(shape)
    return numbers[first : first + part.stop - part.start] if axis == 0 else numbers[:, first : first + part.stop - part.start]
