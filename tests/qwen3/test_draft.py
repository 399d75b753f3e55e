"""Speculation by a draft model: the texts are those without it, and what it has read is used again."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ops.registry import Kernels
from qwen3 import hf
from qwen3.draft import Draft
from qwen3.engine import Engine, Request
from qwen3.generate import generate
from qwen3.tokenizer import train_bpe
from tests.experiments import scoring_worker
from tests.qwen3.test_engine import prompts, serve, tokens
from tests.qwen3.test_speculation import all_of, engine
from tests.tiny import DENSE, MOE, random_params

COUNT, LONG = 20, DENSE.replace(max_position=128)
SMALL = LONG.replace(num_layers=1)


def near(params, noise):
    """The model with noise on its head's table: it guesses some tokens right and some wrong."""
    import mindspore as ms

    table = params["embed"].asnumpy()
    return {**params, "embed": ms.Tensor(table + np.random.default_rng(0).normal(0, noise, table.shape).astype(np.float32))}


def drafting(params, draft_params, cfg=DENSE, draft_cfg=LONG, slots=3, speculate=4, kernels=None, **options):
    draft = Draft(draft_params, draft_cfg, slots=slots, length=96, most=speculate, kernels=kernels, page=8, prefill_chunk=16)
    return engine(params, cfg, slots=slots, speculate=speculate, draft=draft, kernels=kernels, **options)


@pytest.fixture(scope="module")
def params():
    return random_params(DENSE)


@pytest.fixture(scope="module")
def want(params):
    return tokens(serve(engine(params, speculate=0), requests()))


def requests(**options):
    return [Request(p, COUNT - i, **options) for i, p in enumerate(prompts(DENSE, (7, 3, 12, 5, 20)))]


@pytest.mark.parametrize("noise", [0.0, 0.05], ids=["right", "some"])
def test_greedy_texts_are_those_without_a_draft(noise, params, want):
    e = drafting(params, near(params, noise))
    assert tokens(serve(e, requests())) == want and e.cache.blocks.used() == 0
    share = e.totals.right_tokens / e.totals.guessed_tokens
    assert share == 1 if noise == 0 else 0 < share < 0.95


@pytest.mark.extended(but=["other model"])
@pytest.mark.parametrize("kind", ["other model", "moe", "reference kernels"])
def test_any_model_may_draft_for_any(kind, params, want):
    if kind == "moe":
        target, small = random_params(MOE), random_params(SMALL, 3)
        expected = tokens(serve(engine(target, MOE, speculate=0), requests()))
        assert tokens(serve(drafting(target, small, MOE, SMALL), requests())) == expected
    else:
        kernels = Kernels() if kind == "reference kernels" else None
        assert tokens(serve(drafting(params, random_params(SMALL, 3), DENSE, SMALL, kernels=kernels), requests())) == want


def test_drawn_texts_penalties_and_pages_that_run_out(params):
    asked = [Request(p, COUNT, temperature=0.5, seed=i, repetition_penalty=1.1) for i, p in enumerate(prompts(DENSE, (7, 3, 12, 5)))]
    plain = tokens(serve(engine(params, speculate=0), asked))
    e = drafting(params, near(params, 0.05))
    assert tokens(serve(e, asked)) == plain and 0 < e.totals.right_tokens < e.totals.guessed_tokens
    short = drafting(params, near(params, 0.05), cache_tokens=64)
    assert [row[:4] for row in tokens(serve(short, asked))] == [row[:4] for row in plain] and short.totals.preempted > 0


def test_neighbours_change_no_bit(params):
    asked = [Request(p, COUNT, logprobs=1) for p in prompts(DENSE, (7, 3, 12, 5))]
    together = all_of(drafting(params, near(params, 0.05)), asked)
    assert [all_of(drafting(params, near(params, 0.05)), [one])[0] for one in asked] == together


def test_guesses_are_the_greedy_continuation_and_are_read_once(params):
    draft, read = Draft(params, DENSE, slots=2, length=64, most=4, page=8), []
    plain = draft._read
    draft._read = lambda width, parts: (read.extend((slot, at, len(part)) for slot, at, part in parts), plain(width, parts))[1]
    first, second = prompts(DENSE, (9, 30))
    for number, slot, text in ((7, 1, first), (8, 0, second), (9, 1, second)):
        greedy = generate(params, [text], DENSE, 12)[0]
        assert draft.guesses({slot: (number, text, 4)})[slot] == greedy[:4]
        draft.learn(slot, 4, 4)
        assert read.pop() == (slot, 0, len(text))
        assert draft.guesses({slot: (number, text + greedy[:5], 4)})[slot] == greedy[5:9]  # all four were right, and one came after
        assert read.pop() == (slot, len(text) + 3, 2)
        other = [*text, *greedy[:5], greedy[5], (greedy[6] + 1) % DENSE.vocab_size]
        assert draft.guesses({slot: (number, other, 2)})[slot] == generate(params, [other], DENSE, 2)[0]
        assert read.pop() == (slot, len(text) + 6, 1)
        draft.learn(slot, 4, 0)
        assert len(draft.guesses({slot: (number, other, 4)})[slot]) == 1  # after one that was all wrong
        read.clear()
    assert draft.guesses({0: (1, second, 0)}) == {0: []} and not read


def test_what_does_not_fit_is_refused(params):
    with pytest.raises(ValueError, match="speculate=99 with a draft model must be from 1 to 32"):
        Draft(params, DENSE, slots=2, length=64, most=99)
    with pytest.raises(ValueError, match="the draft model has 64 positions, and rows have up to 96 tokens"):
        Draft(params, DENSE, slots=2, length=96, most=4)
    draft = Draft(params, DENSE, slots=2, length=64, most=4)
    for options in ({"slots": 3, "speculate": 4}, {"slots": 2}):
        with pytest.raises(ValueError, match="a draft model needs speculate=1 or more, and slots="):
            Engine(params, DENSE, length=64, draft=draft, **options)


@pytest.mark.extended
def test_generate_with_a_draft_model_gives_the_texts_without_it(tmp_path):
    """And refuses one of another tokenizer, or without a number of guesses."""
    tokenizer = scoring_worker.tokenizer()
    cfg = DENSE.replace(vocab_size=tokenizer.vocab_size, max_position=256, eos_id=tokenizer.eos_id)
    tokenizer.save(tmp_path / "tokenizer")
    train_bpe(["other words " * 9], 300).save(tmp_path / "other_tokenizer")
    for name, seed, files in (("large", 0, "tokenizer"), ("small", 1, "tokenizer"), ("other", 2, "other_tokenizer")):
        size = cfg.replace(num_layers=1) if name != "large" else cfg
        hf.save(tmp_path / name, size, random_params(size, seed), tokenizer_dir=tmp_path / files)

    def run(*flags):
        command = [
            sys.executable,
            "-m",
            "experiments.generate",
            f"--hf_dir={tmp_path}/large",
            "--prompt=def f",
            "--max_new_tokens=12",
            *flags,
        ]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)

    texts = []
    for flags in ((), (f"--draft_dir={tmp_path}/small", "--speculate=3")):
        done = run(*flags)
        assert done.returncode == 0, done.stderr
        texts.append((tmp_path / "text_generation_result.txt").read_text())
    assert texts[0] == texts[1]
    for flags, words in (
        ((f"--draft_dir={tmp_path}/other", "--speculate=3"), "has another tokenizer"),
        ((f"--draft_dir={tmp_path}/small",), "needs --speculate=N"),
    ):
        assert words in run(*flags).stderr
