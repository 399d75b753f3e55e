"""Qwen3, Qwen3-MoE and Qwen2.5 as pure functions of a tree of parameters.

Dims: B batch, S query length, T key length, D model, N heads, K kv heads, H head dim, F ffn, E experts, V vocab, L layers,
R = B * S rows. `build(cfg, sharding)` binds the layers' annotated ops; `forward` and `loss_fn` here are that on one device.
"""

import functools
from types import SimpleNamespace

import mindspore as ms
import numpy as np
from mindspore import ops

from layers import attention, embed, linear, loss, mlp, moe, norm, rope
from ops import iota as iota_op
from ops import registry
from parallel import context, zero
from parallel.recompute import recomputed
from parallel.scan import scan as scan_layers
from parallel.sharding import Sharding
from parallel.spec import tree_leaves, unflatten
from qwen3.config import check_compute_dtype

RECOMPUTE = ("none", "full", "attention")  # nothing, all of a layer, or its attention and the norm before it


def param_specs(cfg):
    """The tree of ParamSpecs: embed, layers[i].{attention_norm, attention, mlp_norm, mlp | moe}, final_norm, lm_head if untied."""
    tree = {"embed": embed.specs(cfg), "layers": [layer_specs(cfg, i) for i in range(cfg.num_layers)], "final_norm": norm.specs(cfg)}
    if not cfg.tie_embeddings:
        tree["lm_head"] = embed.specs(cfg)
    return tree


def layer_specs(cfg, i):
    ffn = {"moe": moe.specs(cfg)} if cfg.is_moe_layer(i) else {"mlp": mlp.specs(cfg)}
    return {"attention_norm": norm.specs(cfg), "attention": attention.specs(cfg), "mlp_norm": norm.specs(cfg), **ffn}


def stacked_specs(cfg):
    """The tree with one layer's specs in place of the list: the structure of stack_layers' result."""
    return {**param_specs(cfg), "layers": layer_specs(cfg, 0)}


def metric_names(cfg):
    """The keys of loss_fn's metrics."""
    return ("loss", "tokens") + (("router_loss", "router_z_loss", "expert_load", "expert_overflow") if cfg.moe_layers else ())


def forward(params, tokens, cfg, *, positions=None, segment_ids=None):
    """tokens_BS int32 -> (logits_BSV float32, aux). aux["router_loss"] is HF's load-balancing loss, for MoE.

    positions_BS default to 0..S-1; segment_ids_BS mask documents from each other, 0 is padding; default one document a row.
    """
    return build(cfg).forward(params, tokens, positions, segment_ids)


def loss_fn(params, batch, cfg):
    """batch {tokens, targets, loss_weights, segment_ids, positions}, all [B, S] -> (loss, metrics).

    loss = metrics["loss"], the cross-entropy in nats per weighted target, + the MoE losses times their coefficients.
    """
    return build(cfg).loss_fn(params, batch)


