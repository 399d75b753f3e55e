"""A train step compiled for one simulated NPU of a layout, in a lowering, and what its graph exchanges and computes with.

    python -m tests.parallel.shard_step LOWERING CASE

in an environment of parallel.simulation.standin, with MS_DEV_SAVE_GRAPHS_PATH. Prints a line of JSON, after RESULT. Nothing is computed.
"""

import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import ops
from mindspore.communication import GlobalComm, init

from experiments.configs import common
from experiments.train import optim
from experiments.train.program import build_program
from layers.bound_ops import BoundOps
from ops.ascendc import build as ascendc
from ops.identity import identity
from ops.registry import OPS
from parallel import collectives
from parallel.graph.jit import jit
from parallel.mesh import Mesh
from parallel.sharding import Sharding
from parallel.trees import tree_leaves, tree_map, tree_paths, unflatten
from qwen3.cache import init_cache
from qwen3.config import Qwen3Config
from qwen3.model import build, choose_kernels, param_specs

DENSE = Qwen3Config(
    vocab_size=61,  # padded: tp does not divide it
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,  # the least of MindSpore's flash attention
    ffn_size=48,
    max_position=64,
    rope_theta=1e4,
    tie_embeddings=False,
    compute_dtype="bfloat16",
)
MOE = DENSE.replace(
    model_type="qwen3_moe",
    num_experts=6,
    experts_per_token=2,
    moe_ffn_size=16,
    router_aux_coef=0.02,
    router_z_coef=0.003,
    moe_block_size=4,
)
ROWS, SEQ_LEN = 4, 16


