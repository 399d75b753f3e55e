"""experiments.generate: prompts in, results out in their order; where weights and defaults come from; a conversation; many processes."""

import io
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.convert import weights as convert_weights
from experiments.generate import batch as generate_batch
from experiments.generate import chat as generate_chat
from experiments.generate import defaults, prompts
from experiments.layout import check as layout
from experiments.serve import requests as serve_requests
from experiments.train import adapter, weights
from parallel.checkpoint import store as checkpoint_store
from parallel.checkpoint.files import step_folder
from parallel.mesh import Mesh
from parallel.placement import cut, place, reader
from parallel.sharding import Sharding
from parallel.trees import tree_leaves, tree_paths
from qwen3 import hf, peft
from qwen3.answers import Forms
from qwen3.engine import Engine, Request
from qwen3.generate import generate
from qwen3.model import param_specs
from qwen3.tokenizer import Tokenizer, train_bpe
from tests.parallel.test_launch import free_port
from tests.qwen3.test_peft import saved
from tests.scripted_answers import ONE, TOOLS
from tests.tiny import DENSE, MOE, assert_close, random_params

ROOT = Path(__file__).parents[2]
LINES = ["the quick", "fox jumps over the lazy dog. the quick brown fox", "你好", "lazy"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["the quick brown fox jumps over the lazy dog. 你好 "] * 4, 290)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A Hugging Face folder of a random model."""
    path = tmp_path_factory.mktemp("model")
    tokenizer.save(path / "tokenizer")
    cfg = DENSE.replace(vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id, max_position=512)
    hf.save(path / "hf", cfg, random_params(cfg), tokenizer_dir=path / "tokenizer")
    return path / "hf"


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """The same as the folder of a run with a checkpoint."""
    path = tmp_path_factory.mktemp("run") / "native"
    convert_weights.to_native(convert_weights.open_weights("input", str(folder)), path)
    return path


@pytest.fixture(scope="module")
def engine(folder):
    cfg, params = hf.load(folder)
    return Engine(params, cfg, slots=2, length=64, prefill_chunk=16)


def main(cwd, *args, launch=()):
    command = [sys.executable, "-m", *launch, "experiments.generate", *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=cwd, text=True, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process, code=0):
    out, err = process.communicate(timeout=280)
    assert process.returncode == code, out[-3000:] + err[-3000:]
    return out, err


def written(path):
    return path.read_text().splitlines()


def expected(folder, tokenizer, count, lines=LINES):
    """The greedy text of each line, on one line."""
    cfg, params = hf.load(folder)
    ids = [generate(params, [tokenizer.encode(line)], cfg, count, stop_ids=(cfg.eos_id, tokenizer.eod_id))[0] for line in lines]
    return [generate_batch.line(SimpleNamespace(text=tokenizer.decode(row, skip_special=True))) for row in ids]


@pytest.mark.extended
def test_a_file_of_prompts_gives_a_line_for_each_in_their_order(folder, tokenizer, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n\n".join(LINES) + "\n")
    options = ["--max_new_tokens=9", "--batch_size=2", "--output_jsonl=out.jsonl", "--num_samples=2", "--logprobs=1"]
    out, _ = ended(main(tmp_path, f"--hf_dir={folder}", "--prompts_file=prompts.txt", *options))
    want = [line for line in expected(folder, tokenizer, 9) for _ in range(2)]  # greedy: both samples
    assert written(tmp_path / "text_generation_result.txt") == want
    found = [json.loads(line) for line in written(tmp_path / "out.jsonl")]
    assert [(r["prompt"], r["sample"]) for r in found] == [(i, s) for i in range(4) for s in range(2)]
    for r, text in zip(found, want):
        assert generate_batch.line(SimpleNamespace(text=r["text"])) == text and r["prompt_tokens"] == len(
            tokenizer.encode(LINES[r["prompt"]])
        )
        assert len(r["tokens"]) == len(r["logprobs"]) == 9 and r["finish_reason"] == "length" and 0 < r["queued_s"] <= r["total_s"]
        assert "message" not in r
        assert all(token == top[0][0] and logprob == top[0][1] for token, (logprob, top) in zip(r["tokens"], r["logprobs"]))
    assert "prefill " in out and "decode " in out and "tokens/s" in out


def test_an_answer_of_a_conversation_is_split_into_its_parts(tokenizer):
    """By the form of the chat template, with calls only where there are tools."""
    text, forms = f"<think>\nHm\n</think>\n\nI look.\n{ONE}", Forms("hermes", True)
    ids = tokenizer.encode("<|im_start|>assistant\n", allow_special=True)
    found = prompts.message(tokenizer, {"messages": [], "tools": TOOLS}, ids, text, forms)
    assert (found["reasoning_content"], found["content"]) == ("Hm", "I look.") and found["tool_calls"][0]["function"]["name"] == "weather"
    found = prompts.message(tokenizer, "a", ids, text, forms)
    assert found["content"] == f"I look.\n{ONE}" and "tool_calls" not in found
    assert prompts.message(tokenizer, "a", ids, text, Forms(None, False)) == {"role": "assistant", "content": text}


@pytest.mark.slow
def test_a_run_generates_what_its_model_does_and_mistakes_are_named(folder, run, tokenizer, tmp_path):
    ended(main(tmp_path, f"--workdir={run}", f"--prompt={LINES[0]}", "--max_new_tokens=9", "--output=here"))
    assert written(tmp_path / "here" / "text_generation_result.txt") == expected(folder, tokenizer, 9, LINES[:1])
    wrong = [
        ((f"--hf_dir={folder}", f"--workdir={run}", "--prompt=a"), "give --hf_dir=FOLDER"),
        ((f"--hf_dir={folder}",), "give --prompt=TEXT or --prompts_file=FILE"),
        (
            (f"--hf_dir={folder}", "--prompt=the quick", "--max_length=1"),
            "prompt 1 of 3 tokens is longer than a row of the cache, 1 tokens",
        ),
        ((f"--hf_dir={folder}", "--prompt=a", "--pp=2"), "pp=2 is 2 ranks, and the job has 1"),
        ((f"--hf_dir={folder}", "--prompt=a", "--top_p=2"), "top_p=2"),
        ((f"--hf_dir={folder}", "--prompt=a", "--logprobs=2"), "--logprobs=2 needs a file to write to; add --output_jsonl"),
        ((f"--hf_dir={folder}", "--prompt=a", "--enable_thinking"), "--enable_thinking=True is for the chat template"),
    ]
    for args, message in wrong:
        assert message in ended(main(tmp_path, *args), 2)[1]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["--tp=2", "--dp=2", "--pp=2"])
def test_launched_processes_write_the_same(folder, tokenizer, tmp_path, layout):
    (tmp_path / "prompts.txt").write_text("\n".join(LINES))
    launch = ["experiments.launch", "--nproc=2", f"--log_dir={tmp_path}/logs", "--"]
    ended(main(tmp_path, f"--hf_dir={folder}", "--prompts_file=prompts.txt", "--max_new_tokens=9", layout, launch=launch))
    assert written(tmp_path / "text_generation_result.txt") == expected(folder, tokenizer, 9)


@pytest.mark.slow
def test_two_launchers_generate_together(folder, tokenizer, tmp_path):
    """As two nodes, which share the machine here. Rank 0 alone reads the prompts and writes."""
    port, nodes = free_port(), []
    for rank in range(2):
        cwd = tmp_path / f"node{rank}"
        cwd.mkdir()
        launch = [
            "experiments.launch",
            "--nproc=1",
            "--nnodes=2",
            f"--node_rank={rank}",
            "--master_addr=127.0.0.1",
            f"--master_port={port}",
        ]
        if rank == 0:
            (cwd / "prompts.txt").write_text("\n".join(LINES))
        args = [f"--hf_dir={folder}", "--prompts_file=prompts.txt", "--max_new_tokens=9", "--tp=2"]
        nodes.append(main(cwd, *args, launch=[*launch, "--log_dir=logs", "--"]))
    for node in nodes:
        ended(node)
    assert written(tmp_path / "node0" / "text_generation_result.txt") == expected(folder, tokenizer, 9)
    assert os.listdir(tmp_path / "node1") == ["logs"]


def test_weights_are_the_same_from_a_folder_and_a_run_in_any_layout(folder, run):
    cfg, params = hf.load(folder)
    for layout_ in (Mesh(), Mesh(tp=2, rank=1), Mesh(dp=2, rank=1)):
        sharding = Sharding(layout_)
        placed = tree_leaves(place(sharding, param_specs(cfg)))
        for opened in (weights.inference(hf_dir=str(folder)), weights.inference(workdir=str(run))):
            assert opened.cfg.replace(eos_id=cfg.eos_id) == cfg and (opened.tokenizer / "tokenizer.json").is_file()
            for p, (path, leaf) in zip(placed, tree_paths(opened.params(sharding))):
                want = cut(layout_, p.spec, p.used, lambda slices, path=path: reader(params)(path, slices))
                np.testing.assert_array_equal(leaf.asnumpy(), want, err_msg=path)
    for wrong in ({}, {"hf_dir": str(folder), "workdir": str(run)}):
        with pytest.raises(ValueError, match="give --hf_dir=FOLDER.*or --workdir=RUN"):
            weights.inference(**wrong)
    with pytest.raises(ValueError, match="--workdir=.*nowhere does not exist"):
        weights.inference(workdir=str(run / "nowhere"))


def test_an_adapter_is_joined_to_the_weights_in_any_layout(tmp_path):
    """In PEFT's format; and a run of LoRA, alone or on a base."""
    cfg, _ = saved(tmp_path, DENSE.replace(tie_embeddings=False))
    joined, params = adapter.with_adapter(*hf.load(tmp_path / "base"), tmp_path / "adapter")
    base, given, run = (str(tmp_path / name) for name in ("base", "adapter", "run"))
    found = adapter.open_adapter(given, cfg.base, lambda path, slices: reader(hf.load(base)[1])(path, slices))
    pieces = []
    for path, spec in peft.adapters(cfg).items():
        data = found.read(path, tuple(slice(0, n) for n in spec.shape))
        pieces.append(checkpoint_store.Piece(f"params/{path}", data.shape, data.shape, (0,) * data.ndim, data))
    noted = {"path": base, "fingerprint": found.fingerprint}
    checkpoint_store.save(step_folder(run, 3), pieces, {"step": 3, "model": cfg.to_hf(), "lora": asdict(cfg.lora), "base": noted})
    for mesh in (Mesh(), Mesh(tp=2, rank=1)):
        sharding = Sharding(mesh)
        placed = tree_leaves(place(sharding, param_specs(joined)))
        for opened in (weights.inference(base, None, given), weights.inference(base, None, run), weights.inference(None, run)):
            for p, (path, leaf) in zip(placed, tree_paths(opened.params(sharding)), strict=True):
                want = cut(mesh, p.spec, p.used, lambda slices, path=path: reader(params)(path, slices))
                assert_close(want, leaf, 1e-6, path)
    other = weights.inference(base).params(Sharding())
    assert not np.array_equal(other["layers"][0]["attention"]["wq"].asnumpy(), params["layers"][0]["attention"]["wq"].asnumpy())
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="for the base .*base, which does not exist; use --hf_dir=BASE --adapter="):
        weights.inference(None, run)


