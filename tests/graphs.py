"""The graphs that MindSpore compiles, for tests of their structure."""

import contextlib
import os
import re
import tempfile
from pathlib import Path

import mindspore as ms

PASS = "validate"  # the last pass before the back end's


@contextlib.contextmanager
def compiled():
    """Gives a list that has, after the context, the names of the operators of each graph that was compiled in it, in their order."""
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
        files = sorted(Path(folder).rglob(f"*_{PASS}_*.ir"), key=lambda path: int(path.stem.rpartition("_")[2]))
        graphs += [re.findall(r"^  %\d+\(.*?\) = (\w+)", path.read_text(), re.MULTILINE) for path in files]
