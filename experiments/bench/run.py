"""Runs experiments.bench, once its flags are checked."""

import json

from absl import flags

from experiments.bench.checkpoint import bench_checkpoint
from experiments.bench.context import bench_context
from experiments.bench.data import bench_data
from experiments.bench.decode import bench_decode
from experiments.bench.int8 import bench_int8
from experiments.bench.memory import bench_memory
from experiments.bench.monitors import bench_monitors
from experiments.bench.ops import bench_ops
from experiments.bench.serve import bench_serve
from experiments.bench.train import LOSS_TOLERANCE, bench_train
from parallel.graph import runtime

FLAGS = flags.FLAGS
BENCHES = {
    "train": (bench_train, 20),
    "decode": (bench_decode, 5),
    "ops": (bench_ops, 20),
    "data": (lambda options: bench_data(options.bin_gb, options.steps), 10),
    "checkpoint": (lambda options: bench_checkpoint(options.state_gb, options.steps, options.folder), 5),
    "memory": (bench_memory, 6),
    "monitors": (bench_monitors, 20),
    "context": (bench_context, 2),
    "int8": (bench_int8, 5),
    "serve": (bench_serve, 3),
}


def measure():
    """Prints the figures of --what, and writes them to --json."""
    runtime.set_up()
    bench, steps = BENCHES[FLAGS.what]
    FLAGS.steps = FLAGS.steps or steps
    figures = bench(FLAGS)
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:{width}} {value:,.4g}" if isinstance(value, float) else f"{name:{width}} {value}")
    if FLAGS.json:
        with open(FLAGS.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)
    if not figures.get("loss_difference", 0) <= LOSS_TOLERANCE:
        raise FloatingPointError("the losses of the implementations differ, so their times cannot be compared; see loss_difference")
