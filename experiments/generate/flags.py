"""The flags of mains that generate: which model, in what layout, with what cache, and how tokens are chosen."""

from pathlib import Path

from absl import flags

from experiments.layout import check as layout
from experiments.train import weights
from parallel import collectives
from parallel.mesh import AXES, world_size
from parallel.sharding import Sharding
from qwen3 import hf_files
from qwen3.engine import Request

FLAGS = flags.FLAGS
NEW_TOKENS = 128  # where neither a flag nor generation_config.json says how many
flags.disclaim_key_flags()  # --help lists them under the main that calls define()
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def define():
    """Registers them."""
    flags.DEFINE_string("hf_dir", None, "a Hugging Face folder: config.json, safetensors, the tokenizer's files")
    flags.DEFINE_string("workdir", None, "instead, the folder of a training run: its newest checkpoint and its tokenizer")
    flags.DEFINE_string("adapter", None, "of LoRA, in PEFT's format or a run of finetune, to join to the weights")
    for axis in AXES:
        flags.DEFINE_integer(axis, None, f"ranks of {axis}, under experiments.launch; default 1; dp ranks share out the prompts")
    flags.DEFINE_integer(
        "batch_size", None, "rows that decode together on a data rank; default: as many as there are prompts, up to 8", lower_bound=1
    )
    flags.DEFINE_integer(
        "max_length", None, "tokens of a row of the cache, prompt and new ones; default: what the longest prompt needs", lower_bound=1
    )
    flags.DEFINE_integer("prefill_chunk", 256, "tokens of a prompt that are read at a time", lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", None, "at most; default: generation_config.json's, else 128", lower_bound=1)
    flags.DEFINE_float(
        "temperature", None, "0: the likeliest token. This and what follows by default as generation_config.json says, else off"
    )
    flags.DEFINE_integer("top_k", None, "draw from so many of the likeliest; 0: all")
    flags.DEFINE_float("top_p", None, "draw from the fewest likeliest that have this much probability; 1: all")
    flags.DEFINE_float("min_p", None, "draw from those with at least this share of the likeliest's probability; 0: all")
    flags.DEFINE_float("repetition_penalty", None, "divides the logits of tokens that were there already; 1: none")
    flags.DEFINE_integer("seed", 0, "of the draws: one seed gives one text, run after run, whatever the order of prompts")
    flags.DEFINE_multi_string("stop", [], "text that ends a result, which it is not part of; repeat the flag for several")
    flags.DEFINE_list("stop_ids", [], "token ids that end a result, beside the model's own")
    flags.DEFINE_boolean("ignore_eos", False, "do not stop at the model's own stop ids")
    flags.DEFINE_boolean("enable_thinking", None, "passed to the chat template; without it the template decides")


class Model:
    """What the flags ask for, opened: cfg, tokenizer, sharding, mesh; defaults, a dict as of generation_config.json; new_tokens: how many
    where nothing says so."""

    def __init__(self):
        rank, _ = collectives.start()
        self.new_tokens = NEW_TOKENS
        self.opened = weights.inference(FLAGS.hf_dir, FLAGS.workdir, FLAGS.adapter)
        self.cfg = self.opened.cfg
        asked = {axis: FLAGS[axis].value for axis in AXES}
        sizes = layout.for_inference(asked, self.cfg, FLAGS.hf_dir or FLAGS.workdir, world_size())
        self.mesh = layout.mesh(self.cfg, sizes, rank)
        self.sharding = Sharding(self.mesh) if self.mesh.world > 1 else None
        self.tokenizer = self.opened.load_tokenizer()
        self.defaults = generation_config(self.opened.folder)

    def params(self):
        return self.opened.params(self.sharding or Sharding())

    @property
    def stop_ids(self):
        """The model's own, of generation_config.json, else of config.json; of a run those and the end of a document; and --stop_ids."""
        own = self.defaults.get("eos_token_id", self.cfg.eos_id)
        own = set(own if isinstance(own, (list, tuple)) else [] if own is None else [own])
        if FLAGS.workdir or not own:
            own |= {self.tokenizer.eod_id, self.tokenizer.eos_id}
        return tuple(sorted((set() if FLAGS.ignore_eos else own) | {_id(i) for i in FLAGS.stop_ids}))

    def request(self, prompt, sample=0, logprobs=None):
        """The Request of a prompt, by flags and defaults."""
        given = {name: FLAGS[name].value for name in SAMPLING if FLAGS[name].value is not None}
        more = {"stop_ids": self.stop_ids, "seed": FLAGS.seed, "sample": sample, "logprobs": logprobs}
        return Request(prompt, self.max_new_tokens, **{**sampling_defaults(self.defaults), **given, **more})

    @property
    def max_new_tokens(self):
        given = FLAGS.max_new_tokens
        return given if given is not None else self.defaults.get("max_new_tokens") or self.new_tokens


def generation_config(folder):
    """generation_config.json of a folder, {} where there is none."""
    path = Path(folder) / hf_files.GENERATION
    return hf_files.read_json(path) if path.is_file() else {}


def sampling_defaults(config):
    """{option: value}: of a generation_config.json with do_sample what it says of drawing, where a temperature that is not there is 1. The
    penalty counts without it too."""
    names = SAMPLING if config.get("do_sample") else ("repetition_penalty",)
    found = {name: config[name] for name in names if config.get(name) is not None}
    return {"temperature": 1.0, **found} if config.get("do_sample") else found


def _id(text):
    if not text.strip().isdigit():
        raise ValueError(f"--stop_ids={text} must be token ids, such as 151643,151645")
    return int(text)
