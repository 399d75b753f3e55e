"""An adapter and its base to a plain Hugging Face folder."""

import os

from experiments.convert import weights as convert
from experiments.train import adapter
from parallel.trees import tree_paths
from qwen3.model import param_specs


def merge(source, output, base, dtype):
    """merge-lora. Returns lines that say what was done. Raises ValueError for an adapter of another base."""
    if not source:
        raise ValueError("--input is missing; give the folder of an adapter in PEFT's format, or of a run of LoRA")
    source, folder = os.path.expanduser(source), convert.check_output(output)
    path = base or adapter.base_name(source)
    if not path or not os.path.isdir(os.path.expanduser(path)):
        raise ValueError(f"--input={source} notes the base {path!r}, which is no folder here; give it as --base=DIR")
    whole = convert.open_weights("base", path)
    found = adapter.open_adapter(source, whole.config, whole.read, path)
    config, read = adapter.merged(whole.config, whole.read, found)
    dtype = dtype or whole.config.param_dtype
    arrays = {name: (spec.shape, dtype) for name, spec in tree_paths(param_specs(config))}

    def read_all(name):
        return convert.hf.cast(read(name, tuple(slice(0, n) for n in arrays[name][0])), dtype, name)

    merged = convert.Weights("base and adapter", whole.folder, arrays, read_all, config, whole.tokenizer)
    convert.to_hugging_face(merged, folder, dtype)
    yield f"read       {whole}, and the adapter of {source}: rank {found.lora.rank}, on {', '.join(found.lora.targets)}"
    yield f"wrote      {folder}, which transformers opens; {whole.describe_tokenizer()}"
