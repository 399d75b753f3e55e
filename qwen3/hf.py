"""Weights to and from Hugging Face folders that `transformers` opens unchanged, whole or by slices. NAMES is the one table of names.

Weights here are (in, out); Hugging Face's Linear keeps (out, in), so they are transposed on the way. Source: modeling_qwen2,
modeling_qwen3 and modeling_qwen3_moe of transformers 4 and 5.
"""

import re
import warnings
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from einops import rearrange
from mindspore import Tensor

from parallel.trees import tree_paths, unflatten
from qwen3 import hf_files
from qwen3.config import DTYPES, Qwen3Config, own_fields
from qwen3.hf_files import CODES
from qwen3.model import param_specs

_LAYER = "model.layers.{layer}."
# Our path: (Hugging Face's name, transposed). {expert}: one tensor an expert there, stacked on dim 0 here.
NAMES = {
    "embed": ("model.embed_tokens.weight", False),
    "layers.{layer}.attention_norm": (_LAYER + "input_layernorm.weight", False),
    "layers.{layer}.attention_out_norm": (_LAYER + "self_attn.out_norm.weight", False),
    "layers.{layer}.mlp_out_norm": (_LAYER + "mlp.out_norm.weight", False),
    "layers.{layer}.attention.wq": (_LAYER + "self_attn.q_proj.weight", True),
    "layers.{layer}.attention.wk": (_LAYER + "self_attn.k_proj.weight", True),
    "layers.{layer}.attention.wv": (_LAYER + "self_attn.v_proj.weight", True),
    "layers.{layer}.attention.wo": (_LAYER + "self_attn.o_proj.weight", True),
    "layers.{layer}.attention.bq": (_LAYER + "self_attn.q_proj.bias", False),
    "layers.{layer}.attention.bk": (_LAYER + "self_attn.k_proj.bias", False),
    "layers.{layer}.attention.bv": (_LAYER + "self_attn.v_proj.bias", False),
    "layers.{layer}.attention.q_norm": (_LAYER + "self_attn.q_norm.weight", False),
    "layers.{layer}.attention.k_norm": (_LAYER + "self_attn.k_norm.weight", False),
    "layers.{layer}.mlp_norm": (_LAYER + "post_attention_layernorm.weight", False),
    "layers.{layer}.mlp.w_gate": (_LAYER + "mlp.gate_proj.weight", True),
    "layers.{layer}.mlp.w_up": (_LAYER + "mlp.up_proj.weight", True),
    "layers.{layer}.mlp.w_down": (_LAYER + "mlp.down_proj.weight", True),
    "layers.{layer}.moe.router": (_LAYER + "mlp.gate.weight", True),
    "layers.{layer}.moe.router_bias": (_LAYER + "mlp.gate.e_score_correction_bias", False),
    "layers.{layer}.moe.w_gate": (_LAYER + "mlp.experts.{expert}.gate_proj.weight", True),
    "layers.{layer}.moe.w_up": (_LAYER + "mlp.experts.{expert}.up_proj.weight", True),
    "layers.{layer}.moe.w_down": (_LAYER + "mlp.experts.{expert}.down_proj.weight", True),
    "final_norm": ("model.norm.weight", False),
    "lm_head": ("lm_head.weight", False),
}
OF_OURS = {"attention_out_norm", "mlp_out_norm", "moe.router_bias"}  # the ends of the paths that transformers does not know
IN_TRANSFORMERS = {path for path in NAMES if path.removeprefix("layers.{layer}.") not in OF_OURS}
# transformers 5 in memory: gate_up_proj [E, 2F, D], the gate's rows before the up's, and down_proj [E, D, F]. Read, never written.
FUSED = {
    "w_gate": (_LAYER + "mlp.experts.gate_up_proj", 2, 0),
    "w_up": (_LAYER + "mlp.experts.gate_up_proj", 2, 1),
    "w_down": (_LAYER + "mlp.experts.down_proj", 1, 0),
}
_SHOWN = 4  # names in an error


class Source(NamedTuple):
    """The tensors of Hugging Face that make up one parameter: their names and common shape. stacked: one an expert.

    part: None, or which of the equal parts of the fused tensor's dim 1.
    """

    names: list
    shape: tuple
    transposed: bool
    stacked: bool
    part: int | None = None