def test_a_run_without_a_checkpoint_has_its_final_model(folder, tmp_path):
    (tmp_path / "hf").symlink_to(folder)
    assert weights.inference(workdir=str(tmp_path)).folder == tmp_path / "hf"


def test_results_keep_to_stop_strings_and_reasons(engine, tokenizer):
    """A stop string frees the row, for the next request."""
    ids = [tokenizer.encode(line) for line in LINES]
    plain = generate_batch.run(engine, tokenizer, [(i, Request(row, 30), ()) for i, row in enumerate(ids)])
    plain.sort(key=lambda r: r.prompt)
    stop = plain[0].text[7:9]
    shown = []
    found = generate_batch.run(engine, tokenizer, [(i, Request(row, 30), (stop,)) for i, row in enumerate(ids)], shown=shown.append, most=3)
    assert sorted("".join(shown)) == sorted("".join(r.text for r in found))
    for r in found:
        text = plain[r.prompt].text
        at = text.find(stop)
        assert r.text == (text[:at] if at >= 0 else text) and r.finish_reason == ("stop" if at >= 0 else "length")
        assert r.tokens == plain[r.prompt].tokens[: len(r.tokens)] and not engine.busy()
    assert any(r.finish_reason == "stop" for r in found)


def test_the_text_of_a_line_can_be_read_back():
    text = "a\\n\nb\r\t\x1b[31m\u2028 é 你 🙂"
    line = generate_batch.line(SimpleNamespace(text=text))
    assert len(line.splitlines()) == 1 and "\x1b" not in line and "é 你 🙂" in line
    assert line.encode("latin-1", "backslashreplace").decode("unicode_escape") == text


