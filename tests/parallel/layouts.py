"""The table of layouts that are compared with one process, and what runs in each of their processes; see test_layouts.py."""

import contextlib
import dataclasses
import json
from unittest import mock

import mindspore as ms
import numpy as np

from experiments.configs import common
from experiments.data.loader import rank_rows
from experiments.train import optim_rules
from experiments.train import program as train_program
from experiments.train.ema import averaged
from layers.lora import DROPOUT_LAYER
from parallel import collectives
from parallel.mesh import Mesh
from parallel.placement import cut, whole
from parallel.random import hash_uniform
from parallel.sharding import Sharding
from parallel.trees import tree_leaves, tree_map, tree_paths
from qwen3.config import Lora
from qwen3.model import choose_kernels
from tests import graphs
from tests.experiments.test_train import make_batch
from tests.tiny import DENSE, MIXED, MOE, QWEN2, random_params

STEPS, ROWS, LR = 5, 8, 3e-3


def _adapted(cfg, dropout=0.0):
    targets = [name for name in cfg.lora_targets if not dropout or name != "router"]
    return cfg.replace(lora=Lora(3, 5.0, tuple(targets), dropout))


MODELS = {
    "dense": DENSE,  # tied, vocabulary of 61, 4 heads on 2 kv heads
    "one layer": DENSE.replace(num_layers=1),
    "untied": DENSE.replace(tie_embeddings=False),
    "qwen2": QWEN2,  # biases, 1 kv head
    "moe": MOE,  # 6 experts
    "moe8": MOE.replace(num_experts=8, router_bias=True),
    "capacity": MOE.replace(moe_capacity_factor=4.0),
    "tight": MOE.replace(moe_capacity_factor=0.5),
    "mixed": MIXED,
    "adapters": _adapted(DENSE.replace(tie_embeddings=False), dropout=0.2),
    "adapters, qwen2": _adapted(QWEN2),
    "adapters, moe": _adapted(MOE),
    "adapters, bfloat16": _adapted(DENSE).replace(frozen_dtype="bfloat16"),
    "adapters, moe, float16": _adapted(MOE).replace(frozen_dtype="float16"),
    "frozen": DENSE.replace(frozen=(("embed", "layers.0.*", "*norm"), ("*w_up",))),
    "mup": DENSE.replace(mup_base_width=6),
    "mup, moe": MOE.replace(mup_base_width=6),
    "deep": DENSE.replace(num_layers=5),
    "norms behind": DENSE.replace(norm_placement="post"),
    "norms around": MIXED.replace(norm_placement="both"),
    "norms around, moe": MOE.replace(norm_placement="both"),
    "adapters, four": _adapted(MIXED.replace(num_layers=4)),
}

