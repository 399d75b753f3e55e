"""Generation: python -m experiments.generate --hf_dir=DIR --prompt=TEXT

    --workdir=RUN         instead of --hf_dir: the newest checkpoint of a training run, of any layout
    --prompts_file=F      one prompt a line, or a .jsonl of texts and conversations
    --chat                applies the chat template: a prompt is a user's message; without a prompt, chats on the terminal

Writes text_generation_result.txt, one line for each result, in the order of the prompts. On several ranks:
python -m experiments.launch --nproc=4 -- experiments.generate --hf_dir=DIR --prompts_file=F --dp=2 --tp=2. See docs/generation.md.
"""

from absl import flags

from experiments import flags as command_line
from experiments import number_flags
from experiments.generate import flags as inference_flags
from experiments.generate import prompts

FLAGS = flags.FLAGS


def define_flags():
    inference_flags.define()
    inference_flags.define_forms()
    flags.DEFINE_string("prompt", None, "text to continue")
    flags.DEFINE_string("prompts_file", None, "a file of prompts: text with one a line, or .jsonl")
    flags.DEFINE_boolean("chat", False, "apply the chat template: a prompt is a user's message; without a prompt, chat on the terminal")
    number_flags.integer("num_samples", 1, "results for each prompt", 1)
    logprobs = "write each token's log-probability, and those of this many likeliest tokens, to --output_jsonl"
    number_flags.integer("logprobs", None, logprobs, 0)
    flags.DEFINE_string("output", ".", "folder of text_generation_result.txt, or a file that ends in .txt")
    flags.DEFINE_string("output_jsonl", None, "a file for results with tokens, finish reasons and timings, one JSON object a line")


def main(_):
    if FLAGS.logprobs is not None and not FLAGS.output_jsonl:
        raise ValueError(f"--logprobs={FLAGS.logprobs} needs a file to write to; add --output_jsonl=FILE")
    inference_flags.check()
    converses = FLAGS.chat and FLAGS.prompt is None and FLAGS.prompts_file is None
    if not converses:
        prompts.check(FLAGS.prompt, FLAGS.prompts_file)
    from experiments.generate import run

    run.generate()


if __name__ == "__main__":
    command_line.run(main, define_flags)
