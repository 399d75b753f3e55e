"""The graphs that MindSpore compiles, for tests of their structure."""

import contextlib
import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import mindspore as ms

from experiments.watch.profiling import PASS  # MindSpore reads it once a process, so all that save graphs save those of one pass


class Graph(NamedTuple):
    """texts: {number: the graph after the last pass of the compiler}; a function with loops or branches has several. actors: what runs
    their operators on a CPU, in the order in which they start."""

    texts: dict
    actors: str


@contextlib.contextmanager
def compiled():
    """Gives a list that has, after the context, the Graph of each function that was compiled in it."""
    graphs = []
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, MS_DEV_DUMP_IR_PASSES=PASS):
        ms.set_context(save_graphs=1, save_graphs_path=folder)  # MS_DEV_SAVE_GRAPHS is read only when MindSpore is imported
        try:
            yield graphs
        finally:
            ms.set_context(save_graphs=0)
        texts = {int(path.stem.split("_")[2]): path.read_text() for path in Path(folder).rglob(f"{PASS}_*.ir")}
        for path in Path(folder).rglob("final_actor_set_kernel_graph_*.ir"):
            first, _, last = path.stem.rpartition("_")[2].partition("-")  # "3" or "0-8"
            of = range(int(first), int(last or first) + 1)
            graphs.append(Graph({number: texts[number] for number in of}, path.read_text()))
        graphs.sort(key=lambda graph: min(graph.texts))


def operators(graph):
    """Returns the names of the operators of a graph, in their order."""
    return [name for text in graph.texts.values() for name in re.findall(r"^  %\d+\(.*?\) = (\w+)", text, re.MULTILINE)]


def collectives(graph):
    """Returns the collectives of a graph in the order in which they run, each by its shape and the lines of source that it comes from.

    Those of a function that has several graphs are sorted, as the order in which its graphs run is not known here.
    """
    found = {}
    for number, text in graph.texts.items():
        for node in re.split(r"^  %\d+\(.*?\) = ", text, flags=re.MULTILINE)[1:]:
            if node.startswith("AllReduce("):
                # generated sources differ in the rank's number
                lines = [line for line in node.splitlines()[1:] if "(<Tensor" in line or "# In file" in line and "/sources/" not in line]
                found[str(number), re.search(r"Default/(AllReduce-op\d+)", node)[1]] = "\n".join(lines)
    order = re.findall(r"^%\d+ = kernel_graph(\d+):(AllReduce-op\d+)\(", graph.actors, re.MULTILINE)
    assert sorted(order) == sorted(found)
    names = [found[each] for each in order]
    return names if len(graph.texts) == 1 else sorted(names)
