"""An OpenAI-compatible server: python -m experiments.serve (--hf_dir=DIR | --workdir=RUN) [--port=8000] [--slots=8] [--length=2048]

    from openai import OpenAI
    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").chat.completions.create(model=..., messages=[...])

Under experiments.launch it runs on several ranks, of which rank 0 answers the clients: see experiments/serve/ranks.py.

    python -m experiments.launch --nproc=2 -- experiments.serve --hf_dir=DIR --tp=2

After SIGTERM the server takes no new requests and gives those that run --drain_s seconds to end; a second SIGTERM drops them.
It needs aiohttp and prometheus_client, and for grammars llguidance: pip install -e '.[serve]'
"""

import importlib.util
import os
import signal

from absl import flags

from experiments import flags as command_line
from experiments import number_flags
from experiments.generate import flags as inference_flags
from experiments.serve import access
from parallel.mesh import AXES, job_rank, world_size

FLAGS = flags.FLAGS


def define_flags():
    flags.DEFINE_string("hf_dir", None, "folder of a Hugging Face model")
    flags.DEFINE_string("workdir", None, "folder of a training run, whose newest checkpoint is served")
    adapter = "NAME=FOLDER: a LoRA adapter, in PEFT's format or a run, that requests choose by the model NAME; repeat the flag for several"
    flags.DEFINE_multi_string("adapter", [], adapter)
    flags.DEFINE_string("host", "127.0.0.1", "address to listen on; any address but the loopback lets other machines connect")
    number_flags.integer("port", 8000, "port to listen on; 0 takes a free one", 0, 65535)
    flags.DEFINE_string("model_name", None, "the model's name in requests; default: the folder's name")
    inference_flags.define_layout()
    number_flags.integer("slots", 8, "texts that a data parallel rank generates at the same time", 1)
    number_flags.integer("length", 2048, "the most tokens of a prompt and its answer together", 2)
    cache_tokens = "tokens that the KV cache of a data parallel rank has room for; default: slots times length"
    number_flags.integer("cache_tokens", None, cache_tokens, 1)
    number_flags.integer("max_waiting", 64, "the most texts that wait for a slot; a request beyond them gets status 429", 0)
    number_flags.integer("max_body", 1 << 20, "the most bytes of a request's body; a larger one gets status 413", 1)
    number_flags.integer("max_connections", 1000, "the most open connections; fewer where the limit of open files is lower. More wait", 1)
    number_flags.real("idle_s", 60, "seconds after which a connection without a request at work is closed", 1, number_flags.MOST_S)
    flags.DEFINE_string("api_key_file", None, "file with the API keys that are accepted, one a line; without it no key is needed")
    inference_flags.define_weights()
    inference_flags.define_speculation()
    inference_flags.define_generation_config()
    inference_flags.define_forms()
    number_flags.real("drain_s", 30, "after SIGTERM, seconds that running requests have to end", 0, number_flags.MOST_S)


def main(_):
    command_line.check_source(FLAGS.hf_dir, FLAGS.workdir)
    missing = [name for name in ("aiohttp", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"experiments.serve needs {' and '.join(missing)}: pip install -e '.[serve]'")
    name = FLAGS.model_name or os.path.basename(os.path.abspath(os.path.expanduser(FLAGS.hf_dir or FLAGS.workdir)))
    adapters = named_adapters(FLAGS.adapter, name)
    keys, connections = access.read_keys(FLAGS.api_key_file), access.connection_limit(FLAGS.max_connections)
    serve_with(name, adapters, keys, connections, access.bind(FLAGS.host, FLAGS.port) if job_rank() == 0 else [])


def named_adapters(given, base):
    """Returns {name: folder} of the values of --adapter. base: the name of the model without adapters."""
    found = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (equals and name and folder):
            raise ValueError(f"--adapter={text}: give NAME=FOLDER, where NAME is the model that requests then name")
        if name in (base, *found):
            raise ValueError(f"--adapter={text}: the name {name} is taken; give each adapter a name of its own")
        found[name] = folder
    return found


def serve_with(name, adapters, keys, connections, sockets):
    """Loads the model and serves it on bound sockets. On several ranks, rank 0 has the sockets and the others follow it."""
    from experiments.generate import defaults, draft
    from experiments.layout import check as layout
    from experiments.serve import http, ranks
    from experiments.serve import run as serve_run
    from experiments.serve.engine import FAILURES
    from experiments.train import weights
    from parallel import collectives
    from parallel.sharding import Sharding
    from qwen3 import answers, grammars
    from qwen3.engine import Engine

    rank, _ = collectives.start()
    model = weights.inference(FLAGS.hf_dir, FLAGS.workdir, beside=adapters)
    asked = {axis: FLAGS[axis].value for axis in AXES}
    mesh = layout.mesh(model.cfg, layout.for_inference(asked, model.cfg, FLAGS.hf_dir or FLAGS.workdir, world_size()), rank)
    several, sharding = mesh.world > 1, Sharding(mesh)
    tokenizer = model.load_tokenizer()
    params, length = model.params(sharding, FLAGS.weights), min(FLAGS.length, model.cfg.max_position)
    file = defaults.read(model.folder)
    stop_ids, found = defaults.stop_ids(file, model.cfg, tokenizer), defaults.for_requests(file) if FLAGS.use_generation_config else {}
    forms = answers.forms_of(tokenizer.chat_template, FLAGS.tool_calls, FLAGS.reasoning)
    limit_s = ranks.GRAMMAR_S if several and rank == 0 else None
    compiler = grammars.Grammars(tokenizer, model.cfg.vocab_size, limit_s) if grammars.installed() else None
    length, make_draft = min(length, FLAGS.cache_tokens or length), draft.maker(tokenizer, mesh.world)

    def make_own():
        options = {"cache_tokens": FLAGS.cache_tokens, "reads": 1, "speculate": FLAGS.speculate, "adapters": model.masks}
        options |= {"sharding": sharding if several else None, "draft": make_draft(FLAGS.slots, length)}
        engine = Engine(params, model.cfg, slots=FLAGS.slots, length=length, **options)
        engine.warm_up(by_host=True)
        return engine

    if rank > 0:
        engine = make_own()
        for number in (signal.SIGTERM, signal.SIGINT):  # they come to all ranks; rank 0 needs the others until its last request has ended
            signal.signal(number, signal.SIG_IGN)
        ranks.follow(engine, mesh, tokenizer, compiler)
        return
    slots = FLAGS.slots * mesh.dp
    limits = slots, FLAGS.max_body, keys, access.names(FLAGS.host)
    settings = http.Settings(name, tokenizer, length, tuple(sorted(stop_ids)), *limits, found, forms, compiler, tuple(adapters))
    sizes = ", ".join(f"{axis} {getattr(mesh, axis)}" for axis in AXES if getattr(mesh, axis) > 1)
    print(f"weights    {model.describe(FLAGS.weights)}", *[f"layout     {mesh.world} ranks: {sizes}"] * several, sep="\n", flush=True)
    most, last = slots + FLAGS.max_waiting, (FLAGS.host, FLAGS.drain_s, connections, FLAGS.idle_s)
    if not several:
        serve_run.run(settings, make_own, most, sockets, *last, FAILURES)
        return
    leader = ranks.Leader(make_own(), mesh)
    try:
        serve_run.run(settings, lambda: leader, most, sockets, *last, 1)
    finally:
        leader.close()


if __name__ == "__main__":
    command_line.run(main, define_flags)
