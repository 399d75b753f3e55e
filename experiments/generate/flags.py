"""Command line flags for generation: the model, the layout, the KV cache and the sampling options.

Nothing here imports MindSpore, see experiments/train/command.py.
"""

from absl import flags

from experiments import flags as command_line
from experiments import number_flags
from parallel.mesh import AXES
from qwen3.schema import LARGEST, short

FLAGS = flags.FLAGS
WEIGHTS = ("float", "int8")
WEIGHTS_HELP = "float, or int8: matrices in 8 bits, quantised while they are read; a quarter of the memory"
MOST_GUESSES = 64  # tokens of one text that are guessed at a time
MOST_CHUNK = 2**16  # tokens of a prompt that are read at a time; more would save nothing
flags.disclaim_key_flags()  # --help lists them under the main that calls define()


def define():
    """Defines the flags."""
    flags.DEFINE_string("hf_dir", None, "a Hugging Face folder: config.json, safetensors and the tokenizer's files; or a model's id")
    flags.DEFINE_boolean("download", False, "download a model that is named by its id and is in no cache")
    flags.DEFINE_string("workdir", None, "instead of --hf_dir: the folder of a training run, for its newest checkpoint and its tokenizer")
    flags.DEFINE_string("adapter", None, "a LoRA adapter to merge into the weights: a folder in PEFT's format, or of a finetune run")
    define_layout()
    number_flags.integer(
        "batch_size", None, "rows that a data parallel rank decodes together; default: the number of its texts, up to 8", 1
    )
    number_flags.integer(
        "max_length", None, "tokens in a row of the cache, prompt and new ones together; default: enough for the longest prompt", 1
    )
    number_flags.integer("prefill_chunk", 256, "tokens of a prompt that one prefill step processes", 1, MOST_CHUNK)
    define_speculation()
    number_flags.integer("max_new_tokens", None, "the most new tokens of a text; default: generation_config.json's, else 128", 1)
    define_weights()
    define_generation_config()
    number_flags.real(
        "temperature", None, "0: the likeliest token. Default of this and the flags below: as in generation_config.json, else off", 0, 100
    )
    number_flags.integer("top_k", None, "sample from this many likeliest tokens; 0: from all", 0)
    top_p = "sample from the fewest likeliest tokens whose probabilities sum to this; 1: from all"
    number_flags.real("top_p", None, top_p, 0, 1, above=True)
    min_p = "sample from tokens with at least this fraction of the likeliest one's probability; 0: from all"
    number_flags.real("min_p", None, min_p, 0, 1)
    penalty = "divides the positive logits of tokens already in the text, multiplies the negative; 1: off"
    number_flags.real("repetition_penalty", None, penalty, 1e-3, 1e3)
    seed = "seed of the sampling; the same seed gives the same text in each run and for each order of prompts"
    number_flags.integer("seed", 0, seed, 0, 2**32 - 1)
    flags.DEFINE_multi_string("stop", [], "text that ends a result and is left out of it; repeat the flag for several")
    flags.DEFINE_list("stop_ids", [], "token ids that end a result, in addition to the model's own")
    flags.DEFINE_boolean("ignore_eos", False, "do not stop at the model's own stop ids")
    flags.DEFINE_boolean("enable_thinking", None, "passed to the chat template; without the flag the template decides")


def define_weights():
    """Defines the flag that experiments.generate and experiments.serve share."""
    flags.DEFINE_enum("weights", WEIGHTS[0], WEIGHTS, WEIGHTS_HELP)


def define_layout():
    """Defines the sizes of the mesh, also for experiments.serve."""
    for axis in AXES:
        text = f"ranks of the mesh axis {axis}, under experiments.launch; default 1; prompts are split over dp"
        number_flags.integer(axis, None, text, -LARGEST)  # layout.for_inference() knows the range


def define_speculation():
    """Defines the flags that experiments.generate and experiments.serve share."""
    text = "the most next tokens that are guessed and checked in one step; 0: none. Guessed from earlier text, or by --draft_dir"
    number_flags.integer("speculate", 0, text, 0, MOST_GUESSES)
    draft = "folder of a smaller Hugging Face model with the same tokenizer, which guesses the next tokens for --speculate"
    flags.DEFINE_string("draft_dir", None, draft)


def define_generation_config():
    """Defines the flag that experiments.generate and experiments.serve share."""
    flags.DEFINE_boolean(
        "use_generation_config",
        True,
        "take the defaults of sampling and of max_new_tokens from the model's generation_config.json; its stop ids apply in any case",
    )


def define_forms():
    """Defines the flags of how answers are split, which experiments.generate and experiments.serve share."""
    calls = "how the model writes tool calls: hermes (Qwen3, Qwen2.5), qwen3_coder, or none; auto: as its chat template asks it to"
    flags.DEFINE_enum("tool_calls", "auto", ["auto", "hermes", "qwen3_coder", "none"], calls)
    reasoning = "whether answers have reasoning, in <think> tags; auto: where the chat template has it"
    flags.DEFINE_enum("reasoning", "auto", ["auto", "tags", "none"], reasoning)


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
    if int(text[:20]) > LARGEST:
        raise ValueError(f"--stop_ids={short(text)} must be at most {LARGEST}; no vocabulary has more ids")
    return int(text)
