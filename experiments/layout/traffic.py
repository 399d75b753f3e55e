"""Computes the communication of a training step without starting a process: collectives by kind and axes, and the bytes of a rank."""

import math
from collections import Counter
from functools import partial

import mindspore as ms
import numpy as np

from experiments.train import muon
from experiments.train.pipeline import count_metrics
from experiments.train.state import placements, stage_placements, uses_scan
from layers import attention, embed, norm
from layers.bound_ops import BoundOps
from ops.routing import shard_capacity
from parallel.context import split as context
from parallel.pipeline import schedule as pipeline
from parallel.placement import ITEMSIZE, local_shape, place
from parallel.sharding import Sharding
from parallel.simulation import traffic
from parallel.specs import init_params
from parallel.step import value_and_grad
from parallel.trees import tree_leaves, tree_map, tree_paths, unflatten
from qwen3 import model
from qwen3.model import build, choose_kernels, layer_specs, param_specs
from qwen3.stages import build_stage, carried_shapes, stage_specs

HEADER = ("sent in a step", "collective", "over", "ranks", "calls", "bytes a rank sends")
SMALL = dict(vocab_size=8, hidden_size=4, num_heads=2, num_kv_heads=2, head_dim=2, ffn_size=4, max_position=8, compute_dtype="float32")
SMALL.update(bos_id=None, eos_id=None, pad_id=None, rope_scaling=None)


def table(config, cfg, sharding):
    """Returns the rows of a table. Bytes are those that a rank sends with ring algorithms; it receives equally many."""
    mesh, grouped = sharding.mesh, {}
    for call, count in step_calls(config, cfg, sharding).items():
        axes = "+".join(dict.fromkeys(atom[:2] for atom in call.atoms))
        calls, size = grouped.get(key := (call.phase, call.kind, axes, mesh.size(call.atoms)), (0, 0))
        grouped[key] = calls + count, size + count * call.sent(mesh)
    order = ("forward", "backward", "update")
    rows = sorted(grouped.items(), key=lambda row: (order.index(row[0][0]), *row[0][1:]))
    return [HEADER, *((*map(str, key), f"{calls:,}", f"{size:,}") for key, (calls, size) in rows)]


def notes(config, cfg):
    """Yields sentences that explain the table."""
    yield "In a ring of n ranks, a rank sends (n - 1) / n of a tensor, twice that for an all-reduce, and receives as much."
    if uses_scan(cfg, config.train.layer_loop):
        yield "The backward of looped layers repeats their forward collectives twice. All are counted; the compiler drops some of them."
    elif config.train.recompute != "none":
        yield "The backward repeats the forward collectives of recomputed layers. All are counted; the compiler drops some of them."
    if config.parallel.cp > 1 and config.parallel.cp_attention != "ulysses":
        yield "A ring of ranks passes tensors on by all-gathers, from which each rank keeps only the shard of its neighbour."
    if cfg.num_experts and cfg.moe_capacity_factor is None:
        yield "AlltoAll sends buffers sized for the worst case, in which all tokens go to one rank; see model_args.moe_capacity_factor."


