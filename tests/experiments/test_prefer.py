"""Training on preferences: each loss and gradient against numpy, packing, adapters, the reference model, going on, and what is refused."""

import json
import shutil

import mindspore as ms
import numpy as np
import pytest
from safetensors import safe_open

from experiments import finetune, prefer, pretrain
from experiments import flags as command_line
from experiments.configs import common
from experiments.data import preferences
from experiments.data.conversations import Conversations
from experiments.data.loader import first_rows
from experiments.posttrain import losses, preference, reference
from experiments.posttrain.settings import LOSSES, settings
from experiments.train import program as train_program
from experiments.train.weights import inference, initial_params
from parallel.checkpoint.files import step_folder
from parallel.checkpoint.read import Reader
from parallel.sharding import Sharding
from parallel.step import value_and_grad
from parallel.trees import tree_map, tree_paths, unflatten
from qwen3 import hf
from qwen3.config import Lora
from qwen3.model import build, forward, param_specs
from tests.experiments.test_pretrain import make_config
from tests.experiments.test_resume import records, stopping_after
from tests.tiny import DENSE, FUSED, assert_close, random_params

LORA = DENSE.replace(lora=Lora(2, 4.0, ("q", "v", "down")))
OPTIONS = {"beta": 0.3, "margin": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.7, "row_pairs": 3}


def config_of(loss, **changes):
    config = common.get_config()
    config.prefer.update({**OPTIONS, "loss": loss, **changes})
    return config


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def formula(s, score, sign):
    """(loss, right) of each pair in float64 numpy, from the scores [pairs, 2] and the signs of the first answers."""
    d, z = score[:, 0] - score[:, 1], max(score[:, 1].mean(), 0)
    if s.loss == "kto":
        gain = sign * s.beta * (score[:, 0] - z)
        return np.where(sign > 0, s.desirable_weight, s.undesirable_weight) * (1 - sigmoid(gain)), gain > 0
    each = {
        "dpo": lambda: -(1 - s.label_smoothing) * log_sigmoid(s.beta * d) - s.label_smoothing * log_sigmoid(-s.beta * d),
        "ipo": lambda: (d - 1 / (2 * s.beta)) ** 2,
        "simpo": lambda: -log_sigmoid(s.beta * d - s.margin),
        "reward": lambda: -log_sigmoid(d - s.margin),
    }
    return each[s.loss](), d > 0


VARIANTS = [(loss, {}) for loss in LOSSES] + [("dpo", {"label_smoothing": 0.2}), ("dpo", {"beta": 30.0})]


@pytest.mark.parametrize("loss, changes", VARIANTS)
def test_each_loss_and_its_gradient_are_the_formulas(loss, changes):
    rng, s = np.random.default_rng(0), settings(config_of(loss, **changes))
    score, sign = rng.normal(0, 3, (6, 2)), np.array([1.0, -1, 1, 1, -1, -1])
    score[0] = 0  # as in the first step of a run, where policy and reference are equal
    want, z = formula(s, score, sign)[0], max(score[:, 1].mean(), 0)

    def of_scores(first, second):
        if loss == "kto":
            return losses.kto(s, first, ms.Tensor(sign > 0, ms.float32), z).sum()
        return losses.OF_PAIRS[loss](s, first - second).sum()

    given = [ms.Tensor(score[:, k], ms.float32) for k in (0, 1)]
    value, grads = ms.value_and_grad(of_scores, (0, 1))(*given)
    assert_close(want.sum(), value, 1e-5)
    for k in (0,) if loss == "kto" else (0, 1):
        step = np.zeros((6, 2))
        step[:, k] = 1e-6
        if loss == "kto":  # whose reference point has no gradient
            step[:, 1] = 0
        slope = (formula(s, score + step, sign)[0] - formula(s, score - step, sign)[0]) / 2e-6
        assert_close(slope, grads[k], 1e-5)


