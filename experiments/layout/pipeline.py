"""Describes a pipeline as text without starting a process: the layers of each stage, the bytes of each rank, and the schedule."""

import math

from experiments.train.optim_rules import MOMENTS
from experiments.train.state import stage_placements
from parallel.context import split as context
from parallel.pipeline import schedule as pipeline
from parallel.placement import nbytes
from parallel.trees import tree_leaves
from qwen3.stages import carried_shapes

HEADER = ("pp rank", "layers of its stages", "parameters", "gradients", "optimizer state", "live inputs", "their bytes", "sent in a step")

NOTES = (
    "All sizes are bytes per rank. For each live micro-batch a rank keeps the input of the stage, from which the backward recomputes the",
    "forward; the input of the first stage is only tokens. Sent: inputs to the next stage, and their gradients back. Collectives inside a",
    "stage are not counted; they are those of the same layers without --pp.",
)


def lines(config, cfg, sharding):
    """Returns (rows of a table with one row per pp rank, lines of the drawn schedule)."""
    parallel, pp = config.parallel, sharding.mesh.pp
    layers, stages, _ = stage_placements(cfg, config, sharding)
    lists = pipeline.schedule(parallel.pp_schedule, pp, parallel.micro_batches, parallel.virtual_stages)
    length = context.padded(sharding.mesh, config.train.seq_len) // sharding.mesh.cp
    rows = config.train.batch_size // parallel.dp // parallel.micro_batches * length
    sizes = [_bytes(carried_shapes(cfg, sharding, each, rows)) if stage else 0 for stage, each in enumerate(layers)]
    moments = len(MOMENTS[config.optim.name])
    table = [HEADER, *(_row(sharding.mesh, rank, layers, stages, lists[rank], sizes, moments) for rank in range(pp))]
    bubble = pipeline.bubble_formula(pp, parallel.micro_batches, parallel.virtual_stages)
    legend = f"{parallel.pp_schedule}: if all stages take equally long, ranks wait {bubble:.1%} of the time. F: forward, B: backward"
    return table, [legend, *pipeline.draw(lists)]


def _row(mesh, rank, layers, stages, actions, sizes, moments):
    mine = range(rank, len(layers), mesh.pp)
    placed = [p for s in mine for p in tree_leaves(stages[s])]
    trained = [p for p in placed if p.spec.trains]
    parameters, gradients = (sum(nbytes(mesh, p, axes) for p in of) for axes, of in (("stored", placed), ("state", trained)))
    sent = sum(sizes[a.action.stage + (not isinstance(a.action, pipeline.Forward))] for a in actions if isinstance(a, pipeline.Send))
    texts = [_layers(s, layers) for s in mine]
    each = (parameters, gradients, moments * gradients)
    return str(rank), ", ".join(texts), *(f"{n:,}" for n in each), str(pipeline.live(actions)), f"{_kept(actions, sizes):,}", f"{sent:,}"


def _layers(stage, layers):
    """Returns the content of a stage, such as "embedding 0-3" or "4-7 head"."""
    own = layers[stage]
    numbers = [f"{own[0]}-{own[-1]}" if len(own) > 1 else str(own[0])] if own else []
    return " ".join(["embedding"] * (stage == 0) + numbers + ["head"] * (stage == len(layers) - 1))


def _kept(actions, sizes):
    """Returns the largest number of bytes of stage inputs that a rank keeps at the same time."""
    now = most = 0
    for action in actions:
        if isinstance(action, pipeline.Forward):
            now += sizes[action.stage]
        elif isinstance(action, pipeline.Backward):
            now -= sizes[action.stage]
        most = max(most, now)
    return most


def _bytes(shapes):
    return sum(math.prod(shape) * (2 if "16" in str(dtype) else 4) for shape, dtype in shapes)