# name -> (model, options); dp, tp, cp, ep, pp, ulysses: of the mesh, others of the run; packed: documents of odd lengths, in rows of an odd
# length; documents: attention takes the lengths of so many; in_place: the update as on Ascend, whose primitive works on CPU, too. In order
# of the number of processes.
LAYOUTS = {
    "pp2, 1F1B, tied": ("dense", dict(pp=2, micro=4)),
    "mixed, pp2, interleaved, a stage without layers": (
        "mixed",
        dict(pp=2, micro=2, schedule="interleaved", virtual=2, layers=(0, 1, 1, 1)),
    ),
    "pp2, GPipe, uneven": ("deep", dict(pp=2, micro=4, schedule="gpipe", layers=(1, 4))),
    "untied, pp2": ("untied", dict(pp=2, micro=2)),
    "adapters, pp2": ("adapters", dict(pp=2, micro=2)),
    "adapters, moe, pp2, interleaved": ("adapters, four", dict(pp=2, micro=2, schedule="interleaved", virtual=2, layers=(1, 1, 1, 1))),
    "frozen, pp2, tied": ("frozen", dict(pp=2, micro=2)),
    "pp2, interleaved, tied": ("deep", dict(pp=2, micro=4, schedule="interleaved", virtual=2)),
    "dp2": ("dense", dict(dp=2)),
    "dp2, ZeRO 1, in place": ("dense", dict(dp=2, zero=1, in_place=True)),
    "dp2, scan, 2 micro-batches, ZeRO 2": ("dense", dict(dp=2, loop="scan", micro=2, zero=2)),
    "tp2": ("untied", dict(tp=2)),
    "tp2, sequence parallel": ("dense", dict(tp=2, seq=True)),
    "dp2, ZeRO 3, scan, average": ("dense", dict(dp=2, zero=3, loop="scan", ema=0.7)),
    "pp2, 1F1B, tied, average": ("dense", dict(pp=2, micro=4, ema=0.7)),
    "moe, dp2 ep2, Muon, average": ("moe", dict(dp=2, ep=2, optim="muon", ema=0.7)),
    "tp2, sequence parallel, gathered again": ("dense", dict(tp=2, seq=True, again=True)),
    "dp2, preferences, 2 micro-batches": ("dense", dict(dp=2, micro=2, prefer="dpo")),
    "tp2, sequence parallel, preferences": ("untied", dict(tp=2, seq=True, prefer="simpo")),
    "adapters, cp2, ring, packed, preferences": ("adapters, qwen2", dict(cp=2, packed=True, prefer="dpo")),
    "adapters, dp2, ZeRO 3, scan, preferences": ("adapters, qwen2", dict(dp=2, zero=3, loop="scan", prefer="kto")),
    "tp2 of 1 kv head, biases": ("qwen2", dict(tp=2, seq=True)),
    "tp2, sequence parallel, full recompute": ("dense", dict(tp=2, seq=True, recompute="full")),
    "dp2 ep2": ("moe", dict(dp=2, ep=2)),
    "adapters, tp2, sequence parallel, scan": ("adapters", dict(tp=2, seq=True, loop="scan")),
    "adapters, dp2, ZeRO 3, scan, 2 micro-batches": ("adapters", dict(dp=2, zero=3, loop="scan", micro=2)),
    "adapters, dp2 ep2, ZeRO 1": ("adapters, moe", dict(dp=2, ep=2, zero=1)),
    "adapters, bfloat16, dp2, ZeRO 3, 2 micro-batches": ("adapters, bfloat16", dict(dp=2, zero=3, micro=2)),
    "adapters, bfloat16, tp2, sequence parallel": ("adapters, bfloat16", dict(tp=2, seq=True)),
    "adapters, bfloat16, pp2": ("adapters, bfloat16", dict(pp=2, micro=2)),
    "adapters, moe, float16, dp2 ep2, ZeRO 3, scan": ("adapters, moe, float16", dict(dp=2, ep=2, zero=3, loop="scan")),
    "frozen, dp2, ZeRO 3": ("frozen", dict(dp=2, zero=3)),
    "tp2, sequence parallel, loss in chunks": ("dense", dict(tp=2, seq=True, chunks=3)),
    "untied, tp2 dp2, loss in chunks, packed": ("untied", dict(tp=2, dp=2, chunks=4, packed=True)),
    "moe, pp2 tp2, loss in chunks": ("moe", dict(pp=2, tp=2, micro=2, chunks=5, evaluate=True)),
    "adapters, tp2 of 1 kv head": ("adapters, qwen2", dict(tp=2)),
    "adapters, dp2, ZeRO 1": ("adapters", dict(dp=2, zero=1)),
    "adapters, dp2, ZeRO 2": ("adapters", dict(dp=2, zero=2)),
    "adapters, dp2 tp2 ep2, sequence parallel, ZeRO 1, scan": ("adapters, moe", dict(dp=2, tp=2, ep=2, seq=True, zero=1, loop="scan")),
    "tp2, Muon": ("untied", dict(tp=2, optim="muon")),
    "moe, dp2, ZeRO 2, Muon": ("moe", dict(dp=2, zero=2, optim="muon")),
    "dp2, ZeRO 1, scan, Muon": ("deep", dict(dp=2, zero=1, loop="scan", optim="muon")),
    "dp2, ZeRO 3, Muon": ("dense", dict(dp=2, zero=3, optim="muon")),
    "tp2 of 1 kv head, sequence parallel, scan, Muon": ("qwen2", dict(tp=2, seq=True, loop="scan", optim="muon")),
    "dp2, ZeRO 1, scan, groups of learning rates": (
        "deep",
        dict(dp=2, zero=1, loop="scan", groups="layers.[0-2].*=0.5,layers.4.*=2,embed=0.1"),
    ),
    "muP, dp2, ZeRO 3, scan": ("mup", dict(dp=2, zero=3, loop="scan")),
    "muP, tp2, sequence parallel": ("mup", dict(tp=2, seq=True)),
    "muP, moe, dp2 ep2, Muon": ("mup, moe", dict(dp=2, ep=2, optim="muon")),
    "muP, pp2, tied": ("mup", dict(pp=2, micro=2)),
    "cp2, ring": ("untied", dict(cp=2, micro=2, evaluate=True)),
    "cp2, Ulysses": ("dense", dict(cp=2, ulysses=2)),
    "cp2, ring, packed, scan": ("dense", dict(cp=2, packed=True, loop="scan")),
    "moe, cp2 ep2": ("moe", dict(cp=2, ep=2, packed=True)),
    "cp2, ring, packed, lengths": ("dense", dict(cp=2, packed=True, documents=5)),
    "cp2, Ulysses, packed, lengths, scan": ("dense", dict(cp=2, ulysses=2, packed=True, documents=6, loop="scan")),
    "cp2, ring, lengths of one document, scan": ("untied", dict(cp=2, documents=2, loop="scan")),
    "tp4 of 2 kv heads": ("dense", dict(tp=4)),
    "tp4 of 1 kv head, sequence parallel, scan": ("qwen2", dict(tp=4, seq=True, loop="scan")),
    "dp2 tp2": ("untied", dict(dp=2, tp=2)),
    "dp2 tp2, sequence parallel, ZeRO 1": ("dense", dict(dp=2, tp=2, seq=True, zero=1)),
    "dp2 tp2, ZeRO 2, 2 micro-batches": ("dense", dict(dp=2, tp=2, zero=2, micro=2)),
    "dp2 tp2, ZeRO 3": ("dense", dict(dp=2, tp=2, zero=3)),
    "dp2 tp2, ZeRO 1, 2 micro-batches, average, in place": ("dense", dict(dp=2, tp=2, zero=1, micro=2, ema=0.7, in_place=True)),
    "cp4, ring": ("dense", dict(cp=4)),
    "cp4, ring, packed": ("dense", dict(cp=4, packed=True)),
    "cp4, Ulysses of 2 kv heads, packed, ZeRO 2": ("dense", dict(cp=4, ulysses=4, packed=True, zero=2)),
    "cp4, hybrid, packed": ("dense", dict(cp=4, ulysses=2, packed=True)),
    "cp4, ring, packed, lengths": ("dense", dict(cp=4, packed=True, documents=5)),
    "cp4, hybrid, packed, lengths, full recompute": ("dense", dict(cp=4, ulysses=2, packed=True, documents=5, recompute="full")),
    "moe, cp4 ep4, Ulysses, packed, lengths, ZeRO 3": ("moe8", dict(cp=4, ulysses=4, ep=4, packed=True, documents=7, zero=3)),
    "cp4, hybrid, packed, lengths, attention recompute": (
        "dense",
        dict(cp=4, ulysses=2, packed=True, documents=5, recompute="attention"),
    ),
    "cp2 tp2, packed, sequence parallel": ("dense", dict(cp=2, tp=2, packed=True, seq=True)),
    "cp2 tp2, Ulysses of 1 kv head, packed": ("qwen2", dict(cp=2, tp=2, ulysses=2, packed=True)),
    "dp2 cp2, ZeRO 3, scan": ("untied", dict(dp=2, cp=2, zero=3, loop="scan")),
    "dp2 tp2, ZeRO 3, full recompute": ("dense", dict(dp=2, tp=2, zero=3, recompute="full")),
    "cp4, hybrid, packed, attention recompute": ("dense", dict(cp=4, ulysses=2, packed=True, recompute="attention")),
    "moe, dp2 tp2 ep2, full recompute": ("moe", dict(dp=2, tp=2, ep=2, recompute="full")),
    "moe, cp2 tp2 ep4, sequence parallel, packed, bias": ("moe8", dict(cp=2, tp=2, ep=4, seq=True, packed=True)),
    "dp4, ZeRO 3, scan": ("untied", dict(dp=4, zero=3, loop="scan")),
    "dp4, ZeRO 1, 2 micro-batches": ("dense", dict(dp=4, zero=1, micro=2)),
    "moe, dp2 tp2": ("moe", dict(dp=2, tp=2)),
    "moe, dp2 tp2 ep2": ("moe", dict(dp=2, tp=2, ep=2)),
    "moe, dp2 tp2 ep2, sequence parallel, ZeRO 1, scan": ("moe", dict(dp=2, tp=2, ep=2, seq=True, zero=1, loop="scan")),
    "moe, dp2 tp2 ep4, sequence parallel, bias": ("moe8", dict(dp=2, tp=2, ep=4, seq=True)),
    "moe, dp4 ep4, ZeRO 3, scan": ("moe8", dict(dp=4, ep=4, zero=3, loop="scan")),
    "moe, dp4 ep2, capacity, ZeRO 2": ("capacity", dict(dp=4, ep=2, zero=2)),
    "mixed, dp2 tp2 ep2, 2 micro-batches": ("mixed", dict(dp=2, tp=2, ep=2, micro=2)),
    "norms behind, dp2 tp2, sequence parallel, ZeRO 1, Lion": ("norms behind", dict(dp=2, tp=2, seq=True, zero=1, optim="lion")),
    "norms around, moe, dp2 tp2 ep2, ZeRO 3, scan": ("norms around, moe", dict(dp=2, tp=2, ep=2, seq=True, zero=3, loop="scan")),
    "norms around, pp2 tp2, SGD": ("norms around", dict(pp=2, tp=2, micro=2, optim="sgd")),
    "dp4, ZeRO 2, 2 micro-batches, SGD": ("dense", dict(dp=4, zero=2, micro=2, optim="sgd")),
    "moe, dp2 tp2 ep4, sequence parallel, ZeRO 3, Lion": ("moe8", dict(dp=2, tp=2, ep=4, seq=True, zero=3, optim="lion")),
    "moe, pp2 dp2 ep2, Muon": ("moe8", dict(pp=2, dp=2, ep=2, micro=2, optim="muon")),
    "dp2 cp2, 2 micro-batches, Muon": ("qwen2", dict(dp=2, cp=2, micro=2, optim="muon")),
    "dp2 tp2, ZeRO 1, scan, Muon": ("dense", dict(dp=2, tp=2, zero=1, loop="scan", optim="muon")),
    "dp2 tp2, ZeRO 3, Muon": ("dense", dict(dp=2, tp=2, zero=3, optim="muon")),
    "moe, dp2 tp2 ep2, sequence parallel, ZeRO 2, scan, Muon": (
        "moe8",
        dict(dp=2, tp=2, ep=2, seq=True, zero=2, loop="scan", optim="muon"),
    ),
    "pp2 dp2, ZeRO 2, tied, in place, Muon": ("dense", dict(pp=2, dp=2, micro=2, zero=2, in_place=True, optim="muon")),
    "pp2 dp2, ZeRO 1, groups of learning rates": ("dense", dict(pp=2, dp=2, micro=2, zero=1, groups="layers.1.*=0.5,embed=0.1")),
    "moe, pp2 dp2 ep2, ZeRO 1": ("moe", dict(pp=2, dp=2, ep=2, micro=2, zero=1)),
    "pp4, 1F1B, tied": ("deep", dict(pp=4, micro=4)),
    "pp4, GPipe, two stages without layers": ("untied", dict(pp=4, micro=2, schedule="gpipe")),
    "mixed, pp4, 1F1B, few micro-batches": ("mixed", dict(pp=4, micro=2)),
    "pp2 tp2": ("untied", dict(pp=2, tp=2, micro=2)),
    "pp2 tp2, sequence parallel, interleaved, tied": ("deep", dict(pp=2, tp=2, seq=True, micro=2, schedule="interleaved", virtual=2)),
    "pp2 dp2": ("dense", dict(pp=2, dp=2, micro=2)),
    "pp2 dp2, ZeRO 1, tied": ("dense", dict(pp=2, dp=2, micro=2, zero=1)),
    "pp2 dp2, ZeRO 2, tied": ("dense", dict(pp=2, dp=2, micro=2, zero=2)),
    "pp2 dp2, ZeRO 2, tied, in place": ("dense", dict(pp=2, dp=2, micro=2, zero=2, in_place=True)),
    "moe, dp2 tp2 ep2, sequence parallel, ZeRO 2, scan, in place": (
        "moe8",
        dict(dp=2, tp=2, ep=2, seq=True, zero=2, loop="scan", in_place=True),
    ),
    "pp2 dp2, ZeRO 3, tied": ("dense", dict(pp=2, dp=2, micro=2, zero=3)),
    "pp2 cp2, ring, packed, tied": ("dense", dict(pp=2, cp=2, micro=2, packed=True)),
    "moe, pp2 cp2 ep2, Ulysses": ("moe8", dict(pp=2, cp=2, ep=2, ulysses=2, micro=2)),
    "adapters, pp2 dp2, ZeRO 3": ("adapters", dict(pp=2, dp=2, micro=2, zero=3)),
    "frozen, pp2 tp2, ZeRO 1": ("frozen", dict(pp=2, tp=2, micro=2, zero=1)),
    "moe, pp2 dp2 ep2, interleaved, bias": ("moe8", dict(pp=2, dp=2, ep=2, micro=2, schedule="interleaved", virtual=2)),
    "moe, pp2 tp2 ep2, sequence parallel": ("moe8", dict(pp=2, tp=2, ep=2, seq=True, micro=2)),
    "dp2 tp4, sequence parallel, ZeRO 1": ("dense", dict(dp=2, tp=4, seq=True, zero=1)),
    "moe, pp2 dp2 tp2 ep2, ZeRO 2": ("moe", dict(pp=2, dp=2, tp=2, ep=2, micro=2, zero=2)),
    "moe, dp4 tp2 ep4, sequence parallel, ZeRO 2": ("moe8", dict(dp=4, tp=2, ep=4, seq=True, zero=2, loop="scan")),
}

