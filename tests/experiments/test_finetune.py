"""Fine-tuning: what the loss is of, all weights and adapters, what trains and what is saved, going on, and what is refused."""

import json
import os
import shutil

import mindspore as ms
import numpy as np
import pytest

from experiments import finetune
from experiments import flags as command_line
from experiments.convert import lora as convert_lora
from experiments.data import conversations, corpus
from experiments.train import adapter, finish
from experiments.train import program as train_program
from experiments.train.weights import initial_params
from parallel.checkpoint.files import step_folder
from parallel.checkpoint.read import Reader
from parallel.trees import tree_paths
from qwen3 import hf
from qwen3.model import build
from qwen3.tokenizer import Tokenizer
from tests.experiments.test_pretrain import make_config
from tests.experiments.test_resume import stopping_after
from tests.tiny import assert_close

QUICK = {
    "train.sample_prompt": "",
    "train.seq_len": 96,
    "train.steps": 4,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.sample_tokens": 0,
    "checkpoint.every": 2,
}
LORA = {"lora.rank": 4, "lora.alpha": 8.0, "train.seq_len": 96}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(conversations, "GENERATED", 60)


def config_of(**changes):
    return make_config("", **{"data.format": "messages", **QUICK, **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of full fine-tuning, and the output."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversations, "GENERATED", 60)
        folder = tmp_path_factory.mktemp("base") / "run"
        finetune.finetune(config_of(**{"train.sample_tokens": 4}), str(folder))
    return folder


def records(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("step_time_s", "tokens_per_s", "mfu")} for line in lines]


def test_full_fine_tuning_lowers_the_loss_and_leaves_a_model_and_the_share_of_right_answers(base):
    lines = records(base)
    assert lines[-1]["final_loss"] < lines[0]["eval_loss"] - 0.5 and 0 <= lines[-1]["exact_match"] <= 1
    assert hf.load(base / "hf")[0].num_layers == 2 and "<|im_start|>user" in (base / "sample.txt").read_text()


@pytest.mark.extended
def test_a_base_model_that_learns_conversations_stops_where_a_turn_ends(base, lora_run, tmp_path):
    """Its own eos is the end of a document, which never comes after a turn. In the files of the model, of a checkpoint and of a merged
    adapter; the sampling defaults of the model that training began from come along."""
    tokenizer = Tokenizer.load(base / "hf")
    end = tokenizer.encode("<|im_end|>", allow_special=True)[0]
    assert json.loads((base / "hf" / "generation_config.json").read_text())["eos_token_id"] == [tokenizer.eod_id, end]
    folder = shutil.copytree(base / "hf", tmp_path / "base")
    for name in ("config.json", "generation_config.json"):
        values = {**json.loads((folder / name).read_text()), "eos_token_id": tokenizer.eod_id}
        values.pop("_from_model_config", None)
        (folder / name).write_text(json.dumps({**values, "do_sample": True} if name.startswith("gen") else values))
    cfg = corpus.with_token_ids(hf.load(folder)[0], tokenizer, trained=False, chats=True)
    assert cfg.eos_id == (tokenizer.eod_id, end) and corpus.with_token_ids(cfg, tokenizer, False, chats=True) == cfg
    finish.save_model(tmp_path / "out", cfg, hf.load(folder)[1], tokenizer, str(folder))
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [tokenizer.eod_id, end] and saved["do_sample"] is True
    assert Reader(step_folder(str(base), 4)).meta["model"]["eos_token_id"] == [tokenizer.eod_id, end]
    peft_only = shutil.copytree(lora_run / "adapter", tmp_path / "adapter")
    list(convert_lora.merge(str(peft_only), str(tmp_path / "merged"), str(folder), None))
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"] == [tokenizer.eod_id, end]


@pytest.fixture(scope="module")
def rows():
    """{packing: the held-out rows}, of the same conversations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversations, "GENERATED", 60)
        return {packing: corpus.load(config_of(**{"data.packing": packing, "data.held_out": 0.2}), 320) for packing in ("packed", "padded")}


@pytest.mark.extended
def test_packed_and_padded_rows_have_the_loss_of_the_next_tokens_of_each_conversation(rows, base):
    """Of what a model gives each conversation alone, the mean negative log probability of the token after each place: labels that are
    shifted once more, or not at all, are far from it."""
    cfg, params = hf.load(base / "hf")
    program = train_program.build_program(cfg, config_of())
    state = program.init(params)
    found = {packing: program.evaluate(state, [data.held_out]) for packing, data in rows.items()}
    held, forward = rows["padded"].held_out, build(cfg).forward
    sums, count = np.zeros(3), 0
    for i in range(len(held["tokens"])):
        size = int((held["segment_ids"][i] > 0).sum())
        ids = np.append(held["tokens"][i][:size], held["targets"][i][size - 1])
        logits = forward(params, ms.Tensor(ids[None].astype(np.int32)))[0].asnumpy()[0].astype(np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for at in np.flatnonzero(held["loss_weights"][i][:size]):
            later = min(at + 2, len(ids) - 1)
            sums += [-logp[at, ids[at + 1]], -logp[at, ids[later]], -logp[at, ids[at]]]
            count += 1
    assert count == held["loss_weights"].sum() == rows["packed"].held_out["loss_weights"].sum()
    right, twice, never = sums / count
    assert found["packed"] == pytest.approx(found["padded"], rel=1e-6) and found["padded"] == pytest.approx(right, rel=1e-5)
    assert min(abs(right - twice), abs(right - never)) > 0.01


@pytest.fixture(scope="module")
def lora_run(base, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversations, "GENERATED", 60)
        folder = tmp_path_factory.mktemp("lora") / "run"
        finetune.finetune(lora_config(base), str(folder))
    return folder


def lora_config(base, **changes):
    tokenizer = {"data.tokenizer": str(base / "hf"), "init_from": str(base / "hf")}
    return config_of(**{**LORA, **tokenizer, "lora.dropout": 0.1, "lora.targets": "q,v,o,down", **changes})


@pytest.mark.extended
def test_a_checkpoint_of_adapters_holds_nothing_else_and_the_base_is_as_it_was(base, lora_run):
    saved = Reader(step_folder(str(lora_run), 4))
    assert all(".lora." in name for name in saved.names) and len(saved.names) == 3 * 2 * 2 * 4  # params, m, v; layers; A, B; targets
    cfg = hf.load(base / "hf")[0]
    hidden, heads, kv, ffn, rank = cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim, cfg.ffn_size, 4
    per_layer = rank * ((hidden + heads) + (hidden + kv) + (heads + hidden) + (ffn + hidden))
    assert saved.nbytes == 3 * 2 * per_layer * 4
    assert saved.meta["base"]["path"] == str(base / "hf")
    losses = [line["eval_loss"] for line in records(lora_run) if "eval_loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.extended
def test_frozen_weights_stay_bit_for_bit_and_have_no_state(base):
    config = lora_config(base)
    cfg = command_line.model_config(config)
    program, (read, _, _) = train_program.build_program(cfg, config), initial_params(cfg, config)
    state = program.init(read)
    before = {path: w.asnumpy().copy() for path, w in tree_paths(state["frozen"])}
    batch = {key: value[:4] for key, value in corpus.load(config, cfg.vocab_size).held_out.items()}
    adapters = [w.asnumpy().copy() for _, w in tree_paths(state["params"])]
    for at in range(2):
        state, _ = program.step(state, batch, 1e-2, at)
    assert all(np.array_equal(before[path], w.asnumpy()) for path, w in tree_paths(state["frozen"]))
    assert not any(np.array_equal(a, w.asnumpy()) for a, (_, w) in zip(adapters, tree_paths(state["params"])))
    assert len(tree_paths(state["m"])) == len(tree_paths(state["v"])) == len(adapters) == 2 * 2 * 4


@pytest.mark.slow
def test_a_stopped_and_resumed_run_of_adapters_is_bit_for_bit_the_one_that_went_through(base, lora_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stopping_after(2, patch)
        finetune.finetune(lora_config(base), str(run))
    finetune.finetune(lora_config(base), str(run))
    got, want = (Reader(step_folder(str(folder), 4)) for folder in (run, lora_run))
    assert all(np.array_equal(got.read(name), want.read(name)) for name in want.names) and got.meta["loader"] == want.meta["loader"]
    assert records(run) == records(lora_run)


@pytest.mark.extended
def test_another_base_is_refused_by_name(base, lora_run):
    with pytest.raises(ValueError, match=f"holds adapters for the base {base}/hf .* and this is random weights"):
        finetune.finetune(lora_config(base, **{"init_from": "", "train.steps": 6}), str(lora_run))
    with pytest.raises(ValueError, match="holds adapters alone, for the base .*merge-lora"):
        finetune.finetune(lora_config(base, init_from=str(lora_run)), str(lora_run) + "_other")


def test_merged_weights_equal_adapters_beside_them(base, lora_run, tmp_path):
    """By merge-lora, from the run's checkpoint and from PEFT's format, to a plain folder."""
    cfg, params = hf.load(base / "hf")
    beside_cfg, beside = adapter.with_adapter(cfg, params, str(lora_run), merge=False)
    tokens = ms.Tensor(np.random.default_rng(0).integers(0, 300, (2, 12)).astype(np.int32))
    want, _ = build(beside_cfg).forward(beside, tokens)
    for source in (lora_run, lora_run / "adapter"):
        output = tmp_path / source.name
        text = " ".join(convert_lora.merge(str(source), str(output), None, None))
        assert "rank 4, on q, v, o, down" in text and os.path.exists(output / "tokenizer.json")
        merged_cfg, merged = hf.load(output)
        assert merged_cfg.lora is None
        assert_close(want, build(merged_cfg).forward(merged, tokens)[0], 1e-5)
    plain, _ = build(cfg).forward(params, tokens)
    assert np.abs(plain.asnumpy() - want.asnumpy()).max() > 1e-4


@pytest.mark.extended
def test_frozen_parameters_of_full_fine_tuning_are_saved_without_state(base, tmp_path):
    changes = {"train.freeze_include": "embed,*norm,layers.*", "train.freeze_exclude": "*w_up", "train.steps": 2, "train.save_hf": False}
    config = config_of(**changes, **{"data.tokenizer": str(base / "hf"), "init_from": str(base / "hf")})
    finetune.finetune(config, str(tmp_path / "run"))
    saved, (_, params) = Reader(step_folder(str(tmp_path / "run"), 2)), hf.load(base / "hf")
    moved = {path for path, w in tree_paths(params) if not np.array_equal(saved.read(f"params/{path}"), w.asnumpy())}
    assert moved == {f"layers.{i}.mlp.w_up" for i in range(2)}
    assert {name for name in saved.names if name.startswith("m/")} == {f"m/{path}" for path in moved}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"data.format": ""}, "data.format='' is no format of conversations"),
        ({"lora.rank": 2, "lora.targets": "q,gates"}, "lora.targets: 'gates' matches none of embed, q, k"),
        ({"lora.rank": 2, "train.freeze_include": "embed"}, "freezes all parameters but the adapters; leave it out"),
        ({"train.freeze_include": "*"}, "leaves nothing to train"),
        ({"data.path": "nowhere.jsonl"}, "^data.path=nowhere.jsonl does not exist"),
    ],
)
def test_mistakes_are_told(changes, said, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        finetune.finetune(config_of(**changes), str(tmp_path / "run"))
