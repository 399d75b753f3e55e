"""What the layers of a model do with a batch: a forward of the same annotated layers that gives a few numbers of each, and the loss by row.
For watching a run (experiments/probe.py); nothing of it is part of a training step."""

from mindspore import ops

from layers import attention, mlp, moe, residual
from parallel import zero
from parallel.scan import scan as scan_layers
from parallel.spec import tree_leaves
from qwen3.model import build, layer_specs, stack_rows

# Of each layer: the squares of what it gives, and the router's entropy in nats, summed over the tokens, and their number, none of them
# padding; the largest logit of attention's softmax
SEEN = ("squares", "entropy", "tokens", "logit_max")


def build_probe(cfg, sharding, kernels, layers, first=True, last=True, scan=False, by_row=False):
    """f(params, carried, batch) -> a tuple of tensors, of the outputs that names() says. For use in a graph.

    params: of qwen3.stages.stage_specs' structure, but that with scan `layers` is one tree of stacked arrays. carried: x_RD, of which the
    first stage has none. layers: the range of the stage's, which may be all. by_row: whether the last stage gives the loss of each row.
    cfg: without dropout.
    """
    parts = build(cfg, sharding, False, kernels).parts
    consts_of, trunk = _consts(sharding, parts), (_scanned if scan else _unrolled)(cfg, sharding, kernels, layers)
    loss_of_rows, given = _loss_of_rows(sharding, parts), names(layers, last, by_row)
    begins, sees, goes_on, judges = first, "seen" in given, "x" in given, "nats" in given

    def probe(params, carried, batch):
        x = parts.begin(params, batch["tokens"]) if begins else carried
        out = ()
        if sees:
            x, seen = trunk(params["layers"], x, consts_of(batch["positions"], batch["segment_ids"]))
            out = (seen,)
        if goes_on:
            out += (x,)
        if judges:
            out += loss_of_rows(params, x, batch["targets"], batch["loss_weights"])
        return out

    return probe


def names(layers, last=True, by_row=False):
    """Of a stage's outputs: seen [layers, SEEN]; x_RD, for the next stage; nats_B and weights_B, of a data rank's rows: the sum of nats
    times the targets' weights, and of these."""
    return ("seen",) * bool(layers) + ("x",) * (not last) + ("nats", "weights") * (last and by_row)


def _consts(sharding, parts):
    """consts_of(positions_BS, segment_ids_BS) -> what the layers are given beside x: cos, sin, segments_BT, order_BT, valid_R, and segments
    and order of the rank's own tokens."""
    own, reshape = sharding.op(_same_integers, "batch keys -> batch keys>seq", kind="kernel"), ops.Reshape()

    def consts_of(positions, segment_ids):
        consts = parts.beside(positions, segment_ids)
        return consts[:4] + (parts.real(reshape(segment_ids, (-1,))), segment_ids, own(consts[3]))

    return consts_of


def _same_integers(x):
    return x + 0


def _watched(cfg, sharding, kernels, layers):
    """For each of these layers f(p, x_RD, consts) -> x_RD, its SEEN numbers [4]."""
    stream, attend = residual.build(cfg, sharding, kernels), attention.build(cfg, sharding, kernels)[0]
    largest, squares, total = attention.build_largest_logit(cfg, sharding, kernels), _squares(sharding), _tokens(sharding)
    dense_ffn, concat, reshape = mlp.build(cfg, sharding, kernels), ops.Concat(0), ops.Reshape()
    moe_ffn, entropy = (f(cfg, sharding, kernels) if cfg.moe_layers else None for f in (moe.build, moe.build_entropy))

    def one(number):
        return reshape(number, (1,))

    def dense(p, x, valid):
        return dense_ffn(p["mlp"], x), total(valid, 0) * 0

    def sparse(p, x, valid):
        return moe_ffn(p["moe"], x, valid)[0], entropy(p["moe"], x, valid)

    def layer_of(i):
        whole, ffn = zero.gathered(sharding, layer_specs(cfg, i)), sparse if cfg.is_moe_layer(i) else dense

        def watched(p, x, consts):
            p, valid = whole(p), consts[4]
            normed = stream.enter(p, x)
            top = largest(p["attention"], normed, consts[0], consts[1], consts[5], consts[2], consts[6], consts[3])
            x, normed = stream.between(p, x, attend(p["attention"], normed, consts[0], consts[1], consts[2], consts[3]))
            y, nats = ffn(p, normed, valid)
            x = stream.leave(p, x, y)
            return x, concat((one(squares(x, valid)), one(nats), one(total(valid, 0)), one(top)))

        return watched

    kinds = {i: (cfg.is_moe_layer(i), tuple(spec.optimizer for spec in tree_leaves(layer_specs(cfg, i)))) for i in layers}
    made = {kind: layer_of(i) for i, kind in kinds.items()}
    return tuple(made[kinds[i]] for i in layers)


def _squares(sharding):
    """squares(x_RD, valid_R) -> the sum of squares of the whole batch's valid rows."""
    total, cast = ops.ReduceSum(), ops.Cast()

    def squares(x, valid):
        x = cast(x, valid.dtype)
        return total(total(x * x, 1) * valid, 0)

    return sharding.op(squares, "rows embed, rows ->", kind="contraction")


def _tokens(sharding):
    return sharding.op(ops.ReduceSum(), "rows ->", kind="reduction")


def _unrolled(cfg, sharding, kernels, layers):
    """trunk(layers, x_RD, consts) -> x_RD, seen [layers, 4]."""
    run, keys, n, stack = _watched(cfg, sharding, kernels, layers), tuple(map(str, layers)), len(layers), stack_rows()

    def trunk(params, x, consts):
        every = ()
        for i in range(n):
            x, seen = run[i](params[keys[i]], x, consts)
            every += (seen,)
        return x, stack(*every)

    return trunk


def _scanned(cfg, sharding, kernels, layers):
    """The same over one tree of stacked layers."""
    loop = scan_layers(_watched(cfg, sharding, kernels, layers)[0], layer_specs(cfg, 0), len(layers), (len(SEEN),))

    def trunk(params, x, consts):
        return loop(x, params, consts)

    return trunk


def _loss_of_rows(sharding, parts):
    """f(params, x_RD, targets_BS, weights_BS) -> (nats_B, weights_B); see names."""
    mul = sharding.op(ops.Mul(), "batch seq", kind="elementwise")
    of_nats, of_weights = (sharding.op(ops.ReduceSum(), "batch seq -> batch", kind="reduction") for _ in range(2))
    reshape, cast = ops.Reshape(), ops.Cast()

    def loss_of_rows(params, x, targets, weights):
        nats = reshape(parts.nats(params, x, targets), targets.shape)
        weights = cast(weights, nats.dtype)
        return of_nats(mul(nats, weights), 1), of_weights(weights, 1)

    return loss_of_rows
