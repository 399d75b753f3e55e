"""Adapters of LoRA, in PEFT's format or in the checkpoints of a run, and the base they belong to."""

import hashlib
from dataclasses import replace
from pathlib import Path

import mindspore as ms
import numpy as np

from parallel.checkpoint.arrays import match
from parallel.checkpoint.read import Reader, find
from parallel.trees import tree_paths, unflatten
from qwen3 import hf_files, peft
from qwen3.config import Lora
from qwen3.model import param_specs

PROBED, PROBE = 16, 64  # parameters, and elements of each dim, that go into a fingerprint


def fingerprint(cfg, read):
    """16 hexadecimal digits of a base: its sizes and constants, and values here and there. read(path, slices): its parameters."""
    specs = tree_paths(param_specs(cfg.base))
    constants = (cfg.model_type, cfg.rope_theta, cfg.rope_scaling, cfg.rms_norm_eps, cfg.experts_per_token, cfg.norm_topk_prob)
    out = hashlib.blake2b(repr((constants, [(path, spec.shape) for path, spec in specs])).encode(), digest_size=8)
    for i in np.unique(np.linspace(0, len(specs) - 1, PROBED).astype(int)):
        path, spec = specs[i]
        values = read(path, tuple(slice(0, min(n, PROBE)) for n in spec.shape))
        out.update(np.ascontiguousarray(values, np.float32))
    return out.hexdigest()


def base_of(cfg, config, read):
    """What a checkpoint of adapters notes of its base."""
    return {"path": config.init_from or f"random weights of train.seed={config.train.seed}", "fingerprint": fingerprint(cfg, read)}


def check_base(noted, base, folder):
    """ValueError unless adapters that note one base, see base_of, are used with the same. Where nothing was noted, sizes have to do."""
    if noted and noted["fingerprint"] and noted["fingerprint"] != base["fingerprint"]:
        raise ValueError(
            f"{folder} holds adapters for the base {noted['path']} (fingerprint {noted['fingerprint']}), and this is {base['path']}"
            f" ({base['fingerprint']}), another one; give the base they were trained on"
        )


def open_adapter(folder, cfg, read, path="the base that was given"):
    """The peft.Adapter in a folder in PEFT's format, or of a run of LoRA's newest checkpoint, for the base `cfg` with parameters read().

    Raises ValueError for one that belongs to another base, which it names.
    """
    if peft.is_adapter(folder):
        found = peft.open_adapter(folder, cfg)
    elif native := find(folder):
        found = _of_checkpoint(native, cfg)
    else:
        raise FileNotFoundError(f"{folder} holds no adapter: neither {peft.CONFIG} nor a checkpoint; give the folder of one")
    noted = {"path": found.base, "fingerprint": found.fingerprint}
    check_base(noted, {"path": path, "fingerprint": fingerprint(cfg, read)}, folder)
    return found


def lora_of(settings, folder):
    """The Lora of a run, from config.lora and the targets that its model has."""
    if not settings:
        raise ValueError(f"{folder} is a checkpoint of a whole model, not of adapters; use it as it is")
    return Lora(**{**settings, "targets": tuple(settings["targets"])})


def _of_checkpoint(folder, cfg):
    saved = Reader(folder)
    lora = lora_of(saved.meta.get("lora"), folder)
    specs = peft.adapters(cfg.base.replace(lora=lora))
    match(saved, {f"params/{path}": spec.shape for path, spec in specs.items()}, kinds=("params",))
    base = saved.meta["base"]

    def read(path, slices):
        return saved.read(f"params/{path}", slices).astype(np.float32)

    return peft.Adapter(lora, read, base["path"], base["fingerprint"])


def check_same(found, cfg, folder):
    """ValueError unless an adapter is what config.lora asks for."""
    for key in ("rank", "alpha", "rslora", "targets"):
        have, want = getattr(found.lora, key), getattr(cfg.lora, key)
        if have != want:
            have, want = (",".join(v) if isinstance(v, tuple) else v for v in (have, want))
            raise ValueError(f"lora.adapter={folder} has {key}={have}, not {want}; use --config.lora.{key}={have}")


def base_name(folder):
    """The path of the base that an adapter notes."""
    if peft.is_adapter(folder):
        return str(hf_files.read_json(Path(folder) / peft.CONFIG).get("base_model_name_or_path") or "")
    native = find(folder)
    return (Reader(native).meta.get("base") or {}).get("path", "") if native else ""


def merged(cfg, read, found):
    """(cfg, read) of the plain model of a base and an adapter: W + scale A B in float32. The head of a tied model stays as the base has it,
    as PEFT's does, so where the embedding has an adapter the model is untied."""
    lora, values = found.lora, {}
    for path in peft.adapters(cfg.base.replace(lora=lora)):
        weight, which = peft.base_path(path)
        values.setdefault(weight, {})[which] = path
    untied = cfg.tie_embeddings and "embed" in values
    cfg = cfg.base.replace(tie_embeddings=cfg.tie_embeddings and not untied)

    def read_merged(path, slices):
        if untied and path == "lm_head":
            return read("embed", slices)
        out = read(path, slices)
        if path not in values:
            return out
        *lead, rows, columns = slices
        rank = slice(0, lora.rank)
        a, b = found.read(values[path]["a"], (*lead, rows, rank)), found.read(values[path]["b"], (*lead, rank, columns))
        return out.astype(np.float32) + np.float32(lora.scale) * (a @ b)

    return cfg, read_merged


def with_adapter(cfg, params, folder, merge=True):
    """(cfg, params) for generation: a base's config and tree of tensors with the adapter in a folder, see open_adapter.

    merge: weights with the products added; else the tree with the adapters beside them, which qwen3.model.build(cfg) runs as they are.
    """
    leaves = {path: leaf.asnumpy() for path, leaf in tree_paths(params)}

    def read(path, slices):
        return leaves[path][slices]

    found = open_adapter(folder, cfg, read)
    if merge:
        cfg, of = merged(cfg, read, found)
    else:
        cfg = cfg.base.replace(lora=replace(found.lora, dropout=0.0))

        def of(path, slices):
            return (read if path in leaves else found.read)(path, slices)

    specs = param_specs(cfg)
    whole = [of(path, tuple(slice(0, n) for n in spec.shape)) for path, spec in tree_paths(specs)]
    return cfg, unflatten(specs, [ms.Tensor(np.ascontiguousarray(value)) for value in whole])
