"""LoRA adapters, in PEFT's format or in the checkpoints of a run, and the base model that they belong to."""

import hashlib
from dataclasses import replace

import mindspore as ms
import numpy as np

from parallel.checkpoint.arrays import match
from parallel.checkpoint.read import Reader, find
from parallel.trees import tree_paths, unflatten
from qwen3 import peft
from qwen3.config import Lora
from qwen3.model import param_specs

ROWS = 4096  # of an embedding, compared at a time
PROBED, PROBE = 16, 64  # a fingerprint reads at most 16 parameters, and of each at most 64 elements along every dim


def fingerprint(cfg, read):
    """Returns 16 hexadecimal digits, a hash of a base model's sizes, its constants and a sample of its weights from read(path, slices)."""
    specs = tree_paths(param_specs(cfg.base))
    constants = (cfg.model_type, cfg.rope_theta, cfg.rope_scaling, cfg.rms_norm_eps, cfg.experts_per_token, cfg.norm_topk_prob)
    out = hashlib.blake2b(repr((constants, [(path, spec.shape) for path, spec in specs])).encode(), digest_size=8)
    for i in np.unique(np.linspace(0, len(specs) - 1, PROBED).astype(int)):
        path, spec = specs[i]
        values = read(path, tuple(slice(0, min(n, PROBE)) for n in spec.shape))
        out.update(np.ascontiguousarray(values, np.float32))
    return out.hexdigest()


def base_of(cfg, config, read):
    """Returns {path, fingerprint} of the base model, which a checkpoint of adapters stores."""
    return {"path": config.init_from or f"random weights of train.seed={config.train.seed}", "fingerprint": fingerprint(cfg, read)}


def check_base(noted, base, folder):
    """Raises ValueError if the adapters in `folder` belong to another base. noted, base: see base_of; no fingerprint noted: no check."""
    if noted and noted["fingerprint"] and noted["fingerprint"] != base["fingerprint"]:
        raise ValueError(
            f"{folder} holds adapters for the base {noted['path']} (fingerprint {noted['fingerprint']}), and this is {base['path']}"
            f" ({base['fingerprint']}), another model; give the base that they were trained on"
        )


def open_adapter(folder, cfg, read, path="the base that was given"):
    """Opens the peft.Adapter in a folder: a folder in PEFT's format, or a LoRA run, whose newest checkpoint is used.

    cfg, read(path, slices): config and parameters of the base. Raises ValueError for an adapter of another base, and names that base.
    """
    if peft.is_adapter(folder):
        found = peft.open_adapter(folder, cfg)
    elif native := find(folder):
        found = _of_checkpoint(native, cfg)
    else:
        raise FileNotFoundError(f"{folder} holds no adapter: neither {peft.CONFIG} nor a checkpoint; give the folder of an adapter")
    check_embedding(found, cfg, read, folder)
    noted = {"path": found.base, "fingerprint": found.fingerprint}
    check_base(noted, {"path": path, "fingerprint": fingerprint(cfg, read)}, folder)
    return found


def check_embedding(found, cfg, read, folder):
    """Raises ValueError if the embedding that PEFT saved beside an adapter of the embedding is not that of the base."""
    for start in range(0, cfg.vocab_size if found.embedding else 0, ROWS):
        slices = (slice(start, min(start + ROWS, cfg.vocab_size)), slice(0, cfg.hidden_size))
        if not np.array_equal(found.embedding(slices), np.asarray(read("embed", slices), np.float32), equal_nan=True):
            raise ValueError(
                f"{folder}: the embedding saved beside the adapter is not that of the base, so it was trained too; {peft.MERGE}"
            )


def lora_of(settings, folder):
    """Returns the Lora that a checkpoint's metadata describes. Raises ValueError if `settings` is empty: the checkpoint has no adapters."""
    if not settings:
        raise ValueError(f"{folder} is a checkpoint of a full model, not of adapters; give the checkpoint of a LoRA run")
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
    """Raises ValueError if an adapter's rank, alpha, rslora or targets are not those of config.lora."""
    for key in ("rank", "alpha", "rslora", "targets"):
        have, want = getattr(found.lora, key), getattr(cfg.lora, key)
        if have != want:
            have, want = (",".join(v) if isinstance(v, tuple) else v for v in (have, want))
            raise ValueError(f"lora.adapter={folder} has {key}={have}, not {want}; use --config.lora.{key}={have}")


def base_name(folder):
    """Returns the path of the base model that an adapter names, "" if it names none."""
    if peft.is_adapter(folder):
        return peft.read_config(folder).base_model_name_or_path
    native = find(folder)
    return (Reader(native).meta.get("base") or {}).get("path", "") if native else ""


def merged(cfg, read, found):
    """Merges an adapter into its base: returns (cfg, read) of a model without adapters whose weights are W + scale A B, in float32.

    With tied embeddings, an adapter on the embedding changes the embedding alone, as in PEFT: the merged model is then untied, and its head
    is the base's embedding.
    """
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
    """Returns (cfg, params) for generation with a base, given as its config and tree of tensors, and the adapter in a folder.

    merge: True adds the adapters to the weights; False keeps them as parameters of their own. qwen3.model.build(cfg) runs both.
    For the folder see open_adapter.
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
