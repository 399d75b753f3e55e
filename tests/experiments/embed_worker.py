"""Vectors and scores in layouts, in each process of a group; see test_embed.py."""

from experiments.embed import vectors
from parallel import collectives
from parallel.mesh import Mesh
from parallel.placement import load, place, reader
from parallel.sharding import Sharding
from parallel.trees import tree_map
from qwen3.stages import own_specs
from qwen3.tokenizer import train_bpe
from tests.tiny import DENSE, MOE, random_params

TEXTS = [f"def function_{j}(x):\n" + "    return x + 7\n" * (j % 4) for j in range(7)]
PAIRS = [("which function", text) for text in TEXTS[:5]]
LAYOUTS = {"dp2": (DENSE, dict(dp=2)), "tp2": (DENSE.replace(tie_embeddings=False), dict(tp=2)), "dp2 ep2": (MOE, dict(dp=2, ep=2))}


def tokenizer():
    return train_bpe([*TEXTS, vectors.BEFORE_PAIR, " yes no yes no\nyes\nno" * 30], 400)


def build(cfg, sizes=None, rank=0, **options):
    tok = tokenizer()
    cfg, sharding = cfg.replace(vocab_size=tok.vocab_size, max_position=256), Sharding(Mesh(**(sizes or {}), rank=rank))
    whole = reader(tree_map(lambda w: w.asnumpy(), random_params(cfg)))
    params = load(sharding.mesh, place(sharding, own_specs(cfg, sharding.mesh)), whole, "used")
    return vectors.build(params, cfg, tok, sharding=sharding, batch_size=2, **options)


def results(cfg, sizes=None, rank=0):
    model = build(cfg, sizes, rank)
    return {"vectors": vectors.embed(model, TEXTS, "find it", 12), "scores": vectors.rerank(model, PAIRS)}


def main():
    rank, _ = collectives.start()
    return {f"{name} {key}": value for name, (cfg, sizes) in LAYOUTS.items() for key, value in results(cfg, sizes, rank).items()}
