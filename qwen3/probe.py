"""Computes statistics of a model's layers and the loss of each row, from a forward pass of a batch, to watch a run
(experiments/watch/probe.py).

It runs the model's own forward pass, with ops that have a function `watch` (layers/bound_ops.py). A training step contains none of this.
"""

from mindspore import ops

from layers import loss, moe
from layers.attention import largest_logit
from layers.bound_ops import BoundOps
from qwen3 import model, run_layers

# The statistics of a layer. Sums over the tokens that are not padding: squares of the layer's output, entropy of the router in nats, and
# number of tokens. And the largest logit before attention's softmax.
SEEN = ("squares", "entropy", "tokens", "logit_max")
_concat, _reshape = ops.Concat(0), ops.Reshape()


def build_probe(cfg, sharding, kernels, layers, first=True, last=True, scan=False, by_row=False):
    """Returns f(params, carried, batch) -> a tuple of tensors, the outputs that names() lists. For use in a graph.

    params: the tree of qwen3.stages.stage_specs; with scan, its `layers` is one tree of stacked arrays. carried: x_RD from the stage
    before; the first stage ignores it. layers: the range of this stage's layers. first, last: whether the stage is the first, the last.
    by_row: whether the last stage returns the loss of each row. cfg: a model without dropout.
    """
    op = BoundOps(cfg, sharding, kernels, watch)
    functions, specs = (model.layer, model.attention_input, model.finish_layer), model.param_specs(cfg)["layers"]
    more_rows = (("own_segments",) if cfg.moe_layers else ("valid", "own_segments")) + ("segments", "order") * op.by_lengths
    run_layers.bind(cfg, op, functions, specs, scan, more_rows=more_rows, stats_size=len(SEEN))
    given, numbers, stack = names(layers, last, by_row), tuple(layers), run_layers.stack_rows()
    returns_seen, returns_x, returns_nats = "seen" in given, "x" in given, "nats" in given

    def probe(params, carried, batch):
        x = model.embed(cfg, op, params, batch["tokens"]) if first else carried
        out = ()
        if returns_seen:
            rows, seen = watched_rows(cfg, op, batch), ()
            if scan:
                x, seen = op.layers(params["layers"], x, rows)
            else:
                for i in numbers:
                    x, found = op.run[i](params["layers"][str(i)], x, rows)
                    seen += (found,)
                seen = stack(*seen)
            out = (seen,)
        if returns_x:
            out += (x,)
        if returns_nats:
            out += loss.sums_of_rows(op, model.nats_and_gap(cfg, op, params, x, batch["targets"])[0], batch["loss_weights"])
        return out

    return probe


def names(layers, last=True, by_row=False):
    """Returns the names of a stage's outputs: seen [layers, SEEN]; x_RD, for the next stage; and for each row of a data rank nats_B, the
    sum of the targets' nats times their weights, and weights_B, the sum of these weights."""
    return ("seen",) * bool(layers) + ("x",) * (not last) + ("nats", "weights") * (last and by_row)


def watched_rows(cfg, op, batch):
    """Returns qwen3.model.rows_of with two more entries: valid_R (also for a dense model), and own_segments [B, S], of this rank's
    tokens."""
    rows = model.rows_of(cfg, op, batch["positions"], batch["segment_ids"], None)
    rows["valid"] = op.is_token(_reshape(batch["segment_ids"], (-1,)), "tokens -> tokens>rows")
    rows["own_segments"] = batch["segment_ids"]
    return rows


def watch(cfg, op, p, x, h, y, rows):
    """Returns the statistics SEEN [4] of a layer. x_RD: its input; h_RD: the input of its feed-forward layer; y_RD: its output."""
    squares, tokens = op.sum_squares(y, rows["valid"], "rows embed, rows ->"), op.count(rows["valid"], "rows ->")
    entropy = moe.router_entropy(cfg, op, p["moe"], h, rows) if "moe" in p else tokens * 0
    top = largest_logit(cfg, op, p["attention"], model.attention_input(cfg, op, p, x), rows)
    return _concat((_reshape(squares, (1,)), _reshape(entropy, (1,)), _reshape(tokens, (1,)), _reshape(top, (1,))))
