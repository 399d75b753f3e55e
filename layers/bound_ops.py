"""The ops of a model in a layout, with their kernels. Each call has a signature:

    q = op.matmul(x, p["wq"], "rows>tokens embed, embed heads -> tokens heads")

Each method of BoundOps is one op. Its last argument is the signature: the logical dims of the operands and of the results. The collectives
around the op follow from the signature (parallel/sharding.py). The rest of an op's definition, such as its kernel, its kind and its casts,
is in one table, layers/op_table.py. Each pair of op and signature is bound once, while a graph is compiled; in eager mode at the first
call.

op.bound("matmul", dims)(x, w) equals op.matmul(x, w, dims). Use this form for an op that is in the table and has no method.
"""

import functools
import itertools

import mindspore as ms
from mindspore import ops

from layers import embed, lora, norm
from layers.op_table import Region, decodes_in_fused_ops, definitions, sizes
from ops import iota
from ops.int8 import is_int8
from ops.pages import slots_and_lengths
from ops.registry import pick
from parallel import zero

_numbers = itertools.count()  # MindSpore stores the results of a constexpr under its name, so each object needs a unique name


class BoundOps:
    """The ops of the model `cfg` in the layout `sharding`, with the implementations `kernels` (an ops.registry.Kernels).

    A layer takes this object as `op`, beside `cfg`. Both are constants while a graph is compiled, so an `if` on their attributes costs
    nothing at run time.

    layers: f(parameters of the layers, x_RD, rows) -> x_RD, statistics. It runs all layers; set by qwen3/run_layers.py.
    run: for each layer f(stored parameters, x_RD, rows) -> x_RD, statistics; set by qwen3/run_layers.py.
    of_layer: for each layer its BoundOps, whose `cfg` is the config of that layer; set by qwen3/run_layers.py.
    gathered: for each layer f(stored parameters) -> the parameters for the ops, all-gathered under ZeRO 3; set by qwen3/run_layers.py.
    gathered_table, gathered_norm, gathered_adapter, gathered_score: such functions for the matrix of the embedding or head, for the last
    norm, for the embedding's adapter, and for the head of a model with labels.
    watch: None, or f(cfg, op, p, x_RD, h_RD, y_RD, rows) -> [n] float32, which a layer calls with its input x, the input h of its
    feed-forward layer and its output y. The layer then returns the result instead of its router statistics. See qwen3/probe.py.
    by_lengths: whether attention takes the lengths of documents (`documents`) instead of segments and order.
    ranks_a_head: the number of ranks in the all-to-all around attention, among which a rank's kv heads are divided.
    has_regions: whether `experts` and `biased_top_k` must be called as one op each, a Region.
    inside: the BoundOps for the ops inside a Region.
    fused_decode: whether decoding runs each layer as two fused ops, decode_attention and decode_mlp.
    loss_chunks: the number of chunks of the vocabulary in which head_loss computes the head and the loss; 0: as many as limit the memory of
    their logits. 1: no chunks.
    fused_head: whether head_loss replaces head and cross_entropy.
    rows_alone: for inference: in matrix products, a row has the same bits whatever rows are beside it (ops/rows_matmul.py).
    """

    def __init__(self, cfg, sharding, kernels, watch=None, loss_chunks=1, rows_alone=False):
        self.cfg, self.sharding, self.kernels, self.watch = cfg, sharding, kernels, watch
        self.layers, self.run, self.of_layer, self.gathered = None, (), (), ()  # set by qwen3/run_layers.py
        self.dtype, self.noises = getattr(ms, cfg.compute_dtype), lora.noises(cfg)
        self.seq_shards, self.vocab_shards, self.expert_shards = map(sharding.shards, ("seq", "vocab", "experts"))
        self.by_lengths = sharding.documents > 0
        self.ranks_a_head = sharding.mesh.size(sharding.rules["span_heads"]) // sharding.mesh.size(sharding.rules["heads"])
        self.has_regions = sharding.lowering == "shard" or (sharding.check and not cfg.lora)
        self.loss_chunks, self.rows_alone = loss_chunks, rows_alone
        self.fused_head = loss_chunks != 1 or (kernels.head_loss != "reference" and self.vocab_shards == 1)
        self.fused_decode = decodes_in_fused_ops(cfg, sharding, kernels)
        if self.fused_decode:
            self.decode_attention = pick(kernels, "decode_attention")(cfg.rms_norm_eps, cfg.head_dim**-0.5)
            self.decode_mlp = pick(kernels, "decode_mlp")(cfg.rms_norm_eps)
            self.decode_attention_int8 = pick(kernels, "decode_attention", "int8")(cfg.rms_norm_eps, cfg.head_dim**-0.5)
            self.decode_mlp_int8 = pick(kernels, "decode_mlp", "int8")(cfg.rms_norm_eps)
        if cfg.router_bias:
            self.top_k_by_bias = pick(kernels, "routing", "top_k")(cfg.experts_per_token, cfg.norm_topk_prob, biased=True)
        if cfg.lora and "embed" in cfg.lora.targets:
            adapter = lora.specs(cfg, {"embed": embed.specs(cfg)}, lora.EMBED)["lora"]
            self.gathered_adapter = zero.gathered(sharding, adapter)
        self.iota, self.places_in_pages = iota.reference(), slots_and_lengths()
        self.gathered_table, self.gathered_norm = (zero.gathered(sharding, specs(cfg)) for specs in (embed.specs, norm.specs))
        if cfg.num_labels:
            self.gathered_score = zero.gathered(sharding, embed.score_specs(cfg))
        self.definitions, self.sizes = definitions(cfg, sharding, kernels, loss_chunks, rows_alone), sizes(cfg, sharding)
        self.bound = ops.constexpr(functools.lru_cache(maxsize=None)(self._bind), name=f"bound_op_{next(_numbers)}")
        inner = sharding.inside()
        self.inside = self if inner is sharding else BoundOps(cfg, inner, kernels, loss_chunks=loss_chunks, rows_alone=rows_alone)

    def at(self, cfg):
        """Returns the BoundOps for layers with the config `cfg`, in the same layout and with the same kernels."""
        return self if cfg == self.cfg else BoundOps(cfg, self.sharding, self.kernels, self.watch, self.loss_chunks, self.rows_alone)

    def _bind(self, name, dims):
        """Returns the function of the op `name` with the signature `dims`. If `dims` is a tuple, the function runs several ops, see
        matmuls."""
        found, sizes = self.definitions[name], self.sizes
        if isinstance(found, Region):
            return self.sharding.region(found.make(self.cfg, self.inside), dims, sizes=sizes, dtype=found.dtype)
        if isinstance(dims, tuple):
            return self.sharding.fan(found.make, dims[0], dims[1:], kind=found.kind, wrap=found.wrap)
        if found.signature:
            dims = found.signature(dims)
        options = {key: getattr(found, key) for key in ("kind", "wrap", "part", "reduce", "dtype", "around")}
        return self.sharding.op(found.make(), dims, sizes=sizes, **options)

    # Matrix products and sums of the residual stream

    def matmul(self, x, w, dims):
        """x W. w may be a matrix in 8 bits (ops/int8.py); dims has the dims of the float matrix, here and in every op with a weight."""
        if is_int8(w):
            return self.bound("matmul_int8", dims)(x, w["int8"], w["scale"])
        return self.bound("matmul", dims)(x, w)

    def matmuls(self, x, weights, dims):
        """Returns a tuple of x W, one for each weight; the collectives of x run once. dims: the dims of x, then for each weight the rest of
        its signature, as in ("rows>tokens embed", "embed heads -> tokens heads", "embed kv -> tokens kv_heads"). With weights in 8 bits
        each product has its own collectives of x."""
        if is_int8(weights[0]):
            out = ()
            for i in range(len(weights)):
                out += (self.matmul(x, weights[i], f"{dims[0]}, {dims[i + 1]}"),)
            return out
        return self.bound("matmul", dims)(x, *weights)

    def router(self, x, w, dims):
        """x W in float32, of the router and of the head of a model with labels."""
        return self.bound("router", dims)(x, w)

    def add(self, x, y, dims):
        return self.bound("add", dims)(x, y)

    def add_bias(self, x, b, dims):
        return self.bound("add_bias", dims)(x, b)

    # Norms, activations and rotary embedding

    def rms_norm(self, x, w, dims):
        return self.bound("rms_norm", dims)(x, w)

    def add_rms_norm(self, x, y, w, dims):
        """x + y and its norm, in one kernel."""
        return self.bound("add_rms_norm", dims)(x, y, w)

    def glu(self, gate, up, dims):
        """The gated linear unit of a feed-forward layer, activation(gate) * up. Qwen's activation is silu, so this is SwiGLU."""
        return self.bound("glu", dims)(gate, up)

    def angles(self, positions, dims):
        """cos and sin [B, S, 1, H / 2] float32 of the rotary embedding at positions_BS."""
        return self.bound("angles", dims)(positions)

    def rope(self, x, cos, sin, dims):
        return self.bound("rope", dims)(x, cos, sin)

    def norm_rope(self, x, w, cos, sin, dims):
        """RMS norm of each head, then the rotary embedding, in one kernel."""
        return self.bound("norm_rope", dims)(x, w, cos, sin)

    # Attention

    def attention(self, q, k, v, segments, order, dims):
        return self.bound("attention", dims)(q, k, v, segments, order)

    def attention_by_lengths(self, q, k, v, documents, dims):
        """attention within the documents of packed rows. documents: see `documents`. The op is `attention`, with other arguments."""
        return self.bound("attention", dims)(q, k, v, documents)

    def documents(self, segments, dims):
        """What attention_by_lengths needs to know of the documents of segments_BT, see parallel/context/ring.py."""
        return self.bound("documents", dims)(segments)

    def attention_over_cache(self, q, k, v, segments, key_segments, order, key_order, dims):
        return self.bound("attention_over_cache", dims)(q, k, v, segments, key_segments, order, key_order)

    def cache_write(self, cache, new, at, dims):
        """Writes new[:, s] into slot at[:, s] of cache_BTKH; nothing is written for a slot past the end. Returns the cache."""
        return self.bound("cache_write", dims)(cache, new, at)

    def paged_write(self, pages, new, slot, dims):
        """Writes new[r] into slot[r] of pages [P, C, K, H]; nothing is written for a slot that is not there. Returns the pages."""
        return self.bound("paged_write", dims)(pages, new, slot)

    def paged_attention(self, q, k, v, table, length, dims):
        """Attention of one query a row over pages; see ops/paged_attention.py."""
        return self.bound("paged_attention", dims)(q, k, v, table, length)

    def packed_attention(self, q, k, v, table, row, position, dims):
        """Attention of many queries of several rows over pages; see ops/paged_attention.py."""
        return self.bound("packed_attention", dims)(q, k, v, table, row, position)

    def largest_logits(self, q, k, segments, key_segments, order, key_order, dims):
        """The largest attention score of each query; see ops/attention.py."""
        return self.bound("largest_logits", dims)(q, k, segments, key_segments, order, key_order)

    # Tokens, documents and dropout

    def embedding(self, w, ids, dims):
        """The rows `ids` of the table w, in float32."""
        if is_int8(w):
            return self.bound("embedding_int8", dims)(w["int8"], ids, w["scale"])
        return self.bound("embedding", dims)(w, ids)

    def gather_seq(self, segments, dims):
        """All-gathers integers of a rank's tokens along the sequence."""
        return self.bound("gather_seq", dims)(segments)

    def token_order(self, segments, dims):
        """The place of each token in its row: 0, 1, ... T - 1, or another order in a ring of ranks (parallel/context/split.py)."""
        return self.bound("token_order", dims)(segments)

    def is_token(self, segment_ids, dims):
        """1.0 for a token, 0.0 for padding."""
        return self.bound("is_token", dims)(segment_ids)

    def move(self, integers, dims):
        """Moves integers from one sharding to another, by the collectives of the signature."""
        return self.bound("move", dims)(integers)

    def dropout(self, name, x, noise, layer, dims):
        """Dropout before the adapter of the weight `name`; see layers/lora.py."""
        return self.bound("dropout_" + name, dims)(x, noise, layer)

    # The head and the loss

    def head(self, x, w, dims):
        """Logits in float32. If the vocabulary is sharded, a rank has its shard, in which padding is -inf."""
        if is_int8(w):
            return self.bound("head_int8", dims)(x, w["int8"], w["scale"])
        return self.bound("head", dims)(x, w)

    def whole_vocab(self, logits, dims):
        """Logits of the full vocabulary, all-gathered, without padding."""
        return self.bound("whole_vocab", dims)(logits)

    def cross_entropy(self, logits, targets, dims):
        """Three columns from a rank's logits: the largest, the sum of exp(logit - largest), and the target's logit or 0."""
        return self.bound("cross_entropy", dims)(logits, targets)

    def head_loss(self, x, w, targets, dims):
        """cross_entropy of head(x, w), as one op."""
        return self.bound("head_loss", dims)(x, w, targets)

    def sub(self, x, y, dims):
        return self.bound("sub", dims)(x, y)

    def mul(self, x, y, dims):
        return self.bound("mul", dims)(x, y)

    def exp(self, x, dims):
        return self.bound("exp", dims)(x)

    def log1p(self, x, dims):
        return self.bound("log1p", dims)(x)

    def ones_like(self, x, dims):
        return self.bound("ones_like", dims)(x)

    def largest(self, x, dims):
        """The maximum along the last dim, over all its shards. The dim stays with size 1."""
        return self.bound("largest", dims)(x)

    def largest_of_all(self, x, dims):
        """The maximum of all elements on all ranks, a scalar."""
        return self.bound("largest_of_all", dims)(x)

    def sum_columns(self, x, dims):
        """The sum along the last dim of a matrix. The dim stays with size 1."""
        return self.bound("sum_columns", dims)(x)

    def sum_seq(self, x, dims):
        """The sum along the last dim of a matrix. The dim is removed."""
        return self.bound("sum_seq", dims)(x)

    def sum(self, x, dims):
        """The sum of all elements of a matrix, a scalar."""
        return self.bound("sum", dims)(x)

    def count(self, x, dims):
        """The sum of all elements of a vector, a scalar."""
        return self.bound("count", dims)(x)

    def sum_squares(self, x, valid, dims):
        """The sum of the squares of the valid rows, a scalar."""
        return self.bound("sum_squares", dims)(x, valid)

    def concat(self, x, y, dims):
        """x and y, concatenated along their first dim."""
        return self.bound("concat", dims)(x, y)

    # Mixture of experts; see layers/moe.py and ops/routing.py

    def top_k(self, logits, dims):
        """logits_RE -> probabilities_RE, expert_Rk, weight_Rk"""
        return self.bound("top_k", dims)(logits)

    def biased_top_k(self, logits, bias, valid, dims):
        return self.bound("biased_top_k", dims)(logits, bias, valid)

    def bias_gradient(self, weight, bias, gradient, dims):
        """Returns weight. In the backward pass, bias gets the gradient `gradient`."""
        return self.bound("bias_gradient", dims)(weight, bias, gradient)

    def router_stats(self, logits, probs, expert, valid, dims):
        return self.bound("router_stats", dims)(logits, probs, expert, valid)

    def router_losses(self, stats, dims):
        return self.bound("router_losses", dims)(stats)

    def router_entropy(self, logits, valid, dims):
        return self.bound("router_entropy", dims)(logits, valid)

    def experts(self, x, expert, weight, w_gate, w_up, w_down, dims):
        return self.bound("experts", dims)(x, expert, weight, w_gate, w_up, w_down)

    def permute(self, x, expert, dims):
        """Sorts the rows of x by expert into blocks. Returns the blocks, the slot of each assignment, and the expert of each block."""
        return self.bound("permute", dims)(x, expert)

    def combine(self, rows, slot, weight, dims):
        """The weighted sum of each row's assignments."""
        return self.bound("combine", dims)(rows, slot, weight)

    def send_plan(self, expert, dims):
        return self.bound("send_plan", dims)(expert)

    def plan_received(self, received, dims):
        return self.bound("plan_received", dims)(received)

    def take(self, x, index, dims):
        """The rows of x with the numbers `index`; zeros for a number past the last row."""
        return self.bound("take", dims)(x, index)

    def count_lost(self, lost, dims):
        return self.bound("count_lost", dims)(lost)

    def grouped_matmul(self, x, w, group, dims):
        """Each block of rows times the matrix of its group."""
        if is_int8(w):
            return self.bound("grouped_matmul_int8", dims)(x, w["int8"], group, w["scale"])
        return self.bound("grouped_matmul", dims)(x, w, group)
