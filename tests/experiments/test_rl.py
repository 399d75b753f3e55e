"""Reinforcement learning: losses and gradients against numpy, the sampler against the trainer, rewards that fail, and runs that go on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

from experiments import finetune, prefer, rl
from experiments import flags as command_line
from experiments.configs import common
from experiments.data import instructions
from experiments.posttrain import losses, policy
from experiments.posttrain.reward_pool import Pool
from experiments.posttrain.rewards import exact_match
from experiments.posttrain.rollouts import Rollouts
from experiments.posttrain.settings import RL_LOSSES, rl_settings
from experiments.train import program as train_program
from parallel.checkpoint.files import step_folder
from parallel.checkpoint.read import Reader
from parallel.graph.nested import part
from parallel.sharding import Sharding
from parallel.step import value_and_grad
from parallel.trees import tree_paths
from qwen3 import hf
from qwen3.engine import Engine, Request
from qwen3.model import build, param_specs
from tests.experiments.test_pretrain import make_config
from tests.experiments.test_resume import records as all_records
from tests.experiments.test_resume import stopping_after
from tests.tiny import DENSE, FUSED, MOE, assert_close, random_params

ROOT = Path(__file__).parents[2]
BAD = "tests.experiments.rewards_for_tests"
DRAWN = np.random.default_rng(0)


# Losses


def config_of(loss, **changes):
    config = common.get_config()
    config.rl.update({"loss": loss, "max_new_tokens": 7, "clip_low": 0.1, "clip_high": 0.3, "kl_coef": 0.2, **changes})
    return config


def formula(s, logp, batch):
    """(loss, share-free sums of clipped tokens and of kl) in float64 numpy from logp_BS; each answer alone, in a loop."""
    num, den, clipped, kl_sum = 0.0, 0.0, 0.0, 0.0
    for b in range(len(logp)):
        at = batch["loss_weights"][b] > 0
        if not at.any():
            continue
        new, old, ref = logp[b][at], batch["sampled"][b][at].astype(np.float64), batch["reference"][b][at].astype(np.float64)
        advantage, n = batch["advantages"][b][at].astype(np.float64), at.sum()
        ratio = np.full(n, np.exp((new - old).mean())) if s.loss == "gspo" else np.exp(new - old)
        free, held = ratio * advantage, np.clip(ratio, 1 - s.clip_low, 1 + s.clip_high) * advantage
        kl = np.exp(ref - new) - (ref - new) - 1
        each = -np.minimum(free, held) + s.kl_coef * kl
        clipped, kl_sum = clipped + (held < free).sum(), kl_sum + kl.sum()
        num += {"dapo": each.sum(), "dr_grpo": each.sum() / s.max_new_tokens}.get(s.loss, each.mean())
        den += n if s.loss == "dapo" else 1
    return num / den, clipped, kl_sum


def made_batch(cfg, loss, rows=5, S=12):
    """Rows with a prompt and an answer, whose last one does not count."""
    rng = np.random.default_rng(3)
    batch = {name: np.zeros((rows, S), np.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
    batch.update({name: np.zeros((rows, S), np.float32) for name in ("loss_weights", "advantages", "sampled", "reference", "denominators")})
    for b in range(rows):
        size, n = int(rng.integers(2, 5)), int(rng.integers(1, 7))
        end = size + n - 1
        ids = rng.integers(1, cfg.vocab_size, size + n)
        batch["tokens"][b, :end], batch["targets"][b, :end] = ids[:-1], ids[1:]
        batch["positions"][b, :end], batch["segment_ids"][b, :end] = np.arange(end), 1
        if b + 1 < rows:
            at = slice(size - 1, end)
            batch["loss_weights"][b, at], batch["advantages"][b, at] = 1, rng.normal()
            batch["sampled"][b, at], batch["reference"][b, at] = -rng.uniform(2, 7, n), -rng.uniform(2, 7, n)
            batch["denominators"][b, size - 1] = losses.denominators(loss, n)
    return batch


def tensors(batch):
    return {name: ms.Tensor(value) for name, value in batch.items()}


@pytest.mark.parametrize("loss", RL_LOSSES)
def test_each_loss_and_its_gradient_by_all_parameters_are_the_formulas(loss):
    """The gradient is that of sum(c log pi) with the constants c = d loss / d log pi of the formula, by differences in float64."""
    config, params, batch = config_of(loss), random_params(DENSE), made_batch(DENSE, loss)
    s, given = rl_settings(config), tensors(batch)
    model = policy.Policy(config, DENSE, Sharding(), False, FUSED, "none", 1)
    found, metrics = model.loss_fn(params, given)
    score = build(DENSE, kernels=FUSED).score
    ids = [given[name] for name in ("tokens", "targets", "positions", "segment_ids")]
    logp = -score(params, *ids)[0].asnumpy().astype(np.float64)
    want, clipped, kl = formula(s, logp, batch)
    assert found.asnumpy() == pytest.approx(want, rel=1e-5) and metrics["clipped"].asnumpy() == clipped > 0
    assert metrics["kl"].asnumpy() == pytest.approx(kl, rel=1e-5) and metrics["tokens"].asnumpy() == batch["loss_weights"].sum()

    slope = np.zeros_like(logp)
    for b, t in zip(*np.nonzero(batch["loss_weights"])):
        step = np.zeros_like(logp)
        step[b, t] = 1e-6
        slope[b, t] = (formula(s, logp + step, batch)[0] - formula(s, logp - step, batch)[0]) / 2e-6
    c = ms.Tensor(slope.astype(np.float32))

    def weighted(params):
        return -(score(params, *ids)[0] * c).sum()

    (_, got), (_, expected) = value_and_grad(lambda p: model.loss_fn(p, given)[0])(params), value_and_grad(weighted)(params)
    for (path, g), (_, e) in zip(tree_paths(got), tree_paths(expected)):
        assert_close(e, g, 1e-5), path


def test_advantages_are_the_formula_and_groups_without_signal_are_dropped():
    rewards = np.array([1, 0, 0, 1, 1, 1, 1, 1, 0.5, 9, 0.2, 0.2], np.float32)
    good = np.array([1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1], np.float32)
    got, kept = losses.advantages(rewards, good, 4, True)
    first, last = np.array([1, 0, 0, 1.0]), np.array([0.5, 0.2, 0.2])
    np.testing.assert_allclose(got[:4], (first - 0.5) / (np.std(first, ddof=1) + 1e-4), rtol=1e-6)
    np.testing.assert_allclose(got[[8, 10, 11]], (last - 0.3) / (np.std(last, ddof=1) + 1e-4), rtol=1e-5)
    assert kept.tolist() == [1] * 4 + [0] * 4 + [1, 0, 1, 1] and not got[4:8].any() and got[9] == 0
    np.testing.assert_allclose(losses.advantages(rewards, good, 4, False)[0][:4], first - 0.5, rtol=1e-6)
    tenth = np.full(6, 0.1, np.float32)  # whose mean rounds
    assert not losses.advantages(tenth, np.ones(6), 6, True)[1].any()


def test_no_answer_that_counts_gives_zero_and_not_nan():
    batch = made_batch(DENSE, "grpo")
    for name in ("loss_weights", "advantages", "denominators"):
        batch[name][:] = 0
    model = policy.Policy(config_of("grpo"), DENSE, Sharding(), False, FUSED, "none", 1)
    assert model.loss_fn(random_params(DENSE), tensors(batch))[0].asnumpy() == 0


# The sampler and the trainer


@pytest.mark.extended(but=("*1.0-dense",))
@pytest.mark.parametrize("cfg", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_samplers_log_probabilities_are_the_trainers(cfg, temperature):
    params, rng = random_params(cfg), np.random.default_rng(0)
    engine = Engine(params, cfg, slots=3, length=32, prefill_chunk=16)
    prompts = [rng.integers(1, cfg.vocab_size, n).tolist() for n in (5, 9, 2, 12)]
    numbers = {engine.submit(Request(p, 8, temperature=temperature, seed=3, sample=i, logprobs=0)): i for i, p in enumerate(prompts)}
    made = [[] for _ in prompts]
    while engine.busy():
        for event in engine.step():
            made[numbers[event.id]].append((event.token, event.logprob))
    for prompt, answer in zip(prompts, made):
        ids = np.array([[*prompt, *(token for token, _ in answer)]], np.int32)
        given = [ids[:, :-1], ids[:, 1:], np.arange(ids.shape[1] - 1, dtype=np.int32)[None], np.ones_like(ids[:, 1:])]
        nats = build(cfg, kernels=FUSED).score(params, *map(ms.Tensor, map(np.ascontiguousarray, given)))[0].asnumpy()
        np.testing.assert_allclose(-nats[0, len(prompt) - 1 :], [logprob for _, logprob in answer], atol=1e-4)


def generated(engine, prompt):
    engine.submit(Request(prompt, 6, logprobs=0))
    out = []
    while engine.busy():
        out += [(event.token, event.logprob) for event in engine.step()]
    return out


def test_parameters_that_change_in_place_make_the_engine_forget_their_keys_and_values():
    options = {"slots": 2, "length": 32, "prefill_chunk": 16, "page": 4}
    params, prompt = random_params(DENSE), list(range(1, 14))
    engine = Engine(params, DENSE, **options)
    generated(engine, prompt)
    for (_, leaf), (_, other) in zip(tree_paths(params), tree_paths(random_params(DENSE, seed=7))):
        leaf.assign_value(other)  # as an optimizer does that works in place
    engine.use(params)
    assert generated(engine, prompt) == generated(Engine(params, DENSE, **options), prompt) and not engine.totals.reused_tokens
    engine.submit(Request(prompt))
    with pytest.raises(ValueError, match="its parameters cannot change while requests wait or run"):
        engine.use(params)


# Rewards


def test_a_reward_that_raises_hangs_ends_or_is_no_number_is_one_bad_answer():
    texts = ["good", "raise", "hang", "nan", "end", "none", "fine"]
    with Pool(f"{BAD}:bad", 2, 1.0) as pool:
        found = [pool.submit("ab", text, {"more": 10}) for text in texts]
        found = [job.result() for job in found]
        workers = [worker.process.pid for worker in pool._workers if worker.process]
    assert found[0] == (16.0, "") and found[-1] == (16.0, "")
    for (reward, reason), said in zip(
        found[1:-1], ("RuntimeError: no reward for this", "more than rl.reward_timeout_s=1", "is nan", "ended", "TypeError")
    ):
        assert reward == 0.0 and said in reason
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.parametrize(
    "name, said",
    [
        ("nowhere:f", "rl.reward=nowhere:f: ModuleNotFoundError: No module named 'nowhere'; give module:function"),
        (f"{BAD}:other", "has no attribute 'other'"),
        (f"{BAD}:constant", "'constant' is int, not a function"),
    ],
)
def test_a_reward_that_is_not_there_is_told(name, said):
    with pytest.raises(ValueError, match=said), Pool(name, 2, 1.0):
        pass


def test_exact_match():
    assert exact_match("1+1=", " 2\n", {"answer": 2}) == 1 and exact_match("1+1=", "3", {"answer": "2"}) == 0


# Runs

QUICK = {"rl.loss": "grpo", "rl.max_new_tokens": 3, "rl.group_size": 4, "rl.reward_processes": 1, "rl.reward": f"{BAD}:spread"}
QUICK |= {"data.format": "prompts", "train.seq_len": 32, "train.batch_size": 8, "train.steps": 4, "train.log_every": 1}
QUICK |= {"train.eval_every": 4, "train.eval_rows": 8, "train.sample_tokens": 0, "train.save_hf": False, "checkpoint.every": 2}
QUICK |= {"rl.updates": 2, "rl.kl_coef": 0.1, "optim.lr": 1e-2}
CLOCK = ("rollout_s",)


def run_config(**changes):
    return make_config("", **{**QUICK, **changes})


def records(run):
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in all_records(run)]


@pytest.fixture(scope="module")
def few():
    with pytest.MonkeyPatch.context() as patch:
        found = instructions.sums()[:120]
        patch.setattr(instructions, "sums", lambda: found)
        yield found


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory):
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    rl.rl(run_config(), str(folder))
    return folder


def same(run, whole):
    got, want = (Reader(step_folder(str(folder), 4)) for folder in (run, whole))
    assert all(np.array_equal(got.read(name), want.read(name)) for name in want.names) and got.meta["loader"] == want.meta["loader"]
    assert records(run) == records(whole) and (run / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


@pytest.mark.extended
def test_a_run_writes_its_metrics_and_samples(whole):
    lines = records(whole)
    assert {"eval_reward", "eval_length"} <= set(lines[0]) and "final_reward" in lines[-1]
    wanted = {"reward", "length", "entropy", "kl", "clipped", "dropped", "drift", "cut", "bad_rewards", "loss", "grad_norm"}
    assert wanted <= set(lines[1]) and lines[1]["bad_rewards"] == 0 and 1 <= lines[1]["length"] <= 3 and lines[1]["entropy"] > 0
    assert lines[1]["kl"] > 0  # of the second update
    samples = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [step for step in range(1, 5) for _ in range(4)]
    assert len({sample["prompt"] for sample in samples[:4]}) == 1 and (whole / "reward.png").exists()


@pytest.mark.extended
def test_a_stopped_and_resumed_run_is_bit_for_bit_the_one_that_went_through(few, whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stopping_after(3, patch)
        rl.rl(run_config(), str(run))
    rl.rl(run_config(**{"rl.slots": 2}), str(run))
    same(run, whole)


@pytest.mark.extended
def test_a_run_goes_on_with_its_own_reference_model_alone(few, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    hf.save(tmp_path / "other", cfg := command_line.model_config(run_config()), random_params(cfg))
    with pytest.raises(ValueError, match="was trained against the reference model random weights of train.seed=0 .*, and this is"):
        rl.rl(run_config(**{"train.steps": 5, "init_from": str(tmp_path / "other")}), str(run))


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("where", ["sample", "reward", "_batch"])
def test_a_run_killed_in_a_step_goes_on_to_the_same_result(where, few, whole, tmp_path, monkeypatch):
    """After sampling has begun, after all is sampled, and after the first of two updates."""
    run, own, calls = tmp_path / "run", getattr(Rollouts, where), []

    def killed(self, *args, **options):
        if self.engine is not None and where == "_batch" and len(calls) == 2:
            step, done = self.program.step, []

            def one_update(*given):
                if done:
                    raise Killed
                done.append(1)
                return step(*given)

            object.__setattr__(self.program, "step", one_update)
        if where != "_batch" and len(calls) == 4:
            raise Killed
        calls.append(1)
        return own(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Rollouts, where, killed)
        with pytest.raises(Killed):
            rl.rl(run_config(), str(run))
    rl.rl(run_config(), str(run))
    same(run, whole)


@pytest.mark.slow
def test_bad_rewards_are_counted_and_leave_the_run_alone(few, tmp_path):
    rl.rl(run_config(**{"rl.reward": f"{BAD}:sometimes", "train.steps": 2, "rl.updates": 1}), str(tmp_path / "run"))
    lines = records(tmp_path / "run")
    assert any(line.get("bad_rewards", 0) > 0 for line in lines) and all(np.isfinite(line.get("loss", 0)) for line in lines)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert any("RuntimeError: odd" in sample.get("reason", "") and sample["reward"] is None for sample in samples)


@pytest.mark.slow
@pytest.mark.parametrize("loss", RL_LOSSES)
@pytest.mark.parametrize("changes", [{}, {"model": "tiny-moe", "model_args.num_layers": 1}], ids=["dense", "moe"])
def test_every_loss_raises_a_reward(loss, changes, few, tmp_path):
    more = {"train.steps": 12, "train.batch_size": 32, "rl.group_size": 8, "rl.kl_coef": 0.01, "train.log_every": 12, **changes}
    if "model" in changes:
        more |= {"model_args.num_experts": 4, "model_args.experts_per_token": 2, "model_args.moe_ffn_size": 16}
    rl.rl(run_config(**{"rl.loss": loss, **more}), str(tmp_path / "run"))
    lines = records(tmp_path / "run")
    assert lines[-2]["eval_reward"] > lines[0]["eval_reward"] or lines[-3]["reward"] > lines[1]["reward"]


@pytest.mark.extended
def test_the_reference_of_adapters_is_the_base(few):
    """With adapters, and 0 in their place."""
    config = run_config(**{"lora.rank": 2})
    cfg = command_line.model_config(config)
    program = train_program.build_program(cfg, config)
    params = random_params(cfg)
    state, rollouts = program.init(params), Rollouts.__new__(Rollouts)
    rollouts.reference = None
    batch = made_batch(cfg, "grpo")
    plain = cfg.replace(lora=None)
    ids = [ms.Tensor(batch[name]) for name in ("tokens", "targets", "positions", "segment_ids")]
    want = build(plain, kernels=FUSED).score(part(param_specs(plain))(params), *ids)[0].asnumpy()
    assert_close(want, program.score(rollouts._reference_state(state), batch), 1e-6)
    assert np.abs(want - program.score(state, batch)).max() > 1e-3


WRONG = [
    ({"rl.loss": ""}, "rl.loss is empty; use one of grpo, dapo, dr_grpo, gspo"),
    ({"data.format": "messages"}, "data.format='messages' has no prompts alone; use data.format=prompts"),
    ({"data.format": "pairs"}, "data.format=pairs is for experiments.prefer"),
    ({"data.path": "nowhere.jsonl"}, "^data.path=nowhere.jsonl does not exist"),
    ({"rl.max_new_tokens": 30}, "has no prompt of at most 3 tokens"),
    ({"train.layer_loop": "scan"}, "train.layer_loop=scan stacks the layers of this model"),
]


@pytest.mark.parametrize("changes, said", WRONG)
def test_mistakes_are_told(changes, said, few, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        rl.rl(run_config(**changes), str(tmp_path / "run"))


def test_the_other_mains_refuse_rewards(tmp_path):
    for main in (finetune.finetune, prefer.prefer):
        with pytest.raises(ValueError, match="rl.loss=grpo is for experiments.rl"):
            main(run_config(), str(tmp_path / "run"))
        with pytest.raises(ValueError, match="data.format=prompts is for experiments.rl"):
            main(run_config(**{"rl.loss": ""}), str(tmp_path / "run"))


LAYOUTS = [
    ({"parallel.tp": 2}, "parallel.tp=2 with rl.loss=grpo is not supported; use --tp=1, with more --dp"),
    ({"parallel.pp": 2, "parallel.micro_batches": 2}, "parallel.pp=2 with rl.loss=grpo is not supported"),
    ({"parallel.cp": 2}, "parallel.cp=2 with rl.loss=grpo is not supported"),
    ({"parallel.dp": 2, "parallel.zero": 3}, "parallel.zero=3 with rl.loss=grpo: the engine needs whole parameters"),
    ({"parallel.lowering": "shard"}, "rl.loss=grpo with parallel.lowering=shard"),
    ({"train.batch_size": 6}, "train.batch_size=6 counts answers, and must be a multiple of rl.group_size=4; use .*=8"),
    ({"rl.max_new_tokens": 40}, "rl.max_new_tokens=40 is more than train.seq_len=32"),
    ({"train.monitor_every": 1}, "train.monitor_every with rl.loss"),
]


@pytest.mark.parametrize("changes, said", LAYOUTS)
def test_a_layout_that_cannot_sample_is_refused_before_it_starts(changes, said):
    config = run_config(**changes)
    with pytest.raises(ValueError, match=said):
        command_line.layout.check(config, command_line.model_config(config, "any"))


@pytest.mark.slow
def test_two_data_ranks_equal_one_process(tmp_path):
    keys = {key: value for key, value in QUICK.items()} | {"data.max_samples": 120, "data.vocab_size": 320, "optim.eps": 1e-5}
    keys |= {
        "model_args.num_layers": 1,
        "train.steps": 2,
        "train.eval_every": 0,
        "optim.lr": 1e-3,
        "rl.kl_coef": 0.1,
        "checkpoint.every": 0,
        "checkpoint.on_exit": False,
    }
    found = []
    for name, launch, flags in (("one", [], []), ("two", ["experiments.launch", "--nproc=2", "--"], ["--dp=2"])):
        command = [
            sys.executable,
            "-m",
            *launch,
            "experiments.rl",
            "--config=experiments/configs/rl_tiny.py",
            f"--workdir={tmp_path / name}",
            *flags,
        ]
        command += [f"--config.{key}={value}" for key, value in keys.items()]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=560)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        found.append(records(tmp_path / name))
    for one, two in zip(*found, strict=True):
        for key in one:
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-4), (one["step"], key)
