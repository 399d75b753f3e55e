"""The notebooks: each runs from top to bottom in its shortened form, and what is committed is one whole run with its pictures.

`python -m tests.experiments.test_notebooks [NOTEBOOK ...]` runs them, or all, in full and writes them as they are to be committed: without
times, versions and other things that differ from run to run.
"""

import itertools
import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "experiments" / "notebooks").glob("*.ipynb"))
IN_DEFAULT_SUITE = "1_read_a_model"
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
CELL_S = 600  # for one cell; the longest trains for some minutes
LARGEST_BYTES = 350_000
OF_A_MACHINE = r"(?<![\w.~])/(?:tmp|home|root|Users|usr|opt|var|work)/"
OF_A_TIME = r"\b\d\d:\d\d:\d\d\b|\b20\d\d-\d\d-\d\d\b"
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


class Interpreter(KernelSpecManager):
    """Whose only kernel is of the interpreter that runs this."""

    def get_kernel_spec(self, kernel_name):
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name=kernel_name, language="python")


def run(path, folder, short):
    """The notebook with the outputs of a run in `folder`, which has neither the notebook nor the sources, with these sources. Raises
    CellExecutionError with a cell's error."""
    notebook = nbformat.read(path, as_version=4)
    temporary = folder / "temporary"
    temporary.mkdir()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / "ipython"), "TMPDIR": str(temporary), "NOTEBOOK_SHORT": ""}
    if short:
        env["NOTEBOOK_SHORT"] = "1"
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=Interpreter())
    working = folder / "working"
    working.mkdir()
    resources = {"metadata": {"path": str(working)}}
    NotebookClient(notebook, km=manager, timeout=CELL_S, record_timing=False, resources=resources).execute(env=env)
    left = [*working.iterdir(), *temporary.iterdir()]
    assert not left, f"{path.name} left {', '.join(file.name for file in left)}"
    return notebook


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def texts(notebook):
    """The text outputs."""
    found = [output.get("text", "") for output in outputs(notebook)]
    return found + [text for output in outputs(notebook) for kind, text in output.get("data", {}).items() if kind.startswith("text/")]


def pictures(notebook):
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def check(notebook):
    """What holds of any run."""
    assert pictures(notebook)
    assert [output for output in outputs(notebook) if output.output_type == "error" or output.get("name") == "stderr"] == []
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


def test_there_are_notebooks():
    assert NOTEBOOKS and IN_DEFAULT_SUITE in [path.stem for path in NOTEBOOKS]


@by_name
def test_a_committed_notebook_is_one_whole_run(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    check(notebook)
    assert path.stat().st_size < LARGEST_BYTES
    assert notebook.metadata == KERNEL and not any(cell.metadata for cell in notebook.cells), "write it as this file's docstring says"
    for text in texts(notebook):
        for pattern in (OF_A_MACHINE, OF_A_TIME, r"\bWARNING\b", "Warning:"):
            assert not re.search(pattern, text), text


@by_name
def test_a_notebook_asks_a_question_and_says_what_it_does_not_show(path):
    cells = nbformat.read(path, as_version=4).cells
    prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
    assert "?" in prose[0] and "not show" in prose[-1]
    first = next(cell.source for cell in cells if cell.cell_type == "code")
    assert 'SHORT = bool(os.environ.get("NOTEBOOK_SHORT"))' in first


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (path.stem != IN_DEFAULT_SUITE)) for path in NOTEBOOKS],
    ids=[path.stem for path in NOTEBOOKS],
)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    before = path.read_bytes()
    done = run(path, tmp_path, short=True)
    check(done)
    assert path.read_bytes() == before
    assert pictures(done) == pictures(nbformat.read(path, as_version=4))


def joined(outputs):
    """What was printed comes in pieces, cut by when the kernel sent it."""
    for name, group in itertools.groupby(outputs, lambda output: output.get("name")):
        first, *rest = group
        if name:
            first.text += "".join(output.text for output in rest)
            rest = []
        yield from (first, *rest)


def write(path):
    """Runs a notebook in full and writes it with its outputs."""
    with TemporaryDirectory() as folder:
        done = run(path, Path(folder), short=False)
    done.metadata = nbformat.from_dict(KERNEL)
    for i, cell in enumerate(done.cells):
        cell.metadata, cell.id = nbformat.from_dict({}), f"cell-{i}"
        if cell.cell_type == "code":
            cell.outputs = list(joined(cell.outputs))
    nbformat.write(done, path)


if __name__ == "__main__":
    for name in sys.argv[1:] or NOTEBOOKS:
        write(Path(name))
