"""Qwen3, Qwen3-MoE and Qwen2.5 as pure functions of a tree of parameters.

Dims: B batch, S query length, T key length, D model, N heads, K kv heads, H head dim, F ffn, E experts, V vocab, L layers,
R = B * S rows.

The functions take (cfg, op, ...). cfg: the sizes of the model. op: its ops in a layout (layers/bound_ops.py). Both are constants while a
graph is compiled. `build` returns the functions for a layout; `forward` and `loss_fn` are for one device.
"""

import fnmatch
import functools
from dataclasses import replace

import mindspore as ms
from mindspore import ops

from layers import attention as attention_layer
from layers import embed as tables
from layers import lora, loss, mlp, moe, norm
from layers.attention import attention
from layers.bound_ops import BoundOps
from layers.op_table import options_of
from ops import registry
from ops.rearrange import rearrange
from parallel.hints import nearest
from parallel.sharding import Sharding
from parallel.trees import tree_paths, unflatten
from qwen3 import run_layers
from qwen3.config import check_compute_dtype
from qwen3.mup import with_mup

NO_STATS = ms.Tensor([0.0], ms.float32)  # router statistics of a dense layer


# The parameters


def param_specs(cfg):
    """Returns the tree of ParamSpecs: embed, layers (a list, see layer_specs), final_norm, lm_head unless tied, and lora if the embedding
    has an adapter. A model with labels has the head `score` instead of lm_head."""
    outside = {"embed": tables.specs(cfg), "final_norm": norm.specs(cfg)}
    if cfg.num_labels:
        outside["score"] = tables.score_specs(cfg)
    elif not cfg.tie_embeddings:
        outside["lm_head"] = tables.specs(cfg)
    outside = with_frozen(cfg, lora.specs(cfg, with_mup(cfg, outside), lora.EMBED))
    return {"embed": outside.pop("embed"), "layers": [layer_specs(cfg, i) for i in range(cfg.num_layers)], **outside}


def layer_specs(cfg, i):
    """Returns the specs of layer i: attention_norm, attention, mlp_norm, and mlp or moe. layers/norm.py describes other places of norms."""
    ffn = {"moe": moe.specs(cfg)} if cfg.is_moe_layer(i) else {"mlp": mlp.specs(cfg)}
    tree = {**norm.around(cfg, "attention", {"attention": attention_layer.specs(cfg)}), **norm.around(cfg, "mlp", ffn)}
    return with_frozen(cfg, lora.layer_specs(cfg, i, with_mup(cfg, tree)), f"layers.{i}.")


def with_frozen(cfg, tree, prefix=""):
    """Marks the specs of parameters that do not train: with LoRA, all but the adapters; without, those that cfg.frozen freezes."""
    (include, exclude), leaves = cfg.frozen, []
    for path, spec in tree_paths(tree):
        path = prefix + path
        frozen = cfg.lora and ".lora." not in f".{path}" or matches(path, include) and not matches(path, exclude)
        leaves.append(replace(spec, optimizer="none", dtype=_frozen_dtype(cfg, spec)) if frozen else spec)
    return unflatten(tree, leaves)


def _frozen_dtype(cfg, spec):
    """Returns the dtype in which a training run keeps a frozen parameter. Vectors are small, and the router computes in float32."""
    return cfg.frozen_dtype if len(spec.shape) > 1 and "router" not in spec.dims else "float32"


def check_frozen(cfg):
    """Raises ValueError if a pattern of cfg.frozen matches no parameter, as a misspelt one would freeze nothing without a word."""
    paths = [path for path, _ in tree_paths(param_specs(cfg.base))]
    for key, patterns in zip(("freeze_include", "freeze_exclude"), cfg.frozen):
        for pattern in patterns:
            if not any(matches(path, (pattern,)) for path in paths):
                near = nearest(pattern, paths) or f"; parameters are {paths[0]}, {paths[1]}, ... {paths[-1]}"
                raise ValueError(f"train.{key}: {pattern!r} matches no parameter{near}")


