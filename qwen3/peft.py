"""Reads and writes adapters in the format of PEFT 0.21: adapter_config.json and adapter_model.safetensors.

Adapters of experts are stored one per expert, such as `experts.0.gate_proj`. PEFT converts them while loading for transformers 5.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parallel.trees import tree_paths
from qwen3 import hf, hf_files
from qwen3.config import TARGETS, Lora
from qwen3.model import param_specs
from qwen3.schema import AdapterJson, checked, short

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, FINGERPRINT = "base_model.model.", "base_fingerprint"
INITS = {"kaiming": True, "gaussian": "gaussian"}
EMBEDDING = f"{PREFIX}model.embed_tokens.base_layer.weight"  # the base's, which PEFT saves beside an adapter of the embedding
MERGE = (
    "merge it into its base with PEFT (model.merge_and_unload().save_pretrained(FOLDER)) and give that folder as the model,"
    " without an adapter"
)
# Keys of adapter_config.json whose value changes nothing here; of others only an empty value is taken.
WITHOUT_EFFECT = (
    *("peft_type", "task_type", "target_modules", "inference_mode", "revision", "auto_mapping", "peft_version", "exclude_modules"),
    *("megatron_core", "qalora_group_size", "runtime_config", "loftq_config", "eva_config", "ephemeral_gpu_offload"),
)
KEEP_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # values of init_lora_weights that do not change the base's weights


class Adapter(NamedTuple):
    """An opened adapter. lora: its Lora. read(path, slices) -> float32 numpy of a parameter of param_specs(cfg with that lora).
    base: the path or name of its base. fingerprint: see experiments/train/adapter.py; None where nobody noted it. embedding(slices): of the
    base's embedding that is saved beside it, float32; None where none is."""

    lora: Lora
    read: object
    base: str
    fingerprint: str | None
    embedding: object = None


def is_adapter(folder):
    return (Path(folder) / CONFIG).is_file()


def adapters(cfg):
    """Returns {path: spec} of the parameters of all adapters."""
    return {path: spec for path, spec in tree_paths(param_specs(cfg)) if ".lora." in f".{path}"}


def base_path(path):
    """Returns (path of the adapted weight, "a" or "b") for the path of an adapter's parameter."""
    parent, _, rest = f".{path}".rpartition(".lora.")
    key, which = rest.rsplit(".", 1)
    return f"{parent}.{key}".strip("."), which


def names(path, shape):
    """Returns PEFT's names for one of our adapter parameters: one name, or one per expert. PEFT stores each tensor transposed."""
    weight, which = base_path(path)
    if weight == "embed":
        return [f"{PREFIX}model.embed_tokens.lora_embedding_{which.upper()}"]
    found = hf.source(weight, shape).names
    return [f"{PREFIX}{name.removesuffix('.weight')}.lora_{which.upper()}.weight" for name in found]


def refuse_what_peft_cannot(cfg):
    """Raises ValueError, with the reason, for adapters that PEFT cannot represent."""
    targets = set(cfg.lora.targets)
    experts = {name.removeprefix("experts.") for name in targets if name.startswith("experts.")}
    mixed = 0 < len(cfg.moe_layers) < cfg.num_layers
    if mixed and targets & {"gate", "up", "down", "experts.gate", "experts.up", "experts.down"}:
        why = "PEFT names modules of dense layers and of experts alike (gate_proj, up_proj, down_proj), and this model has both"
    elif len(experts & {"gate", "up"}) == 1:
        why = "transformers fuses the experts' gate and up, and PEFT adapts both or neither; put both in lora.targets"
    elif experts & {"gate", "up"} and cfg.lora.rslora:
        why = "PEFT fuses the experts' gate and up into one adapter of twice the rank, which changes the scale that lora.rslora=true gives"
    elif cfg.router_bias and targets & {"router"}:
        why = "transformers does not know the router's bias (model_args.router_bias)"
    else:
        return
    raise ValueError(f"lora.targets={','.join(cfg.lora.targets)} cannot be saved in PEFT's format: {why}; use other lora.targets")


def save(folder, cfg, leaves, base, fingerprint):
    """Writes an adapter that PEFT loads, and replaces one that is already in the folder.

    leaves: {path: array, or an object with asnumpy(), which is called once, in order}. base: the path of the base model. fingerprint: of
    the base. Raises ValueError for adapters that PEFT cannot represent, and for a folder that contains anything else.
    """
    refuse_what_peft_cannot(cfg)
    found = adapters(cfg)
    modules = sorted({TARGETS[name][1] for name in cfg.lora.targets})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": cfg.lora.rank,
        "lora_alpha": cfg.lora.alpha,
        "lora_dropout": cfg.lora.dropout,
        "use_rslora": cfg.lora.rslora,
        "init_lora_weights": INITS[cfg.lora.init],
        "target_modules": modules,
        "bias": "none",
        "inference_mode": True,
    }
    entries = []
    for path, spec in found.items():
        shape = spec.shape[-2:][::-1]
        entries += [(name, "F32", shape) for name in names(path, spec.shape)]
    with hf_files.replacing(Path(folder), check_replaceable) as new:
        hf_files.write_tensors(new / WEIGHTS, entries, _arrays(found, leaves), {FINGERPRINT: fingerprint})
        hf_files.write_json(new / CONFIG, config)


