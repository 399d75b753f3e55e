"""Log-likelihoods against transformers' stored logits, requests cut as lm-evaluation-harness cuts them, any layout as one process."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import mindspore as ms
import numpy as np
import pytest

from experiments.evaluate import harness, scoring, tasks
from qwen3 import hf
from qwen3.generate import generate
from qwen3.model import forward
from tests import processes
from tests.experiments import scoring_worker
from tests.golden import make_harness
from tests.tiny import DENSE, MOE

GOLDEN = Path(__file__).parents[1] / "golden" / "hf"


@pytest.fixture(scope="module")
def model():
    return scoring_worker.scorer(DENSE, {}, 0)


def log_softmax(logits):
    z = np.asarray(logits, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def alone(model, context, continuation):
    """(log probability, greedy) of ids, by a forward pass of that request alone."""
    ids = [*context, *continuation]
    logits = forward(model.params, ms.Tensor(np.array([ids[:-1]], np.int32)), model.cfg)[0].asnumpy()[0]
    at = np.arange(len(context) - 1, len(ids) - 1)
    return log_softmax(logits)[at, continuation].sum(), bool((logits[at].argmax(-1) == continuation).all())


@pytest.mark.parametrize("name", ["dense_yarn", "moe_norm", "qwen2_bias"])
def test_log_likelihoods_are_those_of_transformers_logits(name):
    """Every start and end of its rows, packed together."""
    cfg, params = hf.load(GOLDEN / name)
    stored = dict(np.load(GOLDEN / name / "reference.npz"))
    tokens, logprobs = stored["tokens"], log_softmax(stored["logits"])
    scorer = scoring.build(params, cfg, SimpleNamespace(eos_id=0, pad_id=0), batch_size=2)
    requests, want = [], []
    for row, cut, end in np.ndindex(len(tokens), 12, 13):
        if 0 < cut < end:
            at = np.arange(cut, end)
            requests.append((tokens[row, :cut].tolist(), tokens[row, cut:end].tolist()))
            want.append(logprobs[row, at - 1, tokens[row, at]].sum())
    requests.append((stored["prompt"].ravel().tolist(), stored["greedy"].tolist()))
    found = scoring.loglikelihood_ids(scorer, requests)
    np.testing.assert_allclose([x for x, _ in found[:-1]], want, rtol=1e-5)
    assert found[-1][1] and not all(greedy for _, greedy in found)


def test_requests_are_cut_as_lm_evaluation_harness_cuts_them(model):
    """The continuation's ids are what is left of the whole's, after as many as the context alone has."""
    encode = model.tokenizer.encode
    whole = encode("def function_1(x):\n    return x")
    assert scoring.encode_pair(model, "def func", "tion_1(x):\n    return x") == (encode("def func"), whole[len(encode("def func")) :])
    assert encode("def func") + encode("tion_1(x):\n    return x") != whole  # so the cut is not where the text is cut
    assert scoring.encode_pair(model, "def  ", "x") == (encode("def"), encode("def  x")[len(encode("def")) :])  # spaces move
    assert scoring.encode_pair(model, "", "def x") == ([model.tokenizer.eos_id], encode("def x"))
    assert scoring.encode_pair(model, "", "<|im_end|>def")[0] == [model.tokenizer.eos_id]  # and is not doubled
    assert scoring.encode_pair(model, "", "<|im_end|>def")[1] == encode("def")


@pytest.mark.extended
def test_requests_of_all_lengths_score_as_each_alone(model):
    pairs = [scoring.encode_pair(model, *pair) for pair in scoring_worker.PAIRS]
    found = scoring.loglikelihood(model, scoring_worker.PAIRS)
    for pair, (logprob, greedy) in zip(pairs, found):
        context, continuation = pair
        context = context[-(model.length + 1 - len(continuation)) :]  # what is too long loses its start
        want = alone(model, context, continuation)
        assert logprob == pytest.approx(want[0], rel=1e-5) and greedy == want[1]
    assert any(sum(map(len, pair)) > model.length + 1 for pair in pairs)
    follows = generate(model.params, [pairs[3][0]], model.cfg, 3)[0]
    assert scoring.loglikelihood_ids(model, [(pairs[3][0], follows)])[0][1]
    for wrong in ([], [1] * (model.length + 1)):
        with pytest.raises(ValueError, match="request 0: its continuation has .* tokens"):
            scoring.loglikelihood_ids(model, [([1], wrong)])


def test_long_texts_are_predicted_once_with_the_most_context():
    """The example of lm-evaluation-harness's documentation."""
    windows = list(scoring.rolling_windows(list(range(10)), -1, 4))
    assert windows == [([-1], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    assert list(scoring.rolling_windows([], -1, 4)) == []


def test_a_rolling_log_likelihood_is_the_sum_of_its_windows(model):
    text = scoring_worker.TEXT[:300]
    windows = list(scoring.rolling_windows(model.tokenizer.encode(text), model.prefix_id, model.length))
    assert len(windows) > 1
    want = sum(alone(model, *window)[0] for window in windows)
    assert scoring.loglikelihood_rolling(model, ["", text]) == [0.0, pytest.approx(want, rel=1e-5)]


@pytest.mark.extended
def test_generation_ends_at_the_texts_that_are_given(model):
    free, cut, sampled = scoring.generate_until(
        model,
        [
            ("def f", {"max_gen_toks": 8}),
            ("def f", {"until": "XYZ", "max_gen_toks": 8, "do_sample": False, "temperature": 1.0}),
            ("def f", SAMPLED),
        ],
    )
    ids = generate(model.params, [model.tokenizer.encode("def f")], model.cfg, 8, stop_ids=[model.tokenizer.eos_id])[0]
    assert free == cut == model.tokenizer.decode(ids, skip_special=True) != sampled and len(free) > 2
    assert scoring.generate_until(model, [("def f", {"until": ["", free[2]], "max_gen_toks": 8})]) == [free.split(free[2])[0]]
    with pytest.raises(ValueError, match="generation has no option 'num_beams'"):
        scoring.generate_until(model, [("x", {"num_beams": 4})])
    with pytest.raises(ValueError, match="max_gen_toks=64 must be from 1 to 63, as the model sees 64 tokens"):
        scoring.generate_until(model, [("x", {"max_gen_toks": 64})])


SAMPLED = {"max_gen_toks": 8, "do_sample": True, "temperature": 5.0}


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_multiple_choice_counts_the_likeliest_by_length_too(model, tmp_path, monkeypatch):
    """Log-likelihoods made up: the second choice is likeliest, the first a character, the third, of two-byte letters, a byte."""
    line = {"context": "x", "choices": ["abcdef", "b", "éééé"], "answer": 0}
    asked, values = [], [-6.0, -2.0, -5.0]

    def made_up(scorer, requests):
        asked.extend(requests)
        return [(value, False) for value in values * (len(requests) // 3)]

    monkeypatch.setattr(scoring, "loglikelihood", made_up)
    path = write(tmp_path / "some.jsonl", line, {**line, "answer": 1, "delimiter": ""}, {**line, "answer": 2})
    task = tasks.read(path)
    found, errors = tasks.run(model, task)
    assert task.name == "some" and asked[0] == ("x", " abcdef") and asked[3] == ("x", "abcdef")
    assert found == {"acc": pytest.approx(1 / 3), "acc_norm": pytest.approx(1 / 3), "acc_bytes": pytest.approx(1 / 3)}
    assert errors["acc"] == pytest.approx(1 / 3)  # sqrt(p (1 - p) / (n - 1))


def test_cloze_and_whole_texts(model, tmp_path):
    follows = model.tokenizer.decode(generate(model.params, [model.tokenizer.encode("def")], model.cfg, 2)[0])
    greedy = {"context": "def", "target": follows, "delimiter": ""}
    other = {"context": "def", "target": "x"}
    found, errors = tasks.run(model, tasks.read(write(tmp_path / "cloze.jsonl", greedy, other)))
    pairs = scoring.loglikelihood(model, [("def", follows), ("def", " x")])
    assert pairs[0][1] and found["acc"] == np.mean([g for _, g in pairs])
    assert found["perplexity"] == pytest.approx(np.exp(-np.mean([x for x, _ in pairs])))
    text = "def function_3(x):\n  é"
    found, _ = tasks.run(model, tasks.read(write(tmp_path / "text.jsonl", {"text": text}, {"text": "x"})))
    nats = -sum(scoring.loglikelihood_rolling(model, [text, "x"]))
    assert found["bits_per_byte"] == pytest.approx(nats / np.log(2) / (len(text.encode()) + 1))
    assert found["word_perplexity"] == pytest.approx(np.exp(nats / 4))


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2 is not JSON"),
        ('{"context": "x"}', "line 2: give the keys"),
        ('{"context": "x", "choices": ["a", "b"], "answer": 2}', "line 2: answer=2 must be the index of a choice, from 0 to 1"),
        ('{"context": "x", "choices": ["a", "b"], "answer": true}', "line 2: answer=True"),
        ('{"context": "x", "choices": ["a"], "answer": 0}', "line 2: .* choices a list of at least two"),
        ('{"context": 1, "choices": ["a", "b"], "answer": 0}', "line 2: .* must be strings"),
        ('{"text": "x"}', "line 2 has 'text', but line 1 has 'choices'"),
    ],
)
def test_a_bad_line_of_a_task_is_named(line, message, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"context": "x", "choices": ["a", "b"], "answer": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        tasks.read(str(tmp_path / "bad.jsonl"))


def test_the_adapter_answers_the_harness_requests(model, monkeypatch):
    """A stand-in for lm-eval's classes, with requests as its Instance has them."""
    api = ModuleType("lm_eval.api.model")
    api.LM = object
    for name, module in {"lm_eval": ModuleType("lm_eval"), "lm_eval.api": ModuleType("lm_eval.api"), "lm_eval.api.model": api}.items():
        monkeypatch.setitem(sys.modules, name, module)
    adapter = harness.adapter(model)
    request = lambda *args: SimpleNamespace(args=args)
    pair = ("def function_1", "(x):")
    assert adapter.loglikelihood([request(*pair)]) == scoring.loglikelihood(model, [pair])
    assert adapter.loglikelihood_rolling([request("def")]) == scoring.loglikelihood_rolling(model, ["def"])
    options = {"until": ["\n"], "max_gen_toks": 4}
    assert adapter.generate_until([request("def", options)]) == scoring.generate_until(model, [("def", options)])
    assert adapter.apply_chat_template([{"role": "user", "content": "x"}]).endswith("<|im_start|>assistant\n")


def test_lm_evaluation_harness_runs_tasks_of_its_own(model, tmp_path):
    pytest.importorskip("lm_eval")
    pytest.importorskip("datasets")
    data = write(tmp_path / "data.json", *({"q": "def function_", "choices": ["1(x)", "2"], "gold": i % 2} for i in range(4)))
    (tmp_path / "ours.yaml").write_text(
        f"task: ours\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: gold\ntarget_delimiter: ''\n"
        "metric_list:\n  - metric: acc\n"
    )
    line = {"context": "def function_", "choices": ["1(x)", "2"], "answer": 0, "delimiter": ""}
    want = tasks.run(model, tasks.read(write(tmp_path / "same.jsonl", *({**line, "answer": i % 2} for i in range(4)))))
    values, errors, count = harness.run(model, ["ours"], str(tmp_path))["ours"]
    assert values["acc"] == want[0]["acc"] == 0.5 and errors["acc"] == pytest.approx(want[1]["acc"]) and count == 4
    with pytest.raises(ValueError, match="--tasks=nothing: neither a file, nor a task"):
        harness.run(model, ["nothing"])


@pytest.mark.parametrize("name", make_harness.MODELS)
def test_scores_are_the_stored_ones_of_the_harness_own_back_end(name, tmp_path):
    """Its cuts, its windows and its task on transformers' model, as tests/golden/make_harness.py stored them."""
    stored = json.loads(make_harness.PATH.read_text())[name]
    model = scoring_worker.scorer({"dense": DENSE, "moe": MOE}[name], {}, 0)
    assert model.length == make_harness.LENGTH and {greedy for *_, greedy in stored["pairs"]} == {True, False}
    found = scoring.loglikelihood(model, [(context, continuation) for context, continuation, *_ in stored["pairs"]])
    np.testing.assert_allclose([x for x, _ in found], [x for *_, x, _ in stored["pairs"]], rtol=1e-5)
    assert [greedy for _, greedy in found] == [greedy for *_, greedy in stored["pairs"]]
    np.testing.assert_allclose(scoring.loglikelihood_rolling(model, make_harness.TEXTS), stored["rolling"], rtol=1e-5)
    lines = [{"context": d["q"], "choices": d["choices"], "answer": d["gold"], "delimiter": ""} for d in make_harness.DOCUMENTS]
    values, _ = tasks.run(model, tasks.read(write(tmp_path / "ours.jsonl", *lines)))
    assert {key: values[key] for key in ("acc", "acc_norm")} == {key: stored[key] for key in ("acc", "acc_norm")}


def test_a_missing_harness_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match="--tasks=hellaswag is not a file, and lm-eval, .* is not installed"):
        harness.run(model, ["hellaswag"])


@pytest.mark.extended
def test_any_layout_scores_as_one_process():
    ranks = processes.run("tests.experiments.scoring_worker:main", 2)
    for name, (cfg, sizes) in scoring_worker.LAYOUTS.items():
        want = scoring_worker.results(cfg, dict.fromkeys(sizes, 1))
        for rank in ranks:
            np.testing.assert_allclose(rank[f"{name}|logprobs"], want["logprobs"], rtol=1e-5)
            np.testing.assert_allclose(rank[f"{name}|rolling"], want["rolling"], rtol=1e-5)
            np.testing.assert_array_equal(rank[f"{name}|greedy"], want["greedy"])
            assert "texts" not in want or rank[f"{name}|texts"].tolist() == want["texts"].tolist()
