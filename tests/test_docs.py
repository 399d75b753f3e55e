"""README.md and docs/: commands, links and names are of things that exist. The slow test runs the commands.

Those of docs/workflows.md are run by tests/experiments/test_workflows.py.
"""

import ast
import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.configs import common
from tests.docs_stand_ins import make_stand_ins

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PACKAGES = ("experiments", "parallel", "layers", "qwen3", "ops", "tests")
LAYOUT = ("dp", "tp", "pp", "cp", "ep", "micro_batches", "zero")  # flags whose names are made in a loop
# Modules of experiments that define flags for a main that imports them
WITH_FLAGS = {("experiments", "flags"), ("experiments.train", "command"), ("experiments.generate", "flags"), ("experiments", "job_flags")}
TAKE_WORDS = ("experiments.compare", "experiments.convert", "experiments.preprocess", "experiments.speedrun")  # beside flags
# Words of the commands that the slow test does not run, and why, or what runs them instead
NOT_RUN = {
    "experiments.accept": "tries everything, for minutes to an hour; tests/experiments/test_accept.py",
    "experiments.bench": "measures for minutes; tests/experiments/test_bench.py",
    "experiments.serve": "does not end; tests/experiments/test_serve.py",
    "experiments.dryrun": "compiles for minutes; tests/experiments/test_dryrun.py",
    "--nnodes=2": "several machines; tests/parallel/test_launch.py",
    "--nproc=8": "NPUs",
    "--config.data.path=PREFIX": "NPUs",
    "--profile_steps=10:15": "more steps than there are; tests/experiments/test_profiling.py",
    "--config=SWEEP_FILE": "tests/experiments/test_sweep.py",
    "experiments.compare": "wants several runs; tests/experiments/test_compare.py",
    "experiments.speedrun": "trains for minutes; tests/experiments/test_speedrun.py",
    "--config.watch.trackers=wandb,mlflow": "wants their libraries; tests/experiments/test_trackers.py",
    "--hf_dir=QWEN3_RERANKER": "a tokenizer with yes and no; tests/experiments/test_embed.py",
    "--hf_dir=DIR --chat": "a conversation; tests/experiments/test_generate.py",
}


def text_of(page):
    """The page without fenced blocks, which quote other projects' commands and show output."""
    return re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(page):
    """The commands of ours on a page, as lists of words after `python -m`; comments are left out."""
    lines = re.sub(r" \\\n\s+", " ", text_of(page)).splitlines()
    found = [re.search(r"python -m (experiments\.[a-z].*)", line) for line in lines if line.startswith("    ")]
    return [shlex.split(match[1], comments=True) for match in found if match]


def main_file(module):
    """The path of the file that `python -m module` runs."""
    path = ROOT / module.replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def flags_of(path):
    """The flags that a main defines, itself or by the modules of WITH_FLAGS that it imports."""
    tree, found = ast.parse(path.read_text()), set()
    defines = any(isinstance(node, ast.Attribute) and node.attr.startswith("define") for node in ast.walk(tree))
    for node in ast.walk(tree):
        called = node.func if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
        if called and (called.attr.startswith("DEFINE_") or getattr(called.value, "id", "") == "number_flags"):
            found |= {node.args[0].value} if isinstance(node.args[0], ast.Constant) else set(LAYOUT)
        if isinstance(node, ast.ImportFrom) and defines:
            for name in (alias.name for alias in node.names if (node.module, alias.name) in WITH_FLAGS):
                found |= flags_of(ROOT / node.module.replace(".", "/") / f"{name}.py")
    return found


def check_command(words):
    """Holds a command's module, flags, config keys and config file to what exists. words: those after `python -m`."""
    if "--" in words and words[0] == "experiments.launch":
        place = words.index("--")
        check_command(words[place + 1 :])
        words = words[:place]
    path, keys = main_file(words[0]), common.get_config()
    assert path.is_file(), words
    flags = flags_of(path)
    for word in words[1:]:
        if word == "--":
            continue  # what follows goes to each run of a sweep
        if not word.startswith("--"):
            assert f'"{word}"' in path.read_text() or words[0] in TAKE_WORDS, words
            continue
        name, _, value = word[2:].partition("=")
        if name.startswith("config."):
            section, key = name.split(".")[1:] if name.count(".") == 2 else (None, name.split(".")[1])
            assert key in (keys[section] if section else keys), (name, words)
        else:
            assert name in flags or name.removeprefix("no") in flags, (name, words)
            assert name != "config" or value == value.upper() or (ROOT / value).is_file(), words


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_modules_flags_keys_and_configs_that_exist(page):
    for words in commands(page):
        check_command(words)


