"""Every number of every config and flag has a range, NaN and infinity are in none, and true is no number: tried for each key and flag."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
from absl import flags as absl_flags

from experiments import flags, pretrain
from experiments.configs import common
from experiments.layout import check as layout
from experiments.train import run
from parallel import host_memory
from qwen3 import engine
from qwen3.config import Qwen3Config
from tests.experiments.test_flags import FILES, MAINS, PACKAGES, TINY, read
from tests.tiny import DENSE, random_params

NAN, INF = float("nan"), float("inf")
ODD = {"nan": NAN, "inf": INF, "-1": -1, "0": 0, "huge": 10**40, "text": "text", "true": True, "false": False}
# The odd values that are right, by key; what a key's section is for needs other keys, and is tested where it is used
ZERO_IS_OFF = ("0",)
ACCEPTED = {
    **dict.fromkeys(("yarn.factor", "yarn.original_max_position"), ZERO_IS_OFF),
    **dict.fromkeys((f"train.{key}" for key in ("eval_every", "eval_rows", "seed", "sample_tokens", "exact_match_rows")), ZERO_IS_OFF),
    **dict.fromkeys(
        (f"train.{key}" for key in ("save_hf_every", "monitor_every", "loss_chunks", "ema_decay", "mup_base_width")), ZERO_IS_OFF
    ),
    **dict.fromkeys((f"checkpoint.{key}" for key in ("every", "keep_last", "keep_every")), ZERO_IS_OFF),
    **dict.fromkeys((f"data.{key}" for key in ("held_out", "max_bytes", "max_samples", "shuffle_buffer")), ZERO_IS_OFF),
    **dict.fromkeys((f"lora.{key}" for key in ("rank", "dropout")), ZERO_IS_OFF),
    **dict.fromkeys((f"optim.{key}" for key in ("warmup_steps", "warmup_ratio", "decay_fraction", "min_lr_ratio", "b1", "b2")), ("0",)),
    **dict.fromkeys((f"optim.{key}" for key in ("muon_momentum", "weight_decay", "clip_norm", "skip_spikes", "router_bias_rate")), ("0",)),
    **dict.fromkeys((f"prefer.{key}" for key in ("margin", "label_smoothing", "desirable_weight", "undesirable_weight")), ZERO_IS_OFF),
    **dict.fromkeys(("rl.kl_coef", "rl.log_samples"), ZERO_IS_OFF),
    "parallel.zero": ("0",),
    "data.max_documents": ("0", "-1"),  # any number, by segment ids; a choice by the length of rows
    **dict.fromkeys((f"parallel.{axis}" for axis in ("dp", "tp", "pp", "cp")), ("-1",)),  # all ranks that are left
    **dict.fromkeys((f"model_args.{key}" for key in ("initializer_range", "router_aux_coef", "router_z_coef")), ("0",)),
    **dict.fromkeys((f"model_args.{key}" for key in ("bos_id", "eos_id", "pad_id")), ("0",)),
    **dict.fromkeys((f"model_args.{key}" for key in ("num_experts", "experts_per_token", "moe_ffn_size")), ("0",)),  # of a dense model
    "model_args.eos_id": ("0",),
    # text, which a file of its own or a later use makes right or wrong
    **dict.fromkeys(("data.path", "data.cache_dir", "data.json_key", "lora.adapter", "resume_from", "init_from"), ("text",)),
    **dict.fromkeys(
        ("train.eval_tasks", "train.sample_prompt", "train.freeze_include", "train.freeze_exclude", "lora.targets", "data.tokenizer"),
        ("text",),
    ),
    "watch.project": ("text",),
}
LISTS = ("parallel.stage_layers", "model_args.mlp_only_layers")
ODD_LISTS = {f"[{name}]": (value,) for name, value in ODD.items()}


def odd_values(key):
    return {**ODD, **ODD_LISTS} if key in LISTS else ODD


def right(key, name, config):
    """Whether an odd value is right for a key of a config."""
    section, _, short = key.rpartition(".")
    kind = {field.name: field.type for field in dataclasses.fields(Qwen3Config)}.get(short) if section == "model_args" else None
    if kind is bool or (kind is None and isinstance(flags._value(config, key), bool)):
        return name in ("true", "false")
    if config.lora.rank and key in ("lora.targets", "train.freeze_include", "train.freeze_exclude"):
        return False
    if "moe" in config.model or "-a" in config.model:
        if key in ("model_args.num_experts", "model_args.experts_per_token", "model_args.moe_ffn_size"):
            return False
    if key == "model_args.mlp_only_layers":
        return name == "[0]"
    return name in ACCEPTED.get(key, ())


def taken(config, key, value):
    """Whether a config file with this value is taken, by ml_collections and by the checks of values, of the model and of the layout."""
    config = config.copy_and_resolve_references()
    section, _, name = key.rpartition(".")
    try:
        (config[section] if section else config)[name] = value
        flags.check(config)
        layout.check(config, flags.model_config(config, "any"))
    except (ValueError, TypeError, FileNotFoundError) as error:
        assert name in str(error) and len(str(error).split(" Other fields present")[0]) < 1000, (key, value, str(error))
        return False
    return True


def check_all(path):
    config = flags._load(path)
    config.parallel.update(common.get_config().parallel)  # one device
    wrong = {
        key: found
        for key in flags._keys(config)
        if (found := [name for name, value in odd_values(key).items() if taken(config, key, value) != right(key, name, config)])
    }
    assert not wrong, f"these are taken and should not be, or the other way round: {wrong}"


@pytest.mark.parametrize("path", ["experiments/configs/tiny.py", "experiments/configs/tiny_moe.py"])
def test_each_key_of_a_config_refuses_what_is_out_of_its_range_by_name(path):
    check_all(path)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES)
def test_each_key_of_every_config_refuses_what_is_out_of_its_range_by_name(path):
    check_all(path)


def test_each_number_of_a_config_has_a_least_and_a_most():
    config, model = common.get_config(), {"model_args"}  # of the model: qwen3.config checks them
    numbers = {key for key in flags._keys(config) if type(flags._value(config, key)) in (int, float) and key.split(".")[0] not in model}
    fractions = {key for key, rule in flags.CHECKS.items() if rule in (flags.FRACTION, flags.BELOW_ONE)}
    by_layout = {f"parallel.{name}" for name in ("dp", "tp", "pp", "cp", "ep", "zero")}
    assert numbers - by_layout <= set(flags.CHECKS) and numbers - fractions - {"parallel.zero"} == set(flags.MOST)


SIZES = [
    ("--config.train.batch_size=100000000000", "train.batch_size=100000000000 must be at most 2147483647: an int32 counts them"),
    ("--config.train.seq_len=100000000000", "train.seq_len=100000000000 must be at most 2147483647: an int32 counts them"),
    ("--config.train.batch_size=2000000000", "are 512000000000 tokens, and an int32 counts up to 2147483647; lower one of them"),
    ("--config.model_args.vocab_size=100000000000", "vocab_size=100000000000 must be a whole number from 1 to 16777216"),
    ("--config.data.vocab_size=100000000000", "data.vocab_size=100000000000 must be at most 16777216: no model has more"),
    ("--config.train.sample_tokens=100000000000000000000", "train.sample_tokens=100000000000000000000 must be at most 2147483647"),
    ("--config.train.seed=4294967296", "train.seed=4294967296 must be at most 4294967295: the generators take 32 bits of it"),
    ("--dp=1000000000000", "flag --dp=1000000000000: it must be a whole number from"),
    ("--dp=2000000", "parallel.dp=2000000 must be at most 1048576: no job has more ranks"),
]


@pytest.mark.parametrize("arg, message", SIZES)
def test_sizes_that_no_machine_has_are_refused_at_the_start(monkeypatch, arg, message):
    with pytest.raises((ValueError, absl_flags.Error), match=re.escape(message)):
        read(monkeypatch, TINY, arg)


def test_a_layout_of_more_ranks_than_exist_is_refused_at_once(monkeypatch):
    monkeypatch.setenv("MS_WORKER_NUM", "1")
    with pytest.raises(ValueError, match="is 1099511627776 ranks, and a job has at most 1048576"):
        read(monkeypatch, TINY, "--dp=1048576", "--tp=1048576")


GIB = 1 << 30
MEMORY = [  # changes, what the message names, and the smallest sum in GiB that it should tell
    ({"train.batch_size": 2**20, "train.seq_len": 2**10}, "train.batch_size=1048576 rows of train.seq_len=1024 tokens", 20),
    ({"model_args.hidden_size": 2**16, "model_args.ffn_size": 2**16}, "parameters, gradients and optimizer state of model=tiny", 200),
    ({"train.sample_tokens": 2**31 - 1}, "the cache of train.sample_tokens=2147483647", 2000),
]


@pytest.mark.parametrize("changes, part, least", MEMORY)
def test_a_run_that_memory_cannot_hold_is_refused_before_its_data_are_read(changes, part, least, tmp_path, monkeypatch):
    config = common.get_config()
    config.update_from_flattened_dict(changes)
    monkeypatch.setattr(host_memory, "machine_bytes", lambda: 16 * GIB)
    monkeypatch.setattr(run.corpus, "load", lambda *_: pytest.fail("the data were read"))
    with pytest.raises(ValueError, match=re.escape(part)) as error:
        pretrain.pretrain(config, str(tmp_path / "run"))
    told = float(
        re.match(r"([\d,.]+) GiB of memory or more are needed, and this machine has 16.0 GiB", str(error.value))[1].replace(",", "")
    )
    assert least <= told and not (tmp_path / "run").exists()


def test_the_machine_says_how_much_memory_it_has(tmp_path):
    assert 1 << 28 < host_memory.machine_bytes() < 1 << 50
    assert host_memory.machine_bytes(tmp_path / "none") is None
    (tmp_path / "info").write_text("MemTotal:   100 kB\nMemFree:  7 kB\nSwapTotal:  28 kB\n")
    assert host_memory.machine_bytes(tmp_path / "info") == 128 << 10
    host_memory.check({"a": 0, "b": 1}, "")


def test_a_cache_that_memory_cannot_hold_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(engine, "PagedCache", lambda *_: pytest.fail("the cache was made"))
    with pytest.raises(
        ValueError, match="the cache of 2048000000000 tokens, for slots=2000000000 of length=1024: .* GiB.; use fewer or shorter rows"
    ):
        engine.Engine(random_params(DENSE), DENSE, slots=2 * 10**9, length=1024)


# Of each main: the flags that take an odd value, beside those of config.parallel
AXES = ("dp", "tp", "pp", "cp", "ep", "micro_batches", "zero")  # any whole number up to an int32's; the checks of the layout have the range
FLAG_ZERO = {
    "convert": ("top", "max_diff", "t"),
    "dryrun": ("compile",),
    "evaluate": ("rows",),
    "generate": ("temperature", "top_k", "min_p", "seed", "logprobs", "speculate"),
    "launch": ("node_rank", "save_s", "restarts"),
    "preprocess": ("max_samples", "document"),
    "serve": ("port", "max_waiting", "drain_s", "speculate"),
}
TRIED = """
import importlib, json, os, sys
from absl import flags
found = {{}}
for name in {names}:
    read, write = os.pipe()
    if not os.fork():
        module = importlib.import_module(name)
        if hasattr(module, "define_flags"):
            module.define_flags()
        elif name.split(".")[1] in ("pretrain", "finetune", "prefer", "rl"):
            importlib.import_module("experiments.train.command").define_flags(name)
        out = {{}}
        for owner, defined in flags.FLAGS.flags_by_module_dict().items():
            for flag in defined:
                if flag.flag_type() in ("int", "float", "multi int", "multi float") and not owner.startswith("absl"):
                    out[flag.name] = []
                    for value in {values}:
                        try:
                            flag.parse([value] if flag.flag_type().startswith("multi") else value)
                            out[flag.name].append(value)
                        except flags.IllegalFlagValueError as error:
                            assert flag.name in str(error), error
        os.write(write, json.dumps(out).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        found[name] = json.loads(pipe.read())
print(json.dumps(found))
"""


def test_each_number_on_a_command_line_has_a_range():
    names = [f"experiments.{name}" for name in MAINS] + [f"experiments.{name}.__main__" for name in PACKAGES]
    code = TRIED.format(names=names, values=["nan", "inf", "-inf", "-1", "0", "1e400", str(10**20), "1" * 5000, "text", "true", "1.5x", ""])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert sum(map(len, found.values())) > 60
    for name, taken_ in found.items():
        main = name.split(".")[1]
        for flag, values in taken_.items():
            want = ["-1", "0"] if flag in AXES else ["0"] if flag in FLAG_ZERO.get(main, ()) else []
            assert values == want, (main, flag, values)