def made_pairs(loss, count=5, seed=0):
    """Pairs of answers of random tokens, after prompts of random tokens."""
    rng, found, signs = np.random.default_rng(seed), [], []
    for i in range(count):
        prompt = rng.integers(1, DENSE.vocab_size, rng.integers(2, 5))
        for k in range(2):
            answer = rng.integers(1, DENSE.vocab_size, rng.integers(1, 6))
            found.append((np.concatenate([prompt, answer]), np.repeat([0, 1], (len(prompt), len(answer)))))
            signs.append((preferences.OTHER if k else 1 - 2 * (i % 2)) if loss == "kto" else 1 - 2 * k)
    ids, masks = (np.concatenate([each[k] for each in found]) for k in (0, 1))
    ends = np.cumsum([0, *(len(each[0]) for each in found)])
    return preferences.Pairs(Conversations(ids.astype(np.int32), masks.astype(np.uint8), ends), np.array(signs, np.int8))


def batch_of(pairs, most=3, seq_len=32, fill=0):
    """All pairs in rows, with nats of a reference model that are drawn at random."""
    source = preferences.PreferenceRows(pairs, seq_len, fill, most=most)
    rows = {key: np.stack([source.row(i)[key] for i in range(len(source))]) for key in source.row(0)}
    rng = np.random.default_rng(1)
    of_each = [rng.uniform(0, 6, len(pairs.answers[i][0]) - 1) for i in range(2 * len(pairs))]
    nats, plan = np.zeros(rows["tokens"].shape, np.float32), source.plan
    for row in range(len(source)):
        for at in range(plan.first[row], plan.first[row + 1]):
            nats[row, plan.start[at] : plan.start[at] + plan.size[at]] = of_each[plan.example[at]]
    return {**rows, "reference": nats}, of_each


def log_probabilities(params, cfg, ids):
    """log p of each token of an answer but its first, computed alone, in float64."""
    found = forward(params, ms.Tensor(ids[None, :-1], ms.int32), cfg)[0].asnumpy()[0].astype(np.float64)
    top = found.max(-1, keepdims=True)
    return (found - top - np.log(np.exp(found - top).sum(-1, keepdims=True)))[np.arange(len(ids) - 1), ids[1:]]


def expected(s, pairs, logps, nats):
    """(loss, right, scores, lengths, log-probabilities) in numpy, from the log-probabilities and nats of each answer's tokens."""
    masks = [pairs.answers[i][1][1:] for i in range(2 * len(pairs))]
    own = np.array([(logp * mask).sum() for logp, mask in zip(logps, masks)])
    score = np.array([((logp + (0 if s.loss == "simpo" else nat)) * mask).sum() for logp, nat, mask in zip(logps, nats, masks)])
    length = np.array([mask.sum() for mask in masks])
    score = score / length if s.length_normalised or s.loss == "simpo" else score
    return *formula(s, score.reshape(-1, 2), pairs.signs[::2]), score, length, own


def tensors(batch):
    return tree_map(lambda x: ms.Tensor(np.ascontiguousarray(x)), batch)


IN_MODEL = [("dpo", {}), ("ipo", {"length_normalised": True}), ("kto", {}), ("simpo", {})]


