"""The gradients of a step with --lowering=shard under pipeline parallelism, which is MindSpore's own.

MindSpore is given all stages as Cells in one program of global arrays. Each rank compiles the Cell of its own stage alone, for every
micro-batch, with the messages to the neighbouring stages, and runs them in the order 1F1B. The result of a stage's Cell must be one tensor
that an op makes ("is not a Pipeline Care Node"). So the residual stream x_RD alone goes from stage to stage, and a mixture of experts,
whose router statistics would have to go with it, is refused (experiments/layout/check.py).

Only ranks of the last stage get a loss. Elsewhere MindSpore puts a constant in its place, and refuses a program with metrics beside it.
"""

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from experiments.train.batch import metric_weight, number, shares, split_batch
from parallel import collectives
from parallel.graph.source import function
from parallel.mesh import Mesh
from parallel.pipeline.schedule import stage_ranges
from parallel.trees import tree_paths, unflatten
from qwen3.model import metric_names
from qwen3.stages import build_stage, stage_specs

SUM = "accu_grads"  # the name by which MindSpore finds the sum of a Parameter's gradients, before that of the Parameter


def network(cfg, config, sharding, kernels, tree, keys):
    """Returns the Cell f(*tensors of a batch called `keys`) -> loss, or on ranks of the last stage (loss, metrics).

    tree: the Parameters of the model. keys: end with "shares", see with_shares.
    """
    pp, parallel = sharding.mesh.pp, config.parallel
    layers = stage_ranges(cfg.num_layers, pp, parallel.virtual_stages, tuple(parallel.stage_layers))
    has_metrics, by_path = sharding.mesh.index(("pp",)) == pp - 1, dict(tree_paths(tree))
    total = sharding.op(ops.ReduceSum(), "batch seq ->", kind="reduction", wrap=_over_all)
    batch, cells = ", ".join(f'"{key}": batch[{i}]' for i, key in enumerate(keys)), []
    for at, own in enumerate(layers):
        first, last = at == 0, at == pp - 1
        specs = stage_specs(cfg, own, first, last)
        run = build_stage(cfg, sharding, kernels, own, first, last, config.train.recompute, config.train.loss_chunks)
        arrays = unflatten(specs, [by_path[path] for path, _ in tree_paths(specs)])
        head, carried = ("stage(batch)", "()") if first else ("stage(x, batch)", "(x,)")
        lines, result = [f"out = run(arrays, {carried}, {{{batch}}})"], "out[0]"
        if last:
            lines.append(f"share = total(batch[{len(keys) - 1}])")
            metrics = [f"{metric_weight(name, 'share')} * out[1]['{name}']" for name in metric_names(cfg)]
            result = ", ".join(["share * out[0]", *(metrics if has_metrics else ())])
        stage = function(head, [*lines, f"return {result}"], run=run, arrays=arrays, total=total)
        cells.append((_First if first else _Later)(stage))
        cells[-1].pipeline_stage = at
    return _MicroBatches(_Stages(*cells), parallel.micro_batches, has_metrics)


def with_shares(batch, micro_batches):
    """Returns the batch with "shares" [rows, S], whose sum over a micro-batch is its share of the step's loss weight."""
    slices = split_batch(batch, micro_batches)
    each = shares(Mesh(), slices) / slices[0]["tokens"].size  # every rank has the global batch
    of_rows = np.repeat(each, len(slices[0]["tokens"])).astype(np.float32)
    return {**batch, "shares": np.broadcast_to(of_rows[:, None], batch["tokens"].shape)}


def on_all_ranks(mesh, names, loss, metrics):
    """Returns (loss, [metrics called `names`]) as numbers, on every rank. metrics: () on ranks of other stages than the last."""
    has = mesh.index(("pp",)) == mesh.pp - 1
    values = [number(loss), *map(number, metrics)] if has else np.zeros(1 + len(names))
    loss, *metrics = collectives.host_sum(mesh, ("pp",), values).tolist()
    return loss, metrics


def _over_all(reduce):
    def total(x):
        return reduce(x, ())

    return total


class _First(nn.Cell):
    def __init__(self, stage):
        super().__init__()
        self.stage = stage

    def construct(self, batch):
        return self.stage(batch)


class _Later(nn.Cell):
    def __init__(self, stage):
        super().__init__()
        self.stage = stage

    def construct(self, x, batch):
        return self.stage(x, batch)


class _Stages(nn.Cell):
    def __init__(self, first, *later):
        super().__init__()
        self.first, self.later = first, nn.CellList(list(later))

    def construct(self, *batch):
        x = self.first(batch)
        for stage in self.later:
            x = stage(x, batch)
        return x


class _MicroBatches(nn.PipelineCell):
    """MindSpore's loop over the micro-batches; in the last stage it sums the metrics beside the loss."""

    def __init__(self, network, micro_batches, has_metrics):
        super().__init__(network, micro_batches)
        self.has_metrics, self.plus = has_metrics, ops.Add()

    def construct(self, *batch):
        loss, metrics = None, ()
        for i in range(self.micro_size):
            out = self.network(*self.micro_inputs[i](i, *batch))
            if not self.has_metrics:
                loss = out if loss is None else self.add_list[i](loss, out)
            elif loss is None:
                loss, metrics = out[0], out[1:]
            else:
                loss = self.add_list[i](loss, out[0])
                summed = ()
                for j in range(len(metrics)):
                    summed += (self.plus(metrics[j], out[j + 1]),)
                metrics = summed
        if self.has_metrics:
            return loss, metrics
        return loss


def build_gradient(network, weights, sums, zero):
    """Returns gradient(*tensors of a batch) -> ((loss, metrics), flat gradients by `weights`), for use in a graph. The metrics are () on
    ranks of other stages than the last.

    sums: flat Parameters in which MindSpore sums the gradients of the micro-batches. The caller's graph clears them. PipelineGradReducer,
    which MindSpore has for this, clears them by a product with 0, and so never again after a step whose gradient was not finite.
    """
    has_metrics, places = network.has_metrics, range(len(weights))
    value_and_grad = ms.value_and_grad(network, None, weights=ms.ParameterTuple(weights), has_aux=has_metrics)

    def gradient(*batch):
        out, grads = value_and_grad(*batch)
        if not zero:
            summed = ()
            for i in places:
                summed += (ops.depend(sums[i], grads[i]),)
            grads = summed
        if has_metrics:
            return (out[0], out[1]), grads
        return (out, ()), grads

    return gradient
