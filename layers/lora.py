"""Low-rank adapters beside frozen weights: y = x W + scale * (dropout(x) A) B, as PEFT computes them. Source: Hu et al. 2021.

The adapters of a part of the model are its p["lora"], with "wq.a" and "wq.b" for its weight "wq" (MindSpore takes no deeper trees), whose
ParamSpecs follow from the weight's: A is split as the weight's input dim, B as its output dim. `beside` is where a layer takes one; without
an adapter it changes nothing.

Dropout draws from the integers of the batch alone, noise_BS of the step and the token, and the numbers of the layer, the weight and the
column: it is the same in every layout.
"""

import dataclasses
import zlib

import mindspore as ms
from mindspore import ops

from layers import embed
from layers.linear import KV
from ops import iota
from ops.registry import pick
from parallel import zero
from parallel.source import function
from parallel.spec import ParamSpec, constant, normal, unflatten, uniform, zeros
from parallel.step import expression, subscripts

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


def unchanged(p, x, y):
    return y


def beside(cfg, sharding, kernels, target, key, size, *, into=None, inner="embed", float32=False):
    """f(p, x, y) -> y + scale * (dropout(x) A) B, for y = x W, W being p[key] of this target, of `size` inputs.

    A weight of which `columns` makes an op is given its output dim, `into`, and x in rows; one of which `row` makes it, its input dim
    `inner`. float32: as the router computes.
    """
    if not _has(cfg, target):
        return unchanged
    matmul, rows = pick(kernels, "matmul"), "tokens" if inner != "embed" else "rows"
    moved = "tokens>rows" if inner != "embed" else "rows"
    down = sharding.op(matmul(), f"{rows} {inner}, {inner} rank -> {moved} rank", kind="contraction", call=_product)
    outer, arrives, leaves = (into, "rows>tokens", "tokens") if into and into != "router" else (into or "embed", "rows", "rows")
    out = KV.get(outer, outer)
    up = sharding.op(matmul(), f"{arrives} rank, rank {outer} -> {leaves} {out}", kind="contraction", call=_product)
    add, scale = sharding.op(ops.Add(), f"{leaves} {out}", kind="elementwise"), cfg.lora.scale
    drop, a, b = _dropout(cfg, sharding, target, f"{rows} {inner}", size, rows), f"{key}.a", f"{key}.b"

    def adapted(p, x, y):
        adapters = p["lora"]
        return add(y, up(down(drop(adapters, x), adapters[a]) * scale, adapters[b]))

    def adapted_in_float32(p, x, y):
        return adapted(p, cast(x, ms.float32), y)

    return adapted_in_float32 if float32 else adapted


def _product(matmul, x, w):
    return matmul(x, cast(w, x.dtype))


def embedding(cfg, sharding, kernels):
    """f(params, tokens_BS, x_RD) -> x_RD with the adapter of the embedding. Without dropout, as PEFT's."""
    if not _has(cfg, "embed"):
        return unchanged
    take = embed.lookup(cfg, sharding, kernels, "rank")
    up = sharding.op(pick(kernels, "matmul")(), "rows rank, rank embed -> rows embed", kind="contraction", call=_product)
    add, scale, reshape = sharding.op(ops.Add(), "rows embed", kind="elementwise"), cfg.lora.scale, ops.Reshape()
    whole = zero.gathered(sharding, specs(cfg, {"embed": embed.specs(cfg)}, EMBED)["lora"])

    def adapted(params, tokens, x):
        pair = whole(params["lora"])
        return add(x, up(cast(take(pair["embed.a"], reshape(tokens, (-1,))), x.dtype) * scale, pair["embed.b"]))

    return adapted


EXPERTS = {  # target: key, and the dims of rows that come in and go out
    "experts.gate": ("w_gate", "embed", "expert_ffn", "embed", "part_ffn"),
    "experts.up": ("w_up", "embed", "expert_ffn", "embed", "part_ffn"),
    "experts.down": ("w_down", "expert_ffn", "embed", "part_ffn", "embed"),
}