@pytest.mark.extended(but=("kto*",))
@pytest.mark.parametrize("loss, changes", IN_MODEL)
def test_packed_pairs_have_the_loss_the_gradient_and_the_metrics_of_answers_computed_alone(loss, changes):
    config, pairs, params = config_of(loss, **changes), made_pairs(loss), random_params(DENSE)
    s, (batch, nats) = settings(config), batch_of(pairs)
    assert batch["segment_ids"].max() > 2, "no row holds two pairs"
    logps = [log_probabilities(params, DENSE, pairs.answers[i][0]) for i in range(10)]
    want, right, score, length, own = expected(s, pairs, logps, nats)
    model = preference.Preference(config, DENSE, Sharding(), False, FUSED, "none", 1)
    (value, found), grads = value_and_grad(model.loss_fn, aux=preference.names(DENSE))(params, tensors(batch))
    assert_close(want.mean(), value, 1e-5)
    done = preference.finished({name: float(x.asnumpy()) for name, x in found.items()}, loss)
    chosen, rejected = pairs.signs == 1, pairs.signs == -1
    assert done["accuracy"] == pytest.approx(right.mean()) and done["pairs"] == 5
    assert done["reward_margin"] == pytest.approx(s.beta * (score[chosen].mean() - score[rejected].mean()), rel=1e-4)
    assert done["rejected_logp"] == pytest.approx(own[rejected].mean(), rel=1e-5)

    slopes = np.zeros(10)  # of the loss by each answer's log-probability, with the reference point held
    for i in range(0, 10, 2 if loss == "kto" else 1):
        step = np.zeros(10)
        step[i] = 1e-5
        slopes[i] = (formula(s, (score + step).reshape(-1, 2), pairs.signs[::2])[0].mean()) / 2e-5
        slopes[i] -= (formula(s, (score - step).reshape(-1, 2), pairs.signs[::2])[0].mean()) / 2e-5
    slopes = slopes / length if s.length_normalised or loss == "simpo" else slopes

    def by_slopes(params):
        total = 0.0
        for i, slope in enumerate(slopes):
            ids, mask = pairs.answers[i]
            logits = forward(params, ms.Tensor(ids[None, :-1], ms.int32), DENSE)[0][0]
            nats = ms.ops.cross_entropy(logits, ms.Tensor(ids[1:], ms.int32), reduction="none")
            total = total - float(slope) * (nats * ms.Tensor(mask[1:], ms.float32)).sum()
        return total

    want_grads = dict(tree_paths(value_and_grad(by_slopes)(params)[1]))
    for path, gradient in tree_paths(grads):
        assert_close(want_grads[path], gradient, 1e-4, path)


def test_packed_and_unpacked_rows_have_the_same_loss():
    config, pairs, params = config_of("dpo"), made_pairs("dpo"), random_params(DENSE)
    model = preference.Preference(config, DENSE, Sharding(), False, FUSED, "none", 1)
    packed, alone = (model.loss_fn(params, tensors(batch_of(pairs, most)[0]))[0].asnumpy() for most in (3, 1))
    assert packed == pytest.approx(alone, rel=1e-6)


def test_editing_an_answer_changes_no_other_answer_of_its_row():
    config, pairs, params = config_of("dpo"), made_pairs("dpo"), random_params(DENSE)
    model = preference.Preference(config, DENSE, Sharding(), False, FUSED, "none", 1)
    batch, _ = batch_of(pairs)
    edited = {**batch, "tokens": np.where(batch["segment_ids"] == 2, 7, batch["tokens"])}
    (_, before), (_, after) = (model.loss_fn(params, tensors(each)) for each in (batch, edited))
    assert before["rejected_logp"].asnumpy() != after["rejected_logp"].asnumpy()
    assert before["chosen_logp"].asnumpy() == pytest.approx(after["chosen_logp"].asnumpy(), rel=1e-6)


@pytest.mark.extended
def test_under_adapters_the_reference_is_the_model_without_them():
    config, pairs, params = config_of("dpo", row_pairs=3), made_pairs("dpo"), random_params(LORA)
    config.lora.rank = 2
    batch, _ = batch_of(pairs)
    del batch["reference"]
    found = preference.Preference(config, LORA, Sharding(), False, FUSED, "none", 1).loss_fn(params, tensors(batch))[0]
    leaves, specs = dict(tree_paths(params)), param_specs(DENSE)
    plain = unflatten(specs, [leaves[path] for path, _ in tree_paths(specs)])
    nats = [-log_probabilities(plain, DENSE, pairs.answers[i][0]) for i in range(10)]
    logps = [-_nats(params, LORA, pairs.answers[i][0]) for i in range(10)]
    want = expected(settings(config), pairs, logps, nats)[0]
    assert abs(want.mean() - np.log(2)) > 1e-3 and found.asnumpy() == pytest.approx(want.mean(), rel=1e-5)


