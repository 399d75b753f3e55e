"""Scoring in layouts, in each process of a group; see test_scoring.py."""

import numpy as np

from experiments.evaluate import scoring
from parallel import collectives
from parallel.mesh import Mesh
from parallel.placement import load, place, reader
from parallel.sharding import Sharding
from parallel.trees import tree_map
from qwen3.stages import own_specs
from qwen3.tokenizer import train_bpe
from tests.tiny import DENSE, MIXED, MOE, random_params

TEXT = "".join(f"def function_{j}(x):\n    return x + {7 * j}\n" for j in range(60))
PAIRS = [(TEXT[i : i + 30 * i + 1], TEXT[4 * i + 1 : 4 * i + 30 + i % 5]) for i in range(20)]
LAYOUTS = {
    "dp2 ep2": (MOE, dict(dp=2, ep=2)),
    "tp2": (DENSE.replace(tie_embeddings=False), dict(tp=2)),
    "pp2": (DENSE, dict(pp=2)),
    "mixed, pp2": (MIXED, dict(pp=2)),
}


def tokenizer():
    return train_bpe([TEXT], 300)


def scorer(cfg, sizes, rank):
    """Of a model with random weights, the same on every rank."""
    tok = tokenizer()
    cfg = cfg.replace(vocab_size=tok.vocab_size)  # an odd number
    sharding = Sharding(Mesh(**sizes, rank=rank))
    whole = reader(tree_map(lambda w: w.asnumpy(), random_params(cfg)))
    params = load(sharding.mesh, place(sharding, own_specs(cfg, sharding.mesh)), whole, "used")
    return scoring.build(params, cfg, tok, sharding=sharding, batch_size=2, length=64)


def results(cfg, sizes, rank=0):
    """Of loglikelihood, loglikelihood_rolling and generate_until, as arrays."""
    model = scorer(cfg, sizes, rank)
    found = scoring.loglikelihood(model, PAIRS)
    out = {
        "logprobs": [x for x, _ in found],
        "greedy": [g for _, g in found],
        "rolling": scoring.loglikelihood_rolling(model, [TEXT[:200], "", "x"]),
    }
    if sizes.get("tp"):
        return out  # tests/qwen3/engine_layouts.py generates there
    asked = [(context, {"until": ["\n"], "max_gen_toks": 6}) for context, _ in PAIRS[:5]]
    out["texts"] = np.array(scoring.generate_until(model, asked), dtype=str)
    return out


def main():
    """In each process: the results of all layouts."""
    rank, _ = collectives.start()
    return {f"{name}|{key}": value for name, layout in LAYOUTS.items() for key, value in results(*layout, rank).items()}