def source(path, shape, present=()):
    """The Source of our parameter `path` of `shape`; `present`: the names in a file, which decide whether experts are fused. Raises
    ValueError for a parameter that NAMES lacks."""
    pattern, number = _pattern(path)
    if pattern not in NAMES:
        raise ValueError(f"the parameter {path} has no name in Hugging Face's files; add {pattern!r} to NAMES in qwen3/hf.py")
    name, transposed = NAMES[pattern]
    if "{expert}" not in name:
        return Source([name.format(layer=number)], shape[::-1] if transposed else shape, transposed, False)
    experts, rows, columns = shape
    fused, parts, part = FUSED[path.rsplit(".", 1)[1]]
    fused = fused.format(layer=number)
    if fused in present:
        return Source([fused], (experts, parts * columns, rows), True, False, part)
    return Source([name.format(layer=number, expert=e) for e in range(experts)], (columns, rows), True, True)


def _pattern(path):
    """(the key of NAMES, the layer's number as text or None) of a parameter."""
    layer = re.match(r"layers\.(\d+)\.", path)
    return (path, None) if layer is None else (f"layers.{{layer}}.{path[layer.end() :]}", layer[1])


def check_names(cfg):
    """Raises ValueError for a model with a parameter that NAMES lacks, which save() could not write."""
    for path, spec in tree_paths(param_specs(cfg)):
        source(path, spec.shape)


def who_opens(cfg):
    """Words on a saved folder: whether transformers computes the same model from it."""
    return "which transformers opens" if not list(_unknown_elsewhere(cfg)) else "which transformers opens as another model; see the warning"


