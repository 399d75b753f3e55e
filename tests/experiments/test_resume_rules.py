"""Resuming, tried for every key of the config and for every file of a run's folder: refused by name, or right."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments import flags, pretrain
from experiments.configs import common
from experiments.evaluate import evaluation
from experiments.train import checkpoints, resume_rules, run_folder, weights
from experiments.train.resume_rules import ELSEWHERE, IN_PLACE, NEVER, RULES
from parallel.checkpoint.files import step_folder, steps
from parallel.checkpoint.store import save
from parallel.mesh import ONE_DEVICE
from tests import processes
from tests.experiments.test_pretrain import make_text
from tests.experiments.test_resume import arrays, config_of, records

DOCS = Path(__file__).parents[2] / "docs" / "checkpoints.md"
KEYS = flags._keys(common.get_config())


def set_key(config, key, value):
    section, _, name = key.rpartition(".")
    (config[section] if section else config)[name] = value
    return config


def with_other(key):
    """A config in which one key has another value of its type, right or not."""
    config = common.get_config()
    value = flags._value(config, key)
    kind = config.model_args.get_type(key.split(".")[1]) if key.startswith("model_args.") else type(value)
    if kind in (int, float):
        return set_key(config, key, kind((value or 0) + 1))
    return set_key(config, key, not value if kind is bool else (1,) if kind is tuple else f"{value or ''}x")


def test_each_key_has_a_decision_of_its_own():
    assert set(RULES) == set(KEYS), "write the key into experiments/train/resume_rules.py: may it change when a run goes on?"
    assert all(where in (IN_PLACE, ELSEWHERE, NEVER) and len(meaning) > 10 for where, meaning in RULES.values())


@pytest.fixture(scope="module")
def of_another_run(tmp_path_factory):
    """The folder of a run of the default config, with an empty checkpoint."""
    folder = tmp_path_factory.mktemp("rules")
    config = run_folder.to_dict(common.get_config())
    save(step_folder(str(folder), 2), iter(()), {"step": 2, "config": config})
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("key", KEYS)
def test_a_changed_key_is_refused_by_name_or_allowed_as_its_rule_says(key, of_another_run):
    where, changed = RULES[key][0], with_other(key)
    named = re.escape(f"{key}=")
    if where == IN_PLACE:
        assert run_folder.own_step(of_another_run, changed) == 2
        checkpoints._check_own(of_another_run, step_folder(of_another_run, 2), changed)
    else:
        with pytest.raises(ValueError, match=f"already holds a run with {named}"):
            run_folder.own_step(of_another_run, changed)
        with pytest.raises(ValueError, match=f"step_000002 was saved with {named}.*put the run's own config.json back"):
            checkpoints._check_own(of_another_run, step_folder(of_another_run, 2), changed)
    changed.resume_from = of_another_run
    if where == NEVER:
        with pytest.raises(ValueError, match=f"was saved with {named}.*; use the same, or --init_from="):
            checkpoints._other(changed, ONE_DEVICE)
    else:
        assert checkpoints._other(changed, ONE_DEVICE) == step_folder(of_another_run, 2)


def test_a_key_that_an_old_config_lacks_had_its_default(of_another_run, tmp_path):
    config = json.loads((Path(of_another_run) / "config.json").read_text())
    del config["optim"]["clip_norm"], config["data"]["too_long"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "checkpoints" / "step_000002").mkdir(parents=True)
    assert run_folder.own_step(str(tmp_path), common.get_config()) == 2
    with pytest.raises(ValueError, match="optim.clip_norm=1.0 instead of 2.0"):
        run_folder.own_step(str(tmp_path), set_key(common.get_config(), "optim.clip_norm", 2.0))


def test_the_docs_say_which_keys_may_change():
    table = DOCS.read_text().partition("**What may change**")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([a-z_]+(?:\.[a-z0-9_*]+)?)`", table))
    for key, (where, _) in RULES.items():
        either = {key, f"{key.split('.')[0]}.*"} if "." in key else {key}
        assert bool(either & named) == (where != NEVER), key


# The files of a finished run that goes on for more steps. Pattern: what happens with a file that is missing, truncated, changed: None
# where the run goes on rightly, else the error, in which NAME stands for the path of the file
NEWEST = r"checkpoints/step_000006"
FILES = {
    r"config\.json": ("and no config.json, which says of which run", "NAME is not JSON", "already holds a run with optim.lr=0.01234"),
    r"finished\.json": (None, "NAME is not JSON", 'NAME must be {"step": N}'),
    r"metrics\.jsonl": (None, None, r"NAME, line \d+ is not text"),
    rf"{NEWEST}/manifest\.json": ("no checkpoint: it has no manifest.json", "NAME is damaged", "NAME is damaged"),
    rf"{NEWEST}/.*": ("NAME: cannot read", r"NAME has \d+ bytes instead of", NEWEST),
    r"checkpoints/step_00000[24]/.*": (None, None, None),
    r"tokenizer/.*": ("NAME is missing", "NAME is not as the run wrote it", "NAME is not as the run wrote it"),
    r"hf/config\.json": ("holds something other than a Qwen model", "NAME: broken JSON", None),
    r"(hf|tensorboard)/.*|sample\.txt|loss\.png|\.lock": (None, None, None),
}
DAMAGES = ("missing", "truncated", "changed")
QUICK = ("config.json", "finished.json", "metrics.jsonl", f"{NEWEST}/manifest.json", f"{NEWEST}/manifest.ocdbt", "tokenizer/tokenizer.json")
FULL = {"train.save_hf": True, "train.sample_tokens": 2}
LONGER = {**FULL, "train.steps": 7}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return make_text(tmp_path_factory.mktemp("resume_rules") / "text")


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    pretrain.pretrain(config_of(text, **FULL), str(folder))
    return folder


@pytest.fixture(scope="module")
def longer(run, text, tmp_path_factory):
    """The run, gone on with for a step more."""
    folder = tmp_path_factory.mktemp("longer") / "run"
    shutil.copytree(run, folder)
    pretrain.pretrain(config_of(text, **LONGER), str(folder))
    return folder


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def damage(path, how):
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif path.name == "config.json" and b'"optim"' in data:
        path.write_bytes(data.replace(b'"lr": 0.01,', b'"lr": 0.01234,'))
    elif path.name == "finished.json":
        path.write_bytes(b'{"step": "6"}')
    elif path.name == "config.json":
        path.write_bytes(data.replace(b'"rms_norm_eps"', b'"rms_norm_epz"'))
    else:
        place = len(data) // 2
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])


def is_unchanged(folder, before):
    """Whether the files of a run's folder are as they were, but for the lock file. before: {path: bytes}."""
    return before == {path: (folder / path).read_bytes() for path in before if path != ".lock"} | {".lock": before.get(".lock")}


