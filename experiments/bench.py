"""Benchmarks: python -m experiments.bench --what=train|data

One line a figure, and the same as JSON with --json=FILE. Compare figures of one machine and one day only.
"""

import json

from absl import flags

from experiments import flags as command_line
from experiments.bench_data import bench_data
from experiments.bench_train import bench_train

FLAGS = flags.FLAGS
flags.DEFINE_enum("what", "train", ["train", "data"], "what to measure")
flags.DEFINE_string("json", None, "file for the figures")
flags.DEFINE_integer("steps", 10, "timed training steps, after two that are not", lower_bound=1)
flags.DEFINE_enum("layer_loop", "auto", ["auto", "unroll", "scan"], "train: how the layers are compiled")
flags.DEFINE_float("bin_gb", 2.0, "data: size of the .bin that is made to load from, in 1e9 bytes", lower_bound=0.001)


def main(_):
    figures = bench_train(FLAGS.steps, FLAGS.layer_loop) if FLAGS.what == "train" else bench_data(FLAGS.bin_gb, FLAGS.steps)
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:{width}} {value:,.4g}" if isinstance(value, float) else f"{name:{width}} {value}")
    if FLAGS.json:
        with open(FLAGS.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    command_line.run(main)
