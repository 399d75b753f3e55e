"""Host code of a training step: makes the micro-batches that its graphs take, and the metrics from what they return."""

import mindspore as ms
import numpy as np

from experiments.data.loader import rank_rows
from experiments.posttrain import policy, preference
from parallel import collectives
from parallel.context import split as context
from parallel.random import hash_bits
from parallel.sharding import DATA
from qwen3.model import drops

SUMS = (
    "tokens",
    "expert_overflow",
    *preference.SUMS,
    *policy.SUMS,
)  # metrics that are summed over micro-batches; all others are weighted means


def with_dropout_seeds(cfg, config, mesh, batch, at):
    """Adds "noise" to the batch of step `at` if the model has dropout: an int32 seed for each token, [rows, S].

    A seed depends on train.seed, the step and the token's position in the global batch, so it is the same in every layout.
    """
    if not drops(cfg):
        return batch
    rows, length = batch["tokens"].shape
    mine = np.array(rank_rows(rows * mesh.dp, mesh.index(("dp",)), mesh.dp, config.parallel.micro_batches), np.uint64)
    place = mine[:, None] * np.uint64(length) + np.arange(length, dtype=np.uint64)
    return {**batch, "noise": hash_bits(config.train.seed, at, place).view(np.int32)}


def tokens_of_rank(sharding, batch):
    """Returns this rank's tokens of a batch of full rows, see parallel.context.split. Raises ValueError if a row has more documents than
    sharding.documents."""
    context.check_documents(sharding.mesh, sharding.documents, batch)
    return context.cut(sharding.mesh, batch)


def split_batch(batch, count):
    """Splits the rows of a batch into `count` micro-batches of equal size."""
    rows = len(batch["tokens"]) // count
    return [{key: value[i * rows : (i + 1) * rows] for key, value in batch.items()} for i in range(count)]


def shares(mesh, slices):
    """Returns each micro-batch's share of the denominator of the loss, summed over all data ranks; equal shares if no
    target has weight. Collective."""
    weights = np.array([_weight(micro_batch) for micro_batch in slices])
    weights = np.asarray(collectives.host_sum(mesh, DATA, weights), np.float64)
    return weights / weights.sum() if weights.sum() else np.full(len(weights), 1 / len(weights))


def _weight(batch):
    if "denominators" in batch:
        return batch["denominators"].sum(dtype=np.float64)
    if "signs" in batch:
        return np.abs(batch["signs"]).sum(dtype=np.float64)
    return batch["loss_weights"].sum(dtype=np.float64)


def over_micro_batches(mesh, batch, count, names, compute):
    """Returns (loss, metrics called `names`) of a step of `count` micro-batches; see shares() for `mesh`.

    compute(share, micro-batch) -> (loss, metrics) of one of them; it also accumulates the gradients.
    """
    loss, aux, slices = 0.0, [0.0] * len(names), split_batch(batch, count)
    for share, micro_batch in zip(shares(mesh, slices), slices):
        one_loss, one_aux = compute(share, micro_batch)
        loss += share * number(one_loss)
        aux = [a + metric_weight(name, share) * x.asnumpy() for name, a, x in zip(names, aux, one_aux)]
    return loss, aux


def mean_over_targets(losses):
    """Returns the mean, in nats per target, of pairs of tensors (nats per target, number of targets)."""
    nats, targets = 0.0, 0.0
    for loss, count in losses:
        loss, count = number(loss), number(count)
        nats, targets = nats + loss * count, targets + count
    return nats / max(targets, 1.0)


def blank(rows, seq_len):
    """Returns a batch in which no target counts, for compiling."""
    ints = ("tokens", "targets", "segment_ids", "positions")
    return {**{key: np.ones((rows, seq_len), np.int32) for key in ints}, "loss_weights": np.zeros((rows, seq_len), np.float32)}


def tensors(batch):
    return {key: ms.Tensor(np.ascontiguousarray(value)) for key, value in batch.items()}


def metric_weight(name, share):
    """Returns the factor of a micro-batch's metric in the sum over the step. share: the micro-batch's share of the loss weight."""
    return 1.0 if name in SUMS else share


def metrics_of(cfg, config, names, lr, objective, aux, norm, skipped):
    """Returns a step's metrics as numbers and lists. aux: values of the metrics called `names`; norm: gradient norm; skipped: 1 if no
    update was made."""
    metrics = {name: number(value) for name, value in zip(names, aux)}
    if config.prefer.loss:
        metrics = preference.finished(metrics, config.prefer.loss)
    elif config.rl.loss:
        metrics = policy.finished(metrics)
    metrics.update(objective=number(objective), grad_norm=number(norm), lr=lr)
    if cfg.moe_layers:
        metrics["expert_load_max"] = float(np.max(metrics["expert_load"]) * cfg.num_experts)  # busiest expert over the mean
    return {**metrics, "skipped": number(skipped)} if config.optim.skip_spikes else metrics


def number(value):
    """Converts a tensor, an array or a number to a float or to lists of floats."""
    return (value.asnumpy() if hasattr(value, "asnumpy") else np.asarray(value)).tolist()
