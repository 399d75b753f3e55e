"""Command line flags for generation: the model, the layout, the KV cache and the sampling options."""

from absl import flags

from experiments.generate import defaults
from experiments.layout import check as layout
from experiments.train import weights
from parallel import collectives
from parallel.mesh import AXES, world_size
from parallel.sharding import Sharding
from qwen3.engine import Request

FLAGS = flags.FLAGS
NEW_TOKENS = 128  # default of --max_new_tokens where generation_config.json has none
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


class Model:
    """The model that the flags name, opened in their layout. Attributes: cfg, tokenizer, mesh, sharding (None on one rank), file (the
    GenerationJson of its folder), defaults (the same, or an empty one with --nouse_generation_config), new_tokens (the limit where neither
    a flag nor the defaults have one)."""

    def __init__(self):
        rank, _ = collectives.start()
        self.new_tokens = NEW_TOKENS
        self.opened = weights.inference(FLAGS.hf_dir, FLAGS.workdir, FLAGS.adapter, FLAGS.download)
        self.cfg = self.opened.cfg
        asked = {axis: FLAGS[axis].value for axis in AXES}
        sizes = layout.for_inference(asked, self.cfg, FLAGS.hf_dir or FLAGS.workdir, world_size())
        self.mesh = layout.mesh(self.cfg, sizes, rank)
        self.sharding = Sharding(self.mesh) if self.mesh.world > 1 else None
        self.tokenizer = self.opened.load_tokenizer()
        self.file = defaults.read(self.opened.folder)
        self.defaults = self.file if FLAGS.use_generation_config else defaults.GenerationJson()

    def params(self):
        return self.opened.params(self.sharding or Sharding())

    @property
    def stop_ids(self):
        """The sorted ids that end a text: --stop_ids and, without --ignore_eos, those of defaults.stop_ids."""
        own = set() if FLAGS.ignore_eos else defaults.stop_ids(self.file, self.cfg, self.tokenizer)
        return tuple(sorted(own | {_id(i) for i in FLAGS.stop_ids}))

    def request(self, prompt, sample=0, logprobs=None):
        """Returns the Request of a prompt (token ids). Flags override generation_config.json."""
        given = {name: FLAGS[name].value for name in defaults.SAMPLING if FLAGS[name].value is not None}
        more = {"stop_ids": self.stop_ids, "seed": FLAGS.seed, "sample": sample, "logprobs": logprobs}
        return Request(prompt, self.max_new_tokens, **{**defaults.sampling(self.defaults), **given, **more})

    @property
    def max_new_tokens(self):
        given = FLAGS.max_new_tokens
        return given if given is not None else self.defaults.max_new_tokens or self.new_tokens


def _id(text):
    if not text.strip().isdigit():
        raise ValueError(f"--stop_ids={text} must be token ids, such as 151643,151645")
    return int(text)