class Reader:
    """An opened Hugging Face folder; opening reads config.json and the headers, and checks names, shapes and dtypes.

    dtype: what read() gives, "float32", "float16" or "bfloat16"; None is each tensor's own. config: the Qwen3Config, with param_dtype that
    of the embedding. specs: the tree of ParamSpec. paths: our path of every parameter. Raises FileNotFoundError or ValueError naming the
    file, the tensor and the fix.

    like: a Qwen3Config, for a reader of that model's parameters, which may be another one than the folder's config.json describes. A
    ValueError then names the parameters that differ; with partial=True they are left out of `paths`, and `left_out` is the text that lists
    them.
    """

    def __init__(self, path, dtype=None, like=None, partial=False):
        _check_dtype(dtype)
        self.folder, self._dtype = Path(path), dtype
        if not self.folder.is_dir():
            what = "is a file" if self.folder.exists() else "is missing"
            raise FileNotFoundError(f"{self.folder} {what}; give a folder with config.json and model.safetensors")
        hf = hf_files.read_json(self.folder / "config.json")
        try:
            config = Qwen3Config.from_hf(hf)
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from None
        except (AttributeError, TypeError) as error:
            raise ValueError(f"{self.folder}: config.json has a value of the wrong type ({error})") from None
        self._files = hf_files.open_weights(self.folder)
        self._check_sizes(config)
        self.specs, self.left_out = param_specs(like or config), ""
        self._specs = dict(tree_paths(self.specs))
        if like is not None:
            self.left_out = self._keep_what_matches(like, partial)
        self._sources = {path: source(path, spec.shape, self._files) for path, spec in self._specs.items()}
        if like is None:
            self._check_names(config)
        self._check_entries()
        self.config = config.replace(param_dtype=self.dtype("embed")) if "embed" in self._specs else config

    @property
    def paths(self):
        return list(self._specs)

    def shape(self, path):
        """The parameter's shape in our orientation."""
        return self._specs[path].shape

    def dtype(self, path):
        """The dtype that read() gives: "float32", "float16" or "bfloat16"."""
        name = self._sources[path].names[0]
        return self._dtype or self._files[name].dtype(name).name

    def read(self, path, index=None):
        """A numpy array of the part that `index` selects: a tuple of slices in our orientation; None is all. Nothing else is read.

        Raises ValueError for a value too large for float16.
        """
        index = _bounds(path, self.shape(path), index)
        origin, dtype = self._sources[path], self.dtype(path)
        if origin.stacked:
            out = np.empty([s.stop - s.start for s in index], hf_files.DTYPES[CODES[dtype]])
            for place, array in zip(out, self._arrays(origin.names[index[0]], index[1:], True)):
                place[...] = cast(array, dtype, path)
            return out
        if origin.part is not None:
            first = origin.part * self.shape(path)[2]
            index = (*index[:2], slice(index[2].start + first, index[2].stop + first))
        (array,) = self._arrays(origin.names, index, origin.transposed)
        array = np.ascontiguousarray(array)
        return cast(array, dtype, path)

    def _arrays(self, names, index, transposed):
        """Yields the part of each tensor that `index` selects, in our orientation. transposed: the file has the last two dims swapped."""
        if transposed:
            index = (*index[:-2], index[-1], index[-2])
        for file, group in groupby(names, key=self._files.get):
            for array in file.arrays(group, index):
                yield rearrange(array, "... outputs inputs -> ... inputs outputs") if transposed else array

    def _check_sizes(self, config):
        """Before anything is built from numbers in config.json that no weights stand behind."""
        experts = 0 if any(name.endswith(".experts.gate_up_proj") for name in self._files) else config.num_experts
        for key, n in (("num_hidden_layers", config.num_layers), ("num_experts", experts)):
            if n > len(self._files):
                raise ValueError(f"{self.folder}: config.json has {key}={n}, but there are {len(self._files)} tensors; are shards missing?")

    def _keep_what_matches(self, like, partial):
        """Removes from _specs what the files do not have in this shape. Returns the text that lists it, and what only the files have."""
        missing, other, wanted = [], [], {"lm_head.weight"} if like.tie_embeddings else set()
        for path, spec in list(self._specs.items()):
            known = _pattern(path)[0] in NAMES
            origin = source(path, spec.shape, self._files) if known else None
            if not known or any(name not in self._files for name in origin.names):
                missing.append(path)
            elif shape := next((s for s in map(self._shape, origin.names) if s != origin.shape), None):
                other.append(f"{path} {list(shape)} instead of {list(origin.shape)} (in the file's order of dims)")
            else:
                wanted.update(origin.names)
                continue
            wanted.update(origin.names if known else ())
            del self._specs[path]
        extra = [n for n in self._files.keys() - wanted if not n.endswith("rotary_emb.inv_freq")]
        lists = {"missing": missing, "of another shape": other, "unknown": sorted(extra)}
        text = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in lists.items() if names)
        if text and not partial:
            raise ValueError(f"{self.folder} holds another model: {text}")
        if not self._specs:
            raise ValueError(f"{self.folder} has none of the model's parameters; give the folder of a model like it")
        return text

    def _shape(self, name):
        return self._files[name].entries[name][1]

    def _check_names(self, config):
        wanted = {name for origin in self._sources.values() for name in origin.names}
        ignored = {"lm_head.weight"} if config.tie_embeddings else set()
        missing = sorted(wanted - self._files.keys())
        extra = sorted(n for n in self._files.keys() - wanted - ignored if not n.endswith("rotary_emb.inv_freq"))
        found = [f"{what} {_some(names)}" for what, names in (("missing tensors", missing), ("unexpected tensors", extra)) if names]
        if found:
            raise ValueError(f"{self.folder}: {'; '.join(found)}. Do config.json and the weights belong to one model?")

    def _check_entries(self):
        for origin in self._sources.values():
            codes = set()
            for name in origin.names:
                file = self._files[name]
                code, shape = file.entries[name][:2]
                codes.add(code)
                if code not in hf_files.DTYPES:
                    raise ValueError(f"{file.path}: tensor {name} is {code}; convert it to one of {', '.join(hf_files.DTYPES)}")
                if shape != origin.shape:
                    raise ValueError(f"{file.path}: tensor {name} has shape {list(shape)}, but config.json makes it {list(origin.shape)}")
            if len(codes) > 1:
                raise ValueError(f"{self.folder}: {_some(origin.names)} have dtypes {', '.join(sorted(codes))}; convert them to one")


