"""The loss of a batch of pairs of answers, packed into rows, in any layout without a pipeline.

Dims: B rows, S tokens, P pairs of a row, A = 2 P answers of a row. The batch is that of qwen3.model.loss_fn, with more in it [B, S]:

    segment_ids   the answers of pair k, from 0, are the documents 2k + 1, the chosen one, and 2k + 2, so that they do not see each other
    loss_weights  1 on the targets that belong to the answer, 0 on those of its prompt; of a reward model, 1 on the last token alone
    signs         float32, on the first token of each answer: 1 for a chosen or desirable one, -1 for the other; else 0. For kto, the second
                  document of a pair is an answer to another prompt, and its sign is 0
    reference     float32, the nats of each target under the reference model, if caches_reference(config)
"""

import mindspore as ms
from mindspore import ops

from experiments.posttrain import losses
from experiments.posttrain.settings import caches_reference, needs_reference, settings
from ops.rearrange import rearrange
from parallel.graph.nested import part
from qwen3 import model
from qwen3.model import metric_names, param_specs, stacked_specs

SUMS = ("pairs", "chosen", "rejected", "chosen_logp", "rejected_logp", "chosen_reward", "rejected_reward", "right")
maximum, equal, greater, cast, expand, reshape = ops.Maximum(), ops.Equal(), ops.Greater(), ops.Cast(), ops.ExpandDims(), ops.Reshape()


def names(cfg):
    """Returns the keys of the metrics that the graph returns. Those of SUMS are sums over the answers of the whole batch."""
    return metric_names(cfg) + SUMS


class Preference:
    """loss_fn(params, batch) -> (loss, metrics), for the loss that config.prefer names. The other arguments: see qwen3.model.build."""

    def __init__(self, config, cfg, sharding, scan, kernels, recompute, loss_chunks):
        self.cfg, self.settings, self.cached = cfg, settings(config), caches_reference(config)
        self.op = model.build(cfg, sharding, scan, kernels, recompute, loss_chunks).op
        self.has_base = needs_reference(config) and not self.cached
        if self.has_base:
            self.base = cfg.replace(lora=None, frozen=(("*",), ()))  # frozen as under the adapters, so gathered alike in ZeRO 3
            self.without_adapters = part(stacked_specs(self.base) if scan else param_specs(self.base))
            self.base_op = model.build(self.base, sharding, scan, kernels, loss_chunks=loss_chunks).op

    def loss_fn(self, params, batch):
        reference = batch["reference"] if self.cached else None
        if self.has_base:
            given = batch["tokens"], batch["targets"], batch["positions"], batch["segment_ids"]
            reference = ops.stop_gradient(model.score_targets(self.base, self.base_op, self.without_adapters(params), *given)[0])
        return loss_of_pairs(self.cfg, self.op, self.settings, params, reference, batch)


