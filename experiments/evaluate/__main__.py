"""Evaluates a model: python -m experiments.evaluate (--hf_dir=DIR | --workdir=RUN) --data=PATH --tasks=FILE.jsonl,... [--json=FILE]

--data: anything that data.path takes; gives its loss, perplexity and bits per byte, with the model's own tokenizer. --config.data.* and
        --config.train.seq_len say how it is read. --workdir without --data and --tasks evaluates the held-out rows of that run.
--weights: float, int8 (matrices in 8 bits), or both, as --weights=float,int8, which says by how much the perplexity changes
--tasks: files as experiments/evaluate/tasks.py describes, or, where lm-evaluation-harness is installed, names of its tasks.

On several ranks: python -m experiments.launch --nproc=2 -- experiments.evaluate ... --tp=2
"""

import os

from absl import flags

from experiments import flags as command_line
from experiments import number_flags
from experiments.configs import common
from experiments.generate.flags import WEIGHTS, WEIGHTS_HELP
from parallel.checkpoint.files import write_json

FLAGS = flags.FLAGS


def define_flags():
    command_line.define(common.__file__)  # a full path, so that it is found from any current folder
    flags.DEFINE_string("data", None, "a text file or folder, the prefix of a .bin/.idx pair, weight,prefix,..., or files for a stream")
    flags.DEFINE_enum("part", "all", ["all", "held_out"], "which part of --data: all of it, or the rows that a training run would hold out")
    number_flags.integer("rows", 0, "the most rows of --data; 0 for all", 0)
    flags.DEFINE_list("tasks", "", "files of tasks, or names of tasks of lm-evaluation-harness")
    flags.DEFINE_list("weights", WEIGHTS[0], f"{WEIGHTS_HELP}; or both, to compare them: float,int8")
    flags.DEFINE_string("task_folder", None, "folder of YAML files that define more tasks for lm-evaluation-harness")
    number_flags.integer("limit", None, "the most documents of each task of lm-evaluation-harness", 1)
    number_flags.integer("max_length", None, "the most tokens of a text; default: the model's longest", 2)
    flags.DEFINE_string("json", None, "file to write the results to")


def check_weights(kinds):
    """Raises ValueError for kinds of weights that do not exist, that are there twice, or none."""
    if not kinds or set(kinds) - set(WEIGHTS) or len(set(kinds)) < len(kinds):
        raise ValueError(f"--weights={','.join(kinds)} must be {', '.join(WEIGHTS)} or several of them, as {','.join(WEIGHTS)}")


def main(_):
    for name in ("init_from", "resume_from", "partial", "zero", "micro_batches", "lowering"):
        if FLAGS[name].present:
            raise ValueError(f"--{name} has no use here; leave it out")
    command_line.check_source(FLAGS.hf_dir, FLAGS.workdir)
    check_weights(FLAGS.weights)
    # Imported here, so that wrong flags are answered before MindSpore is imported, which takes seconds.
    from experiments.evaluate import evaluation
    from experiments.train import weights
    from parallel import collectives

    rank, _ = collectives.start()
    model = weights.inference(FLAGS.hf_dir, FLAGS.workdir, download=FLAGS.download)
    tokenizer = model.load_tokenizer()
    files, names = evaluation.split_tasks(FLAGS.tasks, FLAGS.task_folder)
    data, part = FLAGS.data, FLAGS.part
    if data is None and not FLAGS.tasks:
        data, part = evaluation.own_data(FLAGS.config, FLAGS.workdir), "held_out"
    FLAGS.config.data.path = data or ""
    FLAGS.config.data.tokenizer = FLAGS.config.data.tokenizer or str(model.tokenizer)
    config = command_line.resolve(FLAGS, cfg=model.cfg)
    results = {}
    for kind in FLAGS.weights:
        scorer, found = evaluation.load(model, tokenizer, config, rank, FLAGS.max_length, kind), {}
        if data is not None:
            found["data"] = evaluation.data_set(scorer, config, part, FLAGS.rows)
        found.update(evaluation.run_tasks(scorer, files, names, FLAGS.task_folder, FLAGS.limit))
        del scorer  # frees its weights before those of the next kind are read
        results = evaluation.joined(results, found, kind)
    if rank == 0:
        report = {"weights": model.describe(FLAGS.weights[0]), "data": data, "part": part if data is not None else None, "results": results}
        print("\n".join(evaluation.table(report)), flush=True)
        if FLAGS.json:
            write_json(os.path.expanduser(FLAGS.json), report)


if __name__ == "__main__":
    command_line.run(main, define_flags)
