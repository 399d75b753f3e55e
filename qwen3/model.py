"""Qwen3, Qwen3-MoE and Qwen2.5 as pure functions of a tree of parameters.

Dims: B batch, S query length, T key length, D model, N heads, K kv heads, H head dim, F ffn, E experts, V vocab, L layers,
R = B * S rows. `build(cfg, sharding)` binds the layers' annotated ops; `forward` and `loss_fn` here are that on one device.
"""

import fnmatch
import functools
from dataclasses import replace
from types import SimpleNamespace

import mindspore as ms
import numpy as np
from mindspore import ops

from layers import attention, embed, lora, loss, mlp, moe, norm, residual, rope
from ops import iota as iota_op
from ops import registry
from parallel import context, zero
from parallel.mesh import ONE_DEVICE
from parallel.recompute import recomputed
from parallel.scan import scan as scan_layers
from parallel.sharding import Sharding
from parallel.spec import tree_leaves, tree_paths, unflatten
from qwen3.config import check_compute_dtype

RECOMPUTE = ("none", "full", "attention")  # nothing, all of a layer, or its attention and the norm before it


def param_specs(cfg):
    """The tree of ParamSpecs: embed, layers[i].{attention_norm, attention, mlp_norm, mlp | moe}, final_norm, lm_head if untied; and lora,
    the adapters of the embedding, as those of a layer's weights are in its parts. For norms elsewhere see layers/residual.py."""
    outside = {"embed": embed.specs(cfg), "final_norm": norm.specs(cfg)}
    if not cfg.tie_embeddings:
        outside["lm_head"] = embed.specs(cfg)
    outside = _frozen(cfg, lora.specs(cfg, outside, lora.EMBED))
    return {"embed": outside.pop("embed"), "layers": [layer_specs(cfg, i) for i in range(cfg.num_layers)], **outside}


def layer_specs(cfg, i):
    ffn = {"moe": moe.specs(cfg)} if cfg.is_moe_layer(i) else {"mlp": mlp.specs(cfg)}
    tree = residual.specs(cfg, attention.specs(cfg), ffn)
    return _frozen(cfg, lora.layer_specs(cfg, i, tree), f"layers.{i}.")


def _frozen(cfg, tree, prefix=""):
    """The tree, in which the specs say which parameters do not train."""
    (include, exclude), leaves = cfg.frozen, []
    for path, spec in tree_paths(tree):
        path = prefix + path
        frozen = cfg.lora and ".lora." not in f".{path}" or _matches(path, include) and not _matches(path, exclude)
        leaves.append(replace(spec, optimizer="none") if frozen else spec)
    return unflatten(tree, leaves)


