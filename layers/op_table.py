"""The table of a model's ops. A line has everything that an op needs except its signature: kernel, kind, casts and so on.

To add an op, add a line here and call it as op.bound(name, dims)(operands). A method of BoundOps (layers/bound_ops.py) that names the
operands allows the shorter op.name(operands, dims).

Each kind of layer has its own table, made from cfg.at_layer(i), so a line may read an option that differs by layer.

Weights are cast to the dtype of the activations inside the op. So their gradients are summed over ranks in the dtype of the weights.
"""

from dataclasses import fields
from typing import NamedTuple

import mindspore as ms
from mindspore import ops

from layers import embed, lora, moe, rope
from ops import attention, head_loss
from ops import iota as iota_op
from ops.identity import identity
from ops.registry import check_options, pick
from parallel.context import ring
from parallel.context import split as context
from parallel.mesh import ONE_DEVICE

cast = ops.Cast()


class Definition(NamedTuple):
    """One op. make() returns the function that computes it. The other fields are the arguments of Sharding.op with these names.

    signature: None, or a function of the signature at the call that returns that of the op.
    """

    make: object
    kind: str
    wrap: object = None
    part: tuple = None
    reduce: str = "sum"
    dtype: object = None
    around: tuple = None
    signature: object = None


class Region(NamedTuple):
    """Several ops that MindSpore's partitioner sees as one op. make(cfg, op) returns the function that calls the ops of `op`. See
    Sharding.region."""

    make: object
    dtype: object = None


