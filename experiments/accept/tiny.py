"""Tiny models, batches and runs of a few steps, that the stages `layouts`, `step` and `checkpoint` share."""

import mindspore as ms
import numpy as np

from experiments.configs import common
from experiments.data.loader import rank_rows
from experiments.layout import check as layout
from experiments.layout.sharding import sharding_of
from experiments.train import optim_rules
from experiments.train.program import build_program
from parallel.mesh import AXES
from parallel.placement import whole
from parallel.random import hash_uniform
from parallel.specs import init_params, normal
from parallel.trees import tree_map, tree_paths
from qwen3.config import Qwen3Config
from qwen3.model import param_specs

SEQ_LEN, LR = 16, 3e-3
DENSE = Qwen3Config(
    vocab_size=61,  # no layout divides it
    hidden_size=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    ffn_size=64,
    max_position=64,
    rope_theta=1e4,
    initializer_range=0.2,
)
MOE = DENSE.replace(
    model_type="qwen3_moe", num_experts=8, experts_per_token=2, moe_ffn_size=32, router_aux_coef=0.02, router_z_coef=0.003, moe_block_size=4
)
MODELS = {"dense": DENSE, "moe": MOE}


def config_of(cfg, parallel, rows):
    """Returns the config of a run. parallel: changes to config.parallel. rows: of a batch."""
    config = common.get_config()
    config.train.batch_size, config.train.seq_len, config.train.layer_loop = rows, SEQ_LEN, "unroll"
    config.parallel.update(parallel)
    config.optim.eps = 1e-5  # at 1e-8 rounding alone moves parameters
    config.optim.clip_norm = 0.5  # acts in every step, so that the norm enters the gradients
    return config


def params_of(cfg, seed=0):
    """Returns a tree of float32 arrays in which nothing is 0 or 1: norms are moved by noise too."""
    specs = param_specs(cfg)
    start = init_params(specs, seed)
    noise = init_params(tree_map(lambda spec: spec.__class__(spec.shape, spec.dims, normal(0.2)), specs), seed + 1)
    return tree_map(lambda spec, w, moved: w if spec.init[0] == "normal" else w + moved, specs, start, noise)


def batch_of(cfg, step, rows):
    """Returns the batch of a step: a text that follows a rule with some noise, two documents a row, and targets without weight."""
    place = np.arange(rows * (SEQ_LEN + 1), dtype=np.uint64).reshape(rows, -1)
    noise = hash_uniform(7, np.uint32(step), place)
    text = (np.cumsum(1 + 5 * (noise > 0.7), axis=1) * 3 % cfg.vocab_size).astype(np.int32)
    column, cut = np.tile(np.arange(SEQ_LEN, dtype=np.int32), (rows, 1)), SEQ_LEN // 3
    return {
        "tokens": text[:, :-1],
        "targets": text[:, 1:],
        "loss_weights": (noise[:, 1:] > 0.1).astype(np.float32) * (column != cut - 1),
        "segment_ids": 1 + (column >= cut).astype(np.int32),
        "positions": np.where(column >= cut, column - cut, column).astype(np.int32),
    }


class Run:
    """A model that trains in a layout. All ranks make it, and call its methods together. Raises ValueError for a layout that does not fit.

    parallel: changes to config.parallel. world: the number of ranks; 1 is this process alone, whatever job it is in.
    """

    def __init__(self, cfg, parallel, rows, rank=0, world=1, ops=()):
        self.cfg, self.rows, self.config = cfg, rows, config_of(cfg, parallel, rows)
        self.config.ops.update(dict(ops))
        self.config.parallel.update(layout.check(self.config, cfg, world))
        parallel = self.config.parallel
        self.mesh = layout.mesh(cfg, parallel, rank)
        self.sharding = sharding_of(self.config, cfg, self.mesh, device=ms.get_context("device_target"))
        self.program = build_program(cfg, self.config, self.sharding)
        self._mine = rank_rows(rows, self.mesh.index(("dp",)), self.mesh.dp, parallel.micro_batches)

    def begin(self):
        """Returns the state before the first step."""
        return self.program.init(params_of(self.cfg))

    def step(self, state, at):
        """Returns (state, metrics) after step `at`. The given state is not to be used again."""
        batch = {key: value[self._mine] for key, value in batch_of(self.cfg, at, self.rows).items()}
        return self.program.step(state, batch, LR, at)

    def whole(self, state):
        """Returns {name: the global array} of a state, on all ranks, by the names of a checkpoint."""
        mine = {h.names: h.data for h in self.program.held(state)}
        return {
            # a copy, since a step changes arrays in place
            h.names[0]: np.array(whole(self.mesh, h.spec, h.axes, mine.get(h.names), holder=h.holders[0] if h.holders else None))
            for h in self.program.held()
        }

    def trained(self, steps):
        """Trains some steps. Returns {"loss i", "norm i": numbers; "gradient PATH": of the first step, clipped; "parameter PATH"}."""
        state, out = self.begin(), {}
        for at in range(steps):
            state, metrics = self.step(state, at)
            out[f"loss {at}"], out[f"norm {at}"] = np.float64(metrics["objective"]), np.float64(metrics["grad_norm"])
            if at == 0:
                out.update(self._gradients(state))
        out.update({f"parameter {path}": w.asnumpy() for path, w in tree_paths(self.program.params(state))})
        return out

    def _gradients(self, state):
        """Reads the gradients of the first step from the first moment of the optimizer."""
        specs = dict(tree_paths(param_specs(self.cfg)))
        for name, array in self.whole(state).items():
            kind, _, path = name.partition("/")
            if kind == "m":
                yield f"gradient {path}", array / optim_rules.momentum(self.config.optim, specs[path])[1]


def title(parallel):
    """Returns the name of a layout, such as "dp 2 x tp 2, sequence parallel, ZeRO 1"."""
    sizes = " x ".join(f"{axis} {parallel[axis]}" for axis in AXES if parallel.get(axis, 1) != 1) or "one rank"
    more = [parallel.get("cp_attention", "")] * (parallel.get("cp", 1) > 1) + ["sequence parallel"] * parallel.get("seq_parallel", False)
    more += [f"ZeRO {parallel['zero']}"] if parallel.get("zero") else []
    more += [parallel["pp_schedule"]] if parallel.get("virtual_stages", 1) > 1 else []
    more += [f"{parallel['micro_batches']} micro-batches"] if parallel.get("micro_batches", 1) > 1 else []
    return ", ".join([sizes, *more])
