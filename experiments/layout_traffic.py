"""What a layout sends in a training step: collectives by kind and axes, and the bytes of a rank, without any process."""

from collections import Counter
from functools import partial

import mindspore as ms
import numpy as np

from experiments.train import placements, uses_scan
from layers import attention, embed, norm, rope
from ops.routing import shard_capacity
from parallel import context, traffic
from parallel.placement import place
from parallel.sharding import Sharding
from parallel.spec import init_params, tree_leaves, tree_map
from parallel.step import value_and_grad
from qwen3.model import build, choose_kernels, layer_specs, param_specs

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
HEADER = ("sent in a step", "collective", "over", "ranks", "calls", "bytes a rank sends")
SMALL = dict(vocab_size=8, hidden_size=4, num_heads=2, num_kv_heads=2, head_dim=2, ffn_size=4, max_position=8, compute_dtype="float32")
SMALL.update(bos_id=None, eos_id=None, pad_id=None, rope_scaling=None)


def table(config, cfg, sharding):
    """Rows of text; bytes are those of ring algorithms, and as many are received."""
    mesh, grouped = sharding.mesh, {}
    for call, count in step_calls(config, cfg, sharding).items():
        axes = "+".join(dict.fromkeys(atom[:2] for atom in call.atoms))
        calls, size = grouped.get(key := (call.phase, call.kind, axes, mesh.size(call.atoms)), (0, 0))
        grouped[key] = calls + count, size + count * call.sent(mesh)
    order = ("forward", "backward", "update")
    rows = sorted(grouped.items(), key=lambda row: (order.index(row[0][0]), *row[0][1:]))
    return [HEADER, *((*map(str, key), f"{calls:,}", f"{size:,}") for key, (calls, size) in rows)]


def notes(config, cfg):
    """How to read it."""
    yield "A ring passes on all parts of a tensor but one, and does so twice to sum it on every rank; a rank receives as much as it sends."
    if uses_scan(cfg, config.train.layer_loop):
        yield "The backward of looped layers makes their forward calls again, twice. All are counted; a few go unused and are left out."
    elif config.train.recompute != "none":
        yield "The backward makes the forward calls of what is recomputed again. All are counted; a few go unused and are left out."
    if config.parallel.cp > 1 and config.parallel.cp_attention != "ulysses":
        yield "What goes round a ring of ranks does so by gathers here, of which each rank keeps its neighbour's part."
    if cfg.num_experts and cfg.moe_capacity_factor is None:
        yield "AlltoAll sends buffers for the worst case, all tokens to one rank's experts; see model_args.moe_capacity_factor."