def matches(path, patterns):
    """Returns whether a parameter's path matches one of the patterns, for example "layers.*.mlp.*"."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


# The model


def forward(params, tokens, cfg, *, positions=None, segment_ids=None):
    """tokens_BS int32 -> (logits_BSV float32, aux), on one device. For MoE, aux["router_loss"] is HF's load-balancing loss.

    A model with labels returns their scores after each token, [B, S, num_labels], in the place of logits.

    positions_BS: default 0..S-1. segment_ids_BS: the number of each token's document, 0 for padding; default: one document per row.
    """
    if not isinstance(tokens, ms.Tensor):
        raise ValueError("forward: tokens must be a mindspore.Tensor of int32, [B, S]; use mindspore.Tensor(tokens, mindspore.int32)")
    return logits(cfg, build(cfg).op, params, tokens, positions, segment_ids)


def loss_fn(params, batch, cfg):
    """batch {tokens, targets, loss_weights, segment_ids, positions}, all [B, S] -> (loss, metrics), on one device. See `loss_of_batch`."""
    return loss_of_batch(cfg, build(cfg).op, params, batch)


def logits(cfg, op, params, tokens, positions, segment_ids):
    """tokens_BS -> (logits_BSV float32, aux), in any layout. See `forward`. V counts the scores of a model with labels."""
    if positions is None:
        positions = default_positions(op, tokens)
    if segment_ids is None:
        segment_ids = ops.ones_like(tokens)
    x, stats = op.layers(params["layers"], embed(cfg, op, params, tokens), rows_of(cfg, op, positions, segment_ids, None))
    found = scores(cfg, op, params, x) if cfg.num_labels else full_logits(cfg, op, params, x)
    found = rearrange(found, "(batch seq) vocab -> batch seq vocab", {"batch": tokens.shape[0]})
    if not cfg.moe_layers:
        return found, {}
    balance, z, load, _ = moe.losses(cfg, op, stats)
    return found, {"router_loss": balance, "router_z_loss": z, "expert_load": load}


def loss_of_batch(cfg, op, params, batch):
    """batch -> (loss, metrics), in any layout. batch: see loss_fn; a model with dropout also needs batch["noise"], see `drops`.

    metrics["loss"] is the cross-entropy in nats per weighted target; loss adds the MoE losses times their coefficients.
    """
    rows = rows_of(cfg, op, batch["positions"], batch["segment_ids"], batch["noise"] if op.noises else None)
    x, stats = op.layers(params["layers"], embed(cfg, op, params, batch["tokens"]), rows)
    return loss_of_states(cfg, op, params, x, stats, batch)


def loss_of_states(cfg, op, params, x, stats, batch):
    """Returns (loss, metrics) of loss_of_batch, from the output x_RD of the last layer and the router statistics of all layers."""
    ce, tokens = loss.weighted_mean(op, nats_and_gap(cfg, op, params, x, batch["targets"])[0], batch["loss_weights"])
    return with_router_losses(cfg, op, stats, ce, {"loss": ce, "tokens": tokens})


def with_router_losses(cfg, op, stats, objective, metrics):
    """Returns (objective, metrics) with the MoE losses that the router statistics of all layers give; both as they are without MoE."""
    if not cfg.moe_layers:
        return objective, metrics
    balance, z, load, overflow = moe.losses(cfg, op, stats)
    metrics["router_loss"], metrics["router_z_loss"] = balance, z  # one by one: a graph joins no dicts
    metrics["expert_load"], metrics["expert_overflow"] = load, overflow
    return objective + cfg.router_aux_coef * balance + cfg.router_z_coef * z, metrics


def score_targets(cfg, op, params, tokens, targets, positions, segment_ids):
    """Arguments [B, S] -> (nats, gap), both [B, S]: the cross-entropy of each target, and the largest logit minus the target's logit, which
    is 0 where the target is the greedy choice."""
    x, _ = op.layers(params["layers"], embed(cfg, op, params, tokens), rows_of(cfg, op, positions, segment_ids, None))
    nats, gap = nats_and_gap(cfg, op, params, x, targets)
    B = tokens.shape[0]
    return rearrange(nats, "(batch seq) 1 -> batch seq", {"batch": B}), rearrange(gap, "(batch seq) 1 -> batch seq", {"batch": B})


def states_of_last(cfg, op, params, tokens, positions, segment_ids, last):
    """Arguments [B, S] and last_B -> x_BD float32: what the final norm gives for the token in column last_B of each row, on every rank.
    The layout must not have sequence parallel."""
    x, _ = op.layers(params["layers"], embed(cfg, op, params, tokens), rows_of(cfg, op, positions, segment_ids, None))
    return ops.cast(final_norm(op, params, last_rows(op, x, last)), ms.float32)


def logits_of_last(cfg, op, params, tokens, positions, segment_ids, last):
    """As states_of_last, but -> logits_BV float32 of the full vocabulary."""
    x, _ = op.layers(params["layers"], embed(cfg, op, params, tokens), rows_of(cfg, op, positions, segment_ids, None))
    return full_logits(cfg, op, params, last_rows(op, x, last))


def extend_cache(cfg, op, params, cache, tokens, positions, last):
    """tokens_BS at positions_BS -> (logits_BV after column last_B of each row, cache).

    cache: for each layer (k_BTKH, v_BTKH); slot t of a row stores position t. Tokens at positions T and later are not stored. The layout
    must not have sequence parallel. B counts a data rank's rows and K its kv heads. Every rank returns the logits of the full vocabulary;
    each shard of them is computed by one rank and all-gathered, so all ranks have the same bits.
    """
    x, rows = embed(cfg, op, params, tokens), rows_over_cache(op, cache, positions)
    x, cache = layers_over_cache(cfg, op, params["layers"], range(cfg.num_layers), x, cache, rows, positions.shape[1] == 1)
    return full_logits(cfg, op, params, last_rows(op, x, last)), cache


def extend_paged_cache(cfg, op, params, cache, table, tokens, positions, row, last, adapters=None):
    """Reads tokens_R at positions_R of some rows into their pages. Returns (logits float32, cache).

    table_BM: the pages of each row, see ops/paged_attention.py; a token for which its row has no page is not stored. row_R, last_B: the
    row of each token, and for each row the number, in R, of the token whose logits are wanted: [B, V]. last None: those of all tokens are,
    [R, V]. Both None: token b is the only one of row b. adapters [B, rank] or None: which of several adapters each row has, see
    qwen3/adapters.py.
    """
    tokens, positions = rearrange(tokens, "tokens -> tokens 1", {}), rearrange(positions, "tokens -> tokens 1", {})
    x, rows = embed(cfg, op, params, tokens), rows_over_pages(op, cache, table, positions, row, adapters)
    x, cache = layers_over_cache(cfg, op, params["layers"], range(cfg.num_layers), x, cache, rows, row is None, last)
    return full_logits(cfg, op, params, x), cache


def layers_over_cache(cfg, op, layers, numbers, x, cache, rows, one_each, last=None):
    """Runs some layers over their cache: x_RD -> x_RD, cache. numbers: the layers' numbers in the model. layers[i], cache[i]: the
    parameters and the cache of layer numbers[i]. rows: see rows_over_cache and rows_over_pages. one_each: each row has one token.

    last_B: over pages, the numbers of the tokens whose x_BD is returned, or None for all. In the last of these layers the others are only
    written into the cache."""
    updated = ()
    for i in range(len(numbers)):
        if last is not None and i == len(numbers) - 1:
            rows["last"] = last
            if "adapters" in rows:
                rows["last_adapters"] = ops.gather(rows["adapters"], last, 0)
        p, own = op.gathered[numbers[i]](layers[i]), op.of_layer[numbers[i]]
        if own.fused_decode and one_each:
            x, kv = decode_layer(own.cfg, own, p, x, rows, cache[i])
        else:
            x, _, kv = layer(own.cfg, own, p, x, rows, cache[i])
        updated += (kv,)
    return x, updated


def layer(cfg, op, p, x, rows, cache):
    """Runs one layer: x_RD -> x_RD, router statistics, cache (None in training). rows: see rows_of."""
    if lora.DROPOUT_LAYER in p:
        rows["layer"] = p[lora.DROPOUT_LAYER]
    y, cache = attention(cfg, op, p["attention"], attention_input(cfg, op, p, x), rows, cache)
    if "last" in rows:
        x, rows["valid"] = ops.gather(x, rows["last"], 0), ops.gather(rows["valid"], rows["last"], 0)
    x, stats = finish_layer(cfg, op, p, x, y, rows)
    return x, stats, cache


def attention_input(cfg, op, p, x):
    """Returns the input of attention: the residual stream x_RD, or its norm."""
    if cfg.norm_placement == "post":
        return x
    return op.rms_norm(x, p["attention_norm"], "rows embed, embed -> rows embed")


def finish_layer(cfg, op, p, x, y, rows):
    """Adds y_RD, the output of attention, to the residual stream x_RD, then runs the feed-forward layer -> x_RD, router statistics."""
    start = x
    x, h = add_attention(cfg, op, p, x, y)
    if "moe" in p:
        y, stats = moe.moe(cfg, op, p["moe"], h, rows)
    else:
        y, stats = mlp.mlp(cfg, op, p["mlp"], h, rows), NO_STATS
    x = add_ffn(cfg, op, p, x, y)
    if op.watch is not None:
        stats = op.watch(cfg, op, p, start, h, x, rows)
    return x, stats


def add_attention(cfg, op, p, x, y):
    """Adds y_RD, the output of attention, to the residual stream x_RD. Returns x_RD and the input of the feed-forward layer."""
    if cfg.norm_placement != "pre":
        y = op.rms_norm(y, p["attention_out_norm"], "rows embed, embed -> rows embed")
    if cfg.norm_placement == "post":
        x = op.add(x, y, "rows embed")
        return x, x
    return op.add_rms_norm(x, y, p["mlp_norm"], "rows embed, rows embed, embed -> rows embed, rows embed")


def add_ffn(cfg, op, p, x, y):
    """Adds y_RD, the output of the feed-forward layer, to the residual stream x_RD."""
    if cfg.norm_placement != "pre":
        y = op.rms_norm(y, p["mlp_out_norm"], "rows embed, embed -> rows embed")
    return op.add(x, y, "rows embed")


def decode_layer(cfg, op, p, x, rows, cache):
    """Computes `layer` over a cache in fused ops, for one token per row on one device: x_BD -> x_BD, cache."""
    x, cache = attention_layer.decode(op, p["attention_norm"], p["attention"], x, rows, cache)
    if "mlp" in p:
        return mlp.decode(op, p["mlp_norm"], p["mlp"], x), cache
    y, _ = moe.moe(cfg, op, p["moe"], op.rms_norm(x, p["mlp_norm"], "rows embed, embed -> rows embed"), rows)
    return add_ffn(cfg, op, p, x, y), cache


def embed(cfg, op, params, tokens):
    """tokens_BS -> x_RD in the compute dtype."""
    ids = rearrange(tokens, "batch seq -> (batch seq)", {})
    x = op.embedding(op.gathered_table(params["embed"]), ids, "vocab embed, tokens -> tokens>rows embed")
    return lora.adapted_embedding(cfg, op, params, ids, ops.cast(x, op.dtype))


def head_table(cfg, op, params):
    """Returns the matrix [V, D] of the head: the embedding's if they are tied."""
    return op.gathered_table(params["embed"] if cfg.tie_embeddings else params["lm_head"])