def test_the_pages_have_commands():
    assert len(commands("README.md")) >= 8 and sum(len(commands(page)) for page in PAGES) > 60


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    tracked = [path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    for name in re.findall(r"`((?:experiments|parallel|layers|qwen3|ops|tests|docs)/[\w./]*)`", text_of(page)):
        exists = (ROOT / name).exists()
        assert exists or "NAME" in name or "FAMILY" in name or any(path.endswith(f"/{name}") for path in tracked), name


@pytest.mark.parametrize("page", PAGES)
def test_modules_and_functions_that_a_page_names_exist(page):
    for name in re.findall(r"`((?:experiments|parallel|layers|qwen3|tests)(?:\.\w+)+)(?:\(.*?\))?`", text_of(page)):
        parts = name.split(".")
        if parts[0] == "parallel" and len(parts) == 2 and parts[1] in common.get_config().parallel:
            continue  # a key of the config
        assert exists(parts), name


def exists(parts):
    for count in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:count])
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return count == len(parts) or defines(path, parts[count])
    return False


def defines(path, name):
    """Whether a source file has a function, class, method or constant of this name."""
    return re.search(rf"^\s*(?:def|class) {name}\b|^{name}\b", path.read_text(), re.MULTILINE) is not None


def test_functions_that_carry_on_names_are_in_their_files():
    """`FILE`: `a`, `b` and `c` says that the file has these; so does `FILE`: `a`."""
    found = re.findall(r"`([\w/]+\.py)`:((?:\s*(?:,|and)?\s*`\w+`)+)", text_of("docs/carry-on.md"))
    named = [(file, name) for file, names in found for name in re.findall(r"`(\w+)`", names)]
    assert len(named) > 50
    for file, name in named:
        assert defines(ROOT / file, name), (file, name)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#\s]+)", text_of(page)):
        assert target.startswith("https://") or (folder / target).exists(), target


def test_every_page_is_in_the_index_and_in_the_site():
    index, site = (ROOT / "docs" / "index.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for page in PAGES[1:]:
        name = page.removeprefix("docs/")
        assert name in site and (name == "index.md" or f"({name})" in index), name


def runs(words):
    """Whether the slow test runs a command: it has nothing of NOT_RUN, and no name in capitals that nothing stands for."""
    return not any(re.search(rf"(?:^| ){re.escape(reason)}(?: |$)", " ".join(words)) for reason in NOT_RUN)


def shortened(words, steps=2):
    """The command with little to do: few steps of small rows, few tokens."""
    if {"experiments.pretrain", "experiments.finetune", "experiments.prefer", "experiments.rl"} & set(words):
        if "--print_layout" in words:
            return words
        seq_len = 256 if "experiments.prefer" in words else 64  # a row holds both answers of a pair
        short = f"steps={steps} batch_size=8 seq_len={seq_len} log_every=1 sample_tokens=0 exact_match_rows=0".split()
        words = [*words, *(f"--config.train.{each}" for each in short), "--config.optim.warmup_steps=1"]
        if "experiments.pretrain" in words and not any(word.startswith("--config.data.") for word in words):
            words.append("--config.data.max_bytes=300000")
    if "experiments.rl" in words:
        words.append("--config.train.eval_rows=8")
    if "experiments.evaluate" in words:
        words = [*words, "--config.train.seq_len=64", "--config.train.batch_size=2"]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/workflows.md"])
def test_commands_run(page, tmp_path):
    """Each in turn in one folder, with stand-ins for the names in capitals and with few steps."""
    todo = [words for words in commands(page) if runs(words)]
    if not todo:
        pytest.skip("no command to run")
    make_stand_ins(tmp_path)
    os.symlink(ROOT / "experiments", tmp_path / "experiments")  # for --config=experiments/configs/...
    if page != "README.md":  # which makes it
        todo.insert(0, commands("README.md")[0])
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    failed = []
    for number, words in enumerate(todo):  # each with a step more, as a page may continue a run that an earlier command has finished
        command = [sys.executable, "-m", *shortened(words, steps=2 + number)]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
        if done.returncode:
            failed.append(f"{shlex.join(words)}\n{done.stdout[-1000:]}\n{done.stderr[-1000:]}")
    assert not failed, "\n\n".join(failed)
