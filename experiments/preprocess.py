"""Text to tokens: python -m experiments.preprocess --input=texts.jsonl --output_prefix=data/wiki --tokenizer=DIR --workers=8

Writes data/wiki_text_document.bin and .idx, one such pair of files for each of --json_keys. With --format=alpaca, sharegpt or messages the
records are conversations. A second pair, data/wiki_loss_document, then has their loss mask: 1 for each token that the assistant produces.

    python -m experiments.preprocess inspect data/wiki_text_document [--tokenizer=DIR] [--document=N]
"""

import os
import sys
import time

import numpy as np
from absl import flags

from experiments import flags as command_line
from experiments import number_flags
from experiments.data import encode, pairs, readers
from experiments.data.megatron import best_dtype
from qwen3.chat import FORMATS
from qwen3.text_stream import printable
from qwen3.tokenizer import Tokenizer

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "input", None, "a file or a folder of files: jsonl, json, csv, parquet, arrow, txt, WikiText, .gz and .zst of them, or other text files"
)
flags.DEFINE_string("output_prefix", None, "start of the names of the files that are written")
flags.DEFINE_string("tokenizer", None, "folder with tokenizer.json and tokenizer_config.json")
flags.DEFINE_list("json_keys", "text", "keys of a record whose texts are tokenized; each key gets its own pair of files")
flags.DEFINE_list("map_keys", "", "from:to,... renames keys of the records before anything else")
flags.DEFINE_boolean("append_eod", True, "end each document with the tokenizer's end-of-document id")
number_flags.integer("workers", 1, "number of processes that tokenize, each on one core", 1, number_flags.MOST_PROCESSES)
number_flags.integer("max_samples", 0, "most records to read; 0 = all", 0)
flags.DEFINE_boolean("skip_bad", False, "leave out records that cannot be used, and report how many; otherwise they are errors")
flags.DEFINE_boolean("per_line", False, "for .txt files: each line is a document")
flags.DEFINE_boolean("detokenize", False, "for WikiText: undo @-@, @,@, @.@ and the spaces around punctuation")
flags.DEFINE_enum("format", None, list(FORMATS), "records are conversations of this format")
flags.DEFINE_enum("enable_thinking", "none", list(encode.THINKING), "value of enable_thinking for the chat template; none = not set")
flags.DEFINE_boolean("train_empty_think", False, "with --format: loss on the empty think block before answers without reasoning")
number_flags.integer("document", 0, "the document that inspect shows", 0)
INSPECTED = []  # the prefix after `inspect` on the command line


def main(_):
    folder = os.path.expanduser(FLAGS.tokenizer or "")
    if INSPECTED:
        return print(printable(pairs.describe(INSPECTED[0], Tokenizer.load(folder) if folder else None, FLAGS.document)))
    for key in ("input", "output_prefix", "tokenizer"):
        if not FLAGS[key].value:
            raise ValueError(f"--{key} is missing; {FLAGS[key].help}")
    if FLAGS.format and FLAGS["json_keys"].present:
        raise ValueError(f"--json_keys={','.join(FLAGS.json_keys)} has no use with --format={FLAGS.format}; leave it out")
    if not FLAGS.format and FLAGS.enable_thinking != "none":
        raise ValueError(f"--enable_thinking={FLAGS.enable_thinking} needs --format={'|'.join(FORMATS)}")
    if not FLAGS.format and FLAGS.train_empty_think:
        raise ValueError(f"--train_empty_think needs --format={'|'.join(FORMATS)}")
    thinking = {"enable_thinking": encode.THINKING[FLAGS.enable_thinking], "train_empty_think": FLAGS.train_empty_think}
    job = encode.Job(folder, _keys(), FLAGS.append_eod, _mapping(), FLAGS.format, any_weight=False, **thinking)
    preprocess(FLAGS.input, os.path.expanduser(FLAGS.output_prefix), job)


def preprocess(path, prefix, job):
    """Tokenizes the records at `path` and writes the pairs of `job`, an encode.Job, to files that begin with `prefix`."""
    bad = pairs.Skipped(FLAGS.skip_bad)
    back = {to: name for name, to in job.map_keys.items()}
    columns = [back.get(key, key) for key in job.keys] if job.format is None else None
    any_text = not (job.format or FLAGS.per_line or FLAGS.detokenize)
    total = sum(os.path.getsize(f) for f in readers.find_files(path, any_text=any_text))
    records = readers.records(path, per_line=FLAGS.per_line, detokenize=FLAGS.detokenize, columns=columns, bad=bad, any_text=any_text)
    records = (r for _, r in zip(range(FLAGS.max_samples), records)) if FLAGS.max_samples else records
    ids = best_dtype(Tokenizer.load(job.tokenizer).vocab_size)
    dtypes = {output: np.uint8 if output == "loss" and job.format else ids for output in job.outputs}
    start = time.perf_counter()
    documents, tokens = pairs.write(prefix, encode.encode(records, job, FLAGS.workers), dtypes, total, bad)
    took_s = time.perf_counter() - start
    for output, count in tokens.items():
        print(f"wrote      {pairs.name(prefix, output)}: {documents:,} documents, {count:,} tokens")
    print(f"took       {took_s:.1f} s, {documents / took_s:,.0f} documents a second; left out {bad.count:,} bad records")


def _keys():
    keys = tuple(FLAGS.json_keys)
    if not keys or not all(keys) or len(set(keys)) < len(keys):
        raise ValueError(f"--json_keys={','.join(keys)} must name at least one key, each once")
    return keys


def _mapping():
    pairs_ = [m.partition(":")[::2] for m in FLAGS.map_keys]
    if not all(a and b for a, b in pairs_) or any(len(set(names)) < len(names) for names in zip(*pairs_)):
        raise ValueError(f"--map_keys={','.join(FLAGS.map_keys)} must be from:to,from:to, each name once")
    return dict(pairs_)


if __name__ == "__main__":
    if sys.argv[1:2] == ["inspect"]:
        del sys.argv[1]
        place = next((i for i, a in enumerate(sys.argv) if i and not a.startswith("-")), None)
        INSPECTED.append(sys.argv.pop(place) if place else "")
    command_line.run(main)