def contents(folder):
    return {path: (folder / path).read_bytes() for path in files_of(folder)}


def outcome(name, how):
    return next(results[DAMAGES.index(how)] for pattern, results in FILES.items() if re.fullmatch(pattern, name))


def check_file(name, how, run, longer, text, folder):
    shutil.copytree(run, folder)
    damage(folder / name, how)
    said = outcome(name, how)
    if said:
        before = contents(folder)
        with pytest.raises((ValueError, FileNotFoundError), match=said.replace("NAME", re.escape(str(folder / name)))):
            pretrain.pretrain(config_of(text, **LONGER), str(folder))
        assert is_unchanged(folder, before)
        return
    pretrain.pretrain(config_of(text, **LONGER), str(folder))
    (got, meta), (want, want_meta) = (arrays(step_folder(str(f), 7)) for f in (folder, longer))
    assert all(np.array_equal(got[key], want[key]) for key in want) and meta == want_meta
    assert records(folder)[-1] == records(longer)[-1], (name, how)
    assert json.loads((folder / "finished.json").read_text()) == {"step": 7}


@pytest.mark.extended
@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", QUICK)
def test_a_file_that_is_not_as_the_run_wrote_it_is_refused_by_name_or_does_no_harm(name, how, run, longer, text, tmp_path):
    check_file(name, how, run, longer, text, tmp_path / "run")


@pytest.mark.slow
def test_every_file_of_a_runs_folder(run, longer, text, tmp_path):
    for name in files_of(run):
        for how in DAMAGES:
            check_file(name, how, run, longer, text, tmp_path / f"{name.replace('/', '_')}.{how}")