# Layouts that are to the bit what others are.
RECOMPUTED = {
    "tp2, sequence parallel, full recompute": "tp2, sequence parallel",
    "tp2, sequence parallel, gathered again": "tp2, sequence parallel",
    "dp2 tp2, ZeRO 3, full recompute": "dp2 tp2, ZeRO 3",
    "cp4, hybrid, packed, attention recompute": "cp4, hybrid, packed",
    "cp4, hybrid, packed, lengths, attention recompute": "cp4, hybrid, packed, lengths, full recompute",
    "moe, dp2 tp2 ep2, full recompute": "moe, dp2 tp2 ep2",
}

# Its buffers are too small, so it equals nothing.
OVERFLOWING = "moe, dp2 ep2, half the capacity"
LAYOUTS_RUN = {**LAYOUTS, OVERFLOWING: ("tight", dict(dp=2, ep=2))}

# In the default suite; the others are in the extended one, but for the SLOW ones.
DEFAULT = ("pp2, 1F1B, tied", "tp2, sequence parallel, loss in chunks", "moe, cp2 ep2")

# Left out of both: more of the same, at 10 seconds of a core for each process. The others have 2 processes and, between them,
# each kind of parallelism, ZeRO, adapters and experts; test_manual.py has the ops on 4.
SLOW = (
    "dp2, ZeRO 3, scan, average",
    "pp2, 1F1B, tied, average",
    "moe, dp2 ep2, Muon, average",
    "dp2 tp2, ZeRO 1, 2 micro-batches, average, in place",
    "tp2, sequence parallel, preferences",
    "adapters, cp2, ring, packed, preferences",
    "adapters, dp2, ZeRO 3, scan, preferences",
    "adapters, tp2, sequence parallel, scan",
    "moe, dp2, ZeRO 2, Muon",
    "dp2",
    "tp2, sequence parallel",
    "moe, pp2 dp2 ep2, ZeRO 1",
    "dp2 ep2",
    "cp2, Ulysses",
    "dp2 tp2, sequence parallel, ZeRO 1",
    "dp2, scan, 2 micro-batches, ZeRO 2",
    "tp4 of 2 kv heads",
    "tp2 of 1 kv head, biases",
    "mixed, pp2, interleaved, a stage without layers",
    "dp2 tp2, ZeRO 2, 2 micro-batches",
    "dp2 tp2, ZeRO 3",
    "moe, dp2 tp2 ep2",
    "adapters, bfloat16, tp2, sequence parallel",
    "adapters, bfloat16, pp2",
    "adapters, moe, float16, dp2 ep2, ZeRO 3, scan",
    "untied, tp2 dp2, loss in chunks, packed",
    "moe, pp2 tp2, loss in chunks",
    "frozen, dp2, ZeRO 3",
    "adapters, dp2 ep2, ZeRO 1",
    "adapters, tp2 of 1 kv head",
    "adapters, dp2, ZeRO 1",
    "adapters, dp2, ZeRO 2",
    "adapters, dp2, ZeRO 3, scan, 2 micro-batches",
    "cp4, hybrid, packed",
    "moe, dp2 tp2 ep4, sequence parallel, bias",
    "adapters, dp2 tp2 ep2, sequence parallel, ZeRO 1, scan",
    "tp2",
    "tp4 of 1 kv head, sequence parallel, scan",
    "dp2 tp2",
    "tp2, sequence parallel, full recompute",
    "tp2, sequence parallel, gathered again",
    "cp2, ring",
    "cp2, Ulysses, packed, lengths, scan",
    "cp2, ring, lengths of one document, scan",
    "cp4, ring, packed, lengths",
    "cp4, hybrid, packed, lengths, full recompute",
    "moe, cp4 ep4, Ulysses, packed, lengths, ZeRO 3",
    "cp4, hybrid, packed, lengths, attention recompute",
    "cp2 tp2, packed, sequence parallel",
    "cp4, ring",
    "cp4, ring, packed",
    "cp4, Ulysses of 2 kv heads, packed, ZeRO 2",
    "dp2 tp2, ZeRO 3, full recompute",
    "cp4, hybrid, packed, attention recompute",
    "moe, dp2 tp2 ep2, full recompute",
    "cp2 tp2, Ulysses of 1 kv head, packed",
    "dp2 cp2, ZeRO 3, scan",
    "moe, cp2 tp2 ep4, sequence parallel, packed, bias",
    "dp4, ZeRO 3, scan",
    "dp4, ZeRO 1, 2 micro-batches",
    "norms behind, dp2 tp2, sequence parallel, ZeRO 1, Lion",
    "norms around, moe, dp2 tp2 ep2, ZeRO 3, scan",
    "norms around, pp2 tp2, SGD",
    "dp4, ZeRO 2, 2 micro-batches, SGD",
    "moe, dp2 tp2 ep4, sequence parallel, ZeRO 3, Lion",
    "moe, pp2 dp2 ep2, Muon",
    "dp2 cp2, 2 micro-batches, Muon",
    "tp2, Muon",
    "dp2, ZeRO 1, scan, Muon",
    "dp2, ZeRO 3, Muon",
    "tp2 of 1 kv head, sequence parallel, scan, Muon",
    "dp2, ZeRO 1, scan, groups of learning rates",
    "dp2 tp2, ZeRO 1, scan, Muon",
    "dp2 tp2, ZeRO 3, Muon",
    "moe, dp2 tp2 ep2, sequence parallel, ZeRO 2, scan, Muon",
    "pp2 dp2, ZeRO 2, tied, in place, Muon",
    "pp2 dp2, ZeRO 1, groups of learning rates",
    "moe, dp2 tp2",
    "moe, dp2 tp2 ep2, sequence parallel, ZeRO 1, scan",
    "moe, dp4 ep4, ZeRO 3, scan",
    "moe, dp4 ep2, capacity, ZeRO 2",
    "mixed, dp2 tp2 ep2, 2 micro-batches",
    "dp2 tp4, sequence parallel, ZeRO 1",
    "pp2, GPipe, uneven",
    "untied, pp2",
    "adapters, pp2",
    "adapters, moe, pp2, interleaved",
    "frozen, pp2, tied",
    "pp2, interleaved, tied",
    "pp4, 1F1B, tied",
    "pp4, GPipe, two stages without layers",
    "mixed, pp4, 1F1B, few micro-batches",
    "pp2 tp2",
    "pp2 tp2, sequence parallel, interleaved, tied",
    "pp2 dp2",
    "pp2 dp2, ZeRO 1, tied",
    "pp2 dp2, ZeRO 2, tied",
    "pp2 dp2, ZeRO 2, tied, in place",
    "moe, dp2 tp2 ep2, sequence parallel, ZeRO 2, scan, in place",
    "pp2 dp2, ZeRO 3, tied",
    "pp2 cp2, ring, packed, tied",
    "moe, pp2 cp2 ep2, Ulysses",
    "adapters, pp2 dp2, ZeRO 3",
    "frozen, pp2 tp2, ZeRO 1",
    "moe, pp2 dp2 ep2, interleaved, bias",
    "moe, pp2 tp2 ep2, sequence parallel",
    "moe, pp2 dp2 tp2 ep2, ZeRO 2",
    "moe, dp4 tp2 ep4, sequence parallel, ZeRO 2",
)


