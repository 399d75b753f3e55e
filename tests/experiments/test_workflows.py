"""docs/workflows.md: each command of ours has flags that exist, and runs, on a tiny model and two processes."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from experiments.configs import common
from parallel.trees import tree_map
from qwen3 import hf
from qwen3.tokenizer import train_bpe
from tests.tiny import DENSE, MOE, random_params

ROOT = Path(__file__).parents[2]
TEXTS = [f"def function_{j}(x):\n    return x + {7 * j}\n去上海的旅游攻略\n" for j in range(80)]
SMALL = "--config.model_args.compute_dtype=float32 --config.train.seq_len=64 --config.train.batch_size=4 --config.train.log_every=1"
SMALL += " --config.train.sample_tokens=0 --config.optim.warmup_steps=1 --config.train.layer_loop=unroll"
FEW = "--config.train.seq_len=64 --config.train.batch_size=2"


def commands():
    """The commands of ours on the page, as lists of words after `python -m`."""
    text = re.sub(r"```.*?```", "", (ROOT / "docs" / "workflows.md").read_text(), flags=re.DOTALL)
    lines = re.sub(r" \\\n\s+", " ", text).splitlines()
    return [shlex.split(line)[2:] for line in lines if line.startswith("    python -m experiments.")]


def defined(module, seen=()):
    """The flags that a main defines, itself or by a module of experiments that it imports."""
    tree, found = ast.parse((ROOT / "experiments" / f"{module}.py").read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("DEFINE_"):
            first = node.args[0]
            found |= {first.value} if isinstance(first, ast.Constant) else {"dp", "tp", "pp", "cp", "ep", "micro_batches", "zero"}
        if isinstance(node, ast.ImportFrom) and node.module == "experiments":
            for name in {alias.name for alias in node.names} & {"flags", "inference_flags", "training"}:
                found |= defined(name)
    return found


def test_the_page_names_flags_keys_and_configs_that_exist():
    assert len(commands()) > 20
    for words in commands():
        if "--" in words:
            at = words.index("--")
            check(words[:at])
            words = words[at + 1 :]
        check(words)


def check(words):
    module, flags, keys = words[0].removeprefix("experiments."), None, common.get_config()
    flags = defined(module)
    for word in words[1:]:
        if not word.startswith("--"):
            assert f'"{word}"' in (ROOT / "experiments" / f"{module}.py").read_text(), words  # a command of convert
            continue
        name, _, value = word[2:].partition("=")
        if name.startswith("config."):
            section, key = name.split(".")[1:] if name.count(".") == 2 else (None, name.split(".")[1])
            assert key in (keys[section] if section else keys), name
        else:
            assert name in flags, (module, name)
            assert name != "config" or (ROOT / value).is_file(), value


def stand_ins(folder):
    """What the commands find where they run: tiny models under the names on the page, and a little of each kind of data."""
    tokenizer = train_bpe(TEXTS, 320)
    tokenizer.save(folder / "tokenizer")
    (folder / "model_from_hf").mkdir()
    (folder / "dataset").mkdir()
    for name, cfg in (("Qwen3-32B", DENSE), ("Qwen3-30B-A3B", MOE)):
        cfg = cfg.replace(vocab_size=tokenizer.vocab_size, max_position=256, eos_id=tokenizer.eos_id)
        params = tree_map(lambda w: w, random_params(cfg))
        hf.save(folder / name, cfg, params, tokenizer_dir=folder / "tokenizer")
    for name in ("hf_dir", "model_from_hf/qwen2.5-7b-hf"):
        os.symlink(folder / "Qwen3-32B", folder / name)
    (folder / "wiki.train.tokens").write_text("".join(f" \n = Title {i} = \n \n {text}" for i, text in enumerate(TEXTS)))
    (folder / "data.jsonl").write_text("".join(json.dumps({"src": "a", "text": text}) + "\n" for text in TEXTS))
    table = pyarrow.table({"instruction": TEXTS, "text": TEXTS})
    pyarrow.parquet.write_table(table, folder / "dataset" / "train-00000-of-00001-a09b74b3ef9c3b56.parquet")
    chats = [{"instruction": f"def {j}", "input": "", "output": f"return {j}"} for j in range(80)]
    (folder / "alpaca_gpt4_data_zh.json").write_text(json.dumps(chats))
    (folder / "input_predict_data.txt").write_text("去上海\n" * 5)
    (folder / "quiz.jsonl").write_text(json.dumps({"context": "def", "choices": ["f", "g"], "answer": 0}) + "\n")


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
    stand_ins(tmp_path)
    env, seen = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, {}
    failed = []
    for words in commands():
        command = smaller(words, seen)
        done = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        if done.returncode:
            failed.append(f"{shlex.join(command)}\n{done.stdout[-1000:]}\n{done.stderr[-1000:]}")
    assert not failed, "\n\n".join(failed)
    assert (tmp_path / "text_generation_result.txt").read_text().count("\n") >= 1
    assert (tmp_path / "output" / "lora" / "adapter" / "adapter_config.json").is_file() and (tmp_path / "output" / "lora_hf").is_dir()