@functools.lru_cache(maxsize=32)
def build(cfg, sharding=None, scan=False, kernels=None, recompute="none"):
    """The model's functions, closed over their annotated ops: forward, loss_fn and extend, as attributes.

    scan: `params["layers"]` is one tree of stacked arrays [L, ...] instead of a list (see stack_layers), run as a loop.
    kernels: the ops' implementations, an ops.registry.Kernels; by default the fastest that this device has.
    recompute: what of each layer the backward computes again, of RECOMPUTE, instead of keeping it.
    """
    device = ms.get_context("device_target")
    check_compute_dtype(cfg, device)
    sharding = sharding or Sharding()
    kernels = kernels or choose_kernels({}, cfg, sharding)
    take, head = embed.build(cfg, sharding, kernels)
    angles = rope.build(cfg, sharding)
    blocks = _blocks(cfg, sharding, kernels, "none" if scan and recompute == "full" else recompute)  # a scanned layer is recomputed anyway
    trunk = _scanned(cfg, blocks) if scan else _unrolled(cfg, sharding, blocks)
    final_norm, head_key = norm.build(cfg, sharding, kernels)[0], "embed" if cfg.tie_embeddings else "lm_head"
    whole_norm, whole_table = zero.gathered(sharding, norm.specs(cfg)), zero.gathered(sharding, embed.specs(cfg))
    whole_rows = sharding.op(_same, "batch seq>keys -> batch keys", kind="kernel") if sharding.shards("seq") > 1 else _same
    order = sharding.op(_order(sharding.mesh.size(sharding.rules["span"])), "batch keys -> batch keys", kind="kernel")
    real = sharding.op(_is_real(), "tokens -> tokens>rows", kind="kernel", dtype=ms.float32)
    whole_vocab = embed.whole(cfg, sharding)
    reshape, consts = ops.Reshape(), _consts(cfg)

    def logits_and_stats(params, tokens, positions, segment_ids):
        cos, sin = angles(positions)
        valid = real(reshape(segment_ids, (-1,)))
        x = take(whole_table(params["embed"]), tokens)
        segments = whole_rows(segment_ids)
        x, stats = trunk(params["layers"], x, consts(cos, sin, segments, order(segments), valid))
        return head(whole_table(params[head_key]), final_norm(whole_norm(params["final_norm"]), x)), stats

    router_losses = moe.losses(cfg, sharding)

    def forward(params, tokens, positions=None, segment_ids=None):
        B, S = tokens.shape
        if positions is None and sharding.shards("seq") > 1:
            raise ValueError("forward: a rank has parts of rows, so it needs positions; see parallel.context.cut")
        positions = _default_positions(tokens) if positions is None else positions
        segment_ids = ops.ones_like(tokens) if segment_ids is None else segment_ids
        logits, stats = logits_and_stats(params, tokens, positions, segment_ids)
        return reshape(whole_vocab(logits), (B, S, -1)), _aux(router_losses(stats)) if cfg.moe_layers else {}

    loss_of = _loss(cfg, sharding, kernels, logits_and_stats, router_losses)
    extend = _extend(cfg, take, head, angles, blocks, final_norm, head_key)
    return SimpleNamespace(forward=forward, loss_fn=loss_of, extend=extend)


def choose_kernels(asked, cfg, sharding=None):
    """The implementations of ops, an ops.registry.Kernels, for a model on this device in a layout. asked: as in ops.registry.choose."""
    shards = sharding.shards("experts") if sharding else 1
    more = {"head_dim": cfg.head_dim, "router_bias": cfg.router_bias, "expert_shards": shards}
    more["spans"] = sharding.shards("span") if sharding else 1
    return registry.choose(asked, ms.get_context("device_target"), cfg.compute_dtype, **more)


def _aux(losses):
    balance, z, load, _ = losses
    return {"router_loss": balance, "router_z_loss": z, "expert_load": load}


def _loss(cfg, sharding, kernels, logits_and_stats, router_losses):
    """loss_fn(params, batch), see above."""
    mean, nll = loss.weighted_mean(sharding), loss.build(cfg.vocab_size, sharding, kernels)
    aux_coef, z_coef = cfg.router_aux_coef, cfg.router_z_coef

    def dense(params, batch):
        logits, _ = logits_and_stats(params, batch["tokens"], batch["positions"], batch["segment_ids"])
        ce, tokens = mean(nll(logits, batch["targets"]), batch["loss_weights"])
        return ce, {"loss": ce, "tokens": tokens}

    def with_experts(params, batch):
        logits, stats = logits_and_stats(params, batch["tokens"], batch["positions"], batch["segment_ids"])
        ce, tokens = mean(nll(logits, batch["targets"]), batch["loss_weights"])
        balance, z, load, overflow = router_losses(stats)
        metrics = {"loss": ce, "tokens": tokens, "router_loss": balance, "router_z_loss": z}
        metrics["expert_load"], metrics["expert_overflow"] = load, overflow
        return ce + aux_coef * balance + z_coef * z, metrics

    return with_experts if cfg.moe_layers else dense