def processes(options):
    return options.get("dp", 1) * options.get("tp", 1) * options.get("cp", 1) * options.get("pp", 1)


def run(model, options, rank=0):
    """Five steps in a layout, or in one process. Every rank returns the same whole arrays: losses, norms, first moments of the optimizer,
    parameters after each; and of its own parts the shapes and bytes."""
    cfg, config, sharding, program, state, mine = begun(model, options, rank)
    mesh, out = sharding.mesh, {}
    for at in range(STEPS):
        state, metrics = program.step(state, batch_of(cfg, options, at, mine), LR, at)
        out[f"loss.{at}"], out[f"grad_norm.{at}"] = metrics["objective"], metrics["grad_norm"]
        if options.get("prefer"):
            out[f"loss.{at}.chosen_logp"] = metrics["chosen_logp"]
        out[f"expert_overflow.{at}"] = metrics.get("expert_overflow", 0.0)
        if at == 0:
            out.update({f"gradient.{path}": m for path, m in moments(cfg, config, program, state, sharding)})
    out.update({f"parameter.{path}": w.asnumpy() for path, w in tree_paths(program.params(state))})
    if options.get("ema"):
        out.update({f"average.{path}": w.asnumpy() for path, w in tree_paths(program.params(averaged(state)))})
    kinds = [name for name in ("params", "frozen", "m", "v") if name in state]
    out["state bytes"] = sum(w.nbytes for name in kinds for w in tree_leaves(state[name]))
    if options.get("evaluate", mesh.pp > 1):
        batch = make_batch(STEPS, rows=ROWS, vocab=cfg.vocab_size)
        out["evaluation"] = program.evaluate(state, [{key: value[mine] for key, value in batch.items()}])
    if program.executor:
        out["live"], out["own parts"] = program.executor.live, own_parts(program, state, mesh, out)
    return {**out, **{f"shape.{h.names[0].partition('/')[2]}": h.data.shape for h in program.held(state) if h.names[0].startswith("m/")}}