def _matches(path, patterns):
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


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
    """The model's functions, closed over their annotated ops: forward, loss_fn, score and extend, as attributes, and what pipeline stages
    are made of: parts (see qwen3/stages.py).

    score(params, tokens, targets, positions, segment_ids), all [B, S] -> (nats [B, S] of each target, gap [B, S]): how far its logit is
    below the largest, so 0 where it is the greedy choice.

    scan: `params["layers"]` is one tree of stacked arrays [L, ...] instead of a list (see stack_layers), run as a loop.
    kernels: the ops' implementations, an ops.registry.Kernels; by default the fastest that this device has.
    recompute: what of each layer the backward computes again, of RECOMPUTE, instead of keeping it.
    """
    device = ms.get_context("device_target")
    check_compute_dtype(cfg, device)
    sharding = sharding or Sharding()
    kernels = kernels or choose_kernels({}, cfg, sharding)
    if recompute == "attention" and drops(cfg):
        raise ValueError(f"train.recompute=attention with lora.dropout={cfg.lora.dropout} is not built; use train.recompute=full")
    parts = _parts(cfg, sharding, kernels, "none" if scan and recompute == "full" else recompute)  # a scanned layer is recomputed anyway
    trunk = _scanned(cfg, parts.layers, kernels) if scan else _unrolled(cfg, sharding, parts.layers)
    router_losses, reshape = moe.losses(cfg, sharding), ops.Reshape()
    noise_of = noise_in(cfg)

    def states_and_stats(params, tokens, positions, segment_ids, noise=None):
        return trunk(params["layers"], parts.begin(params, tokens), parts.beside(positions, segment_ids, noise))

    def forward(params, tokens, positions=None, segment_ids=None):
        B, S = tokens.shape
        if positions is None and sharding.shards("seq") > 1:
            raise ValueError("forward: a rank has parts of rows, so it needs positions; see parallel.context.cut")
        positions = _default_positions(tokens) if positions is None else positions
        segment_ids = ops.ones_like(tokens) if segment_ids is None else segment_ids
        x, stats = states_and_stats(params, tokens, positions, segment_ids)
        return reshape(parts.whole_logits(params, x), (B, S, -1)), _aux(router_losses(stats)) if cfg.moe_layers else {}

    def score(params, tokens, targets, positions, segment_ids):
        B, S = tokens.shape
        x, _ = states_and_stats(params, tokens, positions, segment_ids)
        nats, gap = parts.nats_and_gap(params, x, targets)
        return reshape(nats, (B, S)), reshape(gap, (B, S))

    def loss_of(params, batch):
        x, stats = states_and_stats(params, batch["tokens"], batch["positions"], batch["segment_ids"], noise_of(batch))
        return parts.loss(params, x, stats, batch)

    extend = _extend(cfg, parts)
    return SimpleNamespace(forward=forward, loss_fn=loss_of, score=score, extend=extend, parts=parts)


def _parts(cfg, sharding, kernels, recompute):
    """What the model's functions are made of: begin(params, tokens_BS) -> x_RD; beside(positions_BS, segment_ids_BS, noise_BS or None) ->
    what each layer is given beside x; layers, as _blocks gives them; whole_logits(params, x_RD) -> logits_RV, of the whole vocabulary;
    nats_and_gap(params, x_RD, targets_BS) -> [R, 1] each, see score; loss(params, x_RD, stats, batch), see loss_fn; over_cache, see
    _over_cache; nats(params, x_RD, targets_BS) -> [R, 1]; real(segment_ids_R) -> valid_R, 1 of what is no padding."""
    take, head = embed.build(cfg, sharding, kernels)
    final_norm, head_key = norm.build(cfg, sharding, kernels)[0], "embed" if cfg.tie_embeddings else "lm_head"
    whole_norm, whole_table = zero.gathered(sharding, norm.specs(cfg)), zero.gathered(sharding, embed.specs(cfg))
    whole_rows = sharding.op(_same, "batch seq>keys -> batch keys", kind="kernel") if sharding.shards("seq") > 1 else _same
    order = sharding.op(_order(sharding.mesh.size(sharding.rules["span"])), "batch keys -> batch keys", kind="kernel")
    real = sharding.op(_is_real(), "tokens -> tokens>rows", kind="kernel", dtype=ms.float32)
    angles, more_embed = rope.build(cfg, sharding), lora.embedding(cfg, sharding, kernels)
    reshape, consts, with_noise, nll = (
        ops.Reshape(),
        _consts(cfg),
        _noise(cfg, sharding),
        loss.build_with_head(cfg.vocab_size, sharding, kernels, head),
    )

    def begin(params, tokens):
        return more_embed(params, tokens, take(whole_table(params["embed"]), tokens))

    def beside(positions, segment_ids, noise=None):
        cos, sin = angles(positions)
        valid = real(reshape(segment_ids, (-1,)))
        segments = whole_rows(segment_ids)
        return with_noise(consts(cos, sin, segments, order(segments), valid), noise)

    def end(params, x):
        return head(whole_table(params[head_key]), final_norm(whole_norm(params["final_norm"]), x))

    nll_and_gap = loss.build_with_gap(cfg.vocab_size, sharding, kernels)
    whole_vocab = embed.whole(cfg, sharding) if sharding.shards("vocab") > 1 else zero.same

    def whole_logits(params, x):
        return whole_vocab(end(params, x))

    def nats_and_gap(params, x, targets):
        return nll_and_gap(end(params, x), targets)

    def nats(params, x, targets):
        return nll(whole_table(params[head_key]), final_norm(whole_norm(params["final_norm"]), x), targets)

    layers, over_cache = _blocks(cfg, sharding, kernels, recompute), functools.partial(_over_cache, cfg, angles)
    found = {"begin": begin, "beside": beside, "layers": layers, "loss": _loss(cfg, sharding, nats), "over_cache": over_cache}
    found.update(nats=nats, real=real)
    return SimpleNamespace(**found, whole_logits=whole_logits, nats_and_gap=nats_and_gap)


