"""Numbers about the layers of a model and the loss of each row, from a forward of a batch, for watching a run (experiments/watch/probe.py).

The forward is the model's own, whose ops carry a function `watch` (layers/bound_ops.py). Nothing of it is part of a training step.
"""

from mindspore import ops

from layers import loss, moe
from layers.attention import largest_logit
from layers.bound_ops import BoundOps
from qwen3 import model, run_layers

# Of each layer: the squares of its output, the router's entropy in nats and the number of tokens, all summed over the tokens that are not
# padding; and the largest logit before attention's softmax.
SEEN = ("squares", "entropy", "tokens", "logit_max")
_concat, _reshape = ops.Concat(0), ops.Reshape()


def build_probe(cfg, sharding, kernels, layers, first=True, last=True, scan=False, by_row=False):
    """Returns f(params, carried, batch) -> a tuple of tensors, the outputs that names() lists. For use in a graph.

    params: of qwen3.stages.stage_specs' structure, but with scan `layers` is one tree of stacked arrays. carried: x_RD, which the first
    stage does not have. layers: the range of the stage's layers, which may be all. by_row: whether the last stage gives the loss of each
    row. cfg: without dropout.
    """
    op = BoundOps(cfg, sharding, kernels, watch)
    functions, specs = (model.layer, model.attention_input, model.finish_layer), model.param_specs(cfg)["layers"]
    more_rows = ("own_segments",) if cfg.moe_layers else ("valid", "own_segments")
    run_layers.bind(cfg, op, functions, specs, scan, more_rows=more_rows, stats_size=len(SEEN))
    given, numbers, stack = names(layers, last, by_row), tuple(layers), run_layers.stack_rows()
    sees, goes_on, judges = "seen" in given, "x" in given, "nats" in given

    def probe(params, carried, batch):
        x = model.embed(cfg, op, params, batch["tokens"]) if first else carried
        out = ()
        if sees:
            rows, seen = watched_rows(cfg, op, batch), ()
            if scan:
                x, seen = op.layers(params["layers"], x, rows)
            else:
                for i in numbers:
                    x, found = op.run[i](params["layers"][str(i)], x, rows)
                    seen += (found,)
                seen = stack(*seen)
            out = (seen,)
        if goes_on:
            out += (x,)
        if judges:
            out += loss.sums_of_rows(op, model.nats(cfg, op, params, x, batch["targets"]), batch["loss_weights"])
        return out

    return probe


def names(layers, last=True, by_row=False):
    """The outputs of a stage: seen [layers, SEEN]; x_RD, for the next stage; nats_B and weights_B, of a data rank's rows, the sum of nats
    times the weights of the targets, and the sum of these weights."""
    return ("seen",) * bool(layers) + ("x",) * (not last) + ("nats", "weights") * (last and by_row)


def watched_rows(cfg, op, batch):
    """The model's `rows`, with valid_R in every model and the segments [B, S] of the rank's own tokens."""
    rows = model.rows_of(cfg, op, batch["positions"], batch["segment_ids"], None)
    rows["valid"] = op.is_token(_reshape(batch["segment_ids"], (-1,)), "tokens -> tokens>rows")
    rows["own_segments"] = batch["segment_ids"]
    return rows


def watch(cfg, op, p, x, h, y, rows):
    """The numbers SEEN [4] of a layer with the input x_RD, the feed-forward part's input h_RD and the output y_RD."""
    squares, tokens = op.sum_squares(y, rows["valid"], "rows embed, rows ->"), op.count(rows["valid"], "rows ->")
    entropy = moe.router_entropy(cfg, op, p["moe"], h, rows) if "moe" in p else tokens * 0
    top = largest_logit(cfg, op, p["attention"], model.attention_input(cfg, op, p, x), rows)
    return _concat((_reshape(squares, (1,)), _reshape(entropy, (1,)), _reshape(tokens, (1,)), _reshape(top, (1,))))