def step_calls(config, cfg, sharding):
    """Counter of traffic.Call for one optimizer step of the trainer."""
    micro, scan = config.parallel.micro_batches, uses_scan(cfg, config.train.layer_loop)
    rest, layers = model_calls(cfg, sharding, config.train.batch_size // micro, config.train.seq_len)
    layers = layers + recomputed_calls(config, cfg, sharding, layers, cfg.num_layers)
    if scan:
        layers = layers + traffic.again(layers)
    update = traffic.of_update(sharding, [p for p in tree_leaves(placements(cfg, sharding, scan)) if p.spec.trains], micro)
    return traffic.times(rest + layers, micro) + update


def recomputed_calls(config, cfg, sharding, layers, count):
    """Counter of the calls that train.recompute makes again in one global micro-batch. layers: those of `count` layers."""
    recompute = config.train.recompute
    if recompute == "full" and not uses_scan(cfg, config.train.layer_loop):
        return traffic.again(layers, 1)
    if recompute != "attention":
        return Counter()
    of_one = attention_calls(cfg, sharding, config.train.batch_size // config.parallel.micro_batches, config.train.seq_len)
    return traffic.times(traffic.again(of_one, 1), count)


def attention_calls(cfg, sharding, batch_size, seq_len):
    """Counter of the forward calls of a layer's attention and the norm before it."""
    small, watched = cfg.replace(**dict(SMALL, num_layers=1)), traffic.Watched(sharding)
    kernels, batch = choose_kernels({}, small, sharding), _batch()
    p = tree_map(ms.Tensor, init_params({"attention": attention.specs(small), "attention_norm": norm.specs(small)}, 0))
    attend, rms = attention.build(small, watched, kernels)[0], norm.build(small, watched, kernels)[0]
    x, (cos, sin) = ms.Tensor(np.ones((4, small.hidden_size), np.float32)), rope.build(small, Sharding())(batch["positions"])
    attend(p["attention"], rms(p["attention_norm"], x), cos, sin, batch["segment_ids"], batch["positions"])
    return traffic.of_ops(sharding, watched.bound, watched.seen, _sizes(cfg, sharding, batch_size, seq_len), BYTES[cfg.compute_dtype])


def model_calls(cfg, sharding, batch_size, seq_len):
    """(Counter of the calls outside the layers, of those in them) for forward and backward of one global micro-batch."""
    kinds = sorted({cfg.is_moe_layer(i) for i in range(cfg.num_layers)})
    of = partial(_watched, cfg, sharding, _sizes(cfg, sharding, batch_size, seq_len))
    each_once = of(kinds)
    layers, rest = Counter(), Counter(each_once)
    for kind in kinds:
        one_more = of([*kinds, kind])
        one_more.subtract(each_once)
        assert min(one_more.values()) >= 0
        number = next(i for i in range(cfg.num_layers) if cfg.is_moe_layer(i) == kind)
        gathered = _gathered(sharding, layer_specs(cfg, number))
        rest.subtract(one_more)
        layers += traffic.times(+one_more + gathered, sum(cfg.is_moe_layer(i) == kind for i in range(cfg.num_layers)))
    tables = traffic.times(_gathered(sharding, embed.specs(cfg)), 2)  # where tokens are looked up, and in the head, tied or not
    return +rest + tables + _gathered(sharding, norm.specs(cfg)), layers


def _gathered(sharding, specs):
    return traffic.of_gathered(sharding, tree_leaves(place(sharding, specs)))


def _watched(cfg, sharding, sizes, kinds):
    """The calls of a model with these kinds of layers (True: of experts), as seen in a small one."""
    small = dict(SMALL, num_layers=len(kinds), tie_embeddings=cfg.tie_embeddings)
    if cfg.num_experts:
        dense = tuple(i for i, is_moe in enumerate(kinds) if not is_moe)
        experts = sharding.shards("experts") * cfg.experts_per_token
        small.update(num_experts=experts, moe_ffn_size=4, mlp_only_layers=dense, decoder_sparse_step=1)
    bound, seen = _run(cfg.replace(**small), sharding)
    return traffic.of_ops(sharding, bound, seen, sizes, BYTES[cfg.compute_dtype])


_runs = {}  # (small model, parts of each dim) -> what was seen: layouts that differ in their ranks' tasks alone share it


def _run(small, sharding):
    """(the ops of a model, how often each ran), on one device."""
    key = small, tuple(sharding.shards(dim) for dim in sharding.rules)
    if key not in _runs:
        watched = traffic.Watched(sharding)
        params = tree_map(ms.Tensor, init_params(param_specs(small), 0))
        value_and_grad(_loss(build(small, watched)))(params, _batch())
        _runs[key] = watched.bound, watched.seen
    return _runs[key]


def _loss(model):
    def loss(params, batch):
        return model.loss_fn(params, batch)[0]

    return loss


def _batch():
    ints = {key: ms.Tensor(np.ones((1, 4)), ms.int32) for key in ("tokens", "targets", "segment_ids", "positions")}
    ints["noise"] = ints["tokens"]  # of dropout
    return {**ints, "loss_weights": ms.Tensor(np.ones((1, 4)), ms.float32)}


def _sizes(cfg, sharding, batch_size, seq_len):
    """{dim: global size} of the dims of what travels, for a batch of all data ranks. Dims that mean several sizes are not here."""
    seq_len = context.padded(sharding.mesh, seq_len)
    rows = batch_size * seq_len
    kv_heads = max(cfg.num_kv_heads, sharding.shards("kv_heads"), sharding.shards("span_kv_heads"))
    sizes = {"heads": cfg.num_heads, "span_heads": cfg.num_heads, "span": seq_len, "keys": seq_len}
    sizes |= dict.fromkeys(("kv_heads", "span_kv_heads"), kv_heads)
    sizes |= {"one": 1, "batch": batch_size, "seq": seq_len, **dict.fromkeys(("rows", "tokens", "expert_rows"), rows)}
    sizes.update(embed=cfg.hidden_size, head_dim=cfg.head_dim, kv=cfg.num_kv_heads * cfg.head_dim, vocab=cfg.vocab_size)
    if cfg.lora:
        sizes["rank"] = cfg.lora.rank
    if cfg.num_experts:
        shards, E, k = sharding.shards("experts"), cfg.num_experts, cfg.experts_per_token
        slots = shard_capacity(rows // sharding.shards("expert_rows"), k, E, shards, cfg.moe_capacity_factor)
        sizes.update(router=E, choice=k, router_stats=2 * E + 2, to_shard=shards, shard=shards, sent=slots * sharding.shards("sent"))
        sizes.update(received=slots * shards * sharding.shards("received"))
    return sizes