def choose_kernels(asked, cfg, sharding=None):
    """The implementations of ops, an ops.registry.Kernels, for a model on this device in a layout. asked: as in ops.registry.choose."""
    shards = sharding.shards("experts") if sharding else 1
    more = {"head_dim": cfg.head_dim, "router_bias": cfg.router_bias, "expert_shards": shards}
    more["spans"] = sharding.shards("span") if sharding else 1
    return registry.choose(asked, ms.get_context("device_target"), cfg.compute_dtype, **more)


def _aux(losses):
    balance, z, load, _ = losses
    return {"router_loss": balance, "router_z_loss": z, "expert_load": load}


def _loss(cfg, sharding, nats):
    """loss(params, x_RD, stats, batch) -> (loss, metrics), as loss_fn above. nats(params, x_RD, targets_BS) -> [R, 1]."""
    mean, router_losses = loss.weighted_mean(sharding), moe.losses(cfg, sharding)
    aux_coef, z_coef = cfg.router_aux_coef, cfg.router_z_coef

    def dense(params, x, stats, batch):
        ce, tokens = mean(nats(params, x, batch["targets"]), batch["loss_weights"])
        return ce, {"loss": ce, "tokens": tokens}

    def with_experts(params, x, stats, batch):
        ce, tokens = mean(nats(params, x, batch["targets"]), batch["loss_weights"])
        balance, z, load, overflow = router_losses(stats)
        metrics = {"loss": ce, "tokens": tokens, "router_loss": balance, "router_z_loss": z}
        metrics["expert_load"], metrics["expert_overflow"] = load, overflow
        return ce + aux_coef * balance + z_coef * z, metrics

    return with_experts if cfg.moe_layers else dense


def drops(cfg):
    """Whether a model has dropout; then loss_fn wants batch["noise"], int32 [B, S], of which each token's draws come."""
    return bool(lora.noises(cfg))


def noise_in(cfg):
    """f(batch) -> its noise where the model has dropout, else None."""

    def given(batch):
        return batch["noise"]

    def none(batch):
        return None

    return given if drops(cfg) else none


def _noise(cfg, sharding):
    """f(consts, noise_BS) -> consts with the noise of rows, of tokens, or both, at their end, as lora.noises says."""
    to_rows, reshape = sharding.op(_same_integers, "tokens -> tokens>rows", kind="kernel"), ops.Reshape()

    def both(consts, noise):
        noise = reshape(noise, (-1,))
        return consts + (to_rows(noise), noise)

    def of_rows(consts, noise):
        return consts + (to_rows(reshape(noise, (-1,))),)

    def of_tokens(consts, noise):
        return consts + (reshape(noise, (-1,)),)

    def none(consts, noise):
        return consts

    return {("rows", "tokens"): both, ("rows",): of_rows, ("tokens",): of_tokens, (): none}[lora.noises(cfg)]


