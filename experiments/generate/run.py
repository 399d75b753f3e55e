"""Runs experiments.generate, once its flags are checked."""

from absl import flags

from experiments.generate import batch as generate_batch
from experiments.generate import chat as generate_chat
from experiments.generate import draft, exchange, prompts
from experiments.generate.model import Model
from qwen3 import answers
from qwen3.engine import Engine, check

FLAGS = flags.FLAGS
CHAT_LENGTH, BATCH = 4096, 8


def generate():
    """Generates for the prompts of the flags, or holds a conversation."""
    model = Model()
    if FLAGS.chat and FLAGS.prompt is None and FLAGS.prompts_file is None:
        return converse(model)
    given = prompts.read(FLAGS.prompt, FLAGS.prompts_file) if model.mesh.rank == 0 else []
    ids = exchange.shared(model.mesh, prompts.encode_all(model.tokenizer, given, FLAGS.chat, FLAGS.enable_thinking) if given else [])
    engine = make_engine(model, ids)
    dp_rank, dp = model.mesh.index(("dp",)), model.mesh.dp
    samples = [(i, s) for i in range(len(ids)) for s in range(FLAGS.num_samples)][dp_rank::dp]
    requests = ((i, model.request(ids[i], s, FLAGS.logprobs), FLAGS.stop) for i, s in samples)
    results = generate_batch.run(engine, model.tokenizer, requests, generate_batch.Together(model.sharding))
    results, totals = generate_batch.gathered(model.mesh, results, engine.totals)
    if model.mesh.rank == 0:
        forms = answers.forms_of(model.tokenizer.chat_template, FLAGS.tool_calls, FLAGS.reasoning)
        for result in results:
            if FLAGS.chat or not isinstance(given[result.prompt], str):
                result.message = prompts.message(model.tokenizer, given[result.prompt], ids[result.prompt], result.text, forms)
        generate_batch.write(results, totals, FLAGS.output, FLAGS.output_jsonl)


def make_engine(model, ids):
    """Returns an Engine with room for these prompts. Raises ValueError for a prompt that does not fit."""
    check(model.request(ids[0], logprobs=FLAGS.logprobs))
    longest = max(map(len, ids))
    length = FLAGS.max_length or min(longest + model.max_new_tokens, model.cfg.max_position)
    if longest > length:
        number = max(range(len(ids)), key=lambda i: len(ids[i])) + 1
        fix = "raise --max_length" if FLAGS.max_length else "shorten it, as the model has no more positions"
        raise ValueError(f"prompt {number} of {longest} tokens is longer than a row of the cache, {length} tokens; {fix}")
    texts_per_rank = -(-len(ids) * FLAGS.num_samples // model.mesh.dp)
    return build(model, FLAGS.batch_size or min(BATCH, texts_per_rank), length, {len(one) for one in ids})


def build(model, slots, length, sizes):
    """Returns an Engine that is compiled for prompts of these sizes in tokens; None compiles for all sizes."""
    if length > model.cfg.max_position:
        raise ValueError(f"--max_length={length} is more than the model's {model.cfg.max_position} positions; use at most that")
    options = {"prefill_chunk": FLAGS.prefill_chunk, "sharding": model.sharding, "speculate": FLAGS.speculate}
    options["draft"] = draft.maker(model.tokenizer, model.mesh.world)(slots, length)
    engine = Engine(model.params(), model.cfg, slots=slots, length=length, **options)
    if model.mesh.rank == 0:
        layout = " x ".join(f"{axis} {getattr(model.mesh, axis)}" for axis in ("dp", "pp", "tp", "ep") if getattr(model.mesh, axis) > 1)
        print(f"model      {model.opened.describe(FLAGS.weights)}{', ' * bool(layout)}{layout}")
        print(f"cache      {slots} rows of {engine.length} tokens, {engine.cache.nbytes / 2**20:,.1f} MiB a rank", flush=True)
    engine.warm_up(sizes)
    return engine


def converse(model):
    if model.mesh.world > 1:
        raise ValueError(f"--chat without a prompt runs on one process, and the job has {model.mesh.world}; give --prompts_file")
    length = model.new_tokens = FLAGS.max_length or min(CHAT_LENGTH, model.cfg.max_position)
    generate_chat.chat(build(model, 1, length, None), model, FLAGS.enable_thinking, FLAGS.stop)
