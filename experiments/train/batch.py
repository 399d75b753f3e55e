"""What a training step does on the host: the micro-batches that go into its graphs, and the metrics that come out of them."""

import mindspore as ms
import numpy as np

from experiments.data.loader import rank_rows
from parallel import collectives
from parallel.random import hash_bits
from parallel.sharding import DATA
from qwen3.model import drops, metric_names

SUMS = ("tokens", "expert_overflow")  # metrics that add up over micro-batches; the others are weighted means


def with_noise(cfg, config, mesh, batch, at):
    """The batch of step `at` with the integers of which dropout draws, where the model has dropout. They depend on the run's seed, the step
    and the token's place in the global batch."""
    if not drops(cfg):
        return batch
    rows, length = batch["tokens"].shape
    mine = np.array(rank_rows(rows * mesh.dp, mesh.index(("dp",)), mesh.dp, config.parallel.micro_batches), np.uint64)
    place = mine[:, None] * np.uint64(length) + np.arange(length, dtype=np.uint64)
    return {**batch, "noise": hash_bits(config.train.seed, at, place).view(np.int32)}


def split_batch(batch, count):
    """`count` slices of a batch's rows."""
    rows = len(batch["tokens"]) // count
    return [{key: value[i * rows : (i + 1) * rows] for key, value in batch.items()} for i in range(count)]


def shares(mesh, slices):
    """Each micro-batch's share of the loss weight, over all data ranks, which call it together; equal shares where nothing has weight."""
    weights = np.array([part["loss_weights"].sum(dtype=np.float64) for part in slices])
    weights = np.asarray(collectives.host_sum(mesh, DATA, weights), np.float64)
    return weights / weights.sum() if weights.sum() else np.full(len(weights), 1 / len(weights))


def tensors(batch):
    return {key: ms.Tensor(np.ascontiguousarray(value)) for key, value in batch.items()}


def metric_weight(name, share):
    """The factor on a metric of a micro-batch in the sum over a step's. share: the micro-batch's share of the loss weight."""
    return 1.0 if name in SUMS else share


def metrics_of(cfg, config, lr, objective, aux, norm, skipped):
    """A step's metrics as numbers and lists. aux: the values of metric_names; norm: the gradient's; skipped: 1 where the update was."""
    metrics = {name: number(value) for name, value in zip(metric_names(cfg), aux)}
    metrics.update(objective=number(objective), grad_norm=number(norm), lr=lr)
    if cfg.moe_layers:
        metrics["expert_load_max"] = float(np.max(metrics["expert_load"]) * cfg.num_experts)  # of any expert, over the mean
    return {**metrics, "skipped": number(skipped)} if config.optim.skip_spikes else metrics


def number(value):
    """A float, or lists of floats, of a tensor, an array or a number."""
    return (value.asnumpy() if hasattr(value, "asnumpy") else np.asarray(value)).tolist()
