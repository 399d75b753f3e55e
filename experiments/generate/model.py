"""The model that the flags of generation name."""

from absl import flags

from experiments.generate import defaults
from experiments.generate import flags as inference_flags
from experiments.layout import check as layout
from experiments.train import weights
from parallel import collectives
from parallel.mesh import AXES, world_size
from parallel.sharding import Sharding
from qwen3.engine import Request

FLAGS = flags.FLAGS
NEW_TOKENS = 128  # default of --max_new_tokens where generation_config.json has none


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
        return self.opened.params(self.sharding or Sharding(), FLAGS.weights)

    @property
    def stop_ids(self):
        """The sorted ids that end a text: --stop_ids and, without --ignore_eos, those of defaults.stop_ids."""
        own = set() if FLAGS.ignore_eos else defaults.stop_ids(self.file, self.cfg, self.tokenizer)
        return tuple(sorted(own | inference_flags.stop_ids()))

    def request(self, prompt, sample=0, logprobs=None):
        """Returns the Request of a prompt (token ids). Flags override generation_config.json."""
        given = {name: FLAGS[name].value for name in defaults.SAMPLING if FLAGS[name].value is not None}
        more = {"stop_ids": self.stop_ids, "seed": FLAGS.seed, "sample": sample, "logprobs": logprobs}
        return Request(prompt, self.max_new_tokens, **{**defaults.sampling(self.defaults), **given, **more})

    @property
    def max_new_tokens(self):
        given = FLAGS.max_new_tokens
        return given if given is not None else self.defaults.max_new_tokens or self.new_tokens