def final_norm(op, params, x):
    return op.rms_norm(x, op.gathered_norm(params["final_norm"]), "rows embed, embed -> rows embed")


def head(cfg, op, params, x):
    """x_RD -> logits_RV float32. If the vocabulary is sharded, V counts this rank's shard."""
    return op.head(final_norm(op, params, x), head_table(cfg, op, params), "rows>tokens embed, vocab embed -> tokens vocab")


def full_logits(cfg, op, params, x):
    """x_RD -> logits_RV of the full vocabulary, on every rank."""
    found = head(cfg, op, params, x)
    return found if op.vocab_shards == 1 else op.whole_vocab(found, "tokens vocab>whole_vocab -> tokens whole_vocab")


def scores(cfg, op, params, x):
    """x_RD -> [R, num_labels] float32: the scores after each token, of a model with labels."""
    return op.router(final_norm(op, params, x), op.gathered_score(params["score"]), "rows>tokens embed, embed one -> tokens one")


def nats_and_gap(cfg, op, params, x, targets):
    """x_RD, targets_BS -> (nats, gap), both [R, 1]. See score_targets."""
    return loss.of_states(op, final_norm(op, params, x), head_table(cfg, op, params), targets)


def rows_of(cfg, op, positions, segment_ids, noise):
    """positions_BS, segment_ids_BS, noise_BS or None -> the dict `rows` that every layer takes beside x_RD.

    cos, sin [B, S, 1, H / 2]: of the rotary embedding. segments, order [B, T]: the document of each key, and its place in the row.
    documents, in their place for attention by the lengths of documents: see BoundOps.documents. valid
    [R], for MoE: 1 for tokens, 0 for padding. noise_rows [R], noise_tokens: the dropout seeds that the adapters need, sharded as "rows" or
    as "tokens". layer, added by `layer`: its number, which dropout needs.
    """
    cos, sin = op.angles(positions, "batch seq -> batch seq one half, batch seq one half")
    segments = segment_ids if op.seq_shards == 1 else op.gather_seq(segment_ids, "batch seq>keys -> batch keys")
    rows = {"cos": cos, "sin": sin, "segments": segments, "order": op.token_order(segments, "batch keys -> batch keys")}
    if op.by_lengths:
        rows["documents"] = op.documents(segments, "batch keys -> batch documents")
    if cfg.moe_layers:
        rows["valid"] = op.is_token(rearrange(segment_ids, "batch seq -> (batch seq)", {}), "tokens -> tokens>rows")
    if "rows" in op.noises:
        rows["noise_rows"] = op.move(rearrange(noise, "batch seq -> (batch seq)", {}), "tokens -> tokens>rows")
    if "tokens" in op.noises:
        rows["noise_tokens"] = rearrange(noise, "batch seq -> (batch seq)", {})
    return rows


