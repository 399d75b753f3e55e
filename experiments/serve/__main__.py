"""An OpenAI-compatible server: python -m experiments.serve (--hf_dir=DIR | --workdir=RUN) [--port=8000] [--slots=8] [--length=2048]

    from openai import OpenAI
    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").chat.completions.create(model=..., messages=[...])

After SIGTERM the server takes no new requests and gives those that run --drain_s seconds to end; a second SIGTERM drops them.
It needs aiohttp and prometheus_client, and for grammars llguidance: pip install -e '.[serve]'
"""

import importlib.util
import os

from absl import flags

from experiments import flags as command_line
from experiments import number_flags
from experiments.generate import flags as inference_flags
from experiments.serve import access
from parallel.mesh import world_size

FLAGS = flags.FLAGS


def define_flags():
    flags.DEFINE_string("hf_dir", None, "folder of a Hugging Face model")
    flags.DEFINE_string("workdir", None, "folder of a training run, whose newest checkpoint is served")
    flags.DEFINE_string("host", "127.0.0.1", "address to listen on; any address but the loopback lets other machines connect")
    number_flags.integer("port", 8000, "port to listen on; 0 takes a free one", 0, 65535)
    flags.DEFINE_string("model_name", None, "the model's name in requests; default: the folder's name")
    number_flags.integer("slots", 8, "texts that are generated at the same time", 1)
    number_flags.integer("length", 2048, "the most tokens of a prompt and its answer together", 2)
    number_flags.integer("cache_tokens", None, "tokens that the KV cache has room for; default: slots times length", 1)
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
    if world_size() > 1:
        raise ValueError("experiments.serve runs on one process; start it without experiments.launch")
    command_line.check_source(FLAGS.hf_dir, FLAGS.workdir)
    missing = [name for name in ("aiohttp", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"experiments.serve needs {' and '.join(missing)}: pip install -e '.[serve]'")
    keys, connections = access.read_keys(FLAGS.api_key_file), access.connection_limit(FLAGS.max_connections)
    serve_with(keys, connections, access.bind(FLAGS.host, FLAGS.port))


def serve_with(keys, connections, sockets):
    """Loads the model and serves it on bound sockets."""
    from experiments.generate import defaults
    from experiments.serve import http
    from experiments.serve import run as serve_run
    from experiments.train import weights
    from parallel import collectives
    from parallel.sharding import Sharding
    from qwen3 import answers, grammars
    from qwen3.engine import Engine

    collectives.start()
    model = weights.inference(FLAGS.hf_dir, FLAGS.workdir)
    tokenizer = model.load_tokenizer()
    params, length = model.params(Sharding(), FLAGS.weights), min(FLAGS.length, model.cfg.max_position)
    name = FLAGS.model_name or os.path.basename(os.path.abspath(os.path.expanduser(FLAGS.hf_dir or FLAGS.workdir)))
    file = defaults.read(model.folder)
    stop_ids, found = defaults.stop_ids(file, model.cfg, tokenizer), defaults.for_requests(file) if FLAGS.use_generation_config else {}
    forms = answers.forms_of(tokenizer.chat_template, FLAGS.tool_calls, FLAGS.reasoning)
    compiler = grammars.Grammars(tokenizer, model.cfg.vocab_size) if grammars.installed() else None
    length = min(length, FLAGS.cache_tokens or length)
    limits = FLAGS.slots, FLAGS.max_body, keys, access.names(FLAGS.host)
    settings = http.Settings(name, tokenizer, length, tuple(sorted(stop_ids)), *limits, found, forms, compiler)
    print(f"weights    {model.describe(FLAGS.weights)}", flush=True)

    def make():
        options = {"cache_tokens": FLAGS.cache_tokens, "reads": 1, "speculate": FLAGS.speculate}
        engine = Engine(params, model.cfg, slots=FLAGS.slots, length=length, **options)
        engine.warm_up(by_host=True)
        return engine

    serve_run.run(settings, make, FLAGS.slots + FLAGS.max_waiting, sockets, FLAGS.host, FLAGS.drain_s, connections, FLAGS.idle_s)


if __name__ == "__main__":
    command_line.run(main, define_flags)
