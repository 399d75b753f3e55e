"""Low-rank adapters beside frozen weights: y = x W + scale * (dropout(x) A) B, as PEFT computes them. Source: Hu et al. 2021.

The adapters of a part of the model are its p["lora"], with "wq.a" and "wq.b" for its weight "wq" (MindSpore takes no deeper trees). Their
ParamSpecs follow from the weight's: A is sharded as the weight's input dim, B as its output dim. Wherever a layer uses a weight, it calls
`adapted` with the product; without an adapter the product stays as it is.

Dropout draws from the integers of the batch alone, noise_BS of the step and the token, and the numbers of the layer, the weight and the
column: it is the same in every layout.
"""

import dataclasses
import zlib
from functools import partial

import mindspore as ms
from mindspore import ops

from ops import iota
from parallel.specs import ParamSpec, constant, normal, uniform, zeros

cast = ops.Cast()
EMBED = {"embed": "embed"}
DROPOUT_LAYER = "dropout_layer"  # where a layer's tree has its number, for the dropout


def specs(cfg, p, names):
    """p, a dict of ParamSpecs, and in p["lora"] those of the adapters of its weights. names: {what cfg.lora calls a weight: its key}."""
    chosen = {}
    for target, key in names.items():
        if _has(cfg, target):
            chosen.update(zip((f"{key}.a", f"{key}.b"), _pair(cfg.lora, p[key], target)))
    return {**p, "lora": chosen} if chosen else p


def _pair(lora, spec, target):
    """The specs of A and B. Initial values are PEFT's: A uniform, as of kaiming_uniform with a = sqrt(5), or normal with 1 / rank, and B 0;
    of an embedding A 0 and B normal."""
    *lead, inner, outer = spec.shape
    *dims, inner_dim, outer_dim = spec.dims
    *parts, inner_parts, outer_parts = spec.parts or (None,) * len(spec.shape)
    a, b = uniform(inner**-0.5) if lora.init == "kaiming" else normal(1 / lora.rank), zeros()
    if target == "embed":
        a, b = zeros(), normal(1.0)
    return (
        ParamSpec((*lead, inner, lora.rank), (*dims, inner_dim, "rank"), a, parts=(*parts, inner_parts, None)),
        ParamSpec((*lead, lora.rank, outer), (*dims, "rank", outer_dim), b, parts=(*parts, None, outer_parts)),
    )


def layer_specs(cfg, i, tree):
    """The tree of layer i with its number, if it has adapters with dropout."""
    if not noises(cfg) or not any(_adapted(part) for part in tree.values()):
        return tree
    return {**tree, DROPOUT_LAYER: ParamSpec((1,), ("one",), constant(i), optimizer="none")}


def without_dropout(cfg):
    return cfg.replace(lora=dataclasses.replace(cfg.lora, dropout=0.0)) if noises(cfg) else cfg


def _adapted(part):
    return isinstance(part, dict) and "lora" in part


def _has(cfg, target):
    return bool(cfg.lora) and target in cfg.lora.targets


# The adapter of a weight in a layout. Of a column-parallel weight x A is computed by rows and gathered; of a row-parallel one it is summed.
DOWN, UP = "rows embed, embed rank -> rows rank", "rows>tokens rank, rank {0} -> tokens {1}"
DIMS = {  # weight: the signature of x A, that of (x A) B, and the dims of y
    "wq": (DOWN, UP.format("heads", "heads"), "tokens heads"),
    "wk": (DOWN, UP.format("kv", "kv_heads"), "tokens kv_heads"),
    "wv": (DOWN, UP.format("kv", "kv_heads"), "tokens kv_heads"),
    "wo": ("tokens heads, heads rank -> tokens>rows rank", "rows rank, rank embed -> rows embed", "rows embed"),
    "w_gate": (DOWN, UP.format("ffn", "ffn"), "tokens ffn"),
    "w_up": (DOWN, UP.format("ffn", "ffn"), "tokens ffn"),
    "w_down": ("tokens ffn, ffn rank -> tokens>rows rank", "rows rank, rank embed -> rows embed", "rows embed"),
    "router": (DOWN, "rows rank, rank router -> rows router", "rows router"),
}
EXPERT_DIMS = {  # weight of the experts: the same
    "w_gate": ("embed", "expert_ffn", "embed", "part_ffn"),
    "w_up": ("embed", "expert_ffn", "embed", "part_ffn"),
    "w_down": ("expert_ffn", "embed", "part_ffn", "embed"),
}
DROPPED = {  # weight with dropout: its name in cfg.lora.targets, and the two dims of its input
    "wq": ("q", "rows", "embed"),
    "wk": ("k", "rows", "embed"),
    "wv": ("v", "rows", "embed"),
    "wo": ("o", "tokens", "heads"),
    "w_gate": ("gate", "rows", "embed"),
    "w_up": ("up", "rows", "embed"),
    "w_down": ("down", "tokens", "ffn"),
}