def rows_over_cache(op, cache, positions):
    """Returns the dict `rows` for attention over a cache. Each row is one document. It has three more entries: slots [B, T], the numbers of
    the cache slots, key_segments [B, T], all 1, and for fused decoding table [B, 1]: the cache as one of pages, of which a row has one."""
    cos, sin = op.angles(positions, "batch seq -> batch seq one half, batch seq one half")
    ones, slots = ops.ones_like(positions), rearrange(op.iota(cache[0][0].shape[1]), "slots -> 1 slots", {})
    slots = ops.tile(slots, (positions.shape[0], 1))
    valid = ops.cast(rearrange(ones, "batch seq -> (batch seq)", {}), ms.float32)
    rows = {"cos": cos, "sin": sin, "segments": ones, "order": positions, "slots": slots, "valid": valid}
    rows["key_segments"] = ops.ones_like(slots)
    rows["table"] = rearrange(op.iota(positions.shape[0]), "batch -> batch 1", {})
    return rows


def rows_over_pages(op, cache, table, positions, row, adapters=None):
    """Returns the dict `rows` for attention over pages, of tokens at positions [R, 1].

    cos, sin [R, 1, 1, H / 2], valid [R]: see rows_of. table_BM. order: the positions. slot_R: where each token is stored, -1 for one that
    is not. For one token of each row (row=None) length_R: how many tokens the row then has. Else row_R and position_R, negative for a
    token that is not stored. See ops/paged_attention.py. adapters [R, rank], if there are several: see qwen3/adapters.py.
    """
    cos, sin = op.angles(positions, "batch seq -> batch seq one half, batch seq one half")
    position = rearrange(positions, "tokens 1 -> tokens", {})
    of_token = table if row is None else ops.gather(table, row, 0)
    slot, length = op.places_in_pages(of_token, position, cache[0][0].shape[1])
    valid = ops.cast(ops.ones_like(position), ms.float32)
    rows = {"cos": cos, "sin": sin, "valid": valid, "table": table, "order": positions, "slot": slot}
    if adapters is not None:
        rows["adapters"] = adapters if row is None else ops.gather(adapters, row, 0)
    if row is None:
        rows["length"] = length
    else:
        rows["row"], rows["position"] = row, length - 1
    return rows


