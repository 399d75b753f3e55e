"""Vectors of texts, or scores of documents for queries: python -m experiments.embed --hf_dir=DIR --input=FILE --output=vectors.npy

--input:   one text a line; or a .jsonl, of which a line is a string or {"text": "..."}. With --rerank: a .jsonl of {"query": "...",
           "document": "..."}
--output:  a .npy of float32 [texts, dims], or a .jsonl with {"embedding": [...]}, or with --rerank {"score": ...}, a line for each input
--instruct: the task, which Qwen3-Embedding wants before queries, not before documents; and Qwen3-Reranker before both

On several ranks: python -m experiments.launch --nproc=2 -- experiments.embed ... --dp=2. See docs/posttraining.md.
"""

from absl import flags

from experiments import flags as command_line
from experiments import number_flags
from experiments.generate import flags as inference_flags

FLAGS = flags.FLAGS


def define_flags():
    flags.DEFINE_string("hf_dir", None, "a Hugging Face folder: config.json, safetensors and the tokenizer's files; or a model's id")
    flags.DEFINE_boolean("download", False, "download a model that is named by its id and is in no cache")
    flags.DEFINE_string("workdir", None, "instead of --hf_dir: the folder of a training run, for its newest checkpoint and its tokenizer")
    flags.DEFINE_string("adapter", None, "a LoRA adapter to merge into the weights: a folder in PEFT's format, or of a finetune run")
    inference_flags.define_layout()
    inference_flags.define_weights()
    flags.DEFINE_string("input", None, "a file of texts: one a line, or a .jsonl")
    flags.DEFINE_string("output", None, "the file to write: .npy or .jsonl")
    flags.DEFINE_string("instruct", None, "the task in one sentence: put before each text as a query, and before each pair of --rerank")
    flags.DEFINE_boolean("rerank", False, "score documents for queries, as Qwen3-Reranker does, instead of vectors")
    flags.DEFINE_boolean("normalise", True, "scale each vector to length 1")
    number_flags.integer("dims", None, "keep this many first dims of each vector; default: all", 1)
    number_flags.integer("batch_size", 8, "rows that a data parallel rank computes together", 1)
    number_flags.integer("max_length", None, "the most tokens of a text, of which a longer one loses its end; default: the model's", 2)


def main(_):
    command_line.check_source(FLAGS.hf_dir, FLAGS.workdir)
    from experiments.embed import files

    texts = files.read(FLAGS.input, FLAGS.rerank)
    files.check_output(FLAGS.output, FLAGS.rerank)
    if FLAGS.rerank and (FLAGS.dims or not FLAGS.normalise):
        raise ValueError("--rerank gives one score a pair; leave out --dims and --nonormalise")
    # Imported here, so that wrong flags are answered before MindSpore is imported, which takes seconds.
    from experiments.embed import vectors
    from experiments.layout import check as layout
    from experiments.train import weights
    from parallel import collectives
    from parallel.mesh import AXES, world_size
    from parallel.sharding import Sharding

    rank, _ = collectives.start()
    model = weights.inference(FLAGS.hf_dir, FLAGS.workdir, FLAGS.adapter, FLAGS.download, head=FLAGS.rerank)
    sizes = layout.for_inference({a: FLAGS[a].value for a in AXES}, model.cfg, FLAGS.hf_dir or FLAGS.workdir, world_size())
    sharding, tokenizer = Sharding(layout.mesh(model.cfg, sizes, rank)), model.load_tokenizer()
    options = {"sharding": sharding, "batch_size": FLAGS.batch_size, "length": FLAGS.max_length}
    embedder = vectors.build(lambda: model.params(sharding, FLAGS.weights), model.cfg, tokenizer, **options)
    if FLAGS.rerank:
        found = vectors.rerank(embedder, texts, FLAGS.instruct)
    else:
        found = vectors.embed(embedder, texts, FLAGS.instruct, FLAGS.dims, FLAGS.normalise)
    if rank == 0:
        files.write(FLAGS.output, found)
        what = "scores" if FLAGS.rerank else f"vectors of {found.shape[1]} dims"
        print(f"{len(found):,} {what} from {model.describe(FLAGS.weights)}, in {FLAGS.output}", flush=True)


if __name__ == "__main__":
    command_line.run(main, define_flags)