def begun(model, options, rank=0):
    """(cfg, config, sharding, program, its state before the first step, which rows of a batch are this rank's)"""
    cfg, config = MODELS[model], run_config(options)
    config.lora.rank = cfg.lora.rank if cfg.lora else 0
    sharding = sharding_of(cfg, options, rank)
    in_place = mock.patch.object(train_program, "choose_kernels", _in_place) if options.get("in_place") else contextlib.nullcontext()
    with in_place:
        program, mesh = train_program.build_program(cfg, config, sharding), sharding.mesh
    state = program.init(tree_map(lambda w: w.asnumpy(), parameters(cfg)))
    return cfg, config, sharding, program, state, rank_rows(ROWS, mesh.index(("dp",)), mesh.dp, options.get("micro", 1))


def _in_place(*args):
    return dataclasses.replace(choose_kernels(*args), adamw="vendor")


def batch_of(cfg, options, at, mine):
    """A step's batch, of which a rank has the rows `mine`."""
    return {key: value[mine] for key, value in rows_of(cfg, options, at).items()}


def parameters(cfg):
    """tests.tiny's, but for the numbers of layers, which are what they are."""
    params = random_params(cfg)
    for i, layer in enumerate(params["layers"]):
        if DROPOUT_LAYER in layer:
            layer[DROPOUT_LAYER] = ms.Tensor([float(i)], ms.float32)
    return params


