"""Vectors and scores against the last states of forward() and against transformers; alone as in a batch; files and what is refused."""

import json
import shutil
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments.embed import files, vectors
from qwen3 import hf
from qwen3.model import forward
from qwen3.tokenizer import EOD, Tokenizer
from tests.experiments import embed_worker
from tests.processes import run
from tests.qwen3.hf_folders import GOLDEN
from tests.tiny import DENSE, MOE, assert_close


@pytest.fixture(scope="module")
def model():
    return embed_worker.build(DENSE)


def alone(model, ids):
    """The logits of the last token of a text that has a row without padding."""
    return forward(model.params, ms.Tensor(np.array([ids], np.int32)), model.cfg)[0].asnumpy()[0, -1]


def test_a_vector_is_the_last_state_of_its_text_alone(model):
    """With a tied head, the logits are the state times the embedding, which shows the state."""
    found = vectors.embed(model, embed_worker.TEXTS, normalise=False)
    table = model.params["embed"].asnumpy()
    for text, vector in zip(embed_worker.TEXTS, found):
        assert_close(alone(model, model.tokenizer.encode(text)), table @ vector, 1e-5)
    lengths = {len(model.tokenizer.encode(text)) for text in embed_worker.TEXTS}
    assert len(lengths) > 3 and max(lengths) > vectors.NARROWEST
    for i in (0, 3):
        np.testing.assert_allclose(vectors.embed(model, [embed_worker.TEXTS[i]], normalise=False)[0], found[i], rtol=1e-4, atol=1e-5)
    short = vectors.embed(model, embed_worker.TEXTS, dims=5)
    np.testing.assert_allclose(short, found[:, :5] / np.linalg.norm(found[:, :5], axis=1, keepdims=True), rtol=1e-5)


def test_the_instruction_and_the_tokenizers_end_are_part_of_a_query(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "end_ids", [model.tokenizer.eod_id])
    (found,) = vectors.embed(model, ["what"], "find it", normalise=False)
    ids = model.tokenizer.encode("Instruct: find it\nQuery:what") + [model.tokenizer.eod_id]
    assert_close(alone(model, ids), model.params["embed"].asnumpy() @ found, 1e-5)


def test_the_ids_that_tokenizer_json_appends_are_known(tmp_path):
    """In the form of Qwen3-Embedding's tokenizer.json."""
    plain = embed_worker.tokenizer()
    plain.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    text = json.loads(path.read_text())
    end, token = {"SpecialToken": {"id": EOD, "type_id": 0}}, {"id": EOD, "ids": [plain.eod_id], "tokens": [EOD]}
    body = [{"Sequence": {"id": "A", "type_id": 0}}, end]
    text["post_processor"] = {"type": "TemplateProcessing", "single": body, "pair": body, "special_tokens": {EOD: token}}
    path.write_text(json.dumps(text))
    found = Tokenizer.load(tmp_path)
    assert plain.end_ids == [] and found.end_ids == [found.eod_id] and found.encode("def") == plain.encode("def")


def test_a_score_is_the_probability_of_yes_against_no(model):
    encode = model.tokenizer.encode
    found = vectors.rerank(model, embed_worker.PAIRS, "judge it")
    for (query, document), score in zip(embed_worker.PAIRS, found):
        middle = f"<Instruct>: judge it\n<Query>: {query}\n<Document>: {document}"
        ids = encode(vectors.BEFORE_PAIR, allow_special=True) + encode(middle) + encode(vectors.AFTER_PAIR, allow_special=True)
        logits = alone(model, ids)
        yes, no = (np.exp(np.float64(logits[encode(word)[0]])) for word in ("yes", "no"))
        assert score == pytest.approx(yes / (yes + no), rel=1e-4)


@pytest.mark.extended
def test_layouts_equal_one_process():
    ranks = run("tests.experiments.embed_worker:main", 2)
    for name, (cfg, _) in embed_worker.LAYOUTS.items():
        want = embed_worker.results(cfg)
        for found in ranks:
            for key, value in want.items():
                assert_close(value, found[f"{name} {key}"], 1e-5, f"{name} {key}")


def flat_copy(source, folder, config=None, drop=()):
    """A folder as transformers' AutoModel saves it: no head, and no "model." before the names."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({k.removeprefix("model."): v for k, v in tensors.items() if k not in drop}, folder / "model.safetensors")
    return folder


def test_the_files_of_a_model_without_a_head_are_read(tmp_path):
    """As Qwen3-Embedding has them: 0.6B is tied; 8B is untied and has no head."""
    tied = flat_copy(GOLDEN / "dense_tied", tmp_path / "tied")
    want, found = hf.Reader(GOLDEN / "dense_tied"), hf.Reader(tied)
    assert want.paths == found.paths and all(np.array_equal(want.read(p), found.read(p)) for p in want.paths)
    untied = flat_copy(GOLDEN / "dense_untied", tmp_path / "untied", drop=("lm_head.weight",))
    with pytest.raises(ValueError, match="missing tensors lm_head.weight"):
        hf.Reader(untied)
    want, found = hf.Reader(GOLDEN / "dense_untied"), hf.Reader(untied, head=False)
    assert set(want.paths) - set(found.paths) == {"lm_head"}
    assert all(np.array_equal(want.read(p), found.read(p)) for p in found.paths)


@pytest.mark.extended
@pytest.mark.parametrize("name", ["dense_tied", "moe_norm"])
def test_states_are_those_that_transformers_gave(name):
    """As tests/golden/make_peers.py stored them."""
    cfg, params = hf.load(GOLDEN / name, dtype="float32")
    stored = np.load(GOLDEN.parent / "peers" / "states.npz")
    model = vectors.build(params, cfg, SimpleNamespace(pad_id=0), batch_size=2)
    found = vectors.of_last_tokens(model, model.states, [stored[f"{name} ids {n}"].tolist() for n in (3, 9, 14)], cfg.hidden_size)
    for n, vector in zip((3, 9, 14), found):
        assert_close(stored[f"{name} {n}"], vector, 1e-5)


def test_texts_are_read_and_results_written(tmp_path):
    lines, pairs = tmp_path / "a.txt", tmp_path / "pairs.jsonl"
    lines.write_text("one\ntwo words\n")
    assert files.read(str(lines)) == ["one", "two words"]
    pairs.write_text('{"query": "q", "document": "d"}\n')
    assert files.read(str(pairs), True) == [("q", "d")]
    values = np.float32([[1.5, 2], [3, 4]])
    files.write(str(tmp_path / "v.npy"), values)
    files.write(str(tmp_path / "v.jsonl"), values)
    assert np.array_equal(np.load(tmp_path / "v.npy"), values)
    assert [json.loads(line)["embedding"] for line in (tmp_path / "v.jsonl").open()] == values.tolist()


def test_what_cannot_be_embedded_is_named(model, tmp_path):
    path = tmp_path / "a.jsonl"
    for text, message in (('"a"\n{"txt": 1}\n', "line 2: give a text"), ("{\n", "line 1 is not JSON"), ("", "is empty")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            files.read(str(path))
    with pytest.raises(ValueError, match="give .*query"):
        path.write_text('{"query": "q"}\n')
        files.read(str(path), True)
    with pytest.raises(ValueError, match="must be a file that ends in .npy or .jsonl"):
        files.check_output("x.csv")
    with pytest.raises(ValueError, match="--dims=25 must be from 1 to 24"):
        vectors.embed(model, ["a"], dims=25)
    with pytest.raises(ValueError, match="--max_length=999 is more than"):
        embed_worker.build(MOE, length=999)
