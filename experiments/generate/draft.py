"""The draft model that the flag --draft_dir names, for speculation."""

from absl import flags

from experiments.train import weights
from parallel.sharding import Sharding
from qwen3.draft import Draft

FLAGS = flags.FLAGS


def maker(tokenizer, ranks):
    """Returns make(slots, length) -> a Draft of --draft_dir for --speculate; make returns None without the flag. tokenizer: that of the
    model that decides. Raises ValueError for a draft model with another tokenizer, and on several ranks."""
    if FLAGS.draft_dir is None:
        return lambda slots, length: None
    if not FLAGS.speculate:
        raise ValueError(f"--draft_dir={FLAGS.draft_dir} needs --speculate=N, how many tokens are guessed at a time, such as --speculate=4")
    if ranks > 1:
        raise ValueError(
            f"--draft_dir={FLAGS.draft_dir} on {ranks} ranks is not supported; leave it out for prompt lookup, or use one rank"
        )
    model = weights.inference(FLAGS.draft_dir)
    if model.load_tokenizer().vocabulary() != tokenizer.vocabulary():
        raise ValueError(
            f"--draft_dir={FLAGS.draft_dir} has another tokenizer, so its guesses are other tokens; give a model with the same"
        )
    params = model.params(Sharding(), FLAGS.weights)

    def make(slots, length):
        return Draft(params, model.cfg, slots=slots, length=length, most=FLAGS.speculate)

    return make
