"""Command line flags for generation: the model, the layout, the KV cache and the sampling options.

Nothing here imports MindSpore, see experiments/train/command.py.
"""

from absl import flags

from experiments import flags as command_line
from parallel.mesh import AXES

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # --help lists them under the main that calls define()


def define():
    """Defines the flags."""
    flags.DEFINE_string("hf_dir", None, "a Hugging Face folder: config.json, safetensors and the tokenizer's files; or a model's id")
    flags.DEFINE_boolean("download", False, "download a model that is named by its id and is in no cache")
    flags.DEFINE_string("workdir", None, "instead of --hf_dir: the folder of a training run, for its newest checkpoint and its tokenizer")
    flags.DEFINE_string("adapter", None, "a LoRA adapter to merge into the weights: a folder in PEFT's format, or of a finetune run")
    for axis in AXES:
        flags.DEFINE_integer(axis, None, f"ranks of the mesh axis {axis}, under experiments.launch; default 1; prompts are split over dp")
    flags.DEFINE_integer(
        "batch_size", None, "rows that a data parallel rank decodes together; default: the number of its texts, up to 8", lower_bound=1
    )
    flags.DEFINE_integer(
        "max_length",
        None,
        "tokens in a row of the cache, prompt and new ones together; default: enough for the longest prompt",
        lower_bound=1,
    )
    flags.DEFINE_integer("prefill_chunk", 256, "tokens of a prompt that one prefill step processes", lower_bound=1)
    flags.DEFINE_integer(
        "max_new_tokens", None, "the most new tokens of a text; default: generation_config.json's, else 128", lower_bound=1
    )
    define_generation_config()
    flags.DEFINE_float(
        "temperature", None, "0: the likeliest token. Default of this and the flags below: as in generation_config.json, else off"
    )
    flags.DEFINE_integer("top_k", None, "sample from this many likeliest tokens; 0: from all")
    flags.DEFINE_float("top_p", None, "sample from the fewest likeliest tokens whose probabilities sum to this; 1: from all")
    flags.DEFINE_float("min_p", None, "sample from tokens with at least this fraction of the likeliest one's probability; 0: from all")
    flags.DEFINE_float(
        "repetition_penalty", None, "divides the positive logits of tokens already in the text, multiplies the negative; 1: off"
    )
    flags.DEFINE_integer("seed", 0, "seed of the sampling; the same seed gives the same text in each run and for each order of prompts")
    flags.DEFINE_multi_string("stop", [], "text that ends a result and is left out of it; repeat the flag for several")
    flags.DEFINE_list("stop_ids", [], "token ids that end a result, in addition to the model's own")
    flags.DEFINE_boolean("ignore_eos", False, "do not stop at the model's own stop ids")
    flags.DEFINE_boolean("enable_thinking", None, "passed to the chat template; without the flag the template decides")


def define_generation_config():
    """Defines the flag that experiments.generate and experiments.serve share."""
    flags.DEFINE_boolean(
        "use_generation_config",
        True,
        "take the defaults of sampling and of max_new_tokens from the model's generation_config.json; its stop ids apply in any case",
    )


def check():
    """Raises ValueError for flags that no model can honour, before one is loaded."""
    command_line.check_source(FLAGS.hf_dir, FLAGS.workdir)
    stop_ids()


def stop_ids():
    """Returns the ids of --stop_ids. Raises ValueError for what is none."""
    return {_id(text) for text in FLAGS.stop_ids}


def _id(text):
    if not text.strip().isdigit():
        raise ValueError(f"--stop_ids={text} must be token ids, such as 151643,151645")
    return int(text)