def test_prompts_of_every_kind_of_line(tokenizer, tmp_path):
    messages = [{"role": "user", "content": "the fox"}]
    lines = ["text", {"prompt": "more"}, messages, {"messages": messages, "tools": None}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    read = prompts.read(path=str(tmp_path / "p.jsonl"))
    assert read == ["text", "more", {"messages": messages, "tools": None}, {"messages": messages, "tools": None}]
    chat = tokenizer.encode("<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n", allow_special=True)
    assert prompts.encode(tokenizer, read[2]).tolist() == prompts.encode(tokenizer, "the fox", chat=True).tolist() == chat
    assert prompts.encode(tokenizer, "<|im_end|>").tolist() == tokenizer.encode("<|im_end|>") != [tokenizer.eos_id]
    for text, message in (
        ("{", "line 1 is not JSON"),
        ("3", "line 1: give a string, a list"),
        ('{"messages": [1]}', "line 1: give a string"),
    ):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            prompts.read(path=str(tmp_path / "bad.jsonl"))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="has no prompt"):
        prompts.read(path=str(tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match="exactly one of them"):
        prompts.read("a", "b")
    with pytest.raises(FileNotFoundError, match="--prompts_file=.*is not a file"):
        prompts.read(path=str(tmp_path / "none"))


def test_defaults_are_those_of_generation_config(tmp_path):
    file = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05, "eos_token_id": [1, 2]}

    def sampling(**changes):
        (tmp_path / "generation_config.json").write_text(json.dumps({**file, **changes}))
        return defaults.sampling(defaults.read(tmp_path))

    assert sampling() == {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}
    assert sampling(do_sample=False) == {"temperature": 0.0, "repetition_penalty": 1.05}  # then transformers is greedy
    assert sampling(do_sample=None) == {"repetition_penalty": 1.05} and sampling(top_k=-1)["top_k"] == 0
    assert sampling(temperature=None, top_k=None, top_p=None, repetition_penalty=None) == {"temperature": 1.0}
    (tmp_path / "generation_config.json").unlink()
    assert defaults.sampling(defaults.read(tmp_path)) == {}


