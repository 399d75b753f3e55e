"""Weights between Hugging Face folders and checkpoints of ours, and what is in them: python -m experiments.convert CMD --input=A --output=B

hf-to-native --input=HF_FOLDER --output=NEW       a checkpoint of the weights alone, for --init_from
native-to-hf --input=RUN --output=NEW             a folder that transformers opens; of a run its newest checkpoint, or give
                                                  RUN/checkpoints/step_000100. Both: --dtype=float32|bfloat16|float16
inspect      --input=A [--state] [--nonorms]      arrays, shapes, dtypes, sizes, norms
merge-lora   --input=ADAPTER --output=NEW         a plain Hugging Face folder from an adapter, in PEFT's format or of a run, and its base;
                                                  --base=DIR where the base is not at the path that the adapter notes
diff         A B [--dtype] [--max_diff=1e-6]      the largest differences by array, of either format; fails above --max_diff
verify       --input=A [--sha256=FILE]            a checkpoint against its checksums; a folder's headers, sizes, index, and a list of
                                                  sha256sum
"""

import sys

from absl import flags

from experiments import flags as command_line
from experiments.convert import look
from experiments.convert import weights as convert
from experiments.convert.lora import merge
from parallel.hints import nearest
from qwen3.config import DTYPES

FLAGS = flags.FLAGS
flags.DEFINE_string("input", None, "folder of a Hugging Face model, of a run (its newest checkpoint), or of a checkpoint")
flags.DEFINE_string("output", None, "the folder to write, which must not exist yet; of diff: the second of the two")
flags.DEFINE_string("base", None, "of merge-lora: folder of the base, a Hugging Face model, a run or a checkpoint")
flags.DEFINE_enum("dtype", None, list(DTYPES), "of what is written, else as it is; of diff: both are rounded to it first")
flags.DEFINE_boolean("state", False, "the optimizer state of a checkpoint, m and v, too")
flags.DEFINE_boolean("norms", True, "read the arrays, for their norms and largest values")
flags.DEFINE_integer("top", 20, "of diff: how many arrays to show; 0 for all")
flags.DEFINE_float("max_diff", None, "of diff: fail above this largest |a - b| / largest |a| of an array, or if only one has an array")
flags.DEFINE_string("sha256", None, "of verify: a file as `sha256sum *` writes it, for the files of a Hugging Face folder")
COMMANDS = {  # and the flags of each
    "hf-to-native": ("input", "output", "dtype"),
    "native-to-hf": ("input", "output", "dtype"),
    "merge-lora": ("input", "output", "base", "dtype"),
    "inspect": ("input", "state", "norms"),
    "diff": ("input", "output", "dtype", "state", "top", "max_diff"),
    "verify": ("input", "sha256"),
}
OPTIONS = sorted({name for names in COMMANDS.values() for name in names})
COMMAND = []  # CMD, taken out of the command line


def main(_):
    name = COMMAND[0] if COMMAND else ""
    if name not in COMMANDS:
        raise ValueError(f"the command {name!r} is not one of {', '.join(COMMANDS)}{nearest(name, COMMANDS)}; see --help")
    for option in OPTIONS:
        if FLAGS[option].present and option not in COMMANDS[name]:
            raise ValueError(f"--{option} has no use with {name}; leave it out")
    try:
        return {"inspect": inspect, "diff": diff, "verify": verify}.get(name, write)(name)
    except (FileNotFoundError, BrokenPipeError):
        raise
    except OSError as error:
        where = error.filename or f"--output={FLAGS.output}"
        raise ValueError(f"{where}: {error.strerror}; make room there, or see to its rights") from error


def write(name):
    if name == "merge-lora":
        lines = merge(FLAGS.input, FLAGS.output, FLAGS.base, FLAGS.dtype)
    else:
        lines = convert.write(name, FLAGS.input, FLAGS.output, FLAGS.dtype)
    print(*lines, sep="\n")


def inspect(_):
    print("\n".join(look.inspect(convert.open_weights("input", FLAGS.input, state=FLAGS.state), FLAGS.norms)))


def diff(_):
    a, b = (convert.open_weights(key, FLAGS[key].value, state=FLAGS.state) for key in ("input", "output"))
    lines, failed = look.describe(*look.diff(a, b, FLAGS.dtype), FLAGS.top, FLAGS.max_diff)
    print("\n".join(lines))
    return int(failed)


def verify(_):
    weights = convert.open_weights("input", FLAGS.input)
    if weights.checked and FLAGS.sha256:
        raise ValueError(f"--sha256={FLAGS.sha256} is for a Hugging Face folder, and --input={FLAGS.input} is a checkpoint; leave it out")
    wrong = look.verify_native(weights) if weights.checked else look.verify_hugging_face(weights.folder, FLAGS.sha256)
    for text in wrong:
        print(f"wrong      {text}")
    print(f"{weights}: {f'{len(wrong)} things are wrong' if wrong else 'all is as it should be'}")
    return int(bool(wrong))


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        COMMAND.append(sys.argv.pop(1))
    for option in ("input", "output"):  # `diff A B` is `diff --input=A --output=B`
        if COMMAND and len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
            sys.argv.append(f"--{option}={sys.argv.pop(1)}")
    command_line.run(main)
