"""The loss of a batch of sampled answers with rewards, in any layout without a pipeline and without context parallelism.

Dims: B rows, S tokens. A row has a prompt and one answer to it. The batch is that of qwen3.model.loss_fn, with more in it, float32 [B, S]:

    loss_weights  1 on the tokens of an answer that counts, else 0
    advantages    that of the answer, on each of its tokens
    sampled       the log-probability with which each token of the answer was sampled
    reference     the log-probability of each target under the reference model, if rl.kl_coef is not 0
    denominators  on the first token of each answer what it adds to the denominator of the loss: see losses.denominators
"""

from mindspore import ops

from experiments.posttrain import losses
from experiments.posttrain.settings import rl_settings
from ops.rearrange import rearrange
from qwen3 import model
from qwen3.model import metric_names

SUMS = ("clipped", "kl", "drift")
exp, maximum, absolute, expand = ops.Exp(), ops.Maximum(), ops.Abs(), ops.ExpandDims()


def names(cfg):
    """Returns the keys of the metrics that the graph returns. Those of SUMS are sums over the tokens of the whole batch."""
    return metric_names(cfg) + SUMS


class Policy:
    """loss_fn(params, batch) -> (loss, metrics), for the loss that config.rl names. The other arguments: see qwen3.model.build."""

    def __init__(self, config, cfg, sharding, scan, kernels, recompute, loss_chunks):
        self.cfg, self.settings = cfg, rl_settings(config)
        self.op = model.build(cfg, sharding, scan, kernels, recompute, loss_chunks).op

    def loss_fn(self, params, batch):
        return loss_of_answers(self.cfg, self.op, self.settings, params, batch)


def loss_of_answers(cfg, op, s, params, batch):
    """batch -> (loss, metrics), in any layout. s: settings.RLSettings. metrics["loss"] is that of the answers of all ranks; loss adds the
    losses of MoE."""
    B, S = batch["tokens"].shape
    rows = model.rows_of(cfg, op, batch["positions"], batch["segment_ids"], batch["noise"] if op.noises else None)
    x, stats = op.layers(params["layers"], model.embed(cfg, op, params, batch["tokens"]), rows)
    logp = -model.nats_and_gap(cfg, op, params, x, batch["targets"])[0]
    logp, mask = rearrange(logp, "(batch seq) 1 -> batch seq", {"batch": B, "seq": S}), batch["loss_weights"]

    length = op.sum_seq(mask, "batch seq -> batch")
    log_ratio = (logp - batch["sampled"]) * mask
    drift = absolute(log_ratio)
    if s.loss == "gspo":
        log_ratio = losses.mean_log_ratio(op.sum_seq(log_ratio, "batch seq -> batch"), length)
    each, held = losses.clipped(s, exp(log_ratio), batch["advantages"])
    kl = losses.k3(logp, batch["reference"]) * mask if s.kl_coef else mask * 0
    of_answer = losses.of_each_answer(s, op.sum_seq(each * mask + s.kl_coef * kl, "batch seq -> batch"), length)
    denominator = op.sum(batch["denominators"], "batch seq ->")
    loss = op.sum(expand(of_answer, 1), "batch answers ->") / maximum(denominator, 1e-9)
    metrics = {
        "loss": loss,
        "tokens": op.sum(mask, "batch seq ->"),
        "clipped": op.sum(held * mask, "batch seq ->"),
        "kl": op.sum(kl, "batch seq ->"),
        "drift": op.sum(drift, "batch seq ->"),
    }
    return model.with_router_losses(cfg, op, stats, loss, metrics)


def finished(metrics):
    """Returns the metrics of an update as numbers, with the sums over tokens divided by their count.

    clipped   the share of tokens whose ratio is beyond a bound, so that they have no gradient
    kl        the mean of k3 against the reference model; 0 without one
    drift     the mean of |log pi - the log-probability of sampling|: rounding alone in the first update, then how far the policy has moved
    """
    return {**metrics, **{name: metrics[name] / max(metrics["tokens"], 1.0) for name in SUMS}}