@pytest.mark.extended
@pytest.mark.parametrize("loss, cfg", [("dpo", LORA.replace(num_layers=1)), ("reward", DENSE.replace(num_layers=1, num_labels=1))])
def test_a_compiled_step_has_the_loss_and_the_gradient_of_the_eager_one(loss, cfg):
    config, params = config_of(loss), random_params(cfg)
    config.lora.rank = cfg.lora.rank if cfg.lora else 0
    batch = {key: value for key, value in batch_of(made_pairs(loss))[0].items() if key != "reference"}
    model = preference.Preference(config, cfg, Sharding(), False, FUSED, "none", 1)
    (value, _), grads = value_and_grad(model.loss_fn, aux=preference.names(cfg))(params, tensors(batch))
    trained = [grad.asnumpy() for path, grad in tree_paths(grads) if ".lora." in path or not cfg.lora]
    program = train_program.build_program(cfg, config)
    _, metrics = program.step(program.init(tree_map(lambda leaf: leaf.asnumpy(), params)), batch, 1e-3, 0)
    assert metrics["loss"] == metrics["objective"] == pytest.approx(float(value.asnumpy()), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(np.sqrt(sum((grad**2).sum() for grad in trained)), rel=1e-4)


def _nats(params, cfg, ids):
    tokens, targets = ms.Tensor(ids[None, :-1], ms.int32), ms.Tensor(ids[None, 1:], ms.int32)
    positions = ms.Tensor(np.arange(len(ids) - 1)[None], ms.int32)
    return build(cfg).score(params, tokens, targets, positions, ms.ops.ones_like(positions))[0].asnumpy()[0].astype(np.float64)


QUICK = {
    "model_args.num_layers": 1,
    "data.format": "pairs",
    "train.seq_len": 160,
    "train.steps": 4,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.sample_tokens": 0,
    "train.save_hf": False,
    "checkpoint.every": 2,
    "prefer.loss": "dpo",
    "optim.lr": 1e-3,
}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(preferences, "GENERATED", 60)


def run_config(**changes):
    return make_config("", **{**QUICK, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of DPO of all weights that nothing stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preferences, "GENERATED", 60)
        folder = tmp_path_factory.mktemp("whole") / "run"
        prefer.prefer(run_config(), str(folder))
    return folder


def test_a_run_starts_at_its_reference_and_learns_the_preference(whole):
    lines = records(whole)
    start, last = lines[0], lines[-1]
    assert start["eval_loss"] == pytest.approx(np.log(2), abs=1e-5) and abs(start["eval_reward_margin"]) < 1e-5
    assert last["final_loss"] < start["eval_loss"] and last["final_accuracy"] > 0.5 and last["final_reward_margin"] > 0
    assert Reader(step_folder(str(whole), 4)).meta["reference"]["path"] == "random weights of train.seed=0"
    assert {"loss", "accuracy", "reward_margin", "chosen_logp", "rejected_logp", "tokens"} <= set(lines[1])


def test_a_stopped_and_resumed_run_is_bit_for_bit_the_one_that_went_through(whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stopping_after(2, patch)
        prefer.prefer(run_config(), str(run))
    with monkeypatch.context() as patch:  # the reference comes from the run's folder
        patch.setattr(reference, "nats_of_rows", lambda *_: pytest.fail("the reference model ran again"))
        prefer.prefer(run_config(), str(run))
    got, want = (Reader(step_folder(str(folder), 4)) for folder in (run, whole))
    assert all(np.array_equal(got.read(name), want.read(name)) for name in want.names) and got.meta["loader"] == want.meta["loader"]
    assert records(run) == records(whole)


def test_a_cache_of_another_model_or_of_other_rows_is_refused(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    notes = json.loads((run / "reference" / "reference.json").read_text())
    for key, what in (("model", "another model"), ("train", "other rows"), ("held_out", "other rows")):
        with pytest.raises(ValueError, match=f"reference holds the log-probabilities of {what}: {key}="):
            reference._check(str(run / "reference"), {**notes, key: "x"})
    meta = Reader(step_folder(str(whole), 4)).meta
    cfg, config = command_line.model_config(run_config()), run_config(**{"train.seed": 1})
    with pytest.raises(ValueError, match="was trained against the reference model random weights of train.seed=0 .*, and this is random"):
        reference.check(meta["reference"], cfg, config, "FOLDER")
    reference.check(meta["reference"], cfg, run_config(), "FOLDER")


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ipo", "kto", "simpo"])
@pytest.mark.parametrize("rank", [0, 4])
def test_every_loss_runs_with_all_weights_and_with_adapters(loss, rank, tmp_path):
    changes = {"prefer.loss": loss, "lora.rank": rank, "prefer.beta": 1.0, "parallel.micro_batches": 2}
    if loss == "ipo":  # whose difference has the goal 1 / (2 beta); these large steps would pass 0.5
        changes["prefer.beta"] = 0.05
    prefer.prefer(run_config(**changes, **({"data.format": "unpaired"} if loss == "kto" else {})), str(tmp_path / "run"))
    lines = records(tmp_path / "run")
    assert lines[-1]["final_loss"] < lines[0]["eval_loss"]
    assert (tmp_path / "run" / "reference").exists() == (rank == 0 and loss != "simpo")


@pytest.mark.slow
def test_accumulation_equals_one_batch():
    pairs, config = made_pairs("dpo", 8), config_of("dpo")
    source = preferences.PreferenceRows(pairs, 32, 0, most=1)
    batch = first_rows(source, 8, 0)
    batch["reference"], params, found = np.full((8, 32), 2.0, np.float32), random_params(DENSE), []
    for micro in (1, 4):
        config.parallel.micro_batches = micro
        program = train_program.build_program(DENSE, config)
        _, metrics = program.step(program.init(params), batch, 1e-3, 0)
        found.append(metrics)
    for name in ("loss", "grad_norm", "accuracy", "reward_margin", "chosen_logp", "pairs"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 8])
def test_dpo_learns_a_made_up_preference(rank, tmp_path, monkeypatch):
    """Of capital letters over small ones: above 0.95 of the pairs that are held out."""
    monkeypatch.setattr(preferences, "GENERATED", 400)
    changes = {"train.steps": 40, "train.log_every": 20, "train.batch_size": 8, "lora.rank": rank, "optim.lr": 3e-3 if rank else 1e-3}
    prefer.prefer(run_config(**changes), str(tmp_path / "run"))
    assert records(tmp_path / "run")[-1]["final_accuracy"] >= 0.95


REWARD = DENSE.replace(num_labels=1)


def test_a_reward_model_scores_the_last_token_of_each_answer():
    """Packed, against the trunk's last states and the head in numpy."""
    config, params = config_of("reward"), random_params(REWARD)
    assert "score" in params and "lm_head" not in params
    pairs, s = made_pairs("reward"), settings(config)
    lasts = np.concatenate([np.arange(len(pairs.answers[i][0])) == len(pairs.answers[i][0]) - 1 for i in range(10)])
    pairs = preferences.Pairs(Conversations(pairs.answers.ids, lasts.astype(np.uint8), pairs.answers.ends), pairs.signs)
    batch, _ = batch_of(pairs)
    found = preference.Preference(config, REWARD, Sharding(), False, FUSED, "none", 1).loss_fn(params, tensors(batch))
    scores = [forward(params, ms.Tensor(pairs.answers[i][0][None, :-1], ms.int32), REWARD)[0].asnumpy()[0, -1, 0] for i in range(10)]
    want, right = formula(s, np.array(scores, np.float64).reshape(-1, 2), pairs.signs[::2])
    assert found[0].asnumpy() == pytest.approx(want.mean(), rel=1e-5)
    assert found[1]["right"].asnumpy() == right.sum() and found[1]["chosen_reward"].asnumpy() == pytest.approx(sum(scores[::2]), rel=1e-5)


def test_the_scores_are_the_last_states_times_the_head():
    params = random_params(REWARD)
    untied = {**params, "lm_head": ms.Tensor(np.eye(DENSE.hidden_size, dtype=np.float32))}  # whose logits are the states themselves
    head = {name: leaf for name, leaf in untied.items() if name != "score"}
    tokens = ms.Tensor([[3, 1, 4, 1, 5]], ms.int32)
    states = forward(head, tokens, DENSE.replace(tie_embeddings=False, vocab_size=DENSE.hidden_size))[0].asnumpy()
    assert_close(states @ params["score"].asnumpy(), forward(params, tokens, REWARD)[0], 1e-5)


def test_a_saved_reward_model_is_one_of_transformers_and_is_read_again(tmp_path):
    params = random_params(REWARD)
    hf.save(tmp_path / "hf", REWARD, params)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"] and config["id2label"] == {"0": "LABEL_0"}
    with safe_open(tmp_path / "hf" / "model.safetensors", "numpy") as file:
        assert file.get_tensor("score.weight").shape == (1, DENSE.hidden_size) and "lm_head.weight" not in file.keys()
    cfg, again = hf.load(tmp_path / "hf")
    assert cfg.num_labels == 1
    for path, leaf in tree_paths(again):
        np.testing.assert_array_equal(leaf.asnumpy(), dict(tree_paths(params))[path].asnumpy())
    with pytest.raises(ValueError, match="hf is a reward model, which writes no text; use a language model"):
        inference(hf_dir=str(tmp_path / "hf"))


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_starts_from_a_language_model_or_from_a_reward_model(tied, tmp_path):
    plain = DENSE.replace(tie_embeddings=tied)
    for cfg in (plain, plain.replace(num_labels=1)):
        hf.save(tmp_path / "hf", cfg, params := random_params(cfg))
        config = config_of("reward")
        config.model = config.init_from = str(tmp_path / "hf")
        wanted = command_line.model_config(config)
        read, _, left_out = initial_params(wanted, config)
        assert wanted.num_labels == 1 and not left_out
        for path, spec in tree_paths(param_specs(wanted)):
            value = read(path, tuple(slice(0, n) for n in spec.shape))
            if path != "score" or cfg.num_labels:
                np.testing.assert_array_equal(value, dict(tree_paths(params))[path].asnumpy())
        shutil.rmtree(tmp_path / "hf")


@pytest.mark.slow
def test_a_reward_model_learns_a_made_up_preference_and_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(preferences, "GENERATED", 400)
    changes = {"prefer.loss": "reward", "train.steps": 40, "train.log_every": 20, "train.batch_size": 8, "train.save_hf": True}
    prefer.prefer(run_config(**changes), str(tmp_path / "run"))
    assert records(tmp_path / "run")[-1]["final_accuracy"] >= 0.95
    assert hf.load(tmp_path / "run" / "hf")[0].num_labels == 1


WRONG = [
    ({"prefer.loss": ""}, "prefer.loss is empty; use one of dpo, ipo, kto, simpo"),
    ({"data.format": "messages"}, "data.format='messages' is no format of preferences; use pairs or unpaired"),
    ({"data.format": "unpaired"}, "has single answers, and prefer.loss=dpo compares pairs; use prefer.loss=kto"),
    ({"data.path": "nowhere.jsonl"}, "^data.path=nowhere.jsonl does not exist"),
]


@pytest.mark.parametrize("changes, said", WRONG)
def test_mistakes_are_told(changes, said, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        prefer.prefer(run_config(**changes), str(tmp_path / "run"))


@pytest.mark.parametrize("main", [pretrain.pretrain, finetune.finetune])
def test_the_other_mains_refuse_preferences(main, tmp_path):
    with pytest.raises(ValueError, match="prefer.loss=dpo is for experiments.prefer"):
        main(run_config(), str(tmp_path / "run"))
    with pytest.raises(ValueError, match="data.format=pairs is for experiments.prefer"):
        main(run_config(**{"prefer.loss": ""}), str(tmp_path / "run"))


LAYOUTS = [
    ({"parallel.pp": 2, "parallel.micro_batches": 2}, "parallel.pp=2 with prefer.loss=dpo is not supported"),
    ({"parallel.cp": 2}, "parallel.cp=2 with prefer.loss=dpo of all weights: the cache of the reference model needs whole rows"),
    ({"train.monitor_every": 1}, "train.monitor_every with prefer.loss"),
    ({"parallel.lowering": "shard"}, "prefer.loss=dpo with parallel.lowering=shard"),
    ({"prefer.loss": "reward", "lora.rank": 2}, "lora.rank=2 with prefer.loss=reward, a reward model: adapters would leave its head"),
    (
        {"prefer.loss": "reward", "train.sample_tokens": 2},
        "train.sample_tokens=2 with prefer.loss=reward, a reward model: it writes no text",
    ),
]


@pytest.mark.parametrize("changes, said", LAYOUTS)
def test_a_layout_that_cannot_train_on_preferences_is_refused_before_it_starts(changes, said):
    config = run_config(**changes)
    with pytest.raises(ValueError, match=said):
        command_line.layout.check(config, command_line.model_config(config, "any"))