def _arrays(found, leaves):
    for path, spec in found.items():
        leaf = leaves[path]
        value = (leaf.asnumpy() if hasattr(leaf, "asnumpy") else np.asarray(leaf)).astype(np.float32, copy=False)
        for matrix in value if len(spec.shape) > 2 else [value]:
            yield matrix.T


def check_replaceable(folder):
    other = (
        [] if not folder.exists() else [p.name for p in folder.iterdir() if p.name not in (CONFIG, WEIGHTS)] if folder.is_dir() else [""]
    )
    if other:
        raise ValueError(f"{folder} holds something other than an adapter ({', '.join(sorted(other)[:4])}); give another name")


def open_adapter(folder, cfg):
    """Opens the Adapter in a folder for a base model with the config cfg. Raises ValueError or FileNotFoundError naming what does not
    fit."""
    folder = Path(folder)
    config = read_config(folder)
    if not hf_files.exists(folder / WEIGHTS):
        raise FileNotFoundError(f"{folder / WEIGHTS} is missing; pickle files (adapter_model.bin) are not read, save it as safetensors")
    file = hf_files.TensorFile(hf_files.inside(folder, WEIGHTS))
    lora = _lora(folder, config, file, cfg)
    specs = adapters(cfg.base.replace(lora=lora))
    where = {path: names(path, spec.shape) for path, spec in specs.items()}
    _check_tensors(folder, file, specs, where, (cfg.vocab_size, cfg.hidden_size))

    def read(path, slices):
        *experts, rows, columns = slices
        picked = where[path][experts[0]] if experts else where[path]
        each = [array.T.astype(np.float32) for array in file.arrays(picked, (columns, rows))]
        return np.ascontiguousarray(np.stack(each) if experts else each[0])

    def embedding(slices):
        return file.array(EMBEDDING, slices).astype(np.float32)

    noted = file.metadata.get(FINGERPRINT)
    return Adapter(lora, read, config.base_model_name_or_path, noted, embedding if EMBEDDING in file.entries else None)


def read_config(folder):
    """The checked AdapterJson of an adapter's folder. Raises ValueError or FileNotFoundError naming what is not supported."""
    path = Path(folder) / CONFIG
    given = hf_files.read_json(path)
    if given.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type={short(given.get('peft_type'))} is not supported; only LORA is; {MERGE}")
    for key, value in given.items():
        if key not in (*AdapterJson.model_fields, *WITHOUT_EFFECT) and value not in (None, False, "", [], {}):
            raise ValueError(f"{path}: {key}={short(value)} is not supported; {MERGE}")
    config = checked(AdapterJson, given, path)
    if config.bias != "none":
        raise ValueError(f"{path}: bias={short(config.bias)} is not supported; {MERGE}")
    if config.init_lora_weights not in KEEP_BASE:
        raise ValueError(f"{path}: init_lora_weights={short(config.init_lora_weights)} changes the base's weights; {MERGE}")
    return config


def _lora(folder, config, file, cfg):
    """Returns the Lora of an adapter. Rank, alpha and dropout come from its config; the targets come from the names of its tensors."""
    module = {}  # (kind, PEFT's module name): the target
    for name in cfg.lora_targets:
        kind = "experts" if name.startswith("experts.") else ""
        module[(kind, TARGETS[name][1])] = name
    found = set()
    for name in sorted(file.entries.keys() - {EMBEDDING}):
        match = re.fullmatch(rf"{re.escape(PREFIX)}model\.(.+)\.lora_(embedding_)?[AB](\.weight)?", name)
        words = match[1].split(".") if match else [""]
        target = module.get(("experts" if "experts" in words else "", words[-1]))
        if target is None:
            raise ValueError(
                f"{folder}: tensor {name} is of no module that an adapter of this model has here: {', '.join(cfg.lora_targets)}; {MERGE}"
            )
        found.add(target)
    targets = tuple(name for name in cfg.lora_targets if name in found)
    if not targets:
        raise ValueError(f"{folder / WEIGHTS} has no tensors of an adapter; is the file complete?")
    init = "gaussian" if config.init_lora_weights == "gaussian" else "kaiming"
    return Lora(config.r, float(config.lora_alpha), targets, float(config.lora_dropout), init, config.use_rslora)


def _check_tensors(folder, file, specs, where, embedding):
    wanted = {name: spec.shape[-2:][::-1] for (path, spec) in specs.items() for name in where[path]}
    if EMBEDDING in file.entries:
        wanted[EMBEDDING] = embedding
    missing, extra = sorted(wanted.keys() - file.entries.keys()), sorted(file.entries.keys() - wanted.keys())
    if missing or extra:
        what = "; ".join(f"{word} {', '.join(found[:3])}" for word, found in (("missing", missing), ("unexpected", extra)) if found)
        raise ValueError(f"{folder}: {what}. Every layer must have the same adapters; was this adapter made for a base model of this size?")
    for name, shape in wanted.items():
        entry = file.entries[name]
        if entry.shape != shape:
            raise ValueError(
                f"{folder}: tensor {name} has shape {list(entry.shape)}, but the base needs {list(shape)}; is it for another base?"
            )
        if entry.code not in hf_files.DTYPES:
            raise ValueError(f"{folder}: tensor {name} is {entry.code}; convert it to one of {', '.join(hf_files.DTYPES)}")