def _is_real():
    """segment_ids -> 1 for a token, 0 for padding."""
    greater, cast = ops.Greater(), ops.Cast()

    def real(segment_ids):
        return cast(greater(segment_ids, 0), ms.float32)

    return real


def _order(ring):
    """segments_BT -> the place of each token in its row, 0, 1, ... T - 1 but for a ring of ranks: what a token may see of its document
    ends with itself."""
    count, zeros_like = iota_op.reference(), ops.ZerosLike()
    if ring > 1:
        count = _order_of_ring(ring)

    def order(segments):
        return zeros_like(segments) + count(segments.shape[1])

    return order


def _order_of_ring(ring):
    def order_of_ring(length):
        return ms.Tensor(context.order(length, ring))

    return ops.constexpr(order_of_ring, name=f"order_of_ring_{ring}")


def _same(x):
    return x


def _default_positions(tokens):
    B, S = tokens.shape
    return ops.broadcast_to(ops.expand_dims(ops.arange(0, S), 0), (B, S))


def _consts(cfg):
    """What every layer is given beside x: cos, sin, segments_BT, order_BT, and for experts valid_R; scan wants no more than is used."""

    def dense(cos, sin, segments, order, valid):
        return cos, sin, segments, order

    def with_experts(cos, sin, segments, order, valid):
        return cos, sin, segments, order, valid

    return with_experts if cfg.moe_layers else dense


def _blocks(cfg, sharding, kernels, recompute):
    """Per layer, (block(p, x_RD, consts) -> x_RD, stats; the same over a cache, for generation)."""
    (rms, add_rms), add = norm.build(cfg, sharding, kernels), linear.residual(sharding)
    attend, attend_cached = attention.build(cfg, sharding, kernels)
    dense_ffn = mlp.build(cfg, sharding, kernels)
    no_stats = ms.Tensor([0.0], ms.float32)

    def dense(p, x, consts):
        return dense_ffn(p["mlp"], x), no_stats

    sparse_ffn = moe.build(cfg, sharding, kernels) if cfg.moe_layers else None

    def sparse(p, x, consts):
        return sparse_ffn(p["moe"], x, consts[4])

    def attended(p, x, consts):
        return (attend(p["attention"], rms(p["attention_norm"], x), consts[0], consts[1], consts[2], consts[3]),)

    if recompute == "attention":
        attended = recomputed(attended, {"attention_norm": norm.specs(cfg), "attention": attention.specs(cfg)})

    def block_of(i, ffn):
        whole = zero.gathered(sharding, layer_specs(cfg, i))

        def block(p, x, consts):
            p = whole(p)
            y = attended({"attention_norm": p["attention_norm"], "attention": p["attention"]}, x, consts[:4])[0]
            x, normed = add_rms(p["mlp_norm"], x, y)
            y, stats = ffn(p, normed, consts)
            return add(x, y), stats

        def cached(p, x, consts, k, v, key_segments, slots):
            p = whole(p)
            normed = rms(p["attention_norm"], x)
            y, k, v = attend_cached(p["attention"], normed, consts[0], consts[1], consts[2], consts[3], k, v, key_segments, slots)
            x, normed = add_rms(p["mlp_norm"], x, y)
            y, _ = ffn(p, normed, consts)
            return add(x, y), k, v

        return recomputed(block, layer_specs(cfg, i)) if recompute == "full" else block, cached

    first = {cfg.is_moe_layer(i): i for i in reversed(range(cfg.num_layers))}  # one block for all layers of a kind
    kinds = {is_moe: block_of(i, sparse if is_moe else dense) for is_moe, i in first.items()}
    return tuple(kinds[cfg.is_moe_layer(i)] for i in range(cfg.num_layers))


