"""The loss of whole data sets of every kind, and what experiments.evaluate refuses."""

import json

import mindspore as ms
import numpy as np
import pytest

from experiments.data import corpus, loader
from experiments.evaluate import evaluation, scoring
from experiments.train import weights
from qwen3 import hf
from qwen3.chat import alpaca, encode_chat
from qwen3.model import forward
from qwen3.tokenizer import Tokenizer
from tests.experiments.test_pretrain_data import BLEND, CHATS, PAIR, chat, folder, make_config  # noqa: F401  folder is a fixture
from tests.experiments.test_scoring import log_softmax
from tests.tiny import DENSE, random_params


@pytest.fixture(scope="module")
def scorer(folder):  # noqa: F811
    tokenizer = Tokenizer.load(folder / "tokenizer")
    cfg = DENSE.replace(vocab_size=tokenizer.vocab_size)
    return scoring.build(random_params(cfg), cfg, tokenizer, batch_size=4)


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_every_text_of_a_stream_counts_once(folder, scorer):  # noqa: F811
    config = make_config(folder, "{}/one.jsonl", **{"data.stream": True})
    found = evaluation.data_set(scorer, config, "all")
    docs, sizes = texts(folder / "one.jsonl"), scorer.tokenizer.token_bytes()
    ids = scorer.tokenizer.encode_batch(docs)
    size = sum(len(text.encode()) - int(sizes[first]) for text, (first, *_) in zip(docs, ids))  # nothing comes before a text's first token
    assert found["count"] == sum(map(len, ids)) and f"{size:,} bytes" in found["of"]
    rows = list(loader.one_epoch(corpus.whole(config, scorer.cfg.vocab_size)[1], 0))
    rows = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    given = {key: ms.Tensor(rows[key]) for key in ("positions", "segment_ids")}
    logprobs = log_softmax(forward(scorer.params, ms.Tensor(rows["tokens"]), scorer.cfg, **given)[0].asnumpy())
    picked = np.take_along_axis(logprobs, rows["targets"][..., None], 2)[..., 0]
    loss = -(picked * rows["loss_weights"]).sum() / found["count"]
    want = {"loss": loss, "perplexity": np.exp(loss), "bits_per_byte": loss * found["count"] / np.log(2) / size}
    assert found["values"] == {key: pytest.approx(value, rel=1e-5) for key, value in want.items()}
    assert evaluation.data_set(scorer, config, "all", 3)["of"].endswith("3 rows")


@pytest.mark.extended
def test_pairs_blends_conversations_and_folders_of_text(folder, scorer, tmp_path):  # noqa: F811
    def whole(path, **changes):
        return evaluation.data_set(scorer, make_config(folder, path, **changes), "all")

    tokens = sum(len(ids) for ids in scorer.tokenizer.encode_batch(texts(folder / "one.jsonl")))
    pair = whole(PAIR)
    assert tokens - 32 <= pair["count"] <= tokens and whole(BLEND)["count"] > 1.5 * pair["count"]
    masks = [encode_chat(scorer.tokenizer, *alpaca(chat(j)))[1] for j in range(60)]
    path, changes = CHATS
    assert whole(path, **changes)["count"] == sum(int(mask[1:49].sum()) for mask in masks)
    changes = {"data.format": "alpaca", "train.seq_len": 48}
    assert whole("{}/chats.jsonl", **changes)["count"] == sum(int(mask[1:49].sum()) for mask in masks)
    for i, text in enumerate(texts(folder / "one.jsonl")):
        (tmp_path / f"{i:03}.txt").write_text(text)
    assert whole(str(tmp_path))["count"] == tokens
    held = corpus.load(make_config(folder, str(tmp_path)), scorer.cfg.vocab_size).held_out
    assert evaluation.data_set(scorer, make_config(folder, str(tmp_path)), "held_out")["count"] == held["loss_weights"].sum()


def test_what_cannot_be_evaluated_is_named(tmp_path):
    with pytest.raises(ValueError, match="--data and --tasks are missing"):
        evaluation.own_data(None, None)
    with pytest.raises(ValueError, match="has no config.json, which names a run's data; give --data"):
        evaluation.own_data(None, str(tmp_path))
    with pytest.raises(ValueError, match="--tasks=missing.jsonl does not exist"):
        evaluation.split_tasks(["hellaswag", "missing.jsonl"], None)
    with pytest.raises(ValueError, match="--task_folder=x is for tasks of lm-evaluation-harness"):
        evaluation.split_tasks([], "x")
    hf.save(tmp_path / "hf", DENSE, random_params(DENSE))
    with pytest.raises(ValueError, match="has no tokenizer beside its weights"):
        weights.inference(str(tmp_path / "hf"), None).load_tokenizer()
