"""The annotated ops of each layer on 4 processes, every rank on its part: results and gradients, for test_manual.py to judge."""

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import ops

from layers import attention, loss, mlp, moe
from layers.bound_ops import BoundOps
from parallel import collectives, step
from parallel.mesh import Mesh
from parallel.sharding import Sharding
from qwen3 import model
from tests.tiny import DENSE, FUSED, MOE

B, S = 4, 4
R = B * S
DENSE = DENSE.replace(vocab_size=9, qkv_bias=True)  # over 4 ranks, the last has padding alone
MOE = MOE.replace(num_experts=8, experts_per_token=3)
BIASED = MOE.replace(router_bias=True, norm_topk_prob=False)
K, H = DENSE.num_kv_heads, DENSE.head_dim

OF_ROWS = ("projection", "row", "embed", "logits", "nll", "norm", "mean")
# name -> sizes of a mesh of 4 ranks, sequence parallel, what is checked on it
LAYOUTS = {
    "dp_tp": (dict(dp=2, tp=2), False, (*OF_ROWS, "mlp", "moe")),
    "cp_tp_sp": (dict(cp=2, tp=2), True, OF_ROWS),
    "tp_kv": (dict(tp=4, kv_repeat=2), False, ("projection", "nll")),
    "tp_kv_sp": (dict(tp=4, kv_repeat=2), True, ("embed", "logits", "nll", "norm", "attention")),
    "ep_of_dp": (dict(dp=2, tp=2, ep=2), False, ("moe_biased",)),
    "ep_of_dp_and_tp_sp": (dict(dp=2, tp=2, ep=4), True, ("moe_biased",)),
    "ep_of_half_of_tp_sp": (dict(tp=4, ep=2), True, ("moe",)),
    "cp_ring": (dict(cp=4), False, ("context",)),
    "cp_ulysses": (dict(cp=4, ulysses=4), False, ("context",)),
    "cp_hybrid": (dict(cp=4, ulysses=2), False, ("context",)),
}


def sharding_of(layout, rank):
    sizes, seq_parallel, _ = LAYOUTS[layout]
    return Sharding(Mesh(**sizes, rank=rank), seq_parallel=seq_parallel)


@dataclass(frozen=True)
class Check:
    """run(cfg, op, p, c) -> a tuple of results. operands (p) are drawn and differentiated: {name: (shape, dims)};
    constants (c): {name: (array, dims)}; results: [(shape, dims)]. All of them global."""

    run: object
    operands: dict
    constants: dict
    results: list
    cfg: object = DENSE

    def inputs(self):
        """The global operands and cotangents of results."""
        rng = np.random.default_rng(7)
        p = {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, (shape, _) in self.operands.items()}
        return p, [rng.normal(0, 1, shape).astype(np.float32) for shape, _ in self.results]


def cut(sharding, x, dims):
    """This rank's part of a global array; zeros for what is missing of the last part of a dim that does not divide."""
    for i, dim in enumerate(dims):
        n = sharding.shards(dim)
        padding = [(0, -x.shape[i] % n if j == i else 0) for j in range(x.ndim)]
        x = np.split(np.pad(x, padding), n, i)[sharding.mesh.index(sharding.rules[dim])]
    return x


def checks(kv_repeat):
    """{name: Check}. A kv head in kv_heads is there kv_repeat times."""
    D, F, V, rng = DENSE.hidden_size, DENSE.ffn_size, DENSE.vocab_size, np.random.default_rng(3)
    x, y = {"x": ((R, D), ("rows", "embed"))}, ((R, D), ("rows", "embed"))
    kv = ((R, K * kv_repeat * H), ("tokens", "kv_heads"))
    table, ids = {"w": ((V, D), ("vocab", "embed"))}, {"ids": (rng.integers(0, V, (R, 1)).astype(np.int32), ("tokens", "one"))}
    weights = {"weights": (rng.integers(0, 3, (R, 1)).astype(np.float32), ("tokens", "one"))}
    valid = {"valid": ((rng.random(R) < 0.8).astype(np.float32), ("rows",))}
    at = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
    see = {"positions": (at * np.arange(1, B + 1, dtype=np.int32)[:, None], ("batch", "seq"))}
    see |= {"segments": (np.sort(rng.integers(1, 3, (B, S)).astype(np.int32)), ("batch", "seq")), "order": (at, ("batch", "seq"))}
    stats = ((moe.stats_size(MOE),), ("stats",))
    one = ((R, 1), ("tokens", "one"))
    return {
        "projection": Check(_projection, {**x, **_of(attention, "wq wk wv bq bk bv")}, {}, [((R, D + 8), ("tokens", "heads")), kv, kv]),
        "mlp": Check(_mlp, {**x, **_of(mlp)}, {}, [y]),
        "row": Check(_row, {"x": ((R, F), ("tokens", "ffn")), **_of(mlp, "w_down")}, {}, [y]),
        "embed": Check(_embed, table, ids, [y]),
        "logits": Check(_logits, {**x, **table}, {}, [((R, V), ("tokens", "whole_vocab"))]),
        "nll": Check(_nll, {**x, **table}, ids, [one]),
        "norm": Check(_norm, {**x, "y": y, "w": ((D,), ("embed",))}, {}, [y, y, y]),
        "mean": Check(_mean, {"x": one}, weights, [((), ()), ((), ())]),
        "attention": Check(_attention, {**x, **_of(attention)}, see, [y]),
        "context": Check(
            _context, {"x": ((B, S, D), ("batch", "seq", "embed")), **_of(attention)}, see, [((B, S, D), ("batch", "seq", "embed"))]
        ),
        "moe": Check(_moe, {**x, **_of(moe, cfg=MOE)}, valid, [y, stats], MOE),
        "moe_biased": Check(_moe, {**x, **_of(moe, cfg=BIASED)}, valid, [y, stats], BIASED),
    }


