"""A step compiled for one rank of a simulated cluster, and what MindSpore says of it: every buffer's size and life, every collective.

A process of its own, in an environment of parallel/simulation/standin.py, compiles the step and calls it; nothing is computed. MindSpore then writes
a row for every block of device memory that its allocator gave out (memory_tracker) and a line for every op that it ran, with shapes and
ranks; those are read here. What is counted: every tensor that the step is given, makes or returns. What is not: see MARGIN.
"""

import csv
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from parallel.simulation import standin

VERSIONS = ("2.7.1", "2.10.0")  # whose logs and files this has read
RESULT = "RESULT "  # before the line of JSON that the process prints
# what parallel.step.in_device_memory makes of a tensor from the host, as MindSpore 2.7.1 and 2.10.0 name it
COPIED = (("PyNativeOutput", "Mul"), ("PyNativeOutput", "Muls"))
HEADER, ALIGNMENT = 32, 512  # bytes that the allocator adds to a tensor's, and to multiples of which it then rounds up
ITEMSIZE = {"float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "bool": 1, "uint8": 1, "int8": 1, "float64": 8}
NAMES = {"AllToAll": "AlltoAll"}  # what the device's own form of a collective is called -> what it is in the graph

# What simulation does not count, in GiB: the two buffers of 200 MB that CANN's communication library takes for each group of ranks
# (HCCL_BUFFSIZE's default), and for kernels' workspaces and the runtime a round figure, as nothing here can measure them.
MARGIN_PER_GROUP_GIB = 0.4
MARGIN_GIB = 2.0


class Block(NamedTuple):
    """Device memory from one moment to another, in the tracker's own clock. kind: input, weight (a Parameter), constant or kernel. name: of
    what made it."""

    first: int
    last: int
    size: int
    kind: str
    name: str
    graph: str


class Exchange(NamedTuple):
    """A collective: its kind, the ranks, the elements of the whole that they exchange, and the bytes of one. A Send or Receive between
    pipeline stages does not say its ranks."""

    kind: str
    ranks: tuple
    elements: int
    itemsize: int

    def sent(self):
        """Bytes that a rank sends in a ring, as parallel.simulation.traffic.Call counts them."""
        n = len(self.ranks)
        if not n:
            return self.elements * self.itemsize if self.kind == "Send" else 0
        return (2 if self.kind == "AllReduce" else 1) * (n - 1) * self.elements * self.itemsize // n


@dataclass(frozen=True)
class Trace:
    """What one process left. said: the JSON that it printed. exchanges: Counter of Exchange. lines: {graph and node: source line}."""

    said: dict
    blocks: tuple
    exchanges: Counter
    lines: dict
    with_fragments: int
    wall_s: float


def unavailable():
    """Why there can be no dry run on this machine, with the fix; None if there can."""
    version = importlib.metadata.version("mindspore")
    if version not in VERSIONS:
        known = " and ".join(VERSIONS)
        return f"the dry run reads what MindSpore {known} writes, and this is {version}; pip install mindspore=={VERSIONS[-1]}"
    return standin.unavailable()


def trace(module, job, world, rank, folder, variables=None, timeout_s=3600):
    """The Trace of `python -m module job.json` as rank `rank` of `world` simulated NPUs. folder: an empty one, for what MindSpore
    writes. variables: more of its environment.

    Raises RuntimeError with the end of what it printed where it fails.
    """
    folder = Path(folder)
    (folder / "job.json").write_text(json.dumps(job))
    env = {**os.environ, **standin.environment(world, rank), **_verbose(folder), **(variables or {})}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), env["PYTHONPATH"]])
    began = time.perf_counter()
    with open(folder / "log", "w+", encoding="utf-8", errors="replace") as log:
        command = [sys.executable, "-m", module, str(folder / "job.json")]
        done = subprocess.run(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT, timeout=timeout_s)
        wall_s = time.perf_counter() - began
        log.seek(0)
        text = log.read()
    said = re.search(f"^{RESULT}(.*)$", text, re.M)
    if done.returncode or not said:
        raise RuntimeError(f"rank {rank} of {world}: the step did not compile (status {done.returncode}):\n{_complaint(text)}")
    found = folder / f"rank_{rank}"
    blocks = read_blocks(found / "memory_block.csv")
    return Trace(json.loads(said[1]), blocks, read_exchanges(found / "tracker_graph.ir"), _lines(found), _fragmented(text), wall_s)


def _verbose(folder):
    """Variables that make MindSpore write what is read here, into a folder."""
    return {
        "GLOG_v": "2",  # the peak is a warning
        "MS_ALLOC_CONF": "memory_tracker:True,memory_tracker_path:./",
        "MS_DEV_SAVE_GRAPHS": "2",
        "MS_DEV_SAVE_GRAPHS_PATH": str(folder),
        "MS_DEV_DUMP_IR_PASSES": "hwopt_d_after_stream_assign",  # the one with names as the tracker has them, and source lines
    }


