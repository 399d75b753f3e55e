"""docs/workflows.md: each command of ours runs, on a tiny model and two processes. Their flags and keys: tests/test_docs.py."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs_stand_ins import make_stand_ins
from tests.test_docs import commands

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
        layout = "--dp=2 --tp=1 --pp=1 --ep=2 --noseq_parallel" if experts else "--dp=1 --tp=1 --pp=2" if stages else "--dp=1 --tp=2 --pp=1"
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