def default_positions(op, tokens):
    """Returns positions [B, S]: 0, 1, ... S - 1 in every row."""
    if op.seq_shards > 1:
        raise ValueError("forward: positions=None cannot be used with sharded rows; pass them, cut by parallel.context.split.cut")
    B, S = tokens.shape
    return ops.tile(rearrange(op.iota(S), "seq -> 1 seq", {}), (B, 1))


def last_rows(op, x, last):
    """x_RD, last_B -> x_BD: selects in each of the B batch rows the token in column last_B."""
    B = last.shape[0]
    return x if x.shape[0] == B else ops.gather(x, op.iota(B) * (x.shape[0] // B) + last, 0)


# The model in a layout


class Model:
    """The functions of a model with cfg and op bound. See `build`."""

    def __init__(self, cfg, op):
        self.cfg, self.op = cfg, op

    def forward(self, params, tokens, positions=None, segment_ids=None):
        return logits(self.cfg, self.op, params, tokens, positions, segment_ids)

    def loss_fn(self, params, batch):
        return loss_of_batch(self.cfg, self.op, params, batch)

    def score(self, params, tokens, targets, positions, segment_ids):
        return score_targets(self.cfg, self.op, params, tokens, targets, positions, segment_ids)

    def last_states(self, params, tokens, positions, segment_ids, last):
        return states_of_last(self.cfg, self.op, params, tokens, positions, segment_ids, last)

    def last_logits(self, params, tokens, positions, segment_ids, last):
        return logits_of_last(self.cfg, self.op, params, tokens, positions, segment_ids, last)

    def extend(self, params, cache, tokens, positions, last):
        return extend_cache(self.cfg, self.op, params, cache, tokens, positions, last)

    def extend_pages(self, params, cache, table, tokens, positions, row, last, adapters=None):
        return extend_paged_cache(self.cfg, self.op, params, cache, table, tokens, positions, row, last, adapters)


@functools.lru_cache(maxsize=32)
def build(cfg, sharding=None, scan=False, kernels=None, recompute="none", loss_chunks=1, rows_alone=False):
    """Returns the Model in a layout, by default on one device.

    scan: the layers run in a loop, and `params["layers"]` is one tree of stacked arrays [L, ...] instead of a list.
    kernels: the implementations of ops, an ops.registry.Kernels; default: the fastest on this device.
    recompute: which activations of a layer the backward pass computes again instead of storing them: none, full or attention.
    loss_chunks: the number of chunks of the vocabulary in which the head and the loss are computed; 0: chosen here. See ops/head_loss.py.
    rows_alone: for inference: a token's matrix products have the same bits in any batch, see ops/rows_matmul.py.
    """
    device = ms.get_context("device_target")
    check_compute_dtype(cfg, device)
    if recompute == "attention" and drops(cfg):
        raise ValueError(f"train.recompute=attention with lora.dropout={cfg.lora.dropout} is not supported; use train.recompute=full")
    sharding = sharding or Sharding()
    if device == "CPU":
        loss_chunks = loss_chunks or 1  # the kernel of head_loss keeps the logits once, and does not compute them twice
    op = BoundOps(cfg, sharding, kernels or choose_kernels({}, cfg, sharding), loss_chunks=loss_chunks, rows_alone=rows_alone)
    run_layers.bind(cfg, op, (layer, attention_input, finish_layer), param_specs(cfg)["layers"], scan, recompute)
    return Model(cfg, op)


def choose_kernels(asked, cfg, sharding=None):
    """Returns the implementations of ops, an ops.registry.Kernels, for a model on this device in a layout. asked: see
    ops.registry.choose."""
    configs = {cfg, *(cfg.at_layer(i) for i in range(cfg.num_layers))}
    needed = {(name, option) for config in configs for name, options in options_of(config).items() for option in options}
    more = {"head_dim": cfg.head_dim, "router_bias": cfg.router_bias, "options": tuple(sorted(needed))}
    if sharding:
        more.update(expert_shards=sharding.shards("experts"), spans=sharding.shards("span"), documents=sharding.documents)
    return registry.choose(asked, ms.get_context("device_target"), cfg.compute_dtype, **more)


def drops(cfg):
    """Returns whether the model has dropout. Then loss_fn needs batch["noise"], int32 [B, S], the dropout seed of each token."""
    return bool(lora.noises(cfg))


def metric_names(cfg):
    """Returns the keys of loss_fn's metrics."""
    return ("loss", "tokens") + (("router_loss", "router_z_loss", "expert_load", "expert_overflow") if cfg.moe_layers else ())


def stacked_specs(cfg):
    """Returns param_specs with the specs of one layer in place of the list of layers: the tree structure of parameters for
    build(scan=True)."""
    return {**param_specs(cfg), "layers": layer_specs(cfg, 0)}