def _unrolled(cfg, sharding, blocks):
    """trunk(layers, x_RD, consts) -> x_RD, stats [MoE layers, 2E + 3] (of a dense model, [1, 1])."""
    run, n = tuple(block for block, _ in blocks), cfg.num_layers
    counted = tuple(cfg.is_moe_layer(i) or (i == 0 and not cfg.moe_layers) for i in range(n))
    dims = ", ".join(["stats"] * sum(counted)) + " -> layers stats"
    stack = sharding.op(_stack(), dims, kind="kernel", sizes={"layers": sum(counted)})

    def trunk(layers, x, consts):
        every = ()
        for i in range(n):
            x, stats = run[i](layers[i], x, consts)
            if counted[i]:
                every += (stats,)
        return x, stack(*every)

    return trunk


def _stack():
    """Not ops.Stack, which, given one tensor, returned in eager mode the shape that it had in an earlier compiled graph."""
    concat, reshape = ops.Concat(0), ops.Reshape()

    def stack(*xs):
        return reshape(concat(xs), (len(xs), -1))

    return stack


def _scanned(cfg, blocks):
    """The same over one tree of stacked layers."""
    if len({cfg.is_moe_layer(i) for i in range(cfg.num_layers)}) > 1:
        raise ValueError("train.layer_loop=scan needs layers of one kind, and this model mixes dense and MoE layers; use unroll")
    loop = scan_layers(blocks[0][0], layer_specs(cfg, 0), cfg.num_layers, (moe.stats_size(cfg) if cfg.moe_layers else 1,))

    def trunk(layers, x, consts):
        return loop(x, layers, consts)

    return trunk


def _extend(cfg, take, head, angles, blocks, final_norm, head_key):
    """extend(params, cache, tokens_BS, positions_BS, last_B) -> (logits_BV at column last_B of each row, cache).

    cache: per layer (k_BTKH, v_BTKH); slot t of a row holds position t. Positions beyond T are dropped.
    """
    run, n = tuple(cached for _, cached in blocks), cfg.num_layers
    gather, iota, pack, cast = ops.Gather(), iota_op.reference(), _consts(cfg), ops.Cast()
    reshape, ones_like, expand, tile = ops.Reshape(), ops.OnesLike(), ops.ExpandDims(), ops.Tile()

    def extend(params, cache, tokens, positions, last):
        B, S = tokens.shape
        cos, sin = angles(positions)
        valid = cast(ones_like(reshape(tokens, (-1,))), ms.float32)
        consts = pack(cos, sin, ones_like(positions), positions, valid)
        slots = tile(expand(iota(cache[0][0].shape[1]), 0), (B, 1))
        key_segments = ones_like(slots)
        x, updated = take(params["embed"], tokens), ()
        for i in range(n):
            x, k, v = run[i](params["layers"][i], x, consts, cache[i][0], cache[i][1], key_segments, slots)
            updated += ((k, v),)
        x = gather(x, iota(B) * S + last, 0)
        return head(params[head_key], final_norm(params["final_norm"], x)), updated

    return extend


def stack_layers(params):
    """params with `layers` as one tree of numpy or tensor arrays stacked on a new first dim, for build(cfg, scan=True)."""
    leaves = [tree_leaves(layer) for layer in params["layers"]]
    stacked = [ms.Tensor(np.stack([_numpy(leaf) for leaf in same])) for same in zip(*leaves)]
    return {**params, "layers": unflatten(params["layers"][0], stacked)}


def unstack_layers(params):
    """The inverse of stack_layers."""
    layers = params["layers"]
    each = [unflatten(layers, [ms.Tensor(_numpy(w)[i]) for w in tree_leaves(layers)]) for i in range(tree_leaves(layers)[0].shape[0])]
    return {**params, "layers": each}


def _numpy(x):
    return x.asnumpy() if hasattr(x, "asnumpy") else x
