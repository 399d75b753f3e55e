"""The initial state of a run: from its newest checkpoint, from another run, from weights alone, or random.

Also inference(), the model of a main that does not train.
"""

import os
from pathlib import Path
from typing import NamedTuple

import mindspore as ms
import numpy as np

from experiments import flags as command_line
from experiments import hub, run_tokenizer
from experiments.convert.weights import open_weights
from experiments.train import adapter
from layers.lora import DROPOUT_LAYER
from parallel.checkpoint.arrays import match, wanted
from parallel.checkpoint.read import Reader, find
from parallel.graph.jit import in_device_memory
from parallel.placement import load, place
from parallel.specs import init_array
from parallel.trees import tree_paths
from qwen3 import hf
from qwen3.adapters import side_by_side
from qwen3.config import Qwen3Config
from qwen3.int8 import Quantised, int8_specs
from qwen3.model import param_specs
from qwen3.stages import own_specs
from qwen3.tokenizer import Tokenizer


class Start(NamedTuple):
    """The start of a run. make(program) -> the state. step, tokens: steps done and targets seen. loader: the state of the data loader.

    text: a description to print. not_loaded: the parameters that did not match, with --partial.
    """

    make: object
    step: int
    tokens: float
    loader: dict | None
    text: str
    not_loaded: str = ""


def from_checkpoint(folder, program, partial, fresh):
    """Returns the Start that continues from a checkpoint, which may have been saved in another layout.

    fresh(path, slices): values of parameters that the checkpoint does not have, such as the base of adapters.
    Raises CheckpointError for a damaged checkpoint, and without `partial` for one of another model.
    """
    saved = Reader(folder)
    if "loader" not in saved.meta:
        raise ValueError(f"{folder} holds weights alone, not the state of a run; use --init_from={folder}")
    found, other = match(saved, wanted(program.held()), partial)

    def read(name, slices):
        if name in found:
            return saved.read(name, slices)
        kind, path = name.split("/")
        return fresh(path, slices) if kind in ("params", "ema") else fresh(path, slices) * 0

    meta = saved.meta
    start = Start(lambda program: program.restore(read, meta["norm"]), meta["step"], meta["tokens_seen"], meta["loader"], "", other)
    return start._replace(text=f"{folder}, step {start.step}")


def random(cfg, config):
    """Returns read(path, slices) of random initial parameters, adapters included, drawn from train.seed."""
    specs = dict(tree_paths(param_specs(cfg)))
    return lambda path, slices: init_array(specs[path], path, config.train.seed, index=slices)


def initial(cfg, config):
    """Returns the Start of a run that begins at step 0."""
    read, text, other = initial_params(cfg, config)
    return Start(lambda program: program.init(read), 0, 0.0, None, text, other)


def initial_params(cfg, config):
    """Returns (read(path, slices), description, parameters not loaded): the weights of config.init_from in their own dtypes, else random
    weights."""
    fresh = random(cfg, config)
    read, text, other = _base(cfg.base, config, fresh)
    if cfg.lora is None:
        return read, text, other
    adapters, how = fresh, f"new adapters of rank {cfg.lora.rank}"
    if config.lora.adapter:
        given = adapter.open_adapter(config.lora.adapter, cfg.base, read)
        adapter.check_same(given, cfg, config.lora.adapter)
        adapters, how = given.read, f"the adapter of {config.lora.adapter}"

    def either(path, slices):
        return (adapters if is_adapter(path) else fresh if path.endswith(DROPOUT_LAYER) else read)(path, slices)

    return either, f"{text}, {how}", other


def is_adapter(path):
    """Whether a parameter belongs to an adapter, such as "layers.0.attention.lora.wq.a"."""
    return ".lora." in f".{path}"


def _base(cfg, config, fresh):
    """initial_params for a model without adapters."""
    if not config.init_from:
        return fresh, f"random weights of train.seed={config.train.seed}", ""
    path = hub.folder_of("init_from", config.init_from)
    if native := find(path):
        return _native(native, cfg, config.partial, fresh)
    read, other = _hugging_face(path, cfg, config, fresh)
    return read, f"the weights of {path}", other


