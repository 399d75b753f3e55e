"""Converts, inspects and compares Hugging Face folders and our checkpoints: python -m experiments.convert CMD --input=A --output=B

hf-to-native --input=HF_FOLDER --output=NEW       writes a checkpoint without optimizer state, for --init_from
native-to-hf --input=RUN --output=NEW             writes a folder that transformers opens, from a run's newest checkpoint, or from
                                                  RUN/checkpoints/step_000100. Both commands take --dtype=float32|bfloat16|float16
inspect      --input=A [--state] [--nonorms]      lists arrays with their shapes, dtypes, sizes and norms
merge-lora   --input=ADAPTER --output=NEW         merges a LoRA adapter, in PEFT's format or of a run, into its base, and writes a Hugging
                                                  Face folder; --base=DIR where the base is not at the path that the adapter names
average      A B ... --output=NEW [--factors=1,1,2]  writes the average of models of one shape, such as checkpoints of one run
merge        A B --output=NEW [--method=slerp] [--t=0.5]  writes a model between two: linear, or on the arc between their weights
diff         A B [--dtype] [--max_diff=1e-6]      shows the largest difference of each array; fails above --max_diff
verify       --input=A [--sha256=FILE]            checks a checkpoint against its checksums, or a Hugging Face folder's headers, sizes and
                                                  index, and its files against a list of sha256sum
"""

import sys

from absl import flags

from experiments import flags as command_line
from experiments import number_flags
from parallel.hints import nearest
from qwen3.config import DTYPES

FLAGS = flags.FLAGS
flags.DEFINE_string("input", None, "folder of a Hugging Face model, of a run (its newest checkpoint), or of a checkpoint")
flags.DEFINE_string("output", None, "the folder to write, which must not exist yet; with diff: the second folder to compare")
flags.DEFINE_string("base", None, "with merge-lora: folder of the base: a Hugging Face model, a run or a checkpoint")
flags.DEFINE_multi_string("inputs", [], "with average and merge: the folders of the models; also as words without a flag")
flags.DEFINE_list("factors", [], "with average: how much each model counts; default: all the same")
flags.DEFINE_enum("method", "linear", ["linear", "slerp"], "with merge: how the weights between two are computed")
number_flags.real("t", 0.5, "with merge: 0 is the first model, 1 the second one", 0, 1)
flags.DEFINE_enum("dtype", None, list(DTYPES), "dtype of the output; default: the input's. With diff: both are rounded to it first")
flags.DEFINE_boolean("state", False, "include a checkpoint's optimizer state, m and v")
flags.DEFINE_boolean("norms", True, "read the arrays, to show their norms and largest values")
number_flags.integer("top", 20, "with diff: how many arrays to show; 0 for all", 0)
MAX_DIFF = "with diff: fail where max|a - b| / max|a| of an array is above this, or only one has an array"
number_flags.real("max_diff", None, MAX_DIFF, 0, 1e9)
flags.DEFINE_string("sha256", None, "with verify: a file that `sha256sum *` wrote, to check a Hugging Face folder's files")
COMMANDS = {  # command: its flags
    "hf-to-native": ("input", "output", "dtype"),
    "native-to-hf": ("input", "output", "dtype"),
    "merge-lora": ("input", "output", "base", "dtype"),
    "average": ("inputs", "output", "factors", "dtype"),
    "merge": ("inputs", "output", "method", "t", "dtype"),
    "inspect": ("input", "state", "norms"),
    "diff": ("input", "output", "dtype", "state", "top", "max_diff"),
    "verify": ("input", "sha256"),
}
OPTIONS = sorted({name for names in COMMANDS.values() for name in names})
COMMAND = []  # CMD, which is removed from sys.argv


def main(_):
    name = COMMAND[0] if COMMAND else ""
    if name not in COMMANDS:
        raise ValueError(f"the command {name!r} is not one of {', '.join(COMMANDS)}{nearest(name, COMMANDS)}; see --help")
    for option in OPTIONS:
        if FLAGS[option].present and option not in COMMANDS[name]:
            raise ValueError(f"--{option} has no use with {name}; leave it out")
    # Imported here, so that wrong flags are answered before MindSpore is imported, which takes seconds.
    from experiments.convert import commands

    try:
        return {"inspect": commands.inspect, "diff": commands.diff, "verify": commands.verify}.get(name, commands.write)(name)
    except (FileNotFoundError, BrokenPipeError):
        raise
    except OSError as error:
        where = error.filename or f"--output={FLAGS.output}"
        raise ValueError(f"{where}: {error.strerror}; free some space there, or check its permissions") from error


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        COMMAND.append(sys.argv.pop(1))
    if COMMAND and COMMAND[0] in ("average", "merge"):
        words = [word for word in sys.argv[1:] if not word.startswith("-")]
        sys.argv[1:] = [word for word in sys.argv[1:] if word.startswith("-")] + [f"--inputs={word}" for word in words]
    for option in ("input", "output"):  # `diff A B` is `diff --input=A --output=B`
        if COMMAND and len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
            sys.argv.append(f"--{option}={sys.argv.pop(1)}")
    command_line.run(main)
