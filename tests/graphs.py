"""The graphs that MindSpore compiles, for tests of their structure."""

import contextlib
import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import mindspore as ms

from experiments.watch.profiling import PASS  # MindSpore reads it once a process, so all that save graphs save those of one pass


class Graph(NamedTuple):
    """text: the graph after the last pass of the compiler. actors: what runs its operators on a CPU, in the order in which they start."""

    text: str
    actors: str


@contextlib.contextmanager
def compiled():
    """Gives a list that has, after the context, the Graph of each function that was compiled in it."""
    graphs, passes = [], os.environ.get("MS_DEV_DUMP_IR_PASSES")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MS_DEV_DUMP_IR_PASSES"] = PASS
        ms.set_context(save_graphs=1, save_graphs_path=folder)  # MS_DEV_SAVE_GRAPHS is read only when MindSpore is imported
        try:
            yield graphs
        finally:
            ms.set_context(save_graphs=0)
            os.environ.pop("MS_DEV_DUMP_IR_PASSES")
            if passes is not None:
                os.environ["MS_DEV_DUMP_IR_PASSES"] = passes
        numbered = {int(path.stem.split("_")[2]): path for path in Path(folder).rglob(f"{PASS}_*.ir")}
        for number, path in sorted(numbered.items()):
            actors = path.parent / "actor_set" / f"final_actor_set_kernel_graph_{number}.ir"
            graphs.append(Graph(path.read_text(), actors.read_text()))


def operators(graph):
    """Returns the names of the operators of a graph, in their order."""
    return re.findall(r"^  %\d+\(.*?\) = (\w+)", graph.text, re.MULTILINE)


def collectives(graph):
    """Returns the collectives of a graph in the order in which they run, each by its shape and the lines of source that it comes from."""
    found = {}
    for node in re.split(r"^  %\d+\(.*?\) = ", graph.text, flags=re.MULTILINE)[1:]:
        if node.startswith("AllReduce("):
            # generated sources differ in the rank's number
            lines = [line for line in node.splitlines()[1:] if "(<Tensor" in line or "# In file" in line and "/sources/" not in line]
            found[re.search(r"Default/(AllReduce-op\d+)", node)[1]] = "\n".join(lines)
    order = re.findall(r"^%\d+ = \w+:(AllReduce-op\d+)\(", graph.actors, re.MULTILINE)
    assert sorted(order) == sorted(found)
    return [found[name] for name in order]