def _hugging_face(folder, cfg, config, fresh):
    """Returns (read(path, slices), parameters not loaded) of a Hugging Face folder; a rank reads only the slices that it asks for."""
    try:
        weights = hf.Reader(folder, None, _as_saved(cfg, hf.read_config(folder)) if cfg.num_labels else cfg, config.partial)
    except ValueError as error:
        if config.partial:
            raise
        own = "" if config.model == folder else f"use --config.model={folder} for the folder's own model, or "
        fix = f"{own}--partial to load what matches and start the rest fresh"
        raise ValueError(f"init_from={folder}, model={config.model}: {error}; {fix}") from error
    found = set(weights.paths)

    def read(path, slices):
        return weights.read(path, slices) if path in found else fresh(path, slices)

    return read, weights.left_out


def _as_saved(cfg, saved):
    """Returns the config by which weights are read for a model with the config cfg. saved: the config of those weights. A reward model that
    starts from a language model reads all but the head, which it draws."""
    return cfg.replace(num_labels=0) if cfg.num_labels and not saved.num_labels else cfg


def _native(folder, cfg, partial, fresh):
    """Returns initial_params from the parameters of a checkpoint, without its optimizer state."""
    saved = Reader(folder)
    specs = tree_paths(param_specs(_as_saved(cfg, Qwen3Config.from_hf(saved.meta["model"])) if cfg.num_labels else cfg))
    if base := saved.meta.get("base"):
        raise ValueError(
            f"init_from={folder} holds adapters alone, for the base {base['path']}; merge them with"
            f" `python -m experiments.convert merge-lora --input={folder} --output=NEW` and use --init_from=NEW"
        )
    found, other = match(saved, {f"params/{path}": spec.shape for path, spec in specs}, partial, kinds=("params",))

    def read(path, slices):
        name = f"params/{path}"
        return saved.read(name, slices) if name in found else fresh(path, slices)

    return read, f"the weights of {folder}", other


class Inference(NamedTuple):
    """A model for inference. read(path, slices) -> elements of a parameter, in the dtype of cfg. reader: None, or the qwen3.hf.Reader of
    its files, for numbers in 8 bits. tokenizer: the folder of its files, or None.

    text: the source of the weights, to print. folder: that of the Hugging Face files or of the checkpoint. masks: of adapters beside the
    weights, see qwen3/adapters.py; None without.
    """

    cfg: Qwen3Config
    read: object
    reader: object
    tokenizer: Path | None
    folder: Path
    text: str
    masks: object = None

    def params(self, sharding, weights="float"):
        """Returns this rank's shards of the parameters. weights: "float", or "int8" for matrices in 8 bits (qwen3/int8.py), which are
        quantised while they are read, one after another, unless the files have numbers that can be kept. Raises ValueError for a layout
        that cannot split a parameter."""
        specs, read = own_specs(self.cfg, sharding.mesh), self.read
        if weights == "int8":
            check_int8()
            specs, read = int8_specs(specs, reader=self.reader), Quantised(read, specs, reader=self.reader).read
        return in_device_memory(load(sharding.mesh, place(sharding, specs), read, "used"))

    def describe(self, weights="float"):
        """Returns the source of the weights as text, for these weights."""
        return f"{self.text}, in 8 bits" if weights == "int8" else self.text

    def load_tokenizer(self):
        """Returns the Tokenizer. Raises ValueError if there is none, or if it has more ids than the model."""
        if self.tokenizer is None:
            raise ValueError(f"{self.text} has no tokenizer beside its weights; put tokenizer.json and tokenizer_config.json there")
        tokenizer = Tokenizer.load(self.tokenizer)
        if tokenizer.vocab_size > self.cfg.vocab_size:
            have = f"{tokenizer.vocab_size} ids, and the model {self.cfg.vocab_size}"
            raise ValueError(f"the tokenizer of {self.tokenizer} has {have}; use the tokenizer of this model")
        return tokenizer


