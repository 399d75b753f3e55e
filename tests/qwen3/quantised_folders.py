"""Writes quantised Hugging Face folders: each format by its own rules, from numbers that are drawn here, beside the floats that they stand
for."""

import json

import numpy as np
from safetensors.numpy import load_file, save_file

from qwen3 import hf
from tests.tiny import random_params

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(numbers, bits, axis, order=None):
    """Unsigned numbers -> int32, 32 / bits of them in each along an axis, the first in the lowest bits. The last word is filled up."""
    pf = 32 // bits
    numbers = np.moveaxis(numbers, axis, -1)
    numbers = np.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, -numbers.shape[-1] % pf)])
    neighbours = numbers.reshape(*numbers.shape[:-1], -1, pf).astype(np.uint64)
    words = sum(neighbours[..., place] << np.uint64(bits * i) for i, place in enumerate(order or range(pf)))
    return np.ascontiguousarray(np.moveaxis(words.astype(np.uint32).view(np.int32), -1, axis))


class Module:
    """Random numbers of one quantised module: q [N, K], zero points z and scales s [N, G], the group of each input."""

    def __init__(self, rng, N, K, bits, group, order=False, symmetric=False):
        self.bits, self.size = bits, group or K
        G = -(-K // self.size)
        self.q = rng.integers(0, 1 << bits, (N, K))
        self.z = np.full((N, G), 1 << (bits - 1)) if symmetric else rng.integers(1, 1 << bits, (N, G))
        self.s = rng.uniform(0.01, 0.1, (N, G)).astype(np.float16)
        self.group = np.arange(K) // self.size
        if order:
            self.group = rng.permutation(self.group)
        self.floats = (self.q - self.z[:, self.group]).astype(np.float32) * self.s.astype(np.float32)[:, self.group]

    def gptq(self, offset):
        stored = (self.z - offset).T
        parts = {"qweight": pack(self.q, self.bits, 1).T, "qzeros": pack(stored, self.bits, 1), "scales": self.s.T}
        return {**parts, "g_idx": self.group.astype(np.int32)}

    def awq(self):
        numbers, zeros = pack(self.q.T, 4, 1, AWQ_ORDER), pack(self.z.T, 4, 1, AWQ_ORDER)
        return {"qweight": numbers, "qzeros": zeros, "scales": self.s.T}

    def packed(self, symmetric, order):
        parts = {"weight_packed": pack(self.q, self.bits, 1), "weight_scale": self.s, "weight_shape": np.array(self.q.shape, np.int64)}
        if not symmetric:
            parts["weight_zero_point"] = pack(self.z, self.bits, 0)
        return {**parts, "weight_g_idx": self.group.astype(np.int32)} if order else parts

    def integers(self, symmetric):
        half = 1 << (self.bits - 1)
        parts = {"weight": (self.q - half).astype(np.int8), "weight_scale": self.s}
        return parts if symmetric else {**parts, "weight_zero_point": (self.z - half).astype(np.int8)}


def gptq(bits=4, group=8, order=False, version="gptq", **more):
    config = {"quant_method": "gptq", "bits": bits, "group_size": group or -1, "desc_act": order, "checkpoint_format": version}
    return {**config, **more}, (bits, group, order, False), lambda module: module.gptq(1 if version == "gptq" else 0)


def awq(group=8, **more):
    config = {"quant_method": "awq", "bits": 4, "group_size": group or -1, "zero_point": True, "version": "gemm", **more}
    return config, (4, group, False, False), Module.awq


def compressed(form="pack-quantized", bits=4, group=8, order=False, symmetric=True, **more):
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group" if group else "channel", "group_size": group}
    weights = {**weights, "actorder": "group" if order else None, "dynamic": False, "observer": "minmax"}
    inputs = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"} if form == "int-quantized" else None
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}}
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"], "kv_cache_scheme": None}
    written = Module.integers if form == "int-quantized" else lambda module, s: module.packed(s, order)
    return {**config, **more}, (bits, group, order, symmetric), lambda module: written(module, symmetric)


def write(folder, cfg, form, seed=0):
    """Writes a model whose projections are quantised. form: of gptq(), awq() or compressed(). Returns {name of a weight: its floats}."""
    config, (bits, group, order, symmetric), parts_of = form
    hf.save(folder, cfg, random_params(cfg, seed))
    path, rng, floats, out = folder / "model.safetensors", np.random.default_rng(seed), {}, {}
    for name, array in load_file(path).items():
        if "_proj.weight" not in name:
            out[name] = array
            continue
        module = Module(rng, *array.shape, bits, group, order, symmetric)
        floats[name] = module.floats
        out.update({name.removesuffix("weight") + part: np.ascontiguousarray(x) for part, x in parts_of(module).items()})
    save_file(out, path)
    given = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**given, "quantization_config": config}))
    return floats