def loss_of_pairs(cfg, op, s, params, reference, batch):
    """batch -> (loss, metrics), in any layout. s: settings.Settings. reference_BS: nats of the targets under the reference model, or None.

    metrics["loss"] is the mean over the pairs of all ranks, and `tokens` counts the targets of answers. loss adds the losses of MoE.
    """
    B, S = batch["tokens"].shape
    rows = model.rows_of(cfg, op, batch["positions"], batch["segment_ids"], batch["noise"] if op.noises else None)
    x, stats = op.layers(params["layers"], model.embed(cfg, op, params, batch["tokens"]), rows)
    if s.loss == "reward":
        logp = model.scores(cfg, op, params, x)  # the score head's, which takes the place of the log-probability
    else:
        logp = -model.nats_and_gap(cfg, op, params, x, batch["targets"])[0]
    logp, weights = rearrange(logp, "(batch seq) 1 -> batch seq", {"batch": B, "seq": S}), batch["loss_weights"]

    documents = documents_of_rows(op, batch["segment_ids"], 2 * s.row_pairs)
    sign, logps = sums(op, batch["signs"], documents), sums(op, logp * weights, documents)
    score = logps if reference is None else sums(op, (logp + reference) * weights, documents)
    if s.length_normalised or s.loss == "simpo":
        score = score / maximum(sums(op, weights, documents), 1.0)

    each, right, present = of_each_pair(op, s, score, sign)
    pairs = op.sum(present, "batch answers ->")
    loss = op.sum(each, "batch answers ->") / maximum(pairs, 1e-9)
    rewards = score if s.loss == "reward" else score * s.beta
    chosen, rejected = cast(equal(sign, 1.0), ms.float32), cast(equal(sign, -1.0), ms.float32)
    metrics = {
        "loss": loss,
        "tokens": op.sum(weights, "batch seq ->"),
        "pairs": pairs,
        "chosen": op.sum(chosen, "batch answers ->"),
        "rejected": op.sum(rejected, "batch answers ->"),
        "chosen_logp": op.sum(chosen * logps, "batch answers ->"),
        "rejected_logp": op.sum(rejected * logps, "batch answers ->"),
        "chosen_reward": op.sum(chosen * rewards, "batch answers ->"),
        "rejected_reward": op.sum(rejected * rewards, "batch answers ->"),
        "right": op.sum(right, "batch answers ->"),
    }
    return model.with_router_losses(cfg, op, stats, loss, metrics)


def of_each_pair(op, s, score, sign):
    """score, sign [B, A] of the documents -> (loss, right, present), all [B, P]. right: 1 where the scores are in the right order.
    present: 1 for a pair, 0 for a place that has none, where loss and right are 0 too."""
    pairs = {"batch": score.shape[0], "pair": s.row_pairs}
    score = rearrange(score, "batch (pair two) -> batch pair two", pairs)
    sign = rearrange(sign, "batch (pair two) -> batch pair two", pairs)
    first, second, present = score[:, :, 0], score[:, :, 1], sign[:, :, 0] * sign[:, :, 0]
    if s.loss == "kto":
        z = op.sum(second * present, "batch answers ->") / maximum(op.sum(present, "batch answers ->"), 1e-9)
        z = ops.stop_gradient(maximum(z, 0.0))
        each, gain = losses.kto(s, first, (1 + sign[:, :, 0]) / 2, z), sign[:, :, 0] * (first - z)
    else:
        each, gain = losses.OF_PAIRS[s.loss](s, first - second), first - second
    return each * present, cast(greater(gain, 0.0), ms.float32) * present, present


def documents_of_rows(op, segment_ids, count):
    """segment_ids_BS -> float32 [B, count, S]: 1 where a token belongs to the document 1, 2, ... count of its row."""
    numbers = reshape(op.iota(count) + 1, (1, count, 1))
    return cast(equal(expand(segment_ids, 1), numbers), ms.float32)


def sums(op, x, documents):
    """x_BS, documents [B, A, S] -> [B, A]: the sum of x over the tokens of each document, on all ranks that share a row."""
    B, A, S = documents.shape
    each = op.sum_seq(reshape(expand(x, 1) * documents, (B * A, S)), "batch seq -> batch")
    return reshape(each, (B, A))


def finished(metrics, loss):
    """Returns the metrics of a step or of an evaluation, as numbers, with the sums over answers divided by their counts. loss: prefer.loss.

    accuracy        the share of pairs whose chosen answer has the larger score; for kto, of answers on the right side of the reference
    reward_margin   the mean reward of chosen answers minus that of rejected ones; a reward is beta times the score, or the score head's
    """
    out = {name: value for name, value in metrics.items() if name not in SUMS[1:]}
    chosen, rejected = (max(metrics[name], 1e-9) for name in ("chosen", "rejected"))
    for name in ("reward",) if loss == "reward" else ("logp", "reward"):
        out[f"chosen_{name}"], out[f"rejected_{name}"] = metrics[f"chosen_{name}"] / chosen, metrics[f"rejected_{name}"] / rejected
    out["reward_margin"] = out["chosen_reward"] - out["rejected_reward"]
    return {**out, "accuracy": metrics["right"] / max(metrics["pairs"], 1e-9)}