def has(p, name):
    """Whether the weight p[name] has an adapter."""
    return "lora" in p and name + ".a" in p["lora"]


def adapted(cfg, op, p, name, x, y, rows):
    """y = x W, with W = p[name] -> y + scale * (dropout(x) A) B; y itself where the weight has no adapter."""
    if not has(p, name):
        return y
    down, up, dims = DIMS[name]
    if name == "router":
        x = cast(x, ms.float32)
    if cfg.lora.dropout:
        _, which, columns = DROPPED[name]
        x = op.dropout(name, x, rows["noise_" + which], rows["layer"], f"{which} {columns}, {which}, one -> {which} {columns}")
    a, b = p["lora"][name + ".a"], p["lora"][name + ".b"]
    return op.add(y, op.matmul(op.matmul(x, a, down) * cfg.lora.scale, b, up), dims)


def adapted_embedding(cfg, op, params, tokens, x):
    """x_RD, the embeddings of tokens_R -> x_RD with the adapter of the embedding. It has no dropout, as PEFT's has none."""
    if not has(params, "embed"):
        return x
    pair = op.whole_adapter(params["lora"])
    low = cast(op.embedding(pair["embed.a"], tokens, "vocab rank, tokens -> tokens>rows rank"), x.dtype)
    return op.add(x, op.matmul(low * cfg.lora.scale, pair["embed.b"], "rows rank, rank embed -> rows embed"), "rows embed")


def adapted_experts(cfg, op, p, name, x, group, y):
    """y [blocks, b, out], each block of x [blocks, b, in] times its expert's matrix of W = p[name] -> y with the experts' adapters."""
    if not has(p, name):
        return y
    inner, outer, x_dim, y_dim = EXPERT_DIMS[name]
    down = f"blocks block_rows {x_dim}, experts {inner} rank, blocks -> blocks block_rows rank"
    up = f"blocks block_rows rank, experts rank {outer}, blocks -> blocks block_rows {y_dim}"
    low = op.grouped_matmul(x, p["lora"][name + ".a"], group, down) * cfg.lora.scale
    return op.add(y, op.grouped_matmul(low, p["lora"][name + ".b"], group, up), f"blocks block_rows {y_dim}")


def noises(cfg):
    """Which noise the dropout of cfg.lora takes: of rows, of tokens, both or none."""
    targets = cfg.lora.targets if cfg.lora and cfg.lora.dropout else ()
    needed = {"rows": {"q", "k", "v", "gate", "up"}, "tokens": {"o", "down"}}
    return tuple(name for name, users in needed.items() if users & set(targets))


def dropouts(cfg):
    """Returns {weight: (make, kind, wrap, part) of an op_table.Definition} of the dropout before each adapter."""
    if not (cfg.lora and cfg.lora.dropout):
        return {}
    sizes, found = {"embed": cfg.hidden_size, "heads": cfg.num_heads * cfg.head_dim, "ffn": cfg.ffn_size}, {}
    for name, (target, _, columns) in DROPPED.items():
        if target in cfg.lora.targets:
            mask = partial(_mask, cfg.lora.dropout, zlib.crc32(target.encode()) & 0x7FFFFFFF)
            found[name] = mask, "kernel", _all_columns, (columns, sizes[columns], _columns_from)
    return found


def _all_columns(mask):
    def dropped(x, noise, layer):
        return mask(0, x, noise, layer)

    return dropped


def _columns_from(mask, first):
    def dropped(x, noise, layer):
        return mask(first, x, noise, layer)

    return dropped


def _mask(rate, site):
    """Returns mask(first column, x_RI, noise_R int32, layer [1]) -> x, with elements zeroed with the probability `rate` and the others
    scaled up. A hash of noise, layer, site and column decides."""
    count, greater_equal, limit = iota.reference(), ops.GreaterEqual(), int(rate * (1 << 24))
    expand, bits, scale = ops.ExpandDims(), ops.BitwiseAnd(), 1 / (1 - rate)

    def mask(first, x, noise, layer):
        column = _mix(_mix(cast(layer, ms.int32) + site) + count(x.shape[1]) + first)
        drawn = bits(_mix(expand(noise, 1) + expand(column, 0)), ms.Tensor((1 << 24) - 1, ms.int32))
        kept = cast(greater_equal(drawn, limit), x.dtype)
        return x * (ops.stop_gradient(kept) * scale)

    return mask


def _mix(x):
    """A hash of int32, the arithmetic wrapping around. Source: lowbias32, Wellons 2018."""
    x = _shifted_xor(x, 16) * 0x7FEB352D
    x = _shifted_xor(x, 15) * (0x846CA68B - (1 << 32))
    return _shifted_xor(x, 16)


def _shifted_xor(x, n):
    """x ^ (x >> n), no sign being shifted in."""
    shifted = ops.BitwiseAnd()(ops.RightShift()(x, ops.OnesLike()(x) * n), ops.OnesLike()(x) * ((1 << (32 - n)) - 1))
    return ops.BitwiseXor()(x, shifted)