@dataclass(frozen=True)
class Case:
    """A model in a layout. ops: what is asked of ops.registry. documents: see Sharding. planted: what is done wrong on purpose, a key of
    PLANTED."""

    cfg: Qwen3Config
    seq_parallel: bool = False
    axes: dict = field(default_factory=lambda: dict(dp=2, tp=2))
    zero: int = 0
    layer_loop: str = "unroll"
    ops: dict = field(default_factory=dict)
    documents: int = 0
    planted: str = ""

    def mesh(self, rank=0):
        return Mesh(**self.axes, kv_repeat=max(1, self.axes["tp"] // self.cfg.num_kv_heads), rank=rank)

    def compiles_only(self):
        """Whether its graph must not be run: in simulation, where nothing is computed, a loop never ends."""
        return self.layer_loop == "scan"

    def config(self):
        config = common.get_config()
        config.train.layer_loop, config.train.batch_size, config.train.seq_len = self.layer_loop, ROWS, SEQ_LEN
        config.ops.update(self.ops)
        config.parallel.zero, config.parallel.seq_parallel = self.zero, self.seq_parallel
        return config

    def sharding(self, lowering, rank=0):
        return Sharding(self.mesh(rank), seq_parallel=self.seq_parallel, zero=self.zero, lowering=lowering, documents=self.documents)


ONE_LAYER = DENSE.replace(num_layers=1)
CASES = {
    "dense": Case(DENSE),
    "dense-sp": Case(DENSE, True),
    "moe": Case(MOE),
    "moe-sp": Case(MOE, True),
    "moe-ep-sp": Case(MOE, True, dict(dp=2, tp=2, ep=2)),
    "zero1": Case(ONE_LAYER.replace(tie_embeddings=True), zero=1),
    "zero2": Case(ONE_LAYER, True, zero=2),
    "zero3": Case(ONE_LAYER, True, zero=3),
    "cp-ring": Case(ONE_LAYER, axes=dict(dp=1, tp=2, cp=2)),
    "cp-ulysses": Case(DENSE, True, axes=dict(dp=1, tp=2, cp=2, ulysses=2)),
    "lengths": Case(DENSE, True, documents=3),
    "lengths-ring": Case(ONE_LAYER, axes=dict(dp=1, tp=2, cp=2), documents=3),
    "dense-scan": Case(DENSE, layer_loop="scan"),
    "references": Case(MOE, True, ops={op: "reference" for op in OPS}),
    "ascendc": Case(MOE, True, ops={op: "ascendc" for op in ascendc.families()}),
    "float32": Case(DENSE.replace(num_layers=1, compute_dtype="float32")),
    "generate": Case(DENSE, axes=dict(dp=1, tp=1)),
    "unscattered": Case(ONE_LAYER, True, planted="unscattered"),
    "summed_twice": Case(ONE_LAYER, planted="summed_twice"),
    "unannotated": Case(ONE_LAYER, True, planted="unannotated"),
}


def compile_step(case, lowering):
    """Compiles one train step; returns what its graph says, and each parameter's local shape."""
    program = {"shard": _global_view, "manual": _local_parts, "generate": _generate}[lowering]
    with _Planted(case.planted):
        slices = program(case, int(os.environ["RANK_ID"]))
    graph = max(Path(os.environ["MS_DEV_SAVE_GRAPHS_PATH"]).glob("rank_*/*_validate_*.ir"), key=os.path.getmtime)
    text = graph.read_text()
    graph.unlink()
    found = {"collectives": collectives_of(text), "invented": invented_splits(text)}
    customs = dict(Counter(re.findall(r'\bfunc_name: "(\w+)"', text)))
    found.update(primitives=primitives_of(text), dtypes=dtypes_of(text), masks=masks_of(text))
    return {"slices": slices, **found, "customs": customs}


def _global_view(case, rank):
    """The step as MindSpore's partitioner takes it: Parameters closed over, optimizer state cloned from them, flat results."""
    sharding, specs = case.sharding("shard", rank), param_specs(case.cfg)
    flat = [ms.Parameter(ms.Tensor(np.zeros(_padded(sharding, spec), np.float32)), name=path) for path, spec in tree_paths(specs)]
    m, v = ([_like(w, tag) for w in flat] for tag in ("m.", "v."))
    kernels = choose_kernels(case.ops, case.cfg, sharding)
    loss_fn, params, count = build(case.cfg, sharding, kernels=kernels).loss_fn, unflatten(specs, flat), len(flat)

    def loss_of(tokens, targets, segment_ids, positions, loss_weights):
        batch = {"tokens": tokens, "targets": targets, "segment_ids": segment_ids, "positions": positions, "loss_weights": loss_weights}
        return loss_fn(params, batch)[0]

    grad = ms.value_and_grad(loss_of, None, weights=flat)

    @ms.jit
    def step(correction, *batch):  # flat arguments: the partitioner does not look into tuples
        loss, grads = grad(*batch)
        out = (loss, *grads)
        for i in range(count):
            out = ops.depend(out, _adamw(flat[i], m[i], v[i], grads[i], correction))
        return out

    step(ms.Tensor(1.0, ms.float32), *_tensors(ROWS).values())
    return {path: w.shape for (path, _), w in zip(tree_paths(specs), flat)}


def _padded(sharding, spec):
    return [-(-n // sharding.shards(dim)) * sharding.shards(dim) for n, dim in zip(spec.shape, spec.dims)]


def _like(w, tag):
    state = w.clone("zeros")
    state.name = tag + w.name
    return state


def _adamw(w, m, v, g, correction):
    m, v = ops.assign(m, 0.9 * m + 0.1 * g), ops.assign(v, 0.95 * v + 0.05 * g * g)
    return ops.assign(w, w - 1e-3 * (m / correction / (ops.sqrt(v / correction) + 1e-8) + 0.1 * w))


def _local_parts(case, rank):
    """The trainer's own step, on this rank's parts."""
    if case.compiles_only():
        optim.resident = _as_it_is  # what puts the state into the device's memory is a graph that runs
    program = build_program(case.cfg, case.config(), case.sharding("manual", rank))
    state = program.init(lambda path, slices: np.zeros([s.stop - s.start for s in slices], np.float32))
    batch = {key: value.asnumpy() for key, value in _tensors(ROWS // case.axes["dp"]).items()}
    try:
        program.step(state, batch, 1e-3, 0)
    except RuntimeError as error:
        if not (case.compiles_only() and "Can't find run graph func" in str(error)):
            raise
    paths = [path for path, _ in tree_paths(param_specs(case.cfg))]
    return dict(zip(paths, [w.shape for w in tree_leaves(state["params"])])) if case.layer_loop == "unroll" else {}


def _as_it_is(kernels):
    return identity


def _generate(case, rank):
    """One token a row over a KV cache."""
    params = tree_map(lambda spec: ms.Tensor(np.zeros(spec.shape, np.float32)), param_specs(case.cfg))
    cache, ids = init_cache(case.cfg, ROWS, SEQ_LEN), ms.Tensor(np.ones((ROWS, 1)), ms.int32)
    extend = build(case.cfg, kernels=choose_kernels(case.ops, case.cfg)).extend
    jit(extend)(params, cache, ids, ids, ms.Tensor(np.zeros(ROWS), ms.int32))
    return {}


def _tensors(rows):
    ints = ("tokens", "targets", "segment_ids", "positions")
    batch = {key: ms.Tensor(np.ones((rows, SEQ_LEN)), ms.int32) for key in ints}
    return {**batch, "loss_weights": ms.Tensor(np.ones((rows, SEQ_LEN)), ms.float32)}


class _Planted:
    """An annotation that is wrong, while a model is built and compiled."""

    def __init__(self, name):
        self.patch = PLANTED.get(name)

    def __enter__(self):
        if self.patch:
            owner, name, wrong = self.patch
            self.kept = getattr(owner, name)
            setattr(owner, name, wrong)

    def __exit__(self, *error):
        if self.patch:
            setattr(self.patch[0], self.patch[1], self.kept)


_matmul, _add = BoundOps.matmul, BoundOps.add


def _unscattered(self, x, w, dims):
    """A row-parallel product whose result is left whole, where the next op wants rows."""
    return _matmul(self, x, w, dims.replace("tokens>rows", "tokens"))


_add = BoundOps.add


def _unannotated(self, x, y, dims):
    """The sum of the residual stream without an annotation."""
    return ops.Add()(x, y) if dims == "rows embed" else _add(self, x, y, dims)


_psum = collectives.psum


def _summed_twice(*args, **options):
    once = _psum(*args, **options)

    def twice(x):
        return once(once(x))

    return twice


PLANTED = {
    "unscattered": (BoundOps, "matmul", _unscattered),
    "summed_twice": (collectives, "psum", _summed_twice),
    "unannotated": (BoundOps, "add", _unannotated),
}

# A node's line, then that of the types of its operands and result.
NODE = re.compile(r"^\s+%\d+\(.*?\) = (?:PrimFunc_)?(AllReduce|AllGather|ReduceScatter|AlltoAll\w*)\((.*)\n\s+: (.*)$", re.M)


def collectives_of(text):
    """[(kind, ranks of the group, dtype, shape of the operand)] of a graph."""
    out = []
    for kind, attributes, types in NODE.findall(text):
        dtype, shape = re.search(r"<Tensor\[(\w+)\]+, \(([\d, ]*)\)", types).groups()
        out.append((kind, _ranks(attributes), dtype.lower(), _numbers(shape)))
    return out


PRIMITIVE = r"^\s+%\d+\(.*?\) = (?:PrimFunc_)?([A-Z]\w*)\("


def primitives_of(text):
    """{name: how often} of the ops in a graph."""
    return dict(Counter(re.findall(PRIMITIVE, text, re.M)))


def dtypes_of(text):
    """{name: [dtypes]} of the first operands of the ops in a graph."""
    out = {}
    for name, types in re.findall(PRIMITIVE + r".*\n\s+: (.*)$", text, re.M):
        if dtype := re.search(r"Tensor\[(\w+)\]", types):
            out.setdefault(name, set()).add(dtype[1])
    return {name: sorted(each) for name, each in out.items()}


def masks_of(text):
    """The shapes of bool tensors of a graph that have a place for each pair of tokens of a row: queries and keys, of all or half a row."""
    shapes = {tuple(_numbers(shape)) for shape in re.findall(r"Tensor\[Bool\]+, \(([\d, ]*)\)", text)}
    return sorted(shape for shape in shapes if len(shape) > 2 and min(shape[-2:]) >= SEQ_LEN // 4)


def _ranks(attributes):
    """The ranks of a collective's group: of the group that we made by this name, or as MindSpore's partitioner states them.

    Of a group of ours it sometimes states all ranks of the job.
    """
    name = re.search(r'group: "([^"]*)"', attributes)[1]
    if name in collectives._groups.values():
        return list(next(ranks for ranks, known in collectives._groups.items() if known == name))
    if stated := re.search(r"group_rank_ids: \(([\d, ]*)\)", attributes):
        return _numbers(stated[1])
    assert name == GlobalComm.WORLD_COMM_GROUP, name
    return list(range(int(os.environ["RANK_SIZE"])))


def _numbers(text):
    return [int(n) for n in text.split(",") if n.strip()]


def invented_splits(text):
    """The ops that MindSpore split without being told to: [name and strategy]."""
    found = re.findall(r" = (?:PrimFunc_)?(\w+)\(.*gen_strategy: (\(\(.*?\)\))", text)
    return [f"{name} {strategy}" for name, strategy in found if any(int(n) > 1 for n in re.findall(r"\d+", strategy.replace("I64", "")))]


def main(lowering, name):
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("Ascend")
    init()
    if lowering == "shard":
        world = int(os.environ["RANK_SIZE"])
        ms.set_auto_parallel_context(device_num=world, full_batch=True, parallel_mode="semi_auto_parallel", enable_alltoall=True)
    print("RESULT", json.dumps(compile_step(CASES[name], lowering)))


if __name__ == "__main__":
    main(*sys.argv[1:])
