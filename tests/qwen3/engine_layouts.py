"""What runs in each process of test_engine_layouts.py: engines in layouts, and data ranks that end at different times."""

import json

import mindspore as ms
import numpy as np

from experiments.generate.batch import Together, gathered, run
from parallel import collectives
from parallel.mesh import Mesh
from parallel.placement import load, place, reader
from parallel.sharding import Sharding
from qwen3 import hf
from qwen3.adapters import side_by_side
from qwen3.engine import Engine, Request
from qwen3.int8 import Quantised, int8_specs
from qwen3.model import build, param_specs
from qwen3.stages import own_specs
from qwen3.tokenizer import train_bpe
from tests.qwen3 import test_adapters
from tests.qwen3.test_engine import CONTINUATIONS, GOLDEN
from tests.tiny import DENSE

DRAWN = {"temperature": 1.0, "top_p": 0.9, "seed": 5}
GROUP = 4  # inputs that share a scale in the layouts of weights in 8 bits: it divides each rank's inputs
# name -> the golden model, sizes of the mesh, options of the requests. In those that end in "int8" the matrices are in 8 bits,
# and in those that end in "guesses" tokens are guessed
LAYOUTS = {
    "tp2": ("dense_tied", dict(tp=2), {}),
    "dp2 ep2": ("moe_norm", dict(dp=2, ep=2), {}),
    "tp2, drawn": ("dense_tied", dict(tp=2), DRAWN),
    "tp2, int8": ("dense_tied", dict(tp=2), {}),
    "pp2, int8": ("dense_tied", dict(pp=2), {}),
    "dp2 ep2, int8": ("moe_norm", dict(dp=2, ep=2), {}),
    "tp2, experts, int8": ("moe_norm", dict(tp=2), {}),
    "tp2, guesses": ("dense_tied", dict(tp=2), {}),
    "pp2, guesses": ("dense_tied", dict(pp=2), {}),
    "dp2 ep2, guesses": ("moe_norm", dict(dp=2, ep=2), {}),
    "tp2, biases": ("qwen2_bias", dict(tp=2), {}),
    "tp2, experts": ("moe_norm", dict(tp=2), {}),
    "dp2": ("dense_tied", dict(dp=2), {}),
    "pp2": ("dense_tied", dict(pp=2), {}),
    "pp2, drawn": ("dense_tied", dict(pp=2), DRAWN),
    "pp2, mixed layers": ("moe_mixed", dict(pp=2), {}),
    "pp2 tp2": ("qwen2_bias", dict(pp=2, tp=2), {}),
    "pp2 dp2 ep2": ("moe_norm", dict(pp=2, dp=2, ep=2), {}),
    "tp4 of 2 kv heads": ("dense_tied", dict(tp=4), {}),
    "dp2 tp2 ep2": ("moe_mixed", dict(dp=2, tp=2, ep=2), {}),
    "dp2 tp2": ("qwen2_bias", dict(dp=2, tp=2), {}),
}


def requests(name, options):
    cases = CONTINUATIONS[name]
    return [(i, Request(case["prompt"], len(case["greedy"]), **options), ()) for i, case in enumerate(cases)]


def tokens(name, sizes, options, rank=0, int8=False, speculate=0):
    """The tokens of each prompt, in one process without a mesh, or as every rank gathers them. Data rank 0 has all but two prompts."""
    cfg, params = hf.load(GOLDEN / "hf" / name)
    mesh = Mesh(**sizes, kv_repeat=max(1, sizes.get("tp", 1) // cfg.num_kv_heads), rank=rank)
    sharding = Sharding(mesh) if mesh.world > 1 else None
    if sharding or int8:
        specs, read = own_specs(cfg, mesh), reader(params)
        specs, read = (int8_specs(specs, GROUP), Quantised(read, param_specs(cfg), GROUP).read) if int8 else (specs, read)
        params = load(mesh, place(sharding or Sharding(), specs), read, "used")
    engine = Engine(params, cfg, slots=3, length=64, prefill_chunk=8, sharding=sharding, speculate=speculate)
    engine.warm_up()
    mine = requests(name, options)
    if mesh.dp > 1:
        mine = mine[2:] if mesh.index(("dp",)) == 0 else mine[:2]
    results, _ = gathered(mesh, run(engine, TOKENIZER, mine, Together(sharding)), engine.totals)
    return [result.tokens for result in results]


TOKENIZER = train_bpe(["a b c"], 259)


def main(names):
    """In each process: {layout: tokens} of a JSON list of names."""
    rank, _ = collectives.start()
    return {name: tokens(*LAYOUTS[name], rank, name.endswith("int8"), 4 * name.endswith("guesses")) for name in json.loads(names)}


def int8_logits(sizes, rank=0):
    """{model: logits [2, 11, V]} with the matrices in 8 bits, in one process or as a rank of a layout has them. Eager, which is quicker for
    one call."""
    sharding, out = Sharding(Mesh(**sizes, rank=rank)), {}
    for name in ("dense_tied", "moe_norm"):
        cfg, params = hf.load(GOLDEN / "hf" / name)
        specs = param_specs(cfg)
        placed = place(sharding, int8_specs(specs, GROUP))
        params = load(sharding.mesh, placed, Quantised(reader(params), specs, GROUP).read, "used")
        tokens = ms.Tensor(np.arange(1, 23, dtype=np.int32).reshape(2, 11))
        out[name] = build(cfg, sharding).forward(params, tokens)[0].asnumpy()
    return out


def main_int8():
    """In each of two processes: int8_logits of tp2."""
    rank, _ = collectives.start()
    return int8_logits(dict(tp=2), rank)


def with_adapters(sizes, rank=0):
    """The tokens of rows of which some have an adapter, with the models of test_adapters.py."""
    mesh, (base, found) = Mesh(**sizes, rank=rank), test_adapters.made(DENSE)
    sharding = Sharding(mesh) if mesh.world > 1 else None
    cfg, read, masks = side_by_side(DENSE, reader(base), found)
    params = load(mesh, place(sharding or Sharding(), own_specs(cfg, mesh)), read, "used")
    engine = Engine(params, cfg, slots=4, length=64, prefill_chunk=8, sharding=sharding, adapters=masks)
    engine.warm_up()
    asked = [Request(prompt, 8, adapter=i % 3) for i, prompt in enumerate(test_adapters.prompts(6))]
    return np.array([tokens for tokens, _ in test_adapters.answers(engine, asked)])


def main_adapters(names):
    """In each of two processes: {axis: with_adapters of two ranks along it}."""
    rank, _ = collectives.start()
    return {axis: with_adapters({axis: 2}, rank) for axis in json.loads(names)}
