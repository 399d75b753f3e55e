"""Benchmarks: python -m experiments.bench --what=train|decode|ops|data|checkpoint|memory|monitors|context|int8|serve

Prints one figure per line; --json=FILE writes them as JSON. Compare only figures of one machine and one day. --peer also measures another
implementation on the same work, in turns with ours (pip install -e '.[peers]').
"""

from absl import flags

from experiments import flags as command_line
from experiments import number_flags
from experiments.bench.peer_list import PEERS

FLAGS = flags.FLAGS
WHAT = ["train", "decode", "ops", "data", "checkpoint", "memory", "monitors", "context", "int8", "serve"]
flags.DEFINE_enum("what", "train", WHAT, "what to measure")
flags.DEFINE_string("json", None, "file to which the figures are written")
number_flags.integer(
    "steps",
    None,
    "train: timed steps (20); decode: generations (5); ops: calls (20); data: steps (10); checkpoint: turns (5);"
    " memory: steps (6); monitors: steps (20); context: (2); int8: turns (5); serve: turns (3)",
    1,
)
flags.DEFINE_boolean("moe", False, "train, decode, monitors: 16 experts of ffn 256, 4 per token, instead of a dense ffn of 768")
number_flags.integers("batch", [1, 16], "decode, int8: prompts at a time; repeat the flag for several", 1, 2**16)
flags.DEFINE_multi_enum("peer", [], list(PEERS), "train, decode, serve: another implementation to measure; repeat the flag for several")
flags.DEFINE_string("peer_python", None, "Python interpreter for peers whose package this one does not have")
flags.DEFINE_enum("kernels", "auto", ["auto", "reference", "cpu"], "train, decode, memory, monitors, serve: implementation of our ops")
flags.DEFINE_boolean("check", False, "train, decode: also measure ours with the reference ops")
flags.DEFINE_enum("layer_loop", "auto", ["auto", "unroll", "scan"], "train, monitors: how the layers are compiled")
number_flags.integer("seq_len", 32768, "context: tokens of the row", 8)
number_flags.integer("layers", 28, "int8: layers of the model", 1, 28)
flags.DEFINE_enum("cp_attention", "ring", ["ring", "ulysses"], "context: how ranks share attention")
flags.DEFINE_enum("shape", "tiny", ["tiny", "wide"], "serve: 6 layers of hidden 256, or 8 of hidden 1024")
PARTS = ["one", "many", "batch", "reuse", "load", "guess"]
flags.DEFINE_multi_enum("part", PARTS, PARTS, "serve: what to measure; repeat the flag for several")
number_flags.integer("threads", 1, "serve: threads of each program. With one, times are CPU seconds; with more, wall seconds", 1, 1024)
number_flags.real("rate", None, "serve: requests a second that arrive in the load; default: 4 for tiny, 0.2 for wide", 1e-6, 1e6)
number_flags.integer("page", 64, "serve: tokens of a page of the engine's cache", 1, 4096)
flags.DEFINE_list("ops", [], "ops: names of the cases to measure; default: all")
number_flags.real("state_gb", 2.0, "checkpoint: size of the state, in 1e9 bytes", 0.001, 1e5)
flags.DEFINE_string("folder", None, "checkpoint: a folder on the disk to measure; default: the system's temporary one")
number_flags.real("bin_gb", 2.0, "data: size of the generated .bin file to load from, in 1e9 bytes", 0.001, 1e5)


def main(_):
    from experiments.bench import run  # once the flags are checked: it imports MindSpore, which takes seconds

    run.measure()


if __name__ == "__main__":
    command_line.run(main)