def own_parts(program, state, mesh, out):
    """Whether what a rank holds of the parameters is what the whole ones have there, tied embeddings on the last stage too."""
    held = {h.names[0].partition("/")[2]: h for h in program.held(state) if h.names[0].startswith("params/")}
    parts = {path: cut(mesh, h.spec, h.axes, out[f"parameter.{path}"].__getitem__) for path, h in held.items()}
    return all(np.array_equal(part, held[path].data.asnumpy()) for path, part in parts.items())


def rows_of(cfg, options, at):
    """The global batch of a step. prefer: its documents are the answers of pairs, and some numbers the nats of a reference model."""
    if not options.get("prefer"):
        return documents_of(cfg, options, at)
    batch = documents_of(cfg, options, at)
    signs = np.where(batch["segment_ids"] % 2, 1, -1) * (batch["positions"] == 0) * (batch["segment_ids"] > 0)
    if options["prefer"] == "kto":  # the second document of a pair is an answer to another prompt
        signs = np.where(signs == 1, np.where(np.arange(ROWS) % 2, 1, -1)[:, None], 0)
    reference = hash_uniform(5, np.uint32(at), np.arange(signs.size, dtype=np.uint64)).reshape(signs.shape) * 5
    return {**batch, "signs": signs.astype(np.float32), "reference": reference.astype(np.float32)}