def inference(hf_dir=None, workdir=None, adapter_dir=None, download=False, beside=None, head=True):
    """Returns the Inference of a Hugging Face folder, or of a run: its newest checkpoint, saved in any layout, else the model in its hf/.

    The dtype is float32 on CPU, elsewhere that of the embedding in the files. adapter_dir: an adapter in PEFT's format or a LoRA run, which
    is merged into the weights as they are read. If workdir itself is a LoRA run, its base is the one that its checkpoint names. beside:
    {name: folder} of adapters that are not merged, and between which requests choose (qwen3/adapters.py). head: see hf.Reader.
    hf_dir may be a model's id on a hub, see experiments.hub. Raises ValueError or FileNotFoundError that name the flag.
    """
    command_line.check_source(hf_dir, workdir)
    key, path = ("hf_dir", hf_dir) if hf_dir else ("workdir", workdir)
    path = hub.folder_of("--hf_dir", path, download) if hf_dir else os.path.expanduser(path)
    own_tokenizer, final = run_tokenizer.of(path) if workdir else None, os.path.join(path, "hf")
    if workdir and not adapter_dir and (base := adapter.base_name(path)):
        adapter_dir, path = path, _noted_base(workdir, base)
    elif workdir and os.path.isdir(final) and not find(path):
        path = final
    weights = open_weights(key, path, head=head)
    if weights.config.num_labels:
        raise ValueError(f"--{key}={path} is a reward model, which writes no text; use a language model")
    dtype = "float32" if ms.get_context("device_target") == "CPU" else weights.config.param_dtype
    cfg, read, text = weights.config.replace(param_dtype=dtype, compute_dtype=dtype), weights.read, str(weights)
    if adapter_dir:
        if beside:
            raise ValueError(f"--{key}={adapter_dir} is adapters itself; give their base as --hf_dir, and each with --adapter=NAME=FOLDER")
        cfg, read = adapter.merged(cfg, read, adapter.open_adapter(os.path.expanduser(adapter_dir), cfg, read, path))
        text += f", with the adapter of {adapter_dir}"
    masks = None
    if beside:
        opened = {name: adapter.open_adapter(os.path.expanduser(folder), cfg, read, path) for name, folder in beside.items()}
        cfg, read, masks = side_by_side(cfg, read, opened)
        text += f", and beside them the adapters {', '.join(beside)}"
    tokenizer = Path(own_tokenizer) if own_tokenizer else weights.tokenizer

    def read_cast(path, slices):
        value = hf.cast(read(path, slices), dtype, path)
        if not _finite(value):
            raise ValueError(
                f"{text}: the parameter {path} has values that are NaN or infinite; use another checkpoint, or copy the file again"
            )
        return value

    reader = None if adapter_dir else weights.hugging_face
    return Inference(cfg, read_cast, reader, tokenizer, weights.folder, text, masks)


def check_int8():
    """Raises ValueError where the device has no ops for weights in 8 bits."""
    if (device := ms.get_context("device_target")) != "CPU":
        raise ValueError(f"--weights=int8 has kernels for CPU only, and this is {device}; use --weights=float")


def _finite(value):
    """Whether all values of an array are finite. It reads the array once: a sum is finite only if all its terms are."""
    if value.dtype.kind in "iub":
        return True
    if str(value.dtype) == "bfloat16":
        return not ((value.view("uint16") & 0x7F80) == 0x7F80).any()  # an exponent of ones: NaN or infinite
    with np.errstate(all="ignore"):
        return bool(np.isfinite(value.sum(dtype=np.float32)) or np.isfinite(value).all())


def _noted_base(workdir, base):
    if not os.path.isdir(base):
        raise ValueError(
            f"--workdir={workdir} holds adapters alone, for the base {base}, which does not exist; use --hf_dir=BASE --adapter={workdir}"
        )
    return base
