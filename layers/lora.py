"""Low-rank adapters beside frozen weights: y = x W + scale * (dropout(x) A) B, as PEFT computes them. Source: Hu et al. 2021.

Adapters are stored in p["lora"], beside the weights: "wq.a" and "wq.b" belong to p["wq"] (MindSpore accepts no deeper trees). Their
ParamSpecs follow from the spec of the weight: A is sharded like the weight's input dim, B like its output dim. After each product with a
weight, a layer calls `adapted`, which adds the product with the adapter, if there is one.

Dropout depends only on integers: noise_BS of the batch, which differs by step and token, and the numbers of the layer, the weight and the
column. So it drops the same elements in every layout.
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
DROPOUT_LAYER = "dropout_layer"  # the key in a layer's tree of its number, which dropout needs


def specs(cfg, p, names):
    """Adds the specs of adapters to p, a dict of ParamSpecs, as p["lora"]. names: {target in cfg.lora: key of the weight in p}."""
    chosen = {}
    for target, key in names.items():
        if _has(cfg, target):
            chosen.update(zip((f"{key}.a", f"{key}.b"), _pair(cfg.lora, p[key], target)))
    return {**p, "lora": chosen} if chosen else p


def _pair(lora, spec, target):
    """Returns the specs of A and B. Initial values as in PEFT: A uniform (kaiming_uniform with a = sqrt(5)) or normal with a standard
    deviation of 1 / rank, and B zero; for the embedding A zero and B standard normal."""
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
    """Adds the number i to the tree of layer i if it has adapters with dropout."""
    if not noises(cfg) or not any(_adapted(part) for part in tree.values()):
        return tree
    return {**tree, DROPOUT_LAYER: ParamSpec((1,), ("one",), constant(i), optimizer="none")}


def without_dropout(cfg):
    """Returns cfg without dropout."""
    return cfg.replace(lora=dataclasses.replace(cfg.lora, dropout=0.0)) if noises(cfg) else cfg


def _adapted(part):
    return isinstance(part, dict) and "lora" in part


def _has(cfg, target):
    return bool(cfg.lora) and target in cfg.lora.targets


# Signatures of adapters. For a column-parallel weight, x A is computed on shards of the rows and all-gathered; for a row-parallel weight it
# is a partial sum, which is reduced.
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
OF_ALL_ROWS = ("wq", "wk", "wv")  # weights that multiply every row, where of the last layer only some rows are wanted
EXPERT_DIMS = {  # weight of the experts: its input dim and output dim, and those dims as x and y have them
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
    """Returns y + scale * (dropout(x) A) B, where y = x p[name]; returns y if the weight has no adapter.

    rows["adapters"] [R, rank], if it is there: what x A is multiplied by, so that rows have different adapters (qwen3/adapters.py).
    rows["last_adapters"]: that of the rows that are left after the projections of attention, where only some are wanted."""
    if not has(p, name):
        return y
    down, up, dims = DIMS[name]
    if name == "router":
        x = cast(x, ms.float32)
    if cfg.lora.dropout:
        _, which, columns = DROPPED[name]
        x = op.dropout(name, x, rows["noise_" + which], rows["layer"], f"{which} {columns}, {which}, one -> {which} {columns}")
    a, b = p["lora"][name + ".a"], p["lora"][name + ".b"]
    low = op.matmul(x, a, down) * cfg.lora.scale
    if "last_adapters" in rows and name not in OF_ALL_ROWS:
        low = low * cast(rows["last_adapters"], low.dtype)
    elif "adapters" in rows:
        low = low * cast(rows["adapters"], low.dtype)
    return op.add(y, op.matmul(low, b, up), dims)


def adapted_embedding(cfg, op, params, tokens, x):
    """Adds the embedding's adapter to x_RD, the embeddings of tokens_R. There is no dropout, as in PEFT."""
    if not has(params, "embed"):
        return x
    pair = op.gathered_adapter(params["lora"])
    low = cast(op.embedding(pair["embed.a"], tokens, "vocab rank, tokens -> tokens>rows rank"), x.dtype)
    return op.add(x, op.matmul(low * cfg.lora.scale, pair["embed.b"], "rows rank, rank embed -> rows embed"), "rows embed")


def adapted_experts(cfg, op, p, name, x, group, y):
    """Adds the experts' adapters to y [blocks, b, out], the product of each block of x [blocks, b, in] with the matrix p[name] of its
    expert."""
    if not has(p, name):
        return y
    inner, outer, x_dim, y_dim = EXPERT_DIMS[name]
    down = f"blocks block_rows {x_dim}, experts {inner} rank, blocks -> blocks block_rows rank"
    up = f"blocks block_rows rank, experts rank {outer}, blocks -> blocks block_rows {y_dim}"
    low = op.grouped_matmul(x, p["lora"][name + ".a"], group, down) * cfg.lora.scale
    return op.add(y, op.grouped_matmul(low, p["lora"][name + ".b"], group, up), f"blocks block_rows {y_dim}")


def noises(cfg):
    """Returns the shardings in which dropout needs its seeds: "rows", "tokens", both or none. See DROPPED."""
    targets = cfg.lora.targets if cfg.lora and cfg.lora.dropout else ()
    needed = {"rows": {"q", "k", "v", "gate", "up"}, "tokens": {"o", "down"}}
    return tuple(name for name, users in needed.items() if users & set(targets))


def dropouts(cfg):
    """Returns {weight: (make, kind, wrap, part)}, the first fields of the op_table.Definition of the dropout before each adapter."""
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
    """Returns mask(first column, x_RI, noise_R int32, layer [1]) -> x, in which each element is zeroed with probability `rate` and the
    others are scaled by 1 / (1 - rate). The choice is a hash of noise, layer, site (the number of the weight) and column."""
    count, greater_equal, limit = iota.reference(), ops.GreaterEqual(), int(rate * (1 << 24))
    expand, bits, scale = ops.ExpandDims(), ops.BitwiseAnd(), 1 / (1 - rate)

    def mask(first, x, noise, layer):
        column = _mix(_mix(cast(layer, ms.int32) + site) + count(x.shape[1]) + first)
        drawn = bits(_mix(expand(noise, 1) + expand(column, 0)), ms.Tensor((1 << 24) - 1, ms.int32))
        kept = cast(greater_equal(drawn, limit), x.dtype)
        return x * (ops.stop_gradient(kept) * scale)

    return mask


def _mix(x):
    """Returns a hash of int32 values; the arithmetic wraps around. Source: lowbias32, Wellons 2018."""
    x = _shifted_xor(x, 16) * 0x7FEB352D
    x = _shifted_xor(x, 15) * (0x846CA68B - (1 << 32))
    return _shifted_xor(x, 16)


def _shifted_xor(x, n):
    """Returns x ^ (x >> n), with a logical shift, which shifts in zeros."""
    shifted = ops.BitwiseAnd()(ops.RightShift()(x, ops.OnesLike()(x) * n), ops.OnesLike()(x) * ((1 << (32 - n)) - 1))
    return ops.BitwiseXor()(x, shifted)