def definitions(cfg, sharding, kernels, loss_chunks, rows_alone=False):
    """Returns {name: Definition or Region} for a model in a layout, with the implementations `kernels`. loss_chunks, rows_alone: see
    BoundOps."""

    more = options_of(cfg)

    def of(op, function="", *args, **options):
        if own := more.get(op, {}):
            check_options(kernels, op, function, own)
        return lambda: pick(kernels, op, function)(*args, **options, **own)

    def over_pages(function):
        """Attention over pages. It needs the options of `attention`, and a model whose kernels lack one is refused when it is read."""

        def make():
            check_options(kernels, "paged_attention", function, more.get("attention", {}))
            return pick(kernels, "paged_attention", function)(scale, **more.get("attention", {}))

        return make

    product = of("rows_matmul" if rows_alone else "matmul")
    eps, scale, k = cfg.rms_norm_eps, cfg.head_dim**-0.5, cfg.experts_per_token
    V, choice = cfg.vocab_size, (None, ms.int32, None)
    last = start_of_last_shard(V, sharding.shards("vocab"))
    return {
        # Matrix products and sums of the residual stream
        "matmul": Definition(product, "contraction", weight_in_dtype_of_x),
        "matmul_int8": Definition(of("matmul", "int8"), "contraction", signature=with_scale_turned),
        "router": Definition(product, "contraction", in_float32),
        "add": Definition(ops.Add, "elementwise"),
        "add_bias": Definition(ops.Add, "kernel", weight_in_dtype_of_x),
        # Norms, activations, rotary embedding
        "rms_norm": Definition(of("rms_norm", "", eps), "kernel", weight_in_dtype_of_x),
        "add_rms_norm": Definition(of("rms_norm", "add", eps), "kernel", weight_after_two_in_their_dtype),
        "glu": Definition(of("swiglu"), "elementwise"),
        "angles": Definition(lambda: rope.angles(cfg), "kernel", dtype=ms.float32),
        "rope": Definition(of("rope"), "kernel"),
        "norm_rope": Definition(of("rope", "norm", eps), "kernel", weight_in_dtype_of_x_before_angles),
        # Attention
        "attention": _attention(sharding, of, scale),
        "documents": Definition(lambda: ring.lengths(sharding, "span"), "kernel", dtype=ms.int32),
        "attention_over_cache": Definition(of("attention", "", scale), "kernel"),
        "cache_write": Definition(of("cache_write"), "kernel"),
        "paged_attention": Definition(over_pages(""), "kernel"),
        "packed_attention": Definition(over_pages("packed"), "kernel"),
        "paged_write": Definition(of("paged_write"), "kernel"),
        "largest_logits": Definition(lambda: attention.largest_logits(scale, **more.get("attention", {})), "kernel", dtype=ms.float32),
        # Tokens and documents
        "embedding": Definition(
            of("embedding"), "contraction", embed.lookup, ("vocab", V, embed.lookup_in_shard(kernels)), dtype=ms.float32
        ),
        "embedding_int8": Definition(
            of("embedding", "int8"),
            "contraction",
            part=("vocab", V, embed.lookup_int8_in_shard(kernels)),
            dtype=ms.float32,
            signature=with_scale_of_table,
        ),
        "gather_seq": Definition(lambda: identity, "kernel"),
        "token_order": Definition(lambda: token_order(sharding.mesh.size(sharding.rules["span"])), "kernel"),
        "is_token": Definition(lambda: is_token, "kernel", dtype=ms.float32),
        "move": Definition(lambda: unchanged_integers, "kernel"),
        # The head and the loss
        "head": Definition(
            of("rows_matmul" if rows_alone else "matmul", transpose_b=True),
            "contraction",
            embed.project,
            ("vocab", V, embed.project_to_shard(V, last)),
            dtype=ms.float32,
        ),
        "head_int8": Definition(
            of("matmul", "int8"),
            "contraction",
            embed.project_int8,
            ("vocab", V, embed.project_int8_to_shard(V, last)),
            dtype=ms.float32,
            signature=with_scale,
        ),
        "whole_vocab": Definition(lambda: embed.without_padding(V), "kernel"),
        "cross_entropy": Definition(of("cross_entropy"), "kernel", from_first_token, ("vocab", V, from_token), dtype=ms.float32),
        "head_loss": _head_loss(of, loss_chunks, V, last),
        "sub": Definition(ops.Sub, "kernel"),
        "mul": Definition(ops.Mul, "elementwise"),
        "exp": Definition(ops.Exp, "elementwise"),
        "log1p": Definition(ops.Log1p, "elementwise"),
        "ones_like": Definition(ops.OnesLike, "elementwise"),
        "largest": Definition(lambda: ops.ReduceMax(keep_dims=True), "reduction", over_dim_1, reduce="max"),
        "largest_of_all": Definition(ops.ReduceMax, "reduction", over_3_dims, reduce="max"),
        "sum_columns": Definition(lambda: ops.ReduceSum(keep_dims=True), "reduction", over_dim_1),
        "sum_seq": Definition(ops.ReduceSum, "reduction", over_dim_1),
        "sum": Definition(ops.ReduceSum, "reduction", over_2_dims),
        "count": Definition(ops.ReduceSum, "reduction", over_dim_0),
        "sum_squares": Definition(lambda: sum_squares, "contraction"),
        "concat": Definition(lambda: ops.Concat(0), "kernel", of_two),
        # Mixture of experts
        "top_k": Definition(of("routing", "top_k", k, cfg.norm_topk_prob), "kernel", dtype=choice),
        "biased_top_k": Region(moe.biased_top_k_of, dtype=choice),
        "bias_gradient": Definition(moe.BiasGradient, "kernel"),
        "router_stats": Definition(lambda: moe.statistics(cfg.num_experts), "contraction", dtype=ms.float32),
        "router_losses": Definition(lambda: moe.losses_of_stats(cfg), "kernel"),
        "router_entropy": Definition(lambda: moe.entropy_of_logits, "contraction", dtype=ms.float32),
        "experts": Region(moe.experts_of, dtype=(None, ms.float32)),
        **_expert_ops(cfg, sharding, kernels, of),
        **{f"dropout_{name}": Definition(*found) for name, found in lora.dropouts(cfg).items()},
    }


def options_of(cfg):
    """Returns {op: {option: value}}: further arguments for the factories of ops (ops/OP.py), for options that only some models have.

    An implementation that does not take such an option is not chosen by default, and choosing it by name is an error. Likewise a ring of
    ranks is an error if attention over a part of the keys does not take the option. For example, for a config field `window` that
    ops/attention.py implements:

        return {"attention": {"window": cfg.window}} if cfg.window else {}
    """
    return {}


