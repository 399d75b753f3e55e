"""The rules of the tree: imports go one way and in no circle, mesh axes are named in parallel/ alone, nothing unsafe reads files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A folder and what it may import of ours, besides itself.
MAY_IMPORT = {
    "ops": (),
    "parallel": ("ops",),
    "layers": ("ops", "parallel"),
    "qwen3": ("ops", "parallel", "layers"),
    "experiments": ("ops", "parallel", "layers", "qwen3"),
}
PEERS = "peer_models"  # the folder of the programs that experiments.bench is compared with


def sources(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path):
    """Top-level names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_go_one_way(folder):
    assert sources(folder)
    for path in sources(folder):
        wrong = (set(imported(path)) & set(MAY_IMPORT)) - {folder, *MAY_IMPORT[folder]}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def modules_imported(path):
    """The names that a file imports when it is imported itself, each as a module or as what a module holds."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield node.module


def test_no_modules_import_each_other_in_a_circle():
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for folder in MAY_IMPORT for path in sources(folder)}
    graph = {name: {other for other in modules_imported(path) if other in files} - {name} for name, path in files.items()}
    done = set()
    while ready := {name for name, others in graph.items() if name not in done and others <= done}:
        done |= ready
    assert done == set(files), f"these import each other: {sorted(set(files) - done)}"


@pytest.mark.parametrize("folder", ["ops", "layers", "qwen3"])
def test_mesh_axes_are_named_in_parallel_only(folder):
    for path in sources(folder):
        strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not strings & {"dp", "tp", "pp", "cp", "ep"}, path


def test_nothing_unsafe_reads_files():
    for folder in MAY_IMPORT:
        for path in sources(folder):
            assert not set(imported(path)) & {"pickle", "marshal", "shelve"}, path


def test_peers_are_imported_by_the_benchmarks_peers_alone():
    """They run in processes of their own, and nothing imports them."""
    for folder in MAY_IMPORT:
        for path in sources(folder):
            if path.parent.name != PEERS:
                assert not set(imported(path)) & {"torch", "transformers", "jax"}, path
                assert f"import {PEERS}" not in path.read_text(), path
