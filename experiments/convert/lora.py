"""The command merge-lora of experiments.convert: merges a LoRA adapter into its base, and writes a Hugging Face folder."""

import os

from experiments.convert import weights as convert
from experiments.train import adapter
from parallel.trees import tree_paths
from qwen3 import chat
from qwen3.model import param_specs
from qwen3.tokenizer import Tokenizer


def merge(source, output, base, dtype):
    """Merges the adapter in `source` into its base, and writes the folder `output`. base: None takes the path that the adapter names.
    dtype: None takes the base's. Yields lines of text about the work done. Raises ValueError for an adapter of another base."""
    if not source:
        raise ValueError("--input is missing; give the folder of an adapter in PEFT's format, or of a run of LoRA")
    source, folder = os.path.expanduser(source), convert.check_output(output)
    if not os.path.isdir(source):
        raise ValueError(f"--input={source} is not a folder; give the folder of an adapter in PEFT's format, or of a run of LoRA")
    path = base or adapter.base_name(source)
    if not path or not os.path.isdir(os.path.expanduser(path)):
        raise ValueError(f"--input={source} names the base {path!r}, which is not a folder; give the base as --base=DIR")
    base_weights = convert.open_weights("base", path)
    found = adapter.open_adapter(source, base_weights.config, base_weights.read, path)
    config, read = adapter.merged(base_weights.config, base_weights.read, found)
    if base_weights.tokenizer and (base_weights.tokenizer / "tokenizer.json").is_file():  # an adapter of a base model may have learnt chats
        config = config.with_eos(chat.turn_ends(Tokenizer.load(base_weights.tokenizer)))
    dtype = dtype or base_weights.config.param_dtype
    arrays = {name: (spec.shape, dtype) for name, spec in tree_paths(param_specs(config))}

    def read_all(name):
        return convert.hf.cast(read(name, tuple(slice(0, n) for n in arrays[name][0])), dtype, name)

    merged = convert.Weights("base and adapter", base_weights.folder, arrays, read_all, config, base_weights.tokenizer)
    convert.to_hugging_face(merged, folder, dtype)
    yield f"read       {base_weights}, and the adapter of {source}: rank {found.lora.rank}, on {', '.join(found.lora.targets)}"
    yield f"wrote      {folder}, {convert.hf.who_opens(config)}; {base_weights.describe_tokenizer()}"