def _same_integers(x):
    return x + 0


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
    """Per layer, (block(p, x_RD, consts) -> x_RD, stats; the same over a cache, for generation; that for one token a row, in few ops, or
    None)."""
    stream, of_attention = residual.build(cfg, sharding, kernels), residual.attention_part(cfg)
    enter, between, leave, rms = stream.enter, stream.between, stream.leave, stream.rms
    attend, attend_cached = attention.build(cfg, sharding, kernels)
    dense_ffn = mlp.build(cfg, sharding, kernels)
    no_stats = ms.Tensor([0.0], ms.float32)

    def dense(p, x, consts):
        return dense_ffn(p["mlp"], x), no_stats

    sparse_ffn = moe.build(cfg, sharding, kernels) if cfg.moe_layers else None

    def sparse(p, x, consts):
        return sparse_ffn(p["moe"], x, consts[4])

    attend_token, mlp_token = attention.build_decode(cfg, kernels), mlp.build_decode(cfg, kernels)

    def attended(p, x, consts):
        return (attend(p["attention"], enter(p, x), consts[0], consts[1], consts[2], consts[3]),)

    if recompute == "attention":
        attended = recomputed(attended, of_attention(residual.specs(cfg, attention.specs(cfg), {})), sharding.lowering)

    def block_of(i, is_moe):
        whole, noisy = zero.gathered(sharding, layer_specs(cfg, i)), lora.noisy(cfg, layer_specs(cfg, i))
        ffn, is_dense = sparse if is_moe else dense, not is_moe

        def block(p, x, consts):
            p = noisy(whole(p), consts)
            y = attended(of_attention(p), x, consts[:4])[0]
            x, normed = between(p, x, y)
            y, stats = ffn(p, normed, consts)
            return leave(p, x, y), stats

        def cached(p, x, consts, k, v, key_segments, slots):
            p = whole(p)
            normed = enter(p, x)
            y, k, v = attend_cached(p["attention"], normed, consts[0], consts[1], consts[2], consts[3], k, v, key_segments, slots)
            x, normed = between(p, x, y)
            y, _ = ffn(p, normed, consts)
            return leave(p, x, y), k, v

        def decode(p, x, consts, k, v):
            x, k, v = attend_token(p["attention_norm"], p["attention"], x, consts[0], consts[1], consts[3], k, v)
            if is_dense:
                return mlp_token(p["mlp_norm"], p["mlp"], x), k, v
            y, _ = ffn(p, rms(p["mlp_norm"], x), consts)
            return leave(p, x, y), k, v

        outer = recomputed(block, layer_specs(cfg, i), sharding.lowering) if recompute == "full" else block
        return outer, cached, decode if _decodes_in_few_ops(cfg, sharding, kernels) else None

    kind_of = [(cfg.is_moe_layer(i), tuple(s.optimizer for s in tree_leaves(layer_specs(cfg, i)))) for i in range(cfg.num_layers)]
    first = {kind: i for i, kind in reversed(list(enumerate(kind_of)))}  # one block for all layers of a kind
    kinds = {kind: block_of(i, kind[0]) for kind, i in first.items()}
    return tuple(kinds[kind] for kind in kind_of)


def _decodes_in_few_ops(cfg, sharding, kernels):
    """Whether a token's step runs in ops that do half a layer each. They hold for one device, as ranks have collectives within a layer, and
    for attention and norms as Qwen3 has them, without adapters; a check of annotations wants the annotated ops."""
    one_device = sharding.mesh == ONE_DEVICE and sharding.lowering == "manual" and not sharding.check
    chosen = "reference" not in (kernels.decode_attention, kernels.decode_mlp)
    return one_device and chosen and cfg.qk_norm and not cfg.qkv_bias and not cfg.lora and cfg.norm_placement == "pre"


def _unrolled(cfg, sharding, blocks):
    """trunk(layers, x_RD, consts) -> x_RD, stats [MoE layers, 2E + 3] (of a dense model, [1, 1])."""
    run, n = tuple(block for block, _, _ in blocks), cfg.num_layers
    counted = tuple(cfg.is_moe_layer(i) or (i == 0 and not cfg.moe_layers) for i in range(n))
    dims = ", ".join(["stats"] * sum(counted)) + " -> layers stats"
    stack = sharding.op(stack_rows(), dims, kind="kernel", sizes={"layers": sum(counted)})

    def trunk(layers, x, consts):
        every = ()
        for i in range(n):
            x, stats = run[i](layers[i], x, consts)
            if counted[i]:
                every += (stats,)
        return x, stack(*every)

    return trunk


