"""docs/workflows.md: each command of ours runs, on a tiny model and two processes. Their flags and keys: tests/test_docs.py."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import flags as command_line
from experiments.dryrun import jobs as dryrun_jobs
from experiments.dryrun.search import estimate
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
FOLDERS = {"Qwen3-32B": "qwen3-32b", "model_from_hf/qwen2.5-7b-hf": "qwen2.5-7b"}


def large_commands(page):
    """[(the command that each process runs, number of processes)] of a page's trainings on many devices."""
    found = []
    for words in commands(page):
        own = words[words.index("--") + 1 :] if "--" in words else words
        options = dict(word.split("=", 1) for word in words if "=" in word)
        world = int(options.get("--nproc", 1)) * int(options.get("--nnodes", 1))
        if own[0] in command_line.MAINS and world >= LARGE and "_tiny" not in options["--config"] and "/tiny" not in options["--config"]:
            found.append((own, world))
    return found


def resolved(own, world):
    """Its config, where the folders that it names have the config.json of the released models alone."""
    for name, size in FOLDERS.items():
        os.makedirs(name, exist_ok=True)
        Path(name, "config.json").write_text(json.dumps(SIZES[size].to_hf()))
    return command_line.resolved([word.replace("experiments/configs/", f"{ROOT}/experiments/configs/") for word in own], world)


@pytest.mark.parametrize("page", [page for page in PAGES if large_commands(page)])
def test_commands_for_large_models_fit_by_the_formulas_of_the_search(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for own, world in large_commands(page):
        memory, _ = estimate(resolved(own, world))
        needed = (memory["peak"] + memory["margin"]) / GIB
        assert needed <= LIMIT_GIB, f"{shlex.join(own)} needs {needed:.1f} GiB"


def noted():
    """[(rank, GiB, command, number of processes)] of docs/workflows.md: what stands above each command for a large model."""
    lines = [line for line in re.sub(r" \\\n\s+", " ", text_of("docs/workflows.md")).splitlines() if line.startswith("    ")]
    out, rest = [], large_commands("docs/workflows.md")
    for before, line in zip(lines, lines[1:]):
        if rest and shlex.split(line, comments=True)[-len(rest[0][0]) :] == rest[0][0]:
            rank, gib = re.fullmatch(r"    # rank (\d+): ([\d.]+) GiB", before).groups()
            out.append((int(rank), float(gib), *rest.pop(0)))
    assert not rest
    return out


def test_each_command_for_a_large_model_has_its_memory_beside_it(tmp_path, monkeypatch):
    """Within 15 % of the formulas, as the compiled peaks of the recommended layouts are."""
    monkeypatch.chdir(tmp_path)
    assert len(noted()) == 6
    for _, gib, own, world in noted():
        memory, _ = estimate(resolved(own, world))
        assert gib <= LIMIT_GIB and (memory["peak"] + memory["margin"]) / GIB == pytest.approx(gib, rel=0.15)


@pytest.mark.slow
@pytest.mark.skipif(dryrun.unavailable() is not None, reason=str(dryrun.unavailable()))
@pytest.mark.parametrize("place", range(6))
def test_the_memory_beside_a_command_is_that_of_the_dry_run(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rank, gib, own, world = noted()[place]
    (report,) = dryrun_jobs.run(resolved(own, world), "train", [rank], [1, 3], LIMIT_GIB)
    needed = (report["figures"]["with_fragments_bytes"] + report["figures"]["margin_bytes"]) / GIB
    assert report["fits"] and not report["problems"] and needed == pytest.approx(gib, abs=0.5)
