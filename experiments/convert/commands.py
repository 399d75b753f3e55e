"""The commands of experiments.convert, once its flags are checked."""

from absl import flags

from experiments.convert import look, mix
from experiments.convert import weights as convert
from experiments.convert.lora import merge

FLAGS = flags.FLAGS


def write(name):
    if name == "merge-lora":
        lines = merge(FLAGS.input, FLAGS.output, FLAGS.base, FLAGS.dtype)
    elif name == "average":
        lines = mix.average(FLAGS.inputs, FLAGS.output, numbers(FLAGS.factors), FLAGS.dtype)
    elif name == "merge":
        lines = mix.merge(FLAGS.inputs, FLAGS.output, FLAGS.method, FLAGS.t, FLAGS.dtype)
    else:
        lines = convert.write(name, FLAGS.input, FLAGS.output, FLAGS.dtype)
    print(*lines, sep="\n")


def numbers(texts):
    try:
        return [float(text) for text in texts]
    except ValueError:
        raise ValueError(f"--factors={','.join(texts)}: give numbers, such as --factors=1,1,2") from None


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
    print(f"{weights}: {len(wrong) or 'no'} error{'s' * (len(wrong) != 1)}")
    return int(bool(wrong))