def test_requests_have_the_defaults_of_generation_config_too(tokenizer, tmp_path):
    """The server's rule is that of experiments.generate; a request wins over the file."""
    file = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05, "max_new_tokens": 7}
    (tmp_path / "generation_config.json").write_text(json.dumps(file))
    found = defaults.for_requests(defaults.read(tmp_path))

    def options(given=found, **body):
        body = json.dumps({"model": "m", "prompt": "the fox", **body}).encode()
        return serve_requests.parse(body, "completion", tokenizer, "m", 200, (1,), 10, given).options

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
    assert [options()[name] for name in names] == [0.6, 20, 0.95, 0.0, 1.05, 7]
    assert options(temperature=0, max_tokens=30)["temperature"] == 0 and options(max_tokens=30)["max_new_tokens"] == 30
    assert [options({})[name] for name in names] == [1.0, 0, 1.0, 0.0, 1.0, 16]  # OpenAI's


def test_a_text_ends_at_the_ids_of_the_files_and_of_the_chat_template(tokenizer, tmp_path):
    """Of a base model, whose own eos is the end of a document, a turn ends at <|im_end|>."""
    base = Tokenizer(tokenizer._backend, {**tokenizer._config, "eos_token": "<|endoftext|>"})
    cfg = DENSE.replace(vocab_size=tokenizer.vocab_size, eos_id=3)
    end = tokenizer.encode("<|im_end|>", allow_special=True)[0]
    assert defaults.stop_ids(defaults.read(tmp_path), cfg, base) == {3, base.eod_id, end}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert defaults.stop_ids(defaults.read(tmp_path), cfg, base) == {5, 6, base.eod_id, end}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 999}')
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id=999 is outside the vocabulary of"):
        defaults.stop_ids(defaults.read(tmp_path), cfg, base)


def test_a_conversation_goes_on_from_all_of_it(engine, tokenizer):
    asked = []

    def request(prompt):
        asked.append(tokenizer.decode(prompt))
        return Request(prompt, 5)

    out, model = io.StringIO(), SimpleNamespace(tokenizer=tokenizer, request=request)
    lines = io.StringIO("the fox\n\nlazy\n/reset\nquick\n" + "dog " * 99 + "\n/exit\nnever\n")
    generate_chat.chat(engine, model, lines=lines, out=out)
    first, second, third, _ = asked
    assert first == "<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n"
    answer = second[len(first) : second.index("<|im_end|>\n<|im_start|>user\nlazy")]
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in answer)
    assert answer and shown in out.getvalue() and "\x12" not in out.getvalue()  # no control character is shown
    assert third == "<|im_start|>user\nquick<|im_end|>\n<|im_start|>assistant\n"
    assert "is longer than the cache of 64" in out.getvalue() and "never" not in out.getvalue()


WRONG = [
    (DENSE, dict(pp=3), "parallel.pp=3 is more than the 2 layers of the model; use --pp=2 or less"),
    (DENSE, dict(cp=2), "parallel.cp=2 splits rows, which only training supports; use --cp=1"),
    (DENSE, dict(tp=8), "parallel.tp=8 must divide num_heads=4"),
    (DENSE, dict(dp=2, ep=2), "parallel.ep=2 splits experts, and model=m is dense"),
    (MOE, dict(tp=2, ep=2), "parallel.ep=2 uses 2 of the tp=2 ranks.*use --dp=2"),
    (MOE, dict(dp=4, ep=4), "parallel.ep=4 must divide num_experts=6"),
]


@pytest.mark.parametrize("cfg, asked, message", WRONG)
def test_layouts_that_do_not_generate_are_refused(cfg, asked, message):
    with pytest.raises(ValueError, match=message):
        layout.for_inference(asked, cfg, "m", None)