def _of(layer, names=None, cfg=DENSE):
    """A layer's parameters, or some of them."""
    specs = layer.specs(cfg)
    return {name: (specs[name].shape, specs[name].dims) for name in (names.split() if names else specs)}


def _projection(cfg, op, p, c):
    dims = "rows>tokens embed", "embed heads -> tokens heads", "embed kv -> tokens kv_heads", "embed kv -> tokens kv_heads"
    q, k, v = op.matmuls(p["x"], (p["wq"], p["wk"], p["wv"]), dims)
    q = op.add_bias(q, p["bq"], "tokens heads, heads -> tokens heads")
    k, v = (op.add_bias(x, p[b], "tokens kv_heads, kv -> tokens kv_heads") for x, b in ((k, "bk"), (v, "bv")))
    return q, k, v


def _mlp(cfg, op, p, c):
    return (mlp.mlp(cfg, op, p, p["x"], {}),)


def _row(cfg, op, p, c):
    return (op.matmul(p["x"], p["w_down"], "tokens ffn, ffn embed -> tokens>rows embed"),)


def _embed(cfg, op, p, c):
    return (model.embed(cfg, op, {"embed": p["w"]}, c["ids"]),)


def _logits_of(op, p):
    return op.head(p["x"], p["w"], "rows>tokens embed, vocab embed -> tokens vocab")


def _logits(cfg, op, p, c):
    return (op.whole_vocab(_logits_of(op, p), "tokens vocab>whole_vocab -> tokens whole_vocab"),)


def _nll(cfg, op, p, c):
    return (loss.nats_and_gap(op, _logits_of(op, p), c["ids"])[0],)


def _norm(cfg, op, p, c):
    normed = op.rms_norm(p["x"], p["w"], "rows embed, embed -> rows embed")
    return (normed, *op.add_rms_norm(p["x"], p["y"], p["w"], "rows embed, rows embed, embed -> rows embed, rows embed"))


def _mean(cfg, op, p, c):
    return loss.weighted_mean(op, p["x"], c["weights"])


def _attention(cfg, op, p, c):
    cos, sin = op.angles(c["positions"], "batch seq -> batch seq one half, batch seq one half")
    rows = {"cos": cos, "sin": sin, "segments": c["segments"], "order": c["order"]}
    return (attention.attention(cfg, op, p, p["x"], rows, None)[0],)


def _context(cfg, op, p, c):
    """Attention where ranks have parts of each document, in any order: the order of tokens is an input."""
    if op.seq_shards > 1:
        c = {**c, **{name: op.gather_seq(c[name], "batch seq>keys -> batch keys") for name in ("segments", "order")}}
    (y,) = _attention(cfg, op, {**p, "x": p["x"].reshape(-1, p["x"].shape[-1])}, c)
    return (y.reshape(p["x"].shape),)


def _moe(cfg, op, p, c):
    return moe.moe(cfg, op, p, p["x"], {"valid": c["valid"]})


def differentiated(check, sharding, p, ws, compiled):
    """(results, {operand: gradient}) of a Check as numpy arrays, on parts of global operands and cotangents."""
    cfg, op, n, total = check.cfg, BoundOps(check.cfg, sharding, FUSED), len(check.results), ops.ReduceSum()

    def of_parts(p, c, ws):
        ys, value = check.run(cfg, op, p, c), 0.0
        for i in range(n):
            value = value + total(ys[i] * ws[i])
        return value, ys

    p = {name: ms.Tensor(cut(sharding, x, check.operands[name][1])) for name, x in p.items()}
    c = {name: ms.Tensor(cut(sharding, x, dims)) for name, (x, dims) in check.constants.items()}
    ws = [ms.Tensor(cut(sharding, w, dims)) for w, (_, dims) in zip(ws, check.results)]
    (_, ys), grads = step.value_and_grad(of_parts, range(n), compiled)(p, c, ws)
    return [ys[i].asnumpy() for i in range(n)], {name: grad.asnumpy() for name, grad in grads.items()}


def main():
    """{`layout.check.i`: result i, `layout.check.operand`: a gradient}"""
    rank, _ = collectives.start()
    results = {}
    for layout, (sizes, _, names) in LAYOUTS.items():
        every = checks(sizes.get("kv_repeat", 1))
        for name in names:
            ys, grads = differentiated(every[name], sharding_of(layout, rank), *every[name].inputs(), False)
            results |= {f"{layout}.{name}.{key}": x for key, x in [*enumerate(ys), *grads.items()]}
    return results