def experts(cfg, sharding, kernels):
    """{key: f(x [blocks, b, in], group, y, adapters) -> y with what the adapters of the experts' w_gate, w_up, w_down add}.

    adapters: the tuple of expert_weights.
    """
    out, place = {}, 0
    for target, (key, inner, outer, x_dim, y_dim) in EXPERTS.items():
        out[key] = _same_blocks
        if _has(cfg, target):
            out[key] = _beside_experts(cfg, sharding, kernels, place, (inner, outer, x_dim, y_dim))
            place += 2
    return out


def _same_blocks(x, group, y, adapters):
    return y


def _beside_experts(cfg, sharding, kernels, place, dims):
    inner, outer, x_dim, y_dim = dims
    matmul, blocks = pick(kernels, "grouped_matmul"), "blocks block_rows"
    down = sharding.op(matmul(), f"{blocks} {x_dim}, experts {inner} rank, blocks -> {blocks} rank", kind="kernel")
    up = sharding.op(matmul(), f"{blocks} rank, experts rank {outer}, blocks -> {blocks} {y_dim}", kind="kernel")
    add, scale = sharding.op(ops.Add(), f"{blocks} {y_dim}", kind="elementwise"), cfg.lora.scale

    def adapted(x, group, y, adapters):
        return add(y, up(down(x, adapters[place], group) * scale, adapters[place + 1], group))

    return adapted


def expert_weights(cfg):
    """(f(p) -> the tuple of the experts' adapters, A and B by turns; their dims, as the end of a signature)."""
    chosen = [EXPERTS[target] for target in EXPERTS if _has(cfg, target)]
    picked = "".join(f"p['lora']['{key}.a'], p['lora']['{key}.b'], " for key, *_ in chosen)
    dims = "".join(f", experts {inner} rank, experts rank {outer}" for _, inner, outer, *_ in chosen)
    return function("adapters(p)", [f"return ({picked})"]), dims


def noises(cfg):
    """Which noise the dropout of cfg.lora takes: of rows, of tokens, both or none."""
    targets = cfg.lora.targets if cfg.lora and cfg.lora.dropout else ()
    needed = {"rows": {"q", "k", "v", "gate", "up"}, "tokens": {"o", "down"}}
    return tuple(name for name, users in needed.items() if users & set(targets))


def noisy(cfg, specs):
    """f(p, consts) -> the tree p of a layer, in which what has adapters has what their dropout needs; consts ends in those of noises()."""
    if DROPOUT_LAYER not in specs:
        return _as_it_is
    kinds = noises(cfg)
    tree = unflatten(specs, [f"p{at}" for at in subscripts(specs)])
    for part in tree.values():
        if _adapted(part):
            part["lora"].update({f"noise.{kind}": f"consts[{i - len(kinds)}]" for i, kind in enumerate(kinds)})
            part["lora"]["layer"] = f"p['{DROPOUT_LAYER}']"
    return function("noisy(p, consts)", [f"return {expression(tree)}"])


def _as_it_is(p, consts):
    return p


def _dropout(cfg, sharding, target, dims, size, rows):
    """f(p["lora"], x) -> x with elements zeroed with the probability cfg.lora.dropout, and the others scaled up."""
    if not cfg.lora.dropout:
        return _whole
    inner, noise = dims.split()[1], f"noise.{rows}"
    mask = _mask(cfg.lora.dropout, zlib.crc32(target.encode()) & 0x7FFFFFFF)
    signature = f"{dims}, {rows}, one -> {dims}"
    drop = sharding.op(mask, signature, kind="kernel", call=_mask_all, part=(inner, size, _mask_part))

    def dropped(adapters, x):
        return drop(x, adapters[noise], adapters["layer"])

    return dropped


def _whole(adapters, x):
    return x


def _mask_all(mask, x, noise, layer):
    return mask(0, x, noise, layer)


def _mask_part(mask, first, x, noise, layer):
    return mask(first, x, noise, layer)


def _mask(rate, site):
    """mask(first column, x_RI, noise_R int32, layer [1]) -> x, elements kept where the hash of noise, layer, site and column says so."""
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