def _attention(sharding, of, scale):
    """Returns the Definition of attention within a row. If ranks share a row in a ring, keys and values travel around it
    (parallel/context/ring.py). With sharding.documents it takes the lengths of documents instead of segments and order."""
    by_lengths, around = sharding.documents, ("span", (1, 2))
    if sharding.shards("span") == 1:
        if by_lengths:
            return Definition(of("attention", "packed", scale), "kernel")
        return Definition(of("attention", "", scale, in_order=True), "kernel", keys_of_the_queries)
    if by_lengths:
        spans = of("attention", "spans", scale)
        return Definition(lambda: ring.attention_by_lengths(sharding, spans(), "span"), "kernel", around=around)
    over_some_keys = of("attention", "parts", scale)
    return Definition(lambda: ring.attention(sharding, over_some_keys(), "span"), "kernel", around=around)


def start_of_last_shard(size, shards):
    """Returns the index of the first element of the last of `shards` shards of a dim. Shards have equal sizes, with padding behind."""
    return (shards - 1) * -(-size // shards)


def _head_loss(of, chunks, vocab_size, last):
    """Returns the Definition of the head and the terms of cross-entropy in one op. chunks: see BoundOps. last: see head_loss.chunked."""
    if chunks == 1:
        return Definition(of("head_loss"), "kernel", weight_in_dtype_of_x_before_integers, dtype=ms.float32)
    project, measure = of("matmul", transpose_b=True), of("cross_entropy")

    def make():
        return head_loss.chunked(chunks, project(), measure(), vocab_size, last)

    return Definition(make, "kernel", in_chunks, ("vocab", vocab_size, in_chunks_from), dtype=ms.float32)


def _expert_ops(cfg, sharding, kernels, of):
    """Returns the ops inside the Region `experts`."""
    if not cfg.num_experts:
        return {}
    E, shards, block = cfg.num_experts, sharding.shards("experts"), pick(kernels, "grouped_matmul", "block")(cfg.moe_block_size)
    return {
        "grouped_matmul": Definition(of("grouped_matmul"), "kernel", weight_in_dtype_of_x_before_integers),
        "grouped_matmul_int8": Definition(of("grouped_matmul", "int8"), "kernel", signature=with_scale_turned),
        "permute": Definition(of("routing", "permute", E, block), "kernel"),
        "combine": Definition(of("routing", "combine"), "contraction"),
        "send_plan": Definition(of("routing", "send_plan", E, shards, cfg.moe_capacity_factor), "kernel"),
        "plan_received": Definition(of("routing", "plan", E // shards, block, empty=True), "kernel", moe.plan_of_shards),
        "take": Definition(of("routing", "take"), "kernel"),
        "count_lost": Definition(ops.ReduceSum, "reduction", over_2_dims),
    }


def sizes(cfg, sharding):
    """Returns {dim: size} of the dims that only results have and no operand."""
    found = {"half": cfg.head_dim // 2, "vocab_parts": sharding.shards("vocab"), "whole_vocab": cfg.vocab_size}
    if sharding.documents:
        found["documents"] = ring.count_lengths(sharding, "span")
    if cfg.num_experts:
        E = cfg.num_experts
        found.update(choice=cfg.experts_per_token, router_stats=2 * E + 2, router=E)
    return found


# Config fields that may have any value with the fused ops of decoding: the ops implement them, or do not depend on them.
IN_FUSED_OPS = (
    *("model_type", "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "rms_norm_eps"),
    *("max_position", "rope_theta", "rope_scaling", "param_dtype", "compute_dtype", "tie_embeddings", "initializer_range", "frozen"),
    "frozen_dtype",
    "mup_base_width",
    "num_labels",
    *("num_experts", "experts_per_token", "moe_ffn_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"),
    *("router_aux_coef", "router_z_coef", "router_bias", "moe_block_size", "moe_capacity_factor", "bos_id", "eos_id", "pad_id"),
)


def decodes_in_fused_ops(cfg, sharding, kernels):
    """Returns whether decoding runs each layer as two fused ops, decode_attention and decode_mlp.

    They need one device, because a layer on several ranks has collectives inside. They implement only Qwen3's layer, so every config field
    outside of IN_FUSED_OPS must have its default. With sharding.check, the annotated ops run instead, because these are to be checked.
    """
    plain = all(getattr(cfg, field.name) == field.default for field in fields(cfg) if field.name not in IN_FUSED_OPS)
    one_device = sharding.mesh == ONE_DEVICE and sharding.lowering == "manual" and not sharding.check
    chosen = "reference" not in (kernels.decode_attention, kernels.decode_mlp)
    return one_device and chosen and plain


# Signatures of ops with a matrix in 8 bits (ops/int8.py), from those of the ops with a float matrix. The scale of a matrix is the last
# operand. Its dims have the names of the matrix' dims, as it is sharded like the matrix; along the input dim it counts groups.


def with_scale(dims, weight=1):
    """Returns the signature with the dims of operand number `weight` once more, at the end of the operands."""
    operands, arrow, results = dims.partition(" -> ")
    return f"{operands}, {operands.split(', ')[weight]}{arrow}{results}"


def with_scale_of_table(dims):
    """Returns with_scale for a table of rows, which is the first operand."""
    return with_scale(dims, 0)


def with_scale_turned(dims):
    """Returns with_scale for a matrix, operand 1, whose last two dims are stored in the other order: output first."""
    operands, arrow, results = dims.partition(" -> ")
    x, w, *rest = operands.split(", ")
    *lead, inputs, outputs = w.split()
    return with_scale(", ".join([x, " ".join([*lead, outputs, inputs]), *rest]) + arrow + results)


# Wrappers of primitives and kernels. Each returns a function with a fixed number of operands, which MindSpore requires of a function that
# is made while a graph is compiled (docs/mindspore.md).


def weight_in_dtype_of_x(fn):
    def with_cast(x, w):
        return fn(x, cast(w, x.dtype))

    return with_cast


def in_float32(fn):
    def with_cast(x, w):
        return fn(cast(x, ms.float32), cast(w, ms.float32))

    return with_cast


def weight_after_two_in_their_dtype(fn):
    def with_cast(x, y, w):
        return fn(x, y, cast(w, x.dtype))

    return with_cast


def weight_in_dtype_of_x_before_angles(fn):
    def with_cast(x, w, cos, sin):
        return fn(x, cast(w, x.dtype), cos, sin)

    return with_cast


def weight_in_dtype_of_x_before_integers(fn):
    def with_cast(x, w, integers):
        return fn(x, cast(w, x.dtype), integers)

    return with_cast


def in_chunks(make):
    """head_loss over chunks of the full vocabulary."""
    return make(0)


def in_chunks_from(make, first):
    """head_loss over chunks of the vocabulary shard that starts at token id `first`."""
    return make(first)


def keys_of_the_queries(attend):
    """Attention whose queries and keys are the same tokens."""

    def self_attention(q, k, v, segments, order):
        return attend(q, k, v, segments, segments, order, order)

    return self_attention


def from_first_token(measure):
    """cross_entropy over the full vocabulary."""

    def of_all(logits, targets):
        return measure(0, logits, targets)

    return of_all


def from_token(measure, first):
    """cross_entropy over the vocabulary shard that starts at token id `first`."""

    def of_shard(logits, targets):
        return measure(first, logits, targets)

    return of_shard


def over_dim_0(reduce):
    def reduced(x):
        return reduce(x, 0)

    return reduced


def over_dim_1(reduce):
    def reduced(x):
        return reduce(x, 1)

    return reduced


def over_2_dims(reduce):
    def reduced(x):
        return reduce(x, (0, 1))

    return reduced


def over_3_dims(reduce):
    def reduced(x):
        return reduce(x, (0, 1, 2))

    return reduced


def of_two(concat):
    def joined(x, y):
        return concat((x, y))

    return joined


def token_order(ring_size):
    """Returns order(segments_BT) -> int32 [B, T], the place of each token in its row.

    ring_size: the number of ranks in a ring. In a ring the tokens of a row are stored in another order (parallel/context/split.py).
    """
    count, zeros_like = iota_op.reference(), ops.ZerosLike()
    if ring_size > 1:
        count = ops.constexpr(lambda length: ms.Tensor(context.order(length, ring_size)), name=f"order_of_ring_{ring_size}")

    def order(segments):
        return zeros_like(segments) + count(segments.shape[1])

    return order


_greater, _total = ops.Greater(), ops.ReduceSum()


def is_token(segment_ids):
    return cast(_greater(segment_ids, 0), ms.float32)


def unchanged_integers(x):
    return x + 0


def sum_squares(x, valid):
    """The sum of squares over the rows of x_RD where valid_R is 1, in float32."""
    x = cast(x, valid.dtype)
    return _total(_total(x * x, 1) * valid, 0)