def load(path, dtype=None):
    """A Hugging Face folder -> (Qwen3Config, nested dict of mindspore Tensors). Errors: see Reader; none comes after data is read,
    but for a value too large for float16.

    dtype: "float32", "float16" or "bfloat16"; None keeps each tensor's own. config.param_dtype says which. A tied model's lm_head
    in the file is not read.
    """
    reader = Reader(path, dtype)
    return reader.config, unflatten(reader.specs, [Tensor.from_numpy(reader.read(p)) for p in reader.paths])


class _Part(NamedTuple):
    """One tensor to write: Hugging Face's name, dtype code and shape; our path, and which expert of it."""

    name: str
    code: str
    shape: tuple
    path: str
    expert: int | None
    transposed: bool

    @property
    def size(self):
        return int(np.prod(self.shape, dtype=np.int64)) * hf_files.DTYPES[self.code].itemsize


def save(path, cfg, params, *, tokenizer_dir=None, max_shard_bytes=5 * 10**9, dtype=None):
    """Write params (Tensors, Parameters or numpy arrays, in the tree of param_specs(cfg)) as a folder that `transformers` opens.

    A leaf may be anything with a shape, a dtype and asnumpy(), which is called once for each, in the tree's order, and not before the one
    ahead is written; wide dtypes come first, if they differ. So one leaf at a time is held in memory.
    dtype: "float32", "float16" or "bfloat16"; None keeps each leaf's own. config.json names that of the embedding. The tokenizer's
    files, and generation_config.json, come from tokenizer_dir, else stay what `path` has. Files hold at most max_shard_bytes, or one
    tensor. `path` is replaced in one step once all is on disk, and only if it is absent, empty or a model saved like this; else ValueError.
    """
    _check_dtype(dtype)
    folder = Path(path)
    leaves = _checked_leaves(cfg, params, dtype)
    carried = _carried(folder, tokenizer_dir)
    shards = _shards(leaves, dtype, max_shard_bytes)
    for message in _unknown_elsewhere(cfg):
        warnings.warn(f"{folder}: {message}", stacklevel=2)
    with hf_files.replacing(folder) as new:
        _write_configs(new, cfg.replace(param_dtype=dtype or _dtype(leaves["embed"])))
        for file in carried:
            hf_files.copy_file(file, new)
        arrays = _arrays([part for parts in shards.values() for part in parts], leaves)
        for name, parts in shards.items():
            hf_files.write_tensors(new / name, [part[:3] for part in parts], islice(arrays, len(parts)))
        if len(shards) > 1:
            where = {part.name: name for name, parts in shards.items() for part in parts}
            total = sum(part.size for parts in shards.values() for part in parts)
            hf_files.write_json(new / hf_files.INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _unknown_elsewhere(cfg):
    """What transformers will compute otherwise."""
    if own := [f"{name}={getattr(cfg, name)}" for name in ("qk_norm", "qkv_bias") if name in cfg.to_hf()]:
        yield f"transformers does not know {' and '.join(own)} of model_type={cfg.model_type}; its attention will differ"
    if cfg.router_bias:
        yield "transformers does not know mlp.gate.e_score_correction_bias and ignores it; its choice of experts will differ"
    dropped = dict.fromkeys(_pattern(path)[0] for path, _ in tree_paths(param_specs(cfg)))
    named = [NAMES[p][0].removeprefix(_LAYER) for p in dropped if p in NAMES and p not in IN_TRANSFORMERS and "router_bias" not in p]
    if named and not own_fields(cfg):
        yield f"transformers does not know {_some(named)} and ignores it; it computes another model"
    for name, value in own_fields(cfg).items():
        yield f"transformers does not know {name}={value} and ignores it; it computes another model"


def _checked_leaves(cfg, params, dtype):
    """{path: leaf}, in the order of writing. ValueError for a tree, shape or dtype that is not the model's."""
    specs, leaves = dict(tree_paths(param_specs(cfg))), dict(tree_paths(params))
    missing, extra = sorted(specs.keys() - leaves.keys()), sorted(leaves.keys() - specs.keys())
    if missing or extra:
        raise ValueError(f"params do not fit the config: missing {_some(missing) or 'none'}; unexpected {_some(extra) or 'none'}")
    for path, spec in specs.items():
        if tuple(leaves[path].shape) != spec.shape:
            raise ValueError(f"params: {path} has shape {list(leaves[path].shape)}, but the config makes it {list(spec.shape)}")
        if _dtype(leaves[path]) not in CODES:
            raise ValueError(f"params: {path} is {_dtype(leaves[path])}; cast it to one of {', '.join(CODES)}")
    # Wide dtypes first, so that each tensor of a file starts at a multiple of its item size.
    return {path: leaves[path] for path in sorted(specs, key=lambda path: -_itemsize(dtype or _dtype(leaves[path])))}


def _itemsize(dtype):
    return hf_files.DTYPES[CODES[dtype]].itemsize


def carried_files(folder):
    """The files of a Hugging Face folder beside config.json and the weights: the tokenizer's, and a generation_config.json that no save()
    made. ValueError for one that links outside."""
    files, generation = hf_files.tokenizer_files(folder), folder / hf_files.GENERATION
    if generation.is_file() and not hf_files.read_json(generation).get("_from_model_config"):
        files.append(hf_files.inside(folder, generation.name))
    return files


def _carried(folder, tokenizer_dir):
    if tokenizer_dir and not hf_files.tokenizer_files(Path(tokenizer_dir)):
        raise FileNotFoundError(f"tokenizer_dir={tokenizer_dir} has none of {', '.join(hf_files.TOKENIZER_FILES)}; give its folder")
    return carried_files(Path(tokenizer_dir or folder))


def _shards(leaves, dtype, max_bytes):
    """{file name: [_Part]}: files of at most max_bytes, or of one tensor."""
    if max_bytes <= 0:
        raise ValueError(f"max_shard_bytes={max_bytes} must be above 0")
    shards, size = [[]], 0
    for path, leaf in leaves.items():
        code, origin = CODES[dtype or _dtype(leaf)], source(path, tuple(leaf.shape))
        for i, name in enumerate(origin.names):
            part = _Part(name, code, origin.shape, path, i if origin.stacked else None, origin.transposed)
            if shards[-1] and size + part.size > max_bytes:
                shards.append([])
                size = 0
            shards[-1].append(part)
            size += part.size
    if len(shards) == 1:
        return {hf_files.WEIGHTS: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": parts for i, parts in enumerate(shards, 1)}


def _arrays(parts, leaves):
    """The arrays to write, in order; one leaf is in host memory at a time."""
    for path, group in groupby(parts, key=lambda part: part.path):
        host = None  # before the next one is made
        host = leaves[path].asnumpy() if hasattr(leaves[path], "asnumpy") else np.asarray(leaves[path])
        for part in group:
            array = cast(host if part.expert is None else host[part.expert], hf_files.DTYPES[part.code].name, path)
            yield array.T if part.transposed else array
            array = None


def _write_configs(folder, cfg):
    config = cfg.to_hf()
    hf_files.write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
    if ids:
        hf_files.write_json(folder / hf_files.GENERATION, {"_from_model_config": True, **ids})


def _check_dtype(dtype):
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")


def _dtype(leaf):
    return str(leaf.dtype).lower()  # mindspore prints BFloat16


def cast(array, dtype, path):
    target = hf_files.DTYPES[CODES[dtype]]
    if array.dtype == target:
        return array
    wide = array.astype(np.float32, copy=False)
    with np.errstate(over="ignore"):
        out = wide.astype(target, copy=False)
    if dtype == "float16" and np.isinf(out).sum() > np.isinf(wide).sum():
        raise ValueError(f"{path} has values above 65504, the largest of float16; use bfloat16 or float32")
    return out


def _bounds(path, shape, index):
    """`index` with a start and a stop for every dim."""
    index = tuple(index or ()) + (slice(None),) * (len(shape) - len(index or ()))
    out = tuple(slice(s.start or 0, n if s.stop is None else s.stop) for s, n in zip(index, shape))
    inside = all(0 <= s.start <= s.stop <= n for s, n in zip(out, shape)) and all(s.step in (None, 1) for s in index)
    if len(index) != len(shape) or not inside:
        raise ValueError(f"index={index} is not inside {path} of shape {list(shape)}; give one slice with step 1 a dim")
    return out


def _some(names):
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