def on_two_ranks(runs, text, path, timeout_s=240):
    """Makes runs, [(folder, changes)], one after the other, in one job of two data ranks. AssertionError, with the words of its error, if
    one of them fails."""
    path.write_text(json.dumps([[str(folder), {**changes, "parallel.dp": 2}] for folder, changes in runs]))
    processes.run("tests.experiments.resume_worker:main", 2, text, str(path), timeout_s=timeout_s)


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGES)
def test_every_file_of_a_runs_folder_on_two_ranks(how, run, longer, text, tmp_path):
    """The run of one process goes on on two, or the job ends with the words that one process ends with. The files that do no harm are
    damaged all at once."""
    harmless, names = tmp_path / "harmless", files_of(run)
    shutil.copytree(run, harmless)
    for name in names:
        folder, said = tmp_path / name.replace("/", "_"), outcome(name, how)
        if said is None:
            damage(harmless / name, how)
            continue
        shutil.copytree(run, folder)
        damage(folder / name, how)
        before = contents(folder)
        with pytest.raises(AssertionError, match=said.replace("NAME", re.escape(str(folder / name)))):
            on_two_ranks([(folder, LONGER)], text, tmp_path / "runs.json")
        assert is_unchanged(folder, before), name
    on_two_ranks([(harmless, LONGER)], text, tmp_path / "runs.json")
    assert json.loads((harmless / "finished.json").read_text()) == {"step": 7}
    assert records(harmless)[-1] == pytest.approx(records(longer)[-1], rel=1e-5)


