"""docs/workflows.md: each command of ours runs, on a tiny model and two processes. Their flags and keys: tests/test_docs.py."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from experiments import flags as command_line
from experiments.dryrun import jobs as dryrun_jobs
from experiments.dryrun.search import estimate
from parallel.mesh import AXES
from parallel.simulation import dryrun
from qwen3.config import SIZES
from tests.docs_stand_ins import make_stand_ins
from tests.test_docs import PAGES, commands, text_of

ROOT = Path(__file__).parents[2]
SMALL = "--config.model_args.compute_dtype=float32 --config.train.seq_len=64 --config.train.batch_size=4 --config.train.log_every=1"
SMALL += " --config.train.sample_tokens=0 --config.optim.warmup_steps=1 --config.train.layer_loop=unroll"
FEW = "--config.train.seq_len=64 --config.train.batch_size=2"


def smaller(words, seen):
    """The command with a tiny model in place of the real one, on two processes of one machine."""
    words = [word.replace("experiments/configs/", f"{ROOT}/experiments/configs/") for word in words]
    if "--print_layout" in words:
        return words
    words = [word for word in words if not re.match("--(nnodes|node_rank|master_addr|master_port)=", word)]
    words = [re.sub("^--(nproc|tp)=.*", r"--\1=2", word) for word in words]
    if "experiments.pretrain" in words or "experiments.finetune" in words:
        experts = any(word.startswith("--ep=") for word in words)
        stages = any(re.match("--pp=[2-9]", word) for word in words) and not experts
        of_dense = "--dp=1 --tp=1 --pp=2" if stages else "--dp=1 --tp=2 --pp=1 --zero=0"
        layout = "--dp=2 --tp=1 --pp=1 --ep=2 --noseq_parallel" if experts else of_dense
        words += [*SMALL.split(), *layout.split(), f"--micro_batches={1 + stages}"]
        if "experiments.pretrain" in words and not any(word.startswith("--config.model=") for word in words):
            words.append(f"--config.model={'Qwen3-30B-A3B' if experts else 'Qwen3-32B'}")
        workdir = next(word for word in words if word.startswith("--workdir="))
        seen[workdir] = seen.get(workdir, 0) + 2  # steps: the same folder again goes on
        words.append(f"--config.train.steps={seen[workdir]}")
    return words + FEW.split() * (words[0] == "experiments.evaluate")


@pytest.mark.slow
def test_every_command_of_the_page_runs(tmp_path):
    make_stand_ins(tmp_path)
    env, seen = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, {}
    failed = []
    for words in commands("docs/workflows.md"):
        command = smaller(words, seen)
        done = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        if done.returncode:
            failed.append(f"{shlex.join(command)}\n{done.stdout[-1000:]}\n{done.stderr[-1000:]}")
    assert not failed, "\n\n".join(failed)
    assert (tmp_path / "text_generation_result.txt").read_text().count("\n") >= 1
    assert (tmp_path / "output" / "lora" / "adapter" / "adapter_config.json").is_file() and (tmp_path / "output" / "lora_hf").is_dir()


GIB, LIMIT_GIB, LARGE = 2**30, 58.0, 4  # LARGE: from this number of devices on
FOLDERS = {"Qwen3-32B": "qwen3-32b", "model_from_hf/qwen2.5-7b-hf": "qwen2.5-7b", "model_from_hf/qwen3-8b-hf": "qwen3-8b"}


class Large(NamedTuple):
    """A command of a page for a large model. noted: (rank, GiB) as the line above it says, or None."""

    page: str
    own: list  # the command that each process runs
    world: int
    noted: tuple


def large_commands(page):
    """The trainings and dry runs of layouts on many devices that a page has, or of one device where the model is large."""
    lines = [line.strip() for line in re.sub(r" \\\n\s+", " ", text_of(page)).splitlines() if line.startswith("    ")]
    found = []
    for before, line in zip(["", *lines], lines):
        if not line.startswith("python -m experiments."):
            continue
        words = shlex.split(line.removeprefix("python -m "), comments=True)
        own = words[words.index("--") + 1 :] if "--" in words else words
        options = dict(word.split("=", 1) for word in words if "=" in word)
        config = options.get("--config", "tiny")
        if own[0] not in (*command_line.MAINS, "experiments.dryrun") or "tiny" in config or "--search" in words or config == config.upper():
            continue
        note = re.fullmatch(r"# rank (\d+): ([\d.]+) GiB", before)
        world = int(options.get("--world_size", int(options.get("--nproc", 1)) * int(options.get("--nnodes", 1))))
        found.append(Large(page, own, world, note and (int(note[1]), float(note[2]))))
    return found


EVERY = [each for page in PAGES for each in large_commands(page)]


def resolved(large):
    """The config of a command, where the folders that it names have the config.json of the released models alone."""
    for name, size in FOLDERS.items():
        os.makedirs(name, exist_ok=True)
        Path(name, "config.json").write_text(json.dumps(SIZES[size].to_hf()))
    own, world = [word.replace("experiments/configs/", f"{ROOT}/experiments/configs/") for word in large.own], large.world
    given = [axis for axis in AXES if any(word.startswith(f"--{axis}=") for word in own)]
    if own[0] == "experiments.dryrun" and given:  # as experiments.dryrun fills in the others
        own += [f"--{axis}={-1 if axis == 'dp' else 1}" for axis in AXES if axis not in given]
    return command_line.resolved(own, 0 if "--print_layout" in own else world)


def test_the_pages_have_commands_for_large_models():
    assert len(EVERY) >= 12 and {"README.md", "docs/dryrun.md", "docs/layouts.md", "docs/workflows.md"} <= {each.page for each in EVERY}


@pytest.mark.extended(but=("README.md*",))
@pytest.mark.parametrize("large", EVERY, ids=lambda large: f"{large.page} {EVERY.index(large)}")
def test_each_command_for_a_large_model_has_its_memory_beside_it(large, tmp_path, monkeypatch):
    """It fits, and is within 20 % of the formulas, as the compiled peaks of the recommended layouts are: formulas know nothing of the gaps
    between buffers, which take most of that where there are large activations (0.6B on one device, 16 %)."""
    monkeypatch.chdir(tmp_path)
    assert large.noted, f"{large.page}: a line such as `# rank 0: 41.6 GiB` must stand above {shlex.join(large.own)}"
    memory, _ = estimate(resolved(large))
    needed = (memory["peak"] + memory["margin"]) / GIB
    assert large.noted[1] <= LIMIT_GIB and needed <= LIMIT_GIB and needed == pytest.approx(large.noted[1], rel=0.2), shlex.join(large.own)


@pytest.mark.slow
@pytest.mark.skipif(dryrun.unavailable() is not None, reason=str(dryrun.unavailable()))
@pytest.mark.parametrize("large", EVERY, ids=lambda large: f"{large.page} {EVERY.index(large)}")
def test_the_memory_beside_a_command_is_that_of_the_dry_run(large, tmp_path, monkeypatch):
    """Two depths of each, extrapolated; one to four minutes a command."""
    monkeypatch.chdir(tmp_path)
    rank, gib = large.noted
    shallow = "6,12" if "--zero=3" in large.own and "--tp=8" in large.own else "1,3"
    depths = next((word.partition("=")[2] for word in large.own if word.startswith("--layers=")), shallow)
    (report,) = dryrun_jobs.run(resolved(large), "train", [rank], [int(n) for n in depths.split(",")], LIMIT_GIB)
    needed = (report["figures"]["with_fragments_bytes"] + report["figures"]["margin_bytes"]) / GIB
    assert report["fits"] and not report["problems"] and needed < LIMIT_GIB
    assert gib == pytest.approx(needed, rel=0.1), f"{shlex.join(large.own)}: {needed:.1f} GiB"
