"""Estimates when each op of a dry run would start and end on the device, and how much of its communication runs under computation.

MindSpore queues the ops of a step on streams: computation on one, the collectives of each group of ranks on another. A stream runs its
queue in order, beside the others, and events make one stream wait for another. tracker_graph.ir has ops and events in the order in which
they were queued, so this order and these waits are those of the compiled step. Durations are those of a cost model, Machine, whose figures
are assumptions: nothing was measured on an NPU. The time that the host takes to queue an op, and waiting for other ranks, are left out.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ITEMSIZE = {"float64": 8, "int64": 8, "uint64": 8, "float32": 4, "int32": 4, "uint32": 4, "bfloat16": 2, "float16": 2, "int16": 2}
ITEMSIZE |= {"uint16": 2, "bool": 1, "uint8": 1, "int8": 1}
NAMES = {"AllToAll": "AlltoAll", "DistCommIsend": "Send", "DistCommIrecv": "Receive"}  # name on the device -> name in this project
TRANSFERS = ("Send", "Receive")
COPIES = ("Muls", "Mul")  # outside of graphs: parallel.graph.jit.in_device_memory copies the inputs of the first step with these


@dataclass(frozen=True)
class Machine:
    """Assumed rates of one NPU, in FLOP and bytes a second: nodes of 8 NPUs with 64 GB each.

    flops: of bfloat16 matrix products. products: fraction of it that products reach. memory: what the vector units read and write.
    inside, between: bytes that a rank sends inside a node of `node` neighbouring ranks, and between nodes. call_s: latency of a collective.
    """

    flops: float = 350e12
    products: float = 0.5
    memory: float = 1.2e12
    inside: float = 150e9
    between: float = 20e9
    call_s: float = 20e-6
    node: int = 8

    def rate(self, ranks):
        """Returns the bytes a second that a rank sends in a group of ranks, which are sorted. Between pipeline stages, which have no ranks
        here, it is the rate inside a node."""
        return self.inside if not ranks or ranks[0] // self.node == ranks[-1] // self.node else self.between


class Task(NamedTuple):
    """An op, or an event, in the queue of a stream.

    kind: such as MatMul, AllGather, RecordEvent. view: whether the result is the operand itself. event: its number, or None. ranks: of a
    collective, or (). results, operands: ((shape, bytes of an element), ...) of tensors.
    """

    kind: str
    stream: int
    view: bool
    event: int | None
    ranks: tuple
    results: tuple
    operands: tuple


# Matches `(%2) = Default/MatMul-op0(%1, %0), task_info: 9, attrs {stream_id=0} ` and the next line, which has the types of the results and
# of the operands: `    (Float32:[2, 4]) <- (Float32:[2, 3], Float32:[3, 4])`.
TASK = re.compile(r"^\((.*?)\) = (?:\S*/)?(\w+?)(-op\d+)?\((.*?)\), task_info: \d+, attrs \{(.*?)\} *\n\s+\((.*?)\) <- \((.*)\)$", re.M)
TENSOR = re.compile(r"(\w+):\[([\d, ]*)\]")


def read_tasks(path):
    """Returns the Tasks of a tracker_graph.ir, in the order in which they were queued."""
    out = []
    for results, kind, in_graph, operands, attrs, made, taken in TASK.findall(Path(path).read_text(encoding="utf-8")):
        if kind in COPIES and not in_graph:
            continue
        given = dict(each.split("=", 1) for each in attrs.split(";") if "=" in each)
        view = bool(results) and results.split(", ")[0] in operands.split(", ") and kind == "Reshape"
        event = int(given["event"]) if "event" in given else None
        ranks = tuple(map(int, given.get("comm_rank", "").split()))
        out.append(Task(NAMES.get(kind, kind), int(given.get("stream_id", 0)), view, event, ranks, _tensors(made), _tensors(taken)))
    return out


def _tensors(text):
    found = TENSOR.findall(text)
    return tuple((tuple(int(n) for n in shape.split(",") if n.strip()), ITEMSIZE[dtype.lower()]) for dtype, shape in found)


def seconds(task, machine):
    """Returns the duration of a task by the cost model."""
    if task.event is not None or task.view:
        return 0.0
    sizes = [math.prod(shape) * size for shape, size in task.results + task.operands]
    if task.ranks:
        whole = sum(sizes[: len(task.results)] if task.kind == "AllGather" else sizes[len(task.results) :])
        n = len(task.ranks)
        return (2 if task.kind == "AllReduce" else 1) * (n - 1) / n * whole / machine.rate(task.ranks) + machine.call_s
    if task.kind in TRANSFERS:
        return max(sizes) / machine.rate(()) + machine.call_s
    return max(flops(task) / (machine.flops * machine.products), sum(sizes) / machine.memory)


def flops(task):
    """Returns the FLOPs of a matrix product or of attention (half of its scores, as it is causal); 0 for any other op."""
    shapes = [shape for shape, _ in task.operands]
    if "GroupedMatmul" in task.kind:
        return 2 * math.prod(shapes[0]) * task.results[0][0][-1]
    if task.kind in ("MatMul", "MatMulExt", "BatchMatMul", "BatchMatMulExt"):
        out = task.results[0][0]
        return 2 * math.sqrt(math.prod(shapes[0]) * math.prod(shapes[1]) * math.prod(out) / math.prod(out[:-2]))
    if task.kind.startswith("FlashAttentionScore"):
        keys = shapes[1][1] if len(shapes[1]) == 4 else shapes[1][0]  # [B, T, K, H] or [T, K, H]
        return 2 * math.prod(shapes[0]) * keys * (2.5 if task.kind.endswith("Grad") else 1)
    return 0


class Timeline(NamedTuple):
    """Seconds by the cost model. total: from the first op to the last. compute: of the ops on the streams of computation.

    sent, exposed: {(kind, ranks): seconds} of the collectives of a group of ranks: their durations, and the time in which the
    computation waits for one of them, and so for those that are queued before it.
    """

    total: float
    compute: float
    sent: Counter
    exposed: Counter


def timeline(tasks, machine):
    """Runs the queues of the streams and returns their Timeline."""
    clock, recorded, last = Counter(), {}, {}  # of each stream; event -> (moment, communication before it); stream -> (kind, ranks)
    compute, sent, exposed = 0.0, Counter(), Counter()
    for task in tasks:
        if task.kind == "RecordEvent":
            recorded[task.event] = clock[task.stream], last.get(task.stream)
        elif task.kind == "WaitEvent":
            moment, cause = recorded.get(task.event, (0.0, None))
            if moment > clock[task.stream]:
                if cause and task.stream not in last:  # computation waits for communication
                    exposed[cause] += moment - clock[task.stream]
                clock[task.stream] = moment
        else:
            took = seconds(task, machine)
            clock[task.stream] += took
            if task.ranks or task.kind in TRANSFERS:
                last[task.stream] = task.kind, task.ranks
                sent[last[task.stream]] += took
            else:
                compute += took
    return Timeline(max(clock.values(), default=0.0), compute, sent, exposed)
