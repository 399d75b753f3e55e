"""Dry run: compiles a step for one rank of a simulated cluster and reads from MindSpore's files its memory and its collectives.

A separate process, in an environment of parallel/simulation/standin.py, compiles the step and calls it; no values are computed. MindSpore
writes a row for every block of device memory that its allocator gives out (memory_tracker), and a line with shapes and ranks for every op
that it runs. All inputs, intermediate tensors and outputs of the step are counted. MARGIN_GIB and MARGIN_PER_GROUP_GIB allow for the rest.
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
from parallel.simulation.timeline import TRANSFERS, read_tasks

VERSIONS = ("2.7.1", "2.10.0")  # the versions of MindSpore whose files this module can read
RESULT = "RESULT "  # the process prints one line of JSON after this
# (type, op) of the copies that parallel.graph.jit.in_device_memory makes, in MindSpore 2.7.1 and 2.10.0
COPIED = (("PyNativeOutput", "Mul"), ("PyNativeOutput", "Muls"))
HEADER, ALIGNMENT = 32, 512  # the allocator adds HEADER bytes to a tensor and rounds up to a multiple of ALIGNMENT

# Memory that simulation does not count, in GiB. For each group of ranks CANN's communication library takes two buffers of 200 MB (the
# default of HCCL_BUFFSIZE). The workspaces of kernels and the runtime cannot be measured here, so MARGIN_GIB is an estimate.
MARGIN_PER_GROUP_GIB = 0.4
MARGIN_GIB = 2.0


class Block(NamedTuple):
    """A block of device memory.

    first, last: when it is allocated and freed, in the tracker's clock. size: bytes. kind: input, weight (a Parameter), constant or kernel.
    name, graph: of the op that made it.
    """

    first: int
    last: int
    size: int
    kind: str
    name: str
    graph: str


class Exchange(NamedTuple):
    """A collective.

    kind: such as AllReduce. ranks: of the group; () for a Send or Receive between pipeline stages. elements: of the complete array, such as
    the gathered one of an all-gather. itemsize: bytes of an element.
    """

    kind: str
    ranks: tuple
    elements: int
    itemsize: int

    def sent(self):
        """Returns the bytes that a rank sends in a ring, as parallel.simulation.traffic.Call counts them."""
        n = len(self.ranks)
        if not n:
            return self.elements * self.itemsize if self.kind == "Send" else 0
        return (2 if self.kind == "AllReduce" else 1) * (n - 1) * self.elements * self.itemsize // n


@dataclass(frozen=True)
class Trace:
    """The measurements of one process.

    said: the JSON value that it printed. exchanges: Counter of Exchange. tasks: list of timeline.Task. lines: {(graph, node): source line}.
    with_fragments: the peak of device memory with fragmentation, in bytes.
    """

    said: dict
    blocks: tuple
    exchanges: Counter
    tasks: list
    lines: dict
    with_fragments: int
    wall_s: float


def unavailable():
    """Returns why the dry run cannot run on this machine, with the fix; None if it can."""
    version = importlib.metadata.version("mindspore")
    if version not in VERSIONS:
        known = " and ".join(VERSIONS)
        return f"the dry run reads what MindSpore {known} writes, and this is {version}; pip install mindspore=={VERSIONS[-1]}"
    return standin.unavailable()


def trace(module, job, world, rank, folder, variables=None, timeout_s=3600):
    """Runs `python -m module job.json` as rank `rank` of `world` simulated NPUs and returns its Trace.

    job: a JSON value. folder: an empty folder for MindSpore's files. variables: further environment variables. Raises RuntimeError with the
    end of the output if the process fails.
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
    tasks = read_tasks(found / "tracker_graph.ir")
    return Trace(json.loads(said[1]), blocks, exchanges_of(tasks), tasks, _lines(found), _fragmented(text), wall_s)


def _verbose(folder):
    """Returns environment variables that make MindSpore write the files that are read here into a folder."""
    return {
        "GLOG_v": "2",  # MindSpore logs the peak as a warning
        "MS_ALLOC_CONF": "memory_tracker:True,memory_tracker_path:./",
        "MS_DEV_SAVE_GRAPHS": "2",
        "MS_DEV_SAVE_GRAPHS_PATH": str(folder),
        "MS_DEV_DUMP_IR_PASSES": "hwopt_d_after_stream_assign",  # this pass has source lines, and the names of the tracker
    }


def _complaint(text):
    """Returns the end of a log without MindSpore's warnings, which do not explain an error."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(("[WARNING]", "[CRITICAL]"))]
    return "\n".join(line for line in lines if "No module named 'te'" not in line)[-2500:]


def _fragmented(text):
    """Returns the peak of device memory with fragmentation, in bytes, from the log of the allocator, which has it in MiB."""
    found = re.search(r"Actual peak memory usage \(with fragments\): (\d+)M", text)
    if not found:
        raise RuntimeError(
            "MindSpore's log has no peak of memory; the step was not run, or this version of MindSpore writes it differently"
        )
    return int(found[1]) << 20


def read_blocks(path):
    """Returns the Blocks of a memory_block.csv."""
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


def exchanges_of(tasks):
    """Returns the Counter of the Exchanges among the Tasks of a step."""
    out = Counter()
    for task in tasks:
        if task.ranks:
            shape, size = (task.results if task.kind == "AllGather" else task.operands)[0]
            out[Exchange(task.kind, task.ranks, math.prod(shape), size)] += 1
        elif task.kind in TRANSFERS:
            shape, size = task.results[0]
            out[Exchange(task.kind, (), math.prod(shape), size)] += 1
    return out


NODE = re.compile(r"# Fullname with scope: \((.*?)\)\n((?:\s+# .*\n)*)")
SOURCE = re.compile(r"# In file (.*?:\d+)")
SUBGRAPH = re.compile(r"^subgraph @(kernel_graph_?\d+)", re.M)


def _lines(folder):
    """Returns {(graph, node): the innermost source line of this code base that made it}."""
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
    """Returns [(moment, bytes allocated from then on)] and the moment of the peak."""
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
    """Returns (bytes allocated at the peak, the blocks that are allocated then)."""
    _, moment = timeline(blocks)
    live = [block for block in blocks if block.first <= moment < block.last]
    return sum(block.size for block in live), live


def peaks(blocks):
    """Returns {graph: the largest number of bytes allocated while it ran}.

    The time between two graphs counts for the earlier one, the time before the first for the key "".
    """
    begun = {block.first: block.graph for block in blocks if block.kind == "kernel" and block.graph}
    out, graph = {}, ""
    for moment, live in timeline(blocks)[0]:
        graph = begun.get(moment, graph)
        out[graph] = max(out.get(graph, 0), live)
    return out


def aligned(nbytes):
    """Returns the bytes that the allocator takes for a tensor of nbytes."""
    return -(-(nbytes + HEADER) // ALIGNMENT) * ALIGNMENT


def margin_gib(exchanges):
    """Returns the GiB to leave free for memory that simulation does not count. exchanges: they give the groups of ranks."""
    return MARGIN_GIB + MARGIN_PER_GROUP_GIB * len({exchange.ranks for exchange in exchanges if exchange.ranks})