def stack_rows():
    """Not ops.Stack, which, given one tensor, returned in eager mode the shape that it had in an earlier compiled graph."""
    concat, reshape = ops.Concat(0), ops.Reshape()

    def stack(*xs):
        return reshape(concat(xs), (len(xs), -1))

    return stack


def _scanned(cfg, blocks, kernels):
    """The same over one tree of stacked layers."""
    if len({cfg.is_moe_layer(i) for i in range(cfg.num_layers)}) > 1:
        raise ValueError("train.layer_loop=scan needs layers of one kind, and this model mixes dense and MoE layers; use unroll")
    if len(set(blocks)) > 1:
        raise ValueError("train.layer_loop=scan needs layers that train alike, and train.freeze_include tells them apart; use unroll")
    loop = scan_layers(blocks[0][0], layer_specs(cfg, 0), cfg.num_layers, (moe.stats_size(cfg) if cfg.moe_layers else 1,), kernels)

    def trunk(layers, x, consts):
        return loop(x, layers, consts)

    return trunk


def _extend(cfg, parts):
    """extend(params, cache, tokens_BS, positions_BS, last_B) -> (logits_BV at column last_B of each row, cache).

    cache: per layer (k_BTKH, v_BTKH); slot t of a row holds position t. Positions beyond T are dropped. In a layout without sequence
    parallel: B are a data rank's rows, K its kv heads, and V is the whole vocabulary, of which each part is one rank's work, so that all
    ranks have the same bits.
    """
    begin, last_of, logits = parts.begin, last_rows(), parts.whole_logits
    over = parts.over_cache(parts.layers, tuple(range(cfg.num_layers)))
    in_few_ops = all(decode for _, _, decode in parts.layers)

    def extend(params, cache, tokens, positions, last):
        x, cache = over(params["layers"], begin(params, tokens), cache, positions)
        if not (in_few_ops and tokens.shape[1] == 1):
            x = last_of(x, last)
        return logits(params, x), cache

    return extend


def last_rows():
    """f(x_RD, last_B) -> x_BD, of each of B rows of R / B tokens that in column last_B."""
    gather, iota = ops.Gather(), iota_op.reference()

    def last_of(x, last):
        B = last.shape[0]
        return gather(x, iota(B) * (x.shape[0] // B) + last, 0)

    return last_of


def _over_cache(cfg, angles, blocks, names):
    """over(layers, x_RD, cache, positions_BS) -> x_RD, cache, by these of _blocks; names: of their parameters in `layers`."""
    run, run_token, n = tuple(cached for _, cached, _ in blocks), tuple(decode for _, _, decode in blocks), len(blocks)
    in_few_ops, iota, pack, cast = all(run_token), iota_op.reference(), _consts(cfg), ops.Cast()
    reshape, ones_like, expand, tile = ops.Reshape(), ops.OnesLike(), ops.ExpandDims(), ops.Tile()

    def over(layers, x, cache, positions):
        B, S = positions.shape
        cos, sin = angles(positions)
        valid = cast(ones_like(reshape(positions, (-1,))), ms.float32)
        consts, updated = pack(cos, sin, ones_like(positions), positions, valid), ()
        if in_few_ops and S == 1:
            for i in range(n):
                x, k, v = run_token[i](layers[names[i]], x, consts, cache[i][0], cache[i][1])
                updated += ((k, v),)
            return x, updated
        slots = tile(expand(iota(cache[0][0].shape[1]), 0), (B, 1))
        key_segments = ones_like(slots)
        for i in range(n):
            x, k, v = run[i](layers[names[i]], x, consts, cache[i][0], cache[i][1], key_segments, slots)
            updated += ((k, v),)
        return x, updated

    return over


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
