"""Computes and writes the metrics of a run: FLOPs per token, MFU, metrics.jsonl, TensorBoard and the plot of the loss."""

import json
import math
import os
import time

import mindspore as ms
import numpy as np

from experiments.watch.records import METRICS, read_records
from ops.registry import choose, pick
from parallel import collectives
from parallel.checkpoint.files import write_text
from parallel.trees import tree_paths
from qwen3.model import param_specs


def flops_per_token(cfg, seq_len):
    """Returns the training FLOPs per token: 6 x (active non-embedding parameters + head) + causal attention. Frozen parameters count 4
    instead of 6, because they have no gradients. Recomputation is not counted."""
    flops, head = 0, None
    for path, spec in tree_paths(param_specs(cfg)):
        each = 6 if spec.trains else 4
        if path in ("embed", "lm_head"):
            head = each * cfg.vocab_size * cfg.hidden_size
            continue
        share = cfg.experts_per_token / cfg.num_experts if "experts" in spec.dims else 1
        flops += each * math.prod(spec.shape) * share
    attention = cfg.num_layers * cfg.num_heads * cfg.head_dim * seq_len  # scores and weighted sum of values; half of them are masked
    return flops + (0 if cfg.num_labels else head) + 6 * attention


def peak_flops(repeats=5, dtype="float32"):
    """Measures the FLOP/s of this device's fastest matmul implementation. Returns the best of `repeats` runs.

    dtype: of the operands. A run on an NPU has larger operands and several products, each of the result of the one before, so that starting
    the kernels and reading the result take little of the time.
    """
    on_cpu = ms.get_context("device_target") == "CPU"
    size, products = (1536, 1) if on_cpu else (8192, 10)
    a = ms.Tensor(np.full((size, size), 1 / size, np.float32)).astype(getattr(ms, dtype))  # its powers are equal to it
    matmul, best = pick(choose({}, ms.get_context("device_target"), dtype), "matmul")(), 0.0
    for _ in range(repeats):
        start, x = time.perf_counter(), a
        for _ in range(products):
            x = matmul(x, a)
        (x if on_cpu else x[:1].float()).asnumpy()
        best = max(best, products * 2 * size**3 / (time.perf_counter() - start))
    return best


def mesh_peak_flops(mesh, dtype="float32"):
    """Returns the sum of peak_flops over all ranks; 0 in simulation, where nothing is computed. They measure at the same time, because
    ranks that share a machine also train at the same time."""
    return float(collectives.host_sum(mesh, tuple(mesh.sizes), [peak_flops(dtype=dtype)])[0])


def held_out(nats, bytes_per_target=None):
    """Returns the metrics of an evaluation loss in nats per target: eval_loss, perplexity, and bits_per_byte if bytes_per_target is
    given. Of preferences and rewards, whose evaluation is a dict of metrics, it returns those as eval_loss, eval_accuracy and so on."""
    if isinstance(nats, dict):
        return {f"eval_{name}": value for name, value in nats.items()}
    values = {"eval_loss": nats, "perplexity": math.exp(min(nats, 700.0))}  # exp of more overflows a float
    return {**values, "bits_per_byte": nats / math.log(2) / bytes_per_target} if bytes_per_target else values


class Writer:
    """Writes the metrics of a run: one JSON object per line to `metrics.jsonl`, numbers also to `tensorboard/`. `records` has all of them.

    workdir: the run's folder; None, for ranks that do not write, keeps only `records`. begun: the step from which a resumed run continues.
    Lines of later steps, which an earlier process wrote, are removed, because these steps run again. trackers: Trackers, which get the
    numbers too, and which the Writer closes; None = none.
    """

    def __init__(self, workdir, begun=0, trackers=None):
        self.records, self.silent, self.trackers = [], workdir is None, trackers
        if not self.silent:
            path = os.path.join(workdir, METRICS)
            if begun:
                self.records = [record for record in read_records(path) if record["step"] <= begun]
                write_text(path, "".join(json.dumps(record) + "\n" for record in self.records))
            self.file = open(path, "a", encoding="utf-8")
            from tensorboardX import SummaryWriter  # imported here because it imports torch where that is installed

            self.board = SummaryWriter(os.path.join(workdir, "tensorboard"), purge_step=begun + 1 if begun else None)

    def write(self, step, values):
        """Writes the metrics of a step. values: {name: number or list of numbers}; lists go to the file only."""
        self.records.append({"step": step, **values})
        if self.silent:
            return
        self.file.write(json.dumps(self.records[-1]) + "\n")
        self.file.flush()
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        for name, value in numbers.items():
            self.board.add_scalar(name, value, step)
        if self.trackers:
            self.trackers.log(step, numbers)

    def sync(self):
        """Makes sure that everything written so far is on disk."""
        if not self.silent:
            os.fsync(self.file.fileno())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if not self.silent:
            self.file.close()
            self.board.close()
            if self.trackers:
                self.trackers.close()


def check(workdir, begun):
    """Raises ValueError for a metrics.jsonl that a Writer of a run that goes on could not read."""
    if begun:
        read_records(os.path.join(workdir, METRICS))


def plot_losses(path, records, bigram=None, label="cross-entropy (nats per token)", name="loss"):
    """Draws the loss curves to a PNG file. records: dicts with step, and loss, eval_loss or final_loss. bigram: the loss of a bigram model,
    drawn as a line. label: that of the losses. name: of another metric that is drawn in place of the loss."""
    from matplotlib.figure import Figure  # imported here because other ranks and the benchmarks draw nothing

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="tight")
    axes = figure.subplots()
    for prefix, which, marker in (("", "training", None), ("eval_", "held out", "o"), ("final_", "held out, all rows", "x")):
        points = [(r["step"], r[prefix + name]) for r in records if prefix + name in r]
        if points:
            axes.plot(*zip(*points), label=which, marker=marker, linewidth=1)
    if bigram is not None:
        axes.axhline(bigram, linestyle="--", color="gray", label="bigram model, held out")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