def step_calls(config, cfg, sharding):
    """Returns a Counter of traffic.Call for one optimizer step of the trainer."""
    micro, scan = config.parallel.micro_batches, uses_scan(cfg, config.train.layer_loop)
    rest, layers = model_calls(cfg, sharding, config.train.batch_size // micro, config.train.seq_len)
    layers = layers + recomputed_calls(config, cfg, sharding, layers, cfg.num_layers)
    if scan:
        layers = layers + traffic.again(layers)
    placed = [p for p in tree_leaves(placements(cfg, sharding, scan)) if p.spec.trains]
    update = traffic.of_update(sharding, placed, micro, ITEMSIZE[cfg.compute_dtype]) + muon_calls(config, sharding, placed)
    return traffic.times(rest + layers, micro) + update


def muon_calls(config, sharding, placed):
    """Returns a Counter of the calls by which Muon orthogonalises matrices whole. placed: the flat list of Placed of what trains."""
    if config.optim.name != "muon":
        return Counter()
    return sum((traffic.of_whole_matrices(sharding.mesh, p) for p in placed if muon.is_matrix(p.spec)), Counter())


def recomputed_calls(config, cfg, sharding, layers, count):
    """Returns a Counter of the calls that train.recompute repeats in one global micro-batch. layers: the calls of `count` layers."""
    looped = config.parallel.pp == 1 and uses_scan(cfg, config.train.layer_loop)
    if config.train.recompute == "none" or looped:  # a loop repeats all calls, whatever is set
        return Counter()
    if config.train.recompute == "full":
        return traffic.again(layers, 1)
    of_one = attention_calls(cfg, sharding, config.train.batch_size // config.parallel.micro_batches, config.train.seq_len)
    return traffic.times(traffic.again(of_one, 1), count)


def spare_calls(config, cfg, sharding):
    """Returns a Counter of those calls of step_calls that a compiled graph of unrolled layers may leave out: repeated calls of recomputed
    layers whose results nothing reads, and, with MindSpore's ZeRO 3, gathers of parameters that the backward pass does not need."""
    micro = config.parallel.micro_batches
    _, layers = model_calls(cfg, sharding, config.train.batch_size // micro, config.train.seq_len)
    spare = recomputed_calls(config, cfg, sharding, layers, cfg.num_layers)
    if sharding.lowering == "shard" and sharding.zero == 3:
        spare += traffic.partitioned_gathers(sharding.mesh, tree_leaves(place(sharding, param_specs(cfg))), ITEMSIZE[cfg.compute_dtype])
    return traffic.times(spare, micro)


def attention_calls(cfg, sharding, batch_size, seq_len):
    """Returns a Counter of the forward calls of a layer's attention and the norm before it."""
    small, watched, batch = cfg.replace(**dict(SMALL, num_layers=1)), traffic.Watched(sharding), _batch()
    kernels = choose_kernels({}, small, sharding)
    p = tree_map(ms.Tensor, init_params({"attention": attention.specs(small), "attention_norm": norm.specs(small)}, 0))
    op, plain = BoundOps(small, watched, kernels), BoundOps(small, Sharding(), kernels)  # rows are made outside of a layer
    rows = model.rows_of(small, plain, batch["positions"], batch["segment_ids"], batch["noise"])
    x = ms.Tensor(np.ones((4, small.hidden_size), np.float32))
    attention.attention(small, op, p["attention"], model.attention_input(small, op, p, x), rows, None)
    return traffic.of_ops(sharding, watched.bound, watched.seen, _sizes(cfg, sharding, batch_size, seq_len), ITEMSIZE[cfg.compute_dtype])


def model_calls(cfg, sharding, batch_size, seq_len):
    """Returns (Counter of the calls outside of layers, Counter of the calls in layers) for forward and backward of one global micro-batch.
    If the first layer makes fewer calls than the others, because nothing before it trains, the first Counter has negative counts."""
    kinds = sorted({cfg.is_moe_layer(i) for i in range(cfg.num_layers)})
    of = partial(_watched, cfg, sharding, _sizes(cfg, sharding, batch_size, seq_len))
    each_once = of(kinds)
    layers, rest = Counter(), Counter(each_once)
    for kind in kinds:
        one_more = of([*kinds, kind])
        one_more.subtract(each_once)
        assert min(one_more.values(), default=0) >= 0
        number = next(i for i in range(cfg.num_layers) if cfg.is_moe_layer(i) == kind)
        gathered = _gathered(sharding, layer_specs(cfg, number))
        rest.subtract(one_more)
        layers += traffic.times(+one_more + gathered, sum(cfg.is_moe_layer(i) == kind for i in range(cfg.num_layers)))
    rest.update(_tables(cfg, sharding) + _gathered(sharding, norm.specs(cfg)))
    return rest, layers


def _tables(cfg, sharding):
    """Returns a Counter of the calls for the matrices of the embedding and of the head. If they are tied, MindSpore's compiler merges the
    two gathers into one; the gradients of the two uses are reduce-scattered separately."""
    once = _gathered(sharding, embed.specs(cfg))
    forward = Counter({call: count for call, count in once.items() if call.phase == "forward"})
    return traffic.times(once, 2) - (forward if cfg.tie_embeddings else Counter())


def _gathered(sharding, specs):
    return traffic.of_gathered(sharding, tree_leaves(place(sharding, specs)))


def _watched(cfg, sharding, sizes, kinds):
    """Returns the calls of a model with these kinds of layers (True: with experts), counted by running a small model."""
    small = dict(SMALL, num_layers=len(kinds), tie_embeddings=cfg.tie_embeddings)
    if cfg.num_experts:
        small.update(_moe_sizes(cfg, sharding, tuple(i for i, is_moe in enumerate(kinds) if not is_moe)))
    bound, seen = _run(cfg.replace(**small), sharding)
    return traffic.of_ops(sharding, bound, seen, sizes, ITEMSIZE[cfg.compute_dtype])


def _moe_sizes(cfg, sharding, dense):
    """Returns config changes for a small mixture of experts. dense: the numbers of the layers without experts."""
    experts = sharding.shards("experts") * cfg.experts_per_token
    return dict(num_experts=experts, moe_ffn_size=4, mlp_only_layers=dense, decoder_sparse_step=1)


_runs = {}  # (small model, number of shards of each dim): result of _run. Layouts that only place ranks differently share an entry.


def _run(small, sharding):
    """Runs a model on one device. Returns (its ops, how often each ran)."""
    key = small, tuple(sharding.shards(dim) for dim in sharding.rules)
    if key not in _runs:
        watched, specs = traffic.Watched(sharding), param_specs(small)
        params = tree_map(ms.Tensor, init_params(specs, 0))
        trains = {path for path, spec in tree_paths(specs) if spec.trains}
        moving = {path: w for path, w in tree_paths(params) if path in trains}
        fixed = {path: w for path, w in tree_paths(params) if path not in trains}
        value_and_grad(_loss(build(small, watched), specs, fixed))(moving, _batch())
        _runs[key] = watched.bound, watched.seen
    return _runs[key]


def _loss(model, specs, fixed):
    paths = [path for path, _ in tree_paths(specs)]

    def loss(moving, batch):
        leaves = {**moving, **fixed}
        return model.loss_fn(unflatten(specs, [leaves[path] for path in paths]), batch)[0]

    return loss


def _batch():
    ints = {key: ms.Tensor(np.ones((1, 4)), ms.int32) for key in ("tokens", "targets", "segment_ids", "positions")}
    ints["noise"] = ints["tokens"]  # of dropout
    return {**ints, "loss_weights": ms.Tensor(np.ones((1, 4)), ms.float32)}


def _sizes(cfg, sharding, batch_size, seq_len):
    """Returns {dim: global size} of the dims of communicated tensors, for a batch of all data ranks. Dims with several sizes are left
    out."""
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
        sizes.update(experts=E, expert_ffn=cfg.moe_ffn_size)  # adapters have these dims
        sizes.update(router=E, choice=k, router_stats=2 * E + 2, to_shard=shards, shard=shards, sent=slots * sharding.shards("sent"))
        sizes.update(received=slots * shards * sharding.shards("received"))
    return sizes


def pipeline_calls(config, cfg, sharding):
    """Returns (Counter of traffic.Call for one optimizer step of a rank of a pipeline, Counter of those calls that its graphs may leave
    out).

    Graphs may leave out repeated forward calls whose results the backward pass of a stage does not need. Transfers between stages are the
    kinds Send and Receive.
    """
    mesh, micro = sharding.mesh, config.parallel.micro_batches
    layers, stages, _ = stage_placements(cfg, config, sharding)
    mine = range(mesh.index(("pp",)), len(layers), mesh.pp)
    calls, spare = Counter(), Counter()
    for s in mine:
        once = stage_calls(config, cfg, sharding, layers[s], s == 0, s == len(layers) - 1)
        repeated = recomputed_calls(config, cfg, sharding, once, len(layers[s]))
        if s < len(layers) - 1:
            repeated += traffic.again(once, 1)
        calls += once + repeated
        spare += repeated
    each = [tree_leaves(stages[s]) for s in mine]
    placed = [p for leaves in each for p in leaves]
    update = traffic.of_update(sharding, placed, micro) + muon_calls(config, sharding, placed)
    if sharding.zero >= 2:  # the gradients of each stage are summed separately
        update -= traffic.of_sums(sharding, placed, micro)
        update += sum((traffic.of_sums(sharding, leaves, micro) for leaves in each), Counter())
    if micro == 1 and sharding.data_atoms:
        update[traffic.Call("update", "AllReduce", sharding.data_atoms, 1)] += 1
    update[traffic.Call("update", "AllReduce", mesh.atoms(("pp",)), count_metrics(cfg))] += 1
    return traffic.times(calls, micro) + update + _transfers(config, cfg, sharding, layers, placed), traffic.times(spare, micro)


def stage_calls(config, cfg, sharding, layers, first, last):
    """Returns a Counter of the calls of a stage, forward and backward, in one global micro-batch."""
    moe = _moe_sizes(cfg, sharding, tuple(i for i in range(cfg.num_layers) if not cfg.is_moe_layer(i))) if cfg.num_experts else {}
    small, watched = cfg.replace(**dict(SMALL, **moe)), traffic.Watched(sharding)
    specs, rows = stage_specs(small, layers, first, last), 4
    inputs = {"params": tree_map(ms.Tensor, init_params(specs, 0))}
    if not first:
        inputs["carried"] = tuple(ms.ops.ones(*each) for each in carried_shapes(small, Sharding(), layers, rows))
    value_and_grad(_stage_value(build_stage(small, watched, None, layers, first, last), first, last))(inputs, _batch())
    sizes = _sizes(cfg, sharding, config.train.batch_size // config.parallel.micro_batches, config.train.seq_len)
    out = traffic.of_ops(sharding, watched.bound, watched.seen, sizes, ITEMSIZE[cfg.compute_dtype])
    stored = [layer_specs(cfg, i) for i in layers] + [embed.specs(cfg)] * (first + last) + [norm.specs(cfg)] * last
    return sum((_gathered(sharding, specs) for specs in stored), out)


def _stage_value(stage, first, last):
    """Returns a function whose value is a number that depends on all results of a stage."""

    def value(inputs, batch):
        out = stage(inputs["params"], () if first else inputs["carried"], batch)
        return out[0] if last else sum(x.sum() for x in out)

    return value


def _transfers(config, cfg, sharding, layers, placed):
    """Returns a Counter of the transfers between stages: inputs forward, their gradients back, and gradients of a matrix that two stages
    share."""
    parallel, mesh, out = config.parallel, sharding.mesh, Counter()
    rows = config.train.batch_size // parallel.dp // parallel.micro_batches * config.train.seq_len
    lists = pipeline.schedule(parallel.pp_schedule, mesh.pp, parallel.micro_batches, parallel.virtual_stages)
    for action in lists[mesh.index(("pp",))]:
        if isinstance(action, (pipeline.Send, pipeline.Recv)):
            kind = "Send" if isinstance(action, pipeline.Send) else "Receive"
            stage = action.action.stage + (not isinstance(action.action, pipeline.Forward))
            for shape, dtype in carried_shapes(cfg, sharding, layers[stage], rows):
                out[traffic.Call("forward", kind, (), math.prod(shape), 4 if dtype == ms.float32 else ITEMSIZE[cfg.compute_dtype])] += 1
    for p in placed:
        if len(p.holders) > 1:
            size = math.prod(local_shape(mesh, p.spec, p.state if sharding.zero >= 2 else p.used))
            out += Counter({traffic.Call("update", kind, (), size): 1 for kind in ("Send", "Receive")})
    return out
