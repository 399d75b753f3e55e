"""Reads and writes Hugging Face folders that `transformers` opens unchanged; parameters can be read slice by slice. NAMES is the one table
of names.

Our weights are (in, out) and Hugging Face's Linear stores (out, in), so weights are transposed. Source: modeling_qwen2,
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
from qwen3 import hf_files, hf_quantized
from qwen3.config import DTYPES, Qwen3Config, own_fields
from qwen3.hf_files import CODES
from qwen3.model import param_specs
from qwen3.quantization import scheme_of
from qwen3.schema import GenerationJson, checked

_LAYER = "model.layers.{layer}."
# Our path: (Hugging Face's name, transposed). A name with {expert} is one tensor per expert in the file; we stack them on dim 0.
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
    "score": ("score.weight", True),
}
OF_OURS = {"attention_out_norm", "mlp_out_norm", "moe.router_bias"}  # the ends of the paths that transformers does not know
IN_TRANSFORMERS = {path for path in NAMES if path.removeprefix("layers.{layer}.") not in OF_OURS}
# Fused experts, as transformers 5 has them in memory: gate_up_proj [E, 2F, D], in which the rows of the gate precede those of the up
# projection, and down_proj [E, D, F]. They are read, never written. Our key: (name, matrices fused into the tensor, number of ours in it).
FUSED = {
    "w_gate": (_LAYER + "mlp.experts.gate_up_proj", 2, 0),
    "w_up": (_LAYER + "mlp.experts.gate_up_proj", 2, 1),
    "w_down": (_LAYER + "mlp.experts.down_proj", 1, 0),
}
HEAD = NAMES["lm_head"][0]
_SHOWN = 4  # names in an error


class Source(NamedTuple):
    """The Hugging Face tensors that make up one parameter: their names and the shape that each of them has.

    transposed: whether the file has the last two dims swapped. stacked: whether there is one tensor per expert, which we stack on dim 0.
    fused_number: for a fused tensor, the number of our matrix among those in its dim 1; else None.
    """

    names: list
    shape: tuple
    transposed: bool
    stacked: bool
    fused_number: int | None = None


def source(path, shape, present=()):
    """Returns the Source of our parameter `path` of `shape`. present: the tensor names in a file, which show whether experts are fused.
    Raises ValueError for a parameter that NAMES lacks."""
    pattern, number = _pattern(path)
    if pattern not in NAMES:
        raise ValueError(f"the parameter {path} has no name in Hugging Face's files; add {pattern!r} to NAMES in qwen3/hf.py")
    name, transposed = NAMES[pattern]
    if "{expert}" not in name:
        return Source([name.format(layer=number)], shape[::-1] if transposed else shape, transposed, False)
    experts, rows, columns = shape
    fused, matrices, number_in_it = FUSED[path.rsplit(".", 1)[1]]
    fused = fused.format(layer=number)
    if fused in present:
        return Source([fused], (experts, matrices * columns, rows), True, False, number_in_it)
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


def read_config(folder):
    """Returns the Qwen3Config of a Hugging Face folder. Raises FileNotFoundError or ValueError naming the file."""
    path = Path(folder) / "config.json"
    return _config(hf_files.read_json(path), path)


def _config(found, path):
    """Returns the Qwen3Config of the JSON object `found` in the file `path`."""
    try:
        return Qwen3Config.from_hf(found, where=path)
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


class Reader:
    """An opened Hugging Face folder. Opening reads config.json and the headers, and checks names, shapes and dtypes. Quantised weights are
    read as float32 (qwen3/hf_quantized.py).

    dtype: the dtype that read() returns, "float32", "float16" or "bfloat16"; None keeps the dtype of each tensor. config: the Qwen3Config;
    its param_dtype is the dtype of the embedding. specs: the tree of ParamSpecs. paths: our path of every parameter. Raises
    FileNotFoundError or ValueError naming the file, the tensor and the fix.

    like: a Qwen3Config, for a reader of that model's parameters, which may be another one than the folder's config.json describes. A
    ValueError then names the parameters that differ; with partial=True they are left out of `paths`, and `left_out` is the text that lists
    them. head: False for a use that needs no logits: a model whose files have no head is then read as one that ties it to the embedding.
    """

    def __init__(self, path, dtype=None, like=None, partial=False, head=True):
        _check_dtype(dtype)
        self.folder, self._dtype = Path(path), dtype
        if not self.folder.is_dir():
            what = "is a file" if self.folder.exists() else "is missing"
            raise FileNotFoundError(f"{self.folder} {what}; give a folder with config.json and model.safetensors")
        path = self.folder / "config.json"
        found = hf_files.read_json(path)
        config = _config(found, path)
        self._files = hf_files.open_weights(self.folder)
        if scheme := scheme_of(found.get("quantization_config"), path):
            self._files = hf_quantized.with_floats(self.folder, self._files, scheme)
        if not head and HEAD not in self._files:
            config = config.replace(tie_embeddings=True)
        self._check_sizes(config)
        self.specs, self.left_out = param_specs(like or config), ""
        self._specs = dict(tree_paths(self.specs))
        if like is not None:
            self.left_out = self._keep_what_matches(like, partial)
        self._sources = {path: source(path, spec.shape, self._files) for path, spec in self._specs.items()}
        if like is None:
            self._check_names(config)
        self._check_entries()
        if (like or config).tie_embeddings and HEAD in self._files and "embed" in self._specs:
            self._check_tied()
        self.config = config.replace(param_dtype=self.dtype("embed")) if "embed" in self._specs else config

    @property
    def paths(self):
        return list(self._specs)

    def shape(self, path):
        """Returns the parameter's shape in our orientation."""
        return self._specs[path].shape

    def dtype(self, path):
        """Returns the dtype of read(path): "float32", "float16" or "bfloat16"."""
        name = self._sources[path].names[0]
        return self._dtype or self._files[name].dtype(name).name

    def read(self, path, index=None):
        """Reads the elements that `index` selects, and no others, as a numpy array. index: a tuple of slices in our orientation; None is
        all.

        Raises ValueError for an index outside the parameter, and for a value too large for float16.
        """
        index = _bounds(path, self.shape(path), index)
        origin, dtype = self._sources[path], self.dtype(path)
        if origin.stacked:
            out = np.empty([s.stop - s.start for s in index], hf_files.DTYPES[CODES[dtype]])
            for place, array in zip(out, self._arrays(origin.names[index[0]], index[1:], True)):
                hf_files.copy(cast(array, dtype, path), place)
            return out
        if origin.fused_number is not None:
            first = origin.fused_number * self.shape(path)[2]
            index = (*index[:2], slice(index[2].start + first, index[2].stop + first))
        (array,) = self._arrays(origin.names, index, origin.transposed)
        return cast(hf_files.in_c_order(array), dtype, path)

    def int8_group(self, path):
        """Returns how many inputs share a scale, where the file has a parameter in 8 bits or less and read_int8 can give its numbers; else
        None."""
        name = self._sources[path].names[0]
        file = self._files[name]
        return file.int8_group(name) if isinstance(file, hf_quantized.FloatWeights) else None

    def read_int8(self, path, index):
        """Reads a parameter that has an int8_group as it stands in ops/int8.py: (numbers int8 [..., O, I], scales float32 [..., O, G]) of
        the elements that `index` selects, slices of [..., O, I] that begin and end with a group."""
        origin = self._sources[path]
        names = origin.names[index[0]] if origin.stacked else origin.names
        found = [pair for file, group in groupby(names, key=self._files.get) for pair in file.int8_arrays(list(group), index[-2:])]
        return tuple(np.stack(part) if origin.stacked else part[0] for part in zip(*found))

    def _arrays(self, names, index, transposed):
        """Yields the elements of each tensor that `index` selects, in our orientation. transposed: whether the file has the last two dims
        swapped."""
        if transposed:
            index = (*index[:-2], index[-1], index[-2])
        for file, group in groupby(names, key=self._files.get):
            for array in file.arrays(group, index):
                yield rearrange(array, "... outputs inputs -> ... inputs outputs") if transposed else array

    def _check_sizes(self, config):
        """Raises ValueError if config.json has more layers or experts than the files have tensors, before specs of that size are built."""
        experts = 0 if any(name.endswith(".experts.gate_up_proj") for name in self._files) else config.num_experts
        counts = {
            f"num_hidden_layers={config.num_layers}": config.num_layers,
            f"num_experts={experts}": experts,
            f"num_experts={experts} in {len(config.moe_layers)} layers": experts * len(config.moe_layers),
        }
        for what, n in counts.items():
            if n > len(self._files):
                raise ValueError(f"{self.folder}: config.json has {what}, but there are {len(self._files)} tensors; are shards missing?")

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
        extra = [n for n in self._files.keys() - wanted if not self._is_ignored(n)]
        lists = {"missing": missing, "of another shape": other, "unknown": sorted(extra)}
        text = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in lists.items() if names)
        if text and not partial:
            raise ValueError(f"{self.folder} holds another model: {text}")
        if not self._specs:
            raise ValueError(f"{self.folder} has none of the model's parameters; give the folder of a model like it")
        return text

    def _is_ignored(self, name):
        """Whether a tensor that no parameter needs may be there: it changes nothing."""
        return name.endswith("rotary_emb.inv_freq") or hf_quantized.is_zero_bias(self._files, name)

    def _shape(self, name):
        return self._files[name].entries[name][1]

    def _check_names(self, config):
        wanted = {name for origin in self._sources.values() for name in origin.names}
        ignored = {"lm_head.weight"} if config.tie_embeddings else set()
        missing = sorted(wanted - self._files.keys())
        extra = sorted(n for n in self._files.keys() - wanted - ignored if not self._is_ignored(n))
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

    def _check_tied(self):
        """Of a tied model, a head in the file has to be the embedding, as it is not read. transformers 5 keeps one that differs."""
        embed, head = (self._files[name] for name in (NAMES["embed"][0], HEAD))
        entry, (rows, columns) = head.entries[HEAD], self.shape("embed")
        fix = "set tie_word_embeddings to false in config.json to keep that head, as transformers does, or remove the tensor"
        if entry.shape != (rows, columns) or entry.code not in hf_files.DTYPES:
            what = f"{entry.code} {list(entry.shape)}"
            raise ValueError(f"{head.path}: tie_word_embeddings=true, and {HEAD} is {what}, not the embedding; {fix}")
        step = max(1, hf_files.MAPPED_BYTES // (4 * columns))
        for start in range(0, rows, step):
            index = (slice(start, min(start + step, rows)),)
            a, b = embed.array(NAMES["embed"][0], index), head.array(HEAD, index)
            if not np.array_equal(a.astype(np.float32), b.astype(np.float32), equal_nan=True):
                raise ValueError(f"{head.path}: tie_word_embeddings=true, and {HEAD} differs from the embedding; {fix}")


def load(path, dtype=None):
    """A Hugging Face folder -> (Qwen3Config, nested dict of mindspore Tensors). Errors: see Reader; none comes after the parameters are
    read, but for a value too large for float16.

    dtype: "float32", "float16" or "bfloat16"; None keeps each tensor's own. config.param_dtype says which. A tied model's lm_head
    in the file must be equal to the embedding.
    """
    reader = Reader(path, dtype)
    return reader.config, unflatten(reader.specs, [Tensor.from_numpy(reader.read(p)) for p in reader.paths])


class _Output(NamedTuple):
    """One tensor to write: Hugging Face's name, dtype code and shape; our path, and the number of the expert or None."""

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
    """Writes params (Tensors, Parameters or numpy arrays, in the tree of param_specs(cfg)) as a folder that `transformers` opens.

    A leaf may be any object with a shape, a dtype and asnumpy(). asnumpy() is called once per leaf, in the order of the tree, after the
    previous leaf is written, so that only one leaf is in host memory. If dtypes differ, wide ones come first.
    dtype: "float32", "float16" or "bfloat16"; None keeps the dtype of each leaf. config.json stores the dtype of the embedding.
    tokenizer_dir: the folder from which the tokenizer's files and generation_config.json are copied; by default those in `path` are kept.
    max_shard_bytes: the largest file; a larger tensor gets a file of its own.
    `path` is replaced in one step when everything is on disk. Raises ValueError if `path` is not absent, empty or a model saved by this
    function.
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
        _add_eos(new / hf_files.GENERATION, cfg.eos_ids)
        arrays = _arrays([tensor for tensors in shards.values() for tensor in tensors], leaves)
        for name, tensors in shards.items():
            hf_files.write_tensors(new / name, [tensor[:3] for tensor in tensors], islice(arrays, len(tensors)))
        if len(shards) > 1:
            where = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
            total = sum(tensor.size for tensors in shards.values() for tensor in tensors)
            hf_files.write_json(new / hf_files.INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _unknown_elsewhere(cfg):
    """Yields a message for each option of the model that transformers does not know and so computes differently."""
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
    """Returns {path: leaf}, in the order of writing. Raises ValueError for a tree, shape or dtype that does not fit the config."""
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
    """Returns the files of a Hugging Face folder that save() copies: the tokenizer's files, and generation_config.json unless save() made
    it. Raises ValueError for a file that links outside of the folder."""
    files, generation = hf_files.tokenizer_files(folder), folder / hf_files.GENERATION
    if generation.is_file() and not hf_files.read_json(generation).get("_from_model_config"):
        files.append(hf_files.inside(folder, generation.name))
    return files


def _carried(folder, tokenizer_dir):
    if tokenizer_dir and not hf_files.tokenizer_files(Path(tokenizer_dir)):
        raise FileNotFoundError(
            f"tokenizer_dir={tokenizer_dir} has none of {', '.join(hf_files.TOKENIZER_FILES)}; give the tokenizer's folder"
        )
    return carried_files(Path(tokenizer_dir or folder))


def _shards(leaves, dtype, max_bytes):
    """Returns {file name: [_Output]}. A file has at most max_bytes, or one tensor."""
    if max_bytes <= 0:
        raise ValueError(f"max_shard_bytes={max_bytes} must be above 0")
    shards, size = [[]], 0
    for path, leaf in leaves.items():
        code, origin = CODES[dtype or _dtype(leaf)], source(path, tuple(leaf.shape))
        for i, name in enumerate(origin.names):
            tensor = _Output(name, code, origin.shape, path, i if origin.stacked else None, origin.transposed)
            if shards[-1] and size + tensor.size > max_bytes:
                shards.append([])
                size = 0
            shards[-1].append(tensor)
            size += tensor.size
    if len(shards) == 1:
        return {hf_files.WEIGHTS: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": tensors for i, tensors in enumerate(shards, 1)}


def _arrays(tensors, leaves):
    """Yields the arrays to write, in order. One leaf at a time is in host memory."""
    for path, group in groupby(tensors, key=lambda tensor: tensor.path):
        host = None  # frees this leaf before the next one is made
        host = leaves[path].asnumpy() if hasattr(leaves[path], "asnumpy") else np.asarray(leaves[path])
        for tensor in group:
            array = cast(host if tensor.expert is None else host[tensor.expert], hf_files.DTYPES[tensor.code].name, path)
            yield array.T if tensor.transposed else array
            array = None


def _write_configs(folder, cfg):
    config = cfg.to_hf()
    hf_files.write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
    if ids:
        hf_files.write_json(folder / hf_files.GENERATION, {"_from_model_config": True, **ids})


def _add_eos(path, eos_ids):
    """Adds the config's eos ids to those of a generation_config.json that came along: transformers reads only the latter."""
    if not path.is_file():
        return
    given = hf_files.read_json(path)
    found = checked(GenerationJson, given, path).eos_token_id
    found = found if isinstance(found, list) else [] if found is None else [found]
    if new := [i for i in eos_ids if i not in found]:
        both = [*found, *new]
        hf_files.write_json(path, {**given, "eos_token_id": both if len(both) > 1 else both[0]})


def _check_dtype(dtype):
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")


def _dtype(leaf):
    return str(leaf.dtype).lower()  # MindSpore prints BFloat16


def cast(array, dtype, path):
    """Returns a numpy array in the dtype of that name. Raises ValueError, naming `path`, for a value too large for float16."""
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
    """Returns `index` with a start and a stop for every dim. Raises ValueError if it is not inside `shape`."""
    index = tuple(index or ()) + (slice(None),) * (len(shape) - len(index or ()))
    out = tuple(slice(s.start or 0, n if s.stop is None else s.stop) for s, n in zip(index, shape))
    inside = all(0 <= s.start <= s.stop <= n for s, n in zip(out, shape)) and all(s.step in (None, 1) for s in index)
    if len(index) != len(shape) or not inside:
        raise ValueError(f"index={index} is not inside {path} of shape {list(shape)}; give one slice with step 1 per dim")
    return out


def _some(names):
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
