"""Recomputed layers give what kept ones give, to the bit, over steps in which parameters change; and hold less."""

import functools
import json
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from mindspore import ops

from experiments.configs import common
from experiments.train import program as train_program
from parallel.graph.recompute import gathered_again
from parallel.lowering import manual
from parallel.step import value_and_grad
from parallel.trees import tree_leaves
from tests.experiments.test_train import make_batch
from tests.tiny import DENSE, MOE, random_params

ONE_LAYER = MOE.replace(num_layers=1)
RUNS = [(ONE_LAYER, "unroll", "full"), (DENSE, "scan", "attention")]
SLOW_RUNS = [
    (MOE, "unroll", "full"),
    (MOE, "unroll", "attention"),
    (DENSE, "unroll", "full"),
    (DENSE, "unroll", "attention"),
    (MOE, "scan", "full"),
]


def run(cfg, loop, recompute):
    """Losses, norms and parameters of three steps."""
    config = common.get_config()
    config.train.layer_loop, config.train.recompute = loop, recompute
    program = train_program.build_program(cfg, config)
    state, out = program.init(random_params(cfg)), []
    for at in range(3):
        state, metrics = program.step(state, make_batch(at, vocab=cfg.vocab_size), 3e-3, at)
        out += [metrics["objective"], metrics["grad_norm"]]
    return out, [w.asnumpy() for w in tree_leaves(program.params(state))]


kept = functools.lru_cache(functools.partial(run, recompute="none"))


@pytest.mark.extended
@pytest.mark.parametrize("cfg, loop, recompute", [*RUNS, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_RUNS)])
def test_recomputed_steps_are_bitwise_those_that_keep_all(cfg, loop, recompute):
    (want, want_params), (found, params) = kept(cfg, loop), run(cfg, loop, recompute)
    assert found == want and want[0] != want[2]
    for a, b in zip(want_params, params, strict=True):
        np.testing.assert_array_equal(a, b)


PEAK = """
import sys, json
import mindspore as ms
from experiments.train import program as train_program
from experiments.bench.train import packed_batch
from experiments.bench.turns import held_mem_gib, peak_mem_gib
from experiments.configs import common
from parallel.specs import init_params
from qwen3.config import Qwen3Config
from qwen3.model import param_specs

cfg = Qwen3Config(vocab_size=64, hidden_size=64, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=32, ffn_size=128, tie_embeddings=True)
config = common.get_config()
config.train.layer_loop, config.train.recompute = "unroll", sys.argv[1]
program = train_program.build_program(cfg, config)
state = program.init(init_params(param_specs(cfg), 0))
program.step(state, packed_batch(64, 4, 64), 1e-3, 0)  # compiles
held = held_mem_gib()
program.step(program.init(init_params(param_specs(cfg), 0)), packed_batch(64, 128, 512), 1e-3, 0)
print(json.dumps(peak_mem_gib() - held))
"""


@pytest.mark.slow
def test_full_recompute_needs_less_than_half_of_the_memory():
    """Of 4 layers and 64 thousand tokens, above what the process had before."""
    peak = {}
    for form in ("none", "full"):
        done = subprocess.run([sys.executable, "-c", PEAK, form], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        peak[form] = json.loads(done.stdout.splitlines()[-1])
    assert 0 < peak["full"] < 0.6 * peak["none"], peak


def test_what_is_gathered_again_has_the_gradients_of_what_is_kept():
    """In a graph, with a stand-in for two ranks whose rows differ."""
    double, matmul = ops.Concat(0), ops.MatMul()

    def gather(x):
        return double((x, x * 2))

    def loss_of(fan):
        def loss(p):
            a, b = fan(p["x"] * 1, p["w0"], p["w1"])
            return (a * a * b).sum()

        return value_and_grad(loss, compiled=True)

    plain = manual.fan((matmul, matmul), gather)
    kept, again = loss_of(plain), loss_of(gathered_again(plain, 2))
    for step in range(2):
        draw = np.random.default_rng(step).normal
        p = {name: ms.Tensor(draw(size=shape).astype(np.float32)) for name, shape in {"x": (3, 4), "w0": (4, 5), "w1": (4, 5)}.items()}
        (a, da), (b, db) = kept(p), again(p)
        assert a == b and all(np.array_equal(da[name].asnumpy(), db[name].asnumpy()) for name in p)