def documents_of(cfg, options, at):
    """A batch of documents, two or four a row."""
    if not options.get("packed"):
        return make_batch(at, rows=ROWS, vocab=cfg.vocab_size)
    batch = make_batch(at, rows=ROWS, seq_len=15, vocab=cfg.vocab_size)
    starts = np.array([[0, 1 + i % 3, 6, 9 + i % 2] for i in range(ROWS)])  # of documents in each row
    place = np.broadcast_to(np.arange(15, dtype=np.int32), (ROWS, 15))
    document = (place[:, :, None] >= starts[:, None]).sum(2)
    positions = place - np.take_along_axis(starts, document - 1, 1)
    return {**batch, "segment_ids": document.astype(np.int32), "positions": positions.astype(np.int32)}


def sharding_of(cfg, options, rank=0):
    sizes = {axis: options[axis] for axis in ("dp", "tp", "cp", "ep", "pp", "ulysses") if axis in options}
    mesh = Mesh(**sizes, kv_repeat=max(1, sizes.get("tp", 1) // cfg.num_kv_heads), rank=rank)
    more = {"documents": options.get("documents", 0), "gathers_again": options.get("again", False)}
    return Sharding(mesh, seq_parallel=options.get("seq", False), zero=options.get("zero", 0), **more)


def run_config(options):
    config = common.get_config()
    config.train.layer_loop = options.get("loop", "unroll")
    config.train.recompute, config.train.loss_chunks = options.get("recompute", "none"), options.get("chunks", 1)
    config.parallel.micro_batches = options.get("micro", 1)
    config.parallel.pp_schedule, config.parallel.virtual_stages = options.get("schedule", "1f1b"), options.get("virtual", 1)
    config.parallel.stage_layers = options.get("layers", ())
    config.optim.name, config.optim.lr_groups = options.get("optim", "adamw"), options.get("groups", "")
    config.prefer.loss, config.prefer.row_pairs = options.get("prefer", ""), 2
    config.train.ema_decay = options.get("ema", 0.0)
    config.optim.eps = 1e-5  # at 1e-8 rounding alone moves parameters
    config.optim.clip_norm = 0.5  # acts in every step, so that the norm enters the gradients
    return config


def moments(cfg, config, program, state, sharding):
    """(path, clipped gradient), whole, after one step, of the first moment."""
    mine = {h.names: h.data for h in program.held(state)}
    for h in program.held():
        kind, _, path = h.names[0].partition("/")
        if kind == "m" and h.spec.optimizer == "adamw":
            path, gain = path if len(h.names) == 1 else "layers." + path.split(".", 2)[2], optim_rules.momentum(config.optim, h.spec)[1]
            yield path, whole(sharding.mesh, h.spec, h.axes, mine.get(h.names), holder=h.holders[0] if h.holders else None) / gain


def main(names):
    """In each process: all layouts of these names, a JSON list."""
    rank, out = collectives.start()[0], {}
    for name in json.loads(names):
        with graphs.compiled() as found:
            results = run(*LAYOUTS_RUN[name], rank)
        results["collectives"] = [call for graph in found for call in ("a graph", *graphs.collectives(graph))]
        out.update({f"{name}|{key}": np.asarray(value) for key, value in results.items()})
    return out
