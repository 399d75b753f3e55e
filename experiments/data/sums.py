"""Writes the sums of two numbers of two digits to files, for a first fine-tuning and for rewards:

    python -m experiments.data.sums --output=runs/sums [--shown=1600]

OUTPUT/shown.jsonl has so many of the sums as conversations, for experiments.finetune; OUTPUT/prompts.jsonl has all the others as prompts
with their answers, for experiments.rl.
"""

import json
import os

from absl import flags

from experiments import flags as command_line
from experiments import number_flags
from experiments.data import instructions
from parallel.checkpoint.files import write_text

FLAGS = flags.FLAGS
flags.disclaim_key_flags()


def main(_):
    os.makedirs(FLAGS.output, exist_ok=True)
    found = instructions.sums()
    shown = [{"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["answer"]}]} for r in found]
    for name, part in (("shown", shown[: FLAGS.shown]), ("prompts", found[FLAGS.shown :])):
        path = os.path.join(FLAGS.output, f"{name}.jsonl")
        write_text(path, "".join(json.dumps(record) + "\n" for record in part))
        print(f"saved      {path}: {len(part)} sums")


def define_flags():
    flags.DEFINE_string("output", "runs/sums", "folder for the files")
    number_flags.integer("shown", 1600, "number of sums that are shown to fine-tuning", 2, 8000)


if __name__ == "__main__":
    command_line.run(main, define_flags)