def _complaint(text):
    """The end of a log, without the lines of MindSpore's own that say nothing of the error."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(("[WARNING]", "[CRITICAL]"))]
    return "\n".join(line for line in lines if "No module named 'te'" not in line)[-2500:]


def _fragmented(text):
    """The peak with what fragmentation loses, in bytes, from the allocator's last words, which are in MiB."""
    found = re.search(r"Actual peak memory usage \(with fragments\): (\d+)M", text)
    if not found:
        raise RuntimeError("MindSpore's log has no peak of memory; the step was not run, or this version words it differently")
    return int(found[1]) << 20


def read_blocks(path):
    """The Blocks of a memory_block.csv."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return tuple(_block(row) for row in rows)


def _block(row):
    of_type = {"ConstantValue": "constant", "Weight": "weight"}
    kind = of_type.get(row["type"]) or ("input" if row["task_name"].endswith("HostDSActor") else "kernel")
    if (row["type"], row["node_name"]) in COPIED:
        kind = "input"
    first, last, size = (int(row[key]) for key in ("start_time_stamp", "end_time_stamp", "size"))
    return Block(first, last, size, kind, row["node_name"], row["graph_name"])


# () = (%2) Default/AllReduce-op0(%1), ..., attrs {group=...;comm_rank=0 8;...} and the types in the line below, results first
TASK = re.compile(r"= (?:\S*/)?(\w+)-op\d+\([^\n]*comm_rank=([\d ]+)[^\n]*\n\s+\((.*?)\) <- \((.*?)\)\n")
# (%1) = DistCommIsend(%1), ... of a tensor that is sent outside of graphs
TRANSFERS = {"DistCommIsend": "Send", "DistCommIrecv": "Receive"}
TRANSFER = re.compile(r"= (" + "|".join(TRANSFERS) + r")\([^\n]*\n\s+\((.*?)\) <- ")
TENSOR = re.compile(r"(\w+):\[([\d, ]*)\]")


def read_exchanges(path):
    """Counter of the Exchanges that were run, of a tracker_graph.ir."""
    out = Counter()
    text = Path(path).read_text(encoding="utf-8")
    for kind, ranks, result, operand in TASK.findall(text):
        dtype, shape = TENSOR.search(result if kind == "AllGather" else operand).groups()
        out[Exchange(NAMES.get(kind, kind), tuple(map(int, ranks.split())), _product(shape), ITEMSIZE[dtype.lower()])] += 1
    for kind, operand in TRANSFER.findall(text):
        dtype, shape = TENSOR.search(operand).groups()
        out[Exchange(TRANSFERS[kind], (), _product(shape), ITEMSIZE[dtype.lower()])] += 1
    return out


def _product(text):
    return math.prod(int(n) for n in text.split(",") if n.strip())


NODE = re.compile(r"# Fullname with scope: \((.*?)\)\n((?:\s+# .*\n)*)")
SOURCE = re.compile(r"# In file (.*?:\d+)")
SUBGRAPH = re.compile(r"^subgraph @(kernel_graph_?\d+)", re.M)


def _lines(folder):
    """{(graph, node): the innermost source line of ours that made it}"""
    out, tree = {}, f"{Path(__file__).parents[2]}{os.sep}"
    for path in Path(folder).glob("*stream_assign*.ir"):
        text = path.read_text(encoding="utf-8")
        graph = SUBGRAPH.search(text)
        for name, comments in NODE.findall(text):
            places = [place for place in SOURCE.findall(comments) if place.startswith(tree) and "site-packages" not in place]
            ours = [place.removeprefix(tree) for place in places]
            if ours:
                out[graph[1] if graph else "", name] = ours[-1]
    return out


def timeline(blocks):
    """[(moment, bytes live from then on)], and the moment of the peak."""
    change = Counter()
    for block in blocks:
        change[block.first] += block.size
        change[block.last] -= block.size
    out, live = [], 0
    for moment in sorted(change):
        live += change[moment]
        out.append((moment, live))
    return out, max(out, key=lambda point: point[1])[0]


def peak(blocks):
    """(bytes live at the peak, the blocks that are)"""
    _, moment = timeline(blocks)
    live = [block for block in blocks if block.first <= moment < block.last]
    return sum(block.size for block in live), live


def peaks(blocks):
    """{graph: the most bytes live while it ran}. What comes before the first, and between two, counts with the one before."""
    begun = {block.first: block.graph for block in blocks if block.kind == "kernel" and block.graph}
    out, graph = {}, ""
    for moment, live in timeline(blocks)[0]:
        graph = begun.get(moment, graph)
        out[graph] = max(out.get(graph, 0), live)
    return out


def aligned(nbytes):
    """Bytes that the allocator gives out for a tensor."""
    return -(-(nbytes + HEADER) // ALIGNMENT) * ALIGNMENT


def margin_gib(exchanges):
    """What is to stay free for what simulation does not count, given the groups of ranks that exchange something."""
    return MARGIN_GIB + MARGIN_PER_GROUP_GIB * len({exchange.ranks for exchange in exchanges if exchange.ranks})