@pytest.mark.extended
def test_a_run_without_its_tokenizer_writes_it_again_and_a_changed_one_is_not_used(run, longer, text, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    assert weights.inference(workdir=str(folder)).tokenizer == folder / "tokenizer"
    (folder / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")  # it would replace the template of the run
    for read in (
        lambda: weights.inference(workdir=str(folder)),
        lambda: weights.open_weights("input", str(folder)),
        lambda: flags._start_from(common.get_config(), str(folder)),
    ):
        with pytest.raises(ValueError, match="tokenizer/chat_template.jinja is not of the run; put the run's own tokenizer back"):
            read()
    shutil.rmtree(folder / "tokenizer")
    pretrain.pretrain(config_of(text, **LONGER), str(folder))
    assert sorted(p.name for p in (folder / "tokenizer").iterdir()) == sorted(p.name for p in (run / "tokenizer").iterdir())
    read = weights.inference(workdir=str(folder)).load_tokenizer()
    assert read.vocab_size == weights.inference(workdir=str(run)).load_tokenizer().vocab_size


def test_a_folder_that_the_results_cannot_replace_is_told_at_the_start(text, tmp_path):
    (tmp_path / "run" / "hf").mkdir(parents=True)
    (tmp_path / "run" / "hf" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="hf holds notes.txt, which saving would delete"):
        pretrain.pretrain(config_of(text, **FULL), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# Keys that may change, with another value that is right on one device, beside those that need other keys to have a meaning
VALUES = {
    "train.steps": 8,
    "train.batch_size": 8,
    "train.batch_ramp": "2:5",
    "train.log_every": 3,
    "train.eval_every": 2,
    "train.eval_rows": 3,
    "train.monitor_every": 2,
    "train.profile_steps": "5:6",
    "train.layer_loop": "scan",
    "train.recompute": "full",
    "train.save_hf": True,
    "train.save_hf_every": 2,
    "train.loss_chunks": 3,
    "train.sample_tokens": 3,
    "train.sample_prompt": "class",
    "train.exact_match_rows": 3,
    "optim.lr": 1e-3,
    "optim.lr_groups": "embed=0.5",
    "optim.schedule": "linear",
    "optim.warmup_steps": 4,
    "optim.warmup_ratio": 0.5,
    "optim.decay_fraction": 0.5,
    "optim.min_lr_ratio": 0.5,
    "optim.b1": 0.8,
    "optim.b2": 0.9,
    "optim.muon_momentum": 0.9,
    "optim.eps": 1e-5,
    "optim.weight_decay": 0.3,
    "optim.clip_norm": 0.1,
    "optim.skip_spikes": 9.0,
    "optim.router_bias_rate": 0.1,
    "checkpoint.every": 3,
    "checkpoint.on_exit": False,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_every": 4,
    "checkpoint.async_save": False,
    "checkpoint.compression": "zstd",
    "checkpoint.on_error": "continue",
    "checkpoint.timeout_s": 60.0,
    "data.max_documents": 16,
    "parallel.micro_batches": 2,
    "parallel.zero": 1,
    "parallel.seq_parallel": True,
    "parallel.seq_gather_again": "on",
    **{f"ops.{op}": "reference" for op in common.OPS},
}
NEEDS_MORE = {  # ranks, a pipeline, another kind of data, frozen weights, or a main's own work
    *("train.frozen_dtype", "train.eval_tasks", "rl.slots", "rl.reward_processes", "rl.reward_timeout_s", "rl.log_samples"),
    *(f"parallel.{name}" for name in ("dp", "tp", "pp", "pp_schedule", "virtual_stages", "stage_layers", "cp", "cp_attention")),
    *("parallel.cp_ulysses", "parallel.ep", "parallel.lowering", "data.skip_bad", "data.cache_dir", "resume_from", "init_from", "partial"),
    *("watch.trackers", "watch.project"),
}
OTHER_UPDATES = ("train.steps",)  # in place, and yet the updates change


@pytest.mark.slow
def test_every_key_that_may_change_is_changed_while_a_run_goes_on(text, tmp_path):
    assert set(VALUES) | NEEDS_MORE == set(resume_rules.keys(IN_PLACE, ELSEWHERE))
    begun, whole = run_that_was_stopped(text, tmp_path / "begun")
    for key in VALUES:
        folder, changes = going_on(begun, key, tmp_path)
        pretrain.pretrain(config_of(text, **changes), str(folder))
        check_changed(folder, key, whole)


@pytest.mark.slow
def test_every_key_is_changed_while_a_run_goes_on_on_two_ranks(text, tmp_path):
    """The run of one process goes on on two."""
    begun, whole = run_that_was_stopped(text, tmp_path / "begun")
    runs = {key: going_on(begun, key, tmp_path) for key in VALUES}
    on_two_ranks(runs.values(), text, tmp_path / "runs.json", timeout_s=2400)
    for key, (folder, _) in runs.items():
        check_changed(folder, key, whole)


@pytest.mark.slow
def test_a_key_that_may_not_change_is_refused_on_two_ranks(text, tmp_path):
    begun, _ = run_that_was_stopped(text, tmp_path / "begun")
    before, keys = contents(begun), [key for key in KEYS if RULES[key][0] == NEVER and has_another(key, config_of(text))]
    assert len(keys) > 10
    for key in keys:
        with pytest.raises(AssertionError, match=re.escape(f"{key.rpartition('.')[2]}=")):
            on_two_ranks([(begun, {key: has_another(key, config_of(text))})], text, tmp_path / "runs.json")
        assert is_unchanged(begun, before), key


def has_another(key, config):
    """Returns another value of a key that is right by itself: one more than a whole number or one from 1 on, and half-way to 1 from a
    fraction. None for a key of another type."""
    value = flags._value(config, key)
    if type(value) not in (int, float):
        return None
    return value + 1 if type(value) is int or value >= 1 else (value + 1) / 2


def run_that_was_stopped(text, begun):
    """Returns the folder of a run of 6 steps that was stopped after 4, and its lines with a loss, of all 6."""
    pretrain.pretrain(config_of(text), str(begun))
    shutil.rmtree(step_folder(str(begun), 6))
    (begun / "finished.json").unlink()
    assert steps(str(begun)) == [2, 4]
    return begun, [r for r in records(begun) if "loss" in r]


def going_on(begun, key, tmp_path):
    """Returns (folder, changes of the config) of a run that goes on from `begun` with another value of a key."""
    folder, changes = tmp_path / key, {key: VALUES[key]}
    if RULES[key][0] != IN_PLACE:
        return folder, {**changes, "resume_from": str(begun)}
    shutil.copytree(begun, folder)
    return folder, changes


def check_changed(folder, key, whole):
    """Holds a run that went on with another value of a key to the run that did not."""
    last, logged = VALUES[key] if key == "train.steps" else 6, 5 if key != "train.log_every" else 6
    assert json.loads((folder / "finished.json").read_text()) == {"step": last}, key
    losses = [r["loss"] for r in records(folder) if "loss" in r and r["step"] == logged]
    if RULES[key][0] == IN_PLACE and key not in OTHER_UPDATES:
        assert losses[-1] == pytest.approx(next(r["loss"] for r in whole if r["step"] == logged), rel=2e-5), key
    else:
        assert np.isfinite(losses[-1]), key


def test_evaluation_reads_a_runs_own_data_keys(run):
    config = common.get_config()
    assert evaluation.own_data(config, str(run)) == json.loads((run / "config.json").read_text())["data"]["path"]
