"""The command line of every main: --config and its overrides, the layout flags, the checks of a config, and errors in one line.

A main calls `define()` at import, `resolve(FLAGS)` in `main(argv)`, and ends with `flags.run(main)`.
"""

import contextlib
import fnmatch
import glob
import math
import os
import re
import runpy
import sys
import traceback

from absl import app, flags
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from experiments import hub, interrupts, number_flags, run_tokenizer
from experiments.configs import common
from experiments.data import batch_ramp, preferences, prompts
from experiments.data.gpt_index import split_ranges
from experiments.layout import check as layout
from experiments.posttrain.settings import LOSSES, RL_LOSSES
from experiments.train import lr_groups
from experiments.watch import trackers
from ops.registry import IMPLEMENTATIONS, LENGTHS, OPS
from parallel.checkpoint.files import COMPRESSIONS
from parallel.checkpoint.read import Reader, find
from parallel.hints import nearest
from parallel.launch import joined
from parallel.mesh import AXES, MOST_RANKS, world_size
from parallel.pipeline.schedule import SCHEDULES
from qwen3.chat import FORMATS
from qwen3.config import DTYPES, SIZES, Lora, Qwen3Config, RopeScaling, check_compute_dtype
from qwen3.json_files import read_json
from qwen3.schema import LARGEST, LIMITS, LORA_LIMITS, YARN_LIMIT
from qwen3.text_stream import printable
from qwen3.tokenizer import Tokenizer

# Mains that train, on any number of ranks, and their default config
MAINS = {
    "experiments.pretrain": "experiments/configs/tiny.py",
    "experiments.finetune": "experiments/configs/finetune_tiny.py",
    "experiments.prefer": "experiments/configs/prefer_tiny.py",
    "experiments.rl": "experiments/configs/rl_tiny.py",
}

flags.disclaim_key_flags()  # --help lists them under the main that calls define()


def define(default_config=None, flag_values=flags.FLAGS):
    """Registers --config, --workdir and the layout flags. A layout flag that is given overrides its key of `config.parallel`."""
    config_flags.DEFINE_config_file("config", None, "a file with get_config(); --config.KEY=VALUE overrides", flag_values=flag_values)
    flag_values["config"].default = default_config  # loaded by parse(), where errors are reported
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=flag_values)
    for name in AXES + ("micro_batches", "zero"):
        # check() knows the range
        number_flags.integer(name, None, f"overrides config.parallel.{name}", -LARGEST, flag_values=flag_values)
    flags.DEFINE_boolean("seq_parallel", None, "overrides config.parallel.seq_parallel", flag_values=flag_values)
    flags.DEFINE_string("lowering", None, "overrides config.parallel.lowering: manual or shard", flag_values=flag_values)
    flags.DEFINE_string("profile_steps", None, "overrides config.train.profile_steps: FIRST:LAST, such as 10:15", flag_values=flag_values)
    flags.DEFINE_string("resume_from", None, "overrides config.resume_from: the run to continue", flag_values=flag_values)
    flags.DEFINE_string("init_from", None, "overrides config.init_from: the initial weights", flag_values=flag_values)
    flags.DEFINE_string(
        "hf_dir", None, "a Hugging Face model, its folder or id, or the folder of a run: sizes, weights, tokenizer", flag_values=flag_values
    )
    flags.DEFINE_boolean("download", False, "download a model that is named by its id and is in no cache", flag_values=flag_values)
    flags.DEFINE_boolean("partial", None, "overrides config.partial: load what matches by name and shape", flag_values=flag_values)


def run(main, define_flags=None, is_rank=True):
    """Calls define_flags(), parses sys.argv and calls main([program]). An import of the main's module thus defines no flags. is_rank: of
    several processes that srun or mpirun starts, each is a rank of one job; False for a main that starts ranks itself.

    A user's mistake prints one line, `error: ...`, and exits with status 2. With --traceback it prints the traceback instead.
    """
    if define_flags:
        define_flags()
    if "traceback" not in flags.FLAGS:
        flags.DEFINE_boolean("traceback", False, "show the whole traceback of an error")
    interrupts.main_runs()
    try:
        if is_rank:
            joined.join()
        app.run(main, flags_parser=parse)
    except KeyboardInterrupt:
        if "--traceback" in sys.argv:
            raise
        print(interrupts.WORDS, file=sys.stderr)
        sys.exit(interrupts.STATUS)
    except (ValueError, FileNotFoundError, FloatingPointError, flags.Error) as error:
        if "--traceback" in sys.argv:
            raise
        print(printable(f"error: {error}"), file=sys.stderr)
        if flags.FLAGS.is_parsed():  # main() raised it, so it may be a bug instead of a user's mistake
            print("(--traceback shows where)", file=sys.stderr)
        sys.exit(2)


def parse(argv, flag_values=flags.FLAGS):
    """Parses argv, which must be sys.argv because config_flags reads that. Returns [program]; raises ValueError or flags.Error."""
    for argument in argv[1:]:
        if not _is_utf8(argument):
            raise ValueError(f"{ascii(argument)} is not UTF-8; rename the file or folder that it names, and write its new name")
    if "config" in flag_values:
        argv = _with_config(argv, flag_values["config"].default)
    rest = flag_values(argv)
    if "verbosity" in flag_values and flag_values["verbosity"].using_default_value:
        flag_values.verbosity = -1  # warnings; app.run would set 0, which shows the INFO lines of libraries such as matplotlib
    if rest[1:]:
        raise ValueError(f"unexpected argument {rest[1]!r}; write options as --name=value")
    return rest


def _is_utf8(text):
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def resolve(flag_values, world=None, cfg=None):
    """Returns the run's config as a FrozenConfigDict: the file, overridden by --config.KEY and then by the layout flags.

    An axis of -1 is replaced by its size. world: the number of ranks; None: those of this process's job; 0: as many as the layout asks for.
    cfg: the Qwen3Config, where it is not the one of config.model. Raises ValueError that names the key, its value and the fix.
    """
    if flag_values.config is None:
        raise ValueError("--config is missing; try --config=experiments/configs/tiny.py")
    config = flag_values.config.copy_and_resolve_references()
    for name in config.parallel:
        if name in flag_values and flag_values[name].value is not None:
            config.parallel[name] = flag_values[name].value
    for name in ("resume_from", "init_from", "partial"):
        if flag_values[name].value is not None:
            config[name] = flag_values[name].value
    if flag_values.profile_steps is not None:
        config.train.profile_steps = flag_values.profile_steps
    if flag_values.hf_dir is not None:
        _start_from(config, hub.folder_of("--hf_dir", flag_values.hf_dir, flag_values.download))
    try:
        config.model = hub.folder_of("model", config.model, flag_values.download)
    except ValueError as error:
        raise ValueError(f"{error}{nearest(os.path.basename(config.model).lower(), SIZES)}") from error
    with contextlib.nullcontext() if flag_values.download else contextlib.suppress(ValueError):  # a run that goes on may do without it
        config.init_from = hub.folder_of("init_from", config.init_from, flag_values.download)
    if config.data.tokenizer:
        config.data.tokenizer = hub.folder_of("data.tokenizer", config.data.tokenizer, flag_values.download)
    check(config)
    _fit_vocabulary(config)
    sizes = layout.check(config, cfg or model_config(config, "any"), world_size() if world is None else world or None)
    config.parallel.update(sizes)
    return FrozenConfigDict(config)


def _start_from(config, folder):
    """Sets the config's model, initial weights and tokenizer to those of a folder: a Hugging Face model, or a run of this project."""
    config.model = config.init_from = folder
    config.data.tokenizer = config.data.tokenizer or run_tokenizer.of(folder) or folder


def _fit_vocabulary(config):
    """Sets model_args.vocab_size to the size of data.tokenizer, where that is more than a model that starts fresh has and the key is not
    given."""
    folder = os.path.expanduser(config.data.tokenizer)
    fresh = config.model in SIZES and not config.init_from and config.model_args.vocab_size is None
    if fresh and config.data.tokenizer and os.path.isfile(os.path.join(folder, "tokenizer.json")):
        size = Tokenizer.load(folder).vocab_size
        if size > SIZES[config.model].vocab_size:
            config.model_args.vocab_size = size


def check_source(hf_dir, workdir):
    """Raises ValueError unless one of --hf_dir and --workdir says where the model is."""
    if bool(hf_dir) == bool(workdir):
        raise ValueError("give --hf_dir=FOLDER, a Hugging Face folder, or --workdir=RUN, the folder of a training run; one of them")


def check_layout(argv, world):
    """Raises ValueError if the layout of a command [module, *arguments] is wrong, or does not have `world` ranks.

    A module that has no layout is not checked.
    """
    if argv[0] in MAINS or any(re.match("--?config(=|$)", arg) for arg in argv):
        resolved(argv, world)


def resolved(argv, world):
    """Returns the config that a command [module, *arguments] gets from resolve() on `world` ranks; ignores flags that define() lacks."""
    default, values, own = MAINS.get(argv[0]), flags.FlagValues(), sys.argv
    define(default, values)
    sys.argv = list(argv)  # where config_flags looks for the keys
    try:
        values(_with_config(sys.argv, default), known_only=True)
    finally:
        sys.argv = own
    return resolve(values, world)


def taken_after_dashes():
    """Removes `--` and all that follows from sys.argv, and returns what followed: a command, or options for another program."""
    if "--" not in sys.argv:
        return []
    place = sys.argv.index("--")
    taken = sys.argv[place + 1 :]
    del sys.argv[place:]
    return taken


def model_config(config, device="CPU"):
    """Returns the Qwen3Config that `config.model` names, changed by `config.model_args`, `yarn`, `lora` and `train.freeze_*`.

    device: MindSpore's name of the target, or 'any' to accept every compute dtype. Raises ValueError for an
    unknown size, a folder that Qwen3Config.from_hf refuses, or a dtype that `device` cannot compute in.
    """
    args = {name: value for name, value in config.model_args.items() if value is not None}
    if "mlp_only_layers" in args:
        given = args["mlp_only_layers"]
        if not isinstance(given, tuple | list) or any(type(i) is not int for i in given):
            raise ValueError(f"model_args.mlp_only_layers={given!r} must be layer numbers, such as (0,1)")
        args["mlp_only_layers"] = tuple(given)
    base = _base_model(config.model)
    if args.get("vocab_size", base.vocab_size) != base.vocab_size:  # another tokenizer, so the ids of the special tokens are unknown
        args = {"bos_id": None, "eos_id": None, "pad_id": None, **args}
    args["num_labels"] = int(config.prefer.loss == "reward")
    args["mup_base_width"] = config.train.mup_base_width
    cfg = _with_trainable(_with_yarn(base.replace(**args), config.yarn), config)
    check_compute_dtype(cfg, device)
    return cfg


def _with_yarn(cfg, yarn):
    if not yarn.factor:
        if yarn.original_max_position:
            raise ValueError(f"yarn.original_max_position={yarn.original_max_position} has no use without yarn.factor; set yarn.factor too")
        return cfg
    return cfg.replace(rope_scaling=RopeScaling(yarn.factor, yarn.original_max_position or cfg.max_position))


def _with_trainable(cfg, config):
    """cfg with the adapters of config.lora and the frozen parameters of train.freeze_*. Raises ValueError for a pattern without a match."""
    include, exclude = (_patterns(config.train[key]) for key in ("freeze_include", "freeze_exclude"))
    if not config.lora.rank:
        return cfg.replace(frozen=(include, exclude), frozen_dtype=_frozen_dtype(config, bool(include), "float32"))
    if include or exclude:
        given = " and ".join(f"{key}={config.train[key]!r}" for key in ("freeze_include", "freeze_exclude") if config.train[key])
        raise ValueError(f"train.{given}: lora.rank={config.lora.rank} freezes all parameters but the adapters; leave it out")
    known, chosen = cfg.lora_targets, set()
    for pattern in _patterns(config.lora.targets):
        found = {name for name in known if fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")}
        if not found:
            raise ValueError(
                f"lora.targets: {pattern!r} matches none of {', '.join(known)}, which model={config.model} has{nearest(pattern, known)}"
            )
        chosen |= found
    targets = tuple(name for name in known if name in chosen)
    if not targets:
        raise ValueError(f"lora.targets is empty; use some of {', '.join(known)}")
    options = {key: config.lora[key] for key in ("rank", "alpha", "dropout", "init", "rslora")}
    return cfg.replace(lora=Lora(targets=targets, **options), frozen_dtype=_frozen_dtype(config, True, cfg.compute_dtype))


def _frozen_dtype(config, freezes, usual):
    """Returns the dtype that train.frozen_dtype means. freezes: whether anything is frozen. usual: the dtype of "auto"."""
    asked = config.train.frozen_dtype
    if not freezes and asked not in ("auto", "float32"):
        raise ValueError(
            f"train.frozen_dtype={asked}: nothing is frozen, and what trains is kept in float32; set lora.rank or train.freeze_include, or"
            " use train.frozen_dtype=auto"
        )
    return usual if asked == "auto" else asked


def _patterns(text):
    return tuple(pattern.strip() for pattern in text.split(",") if pattern.strip())


def _base_model(model):
    if model in SIZES:
        return SIZES[model]
    if saved := find(model):
        return _saved_model(saved)
    path = os.path.join(model, "config.json")
    if not os.path.isdir(model):
        near = nearest(os.path.basename(model).lower(), SIZES)
        raise ValueError(f"model={model!r} is neither a size nor a folder{near}; the sizes are {', '.join(SIZES)}")
    if not os.path.lexists(path):
        raise FileNotFoundError(f"model={model!r}: the folder has no config.json; give a Hugging Face folder")
    return Qwen3Config.from_hf(read_json(path), where=path)


def _saved_model(folder):
    """The Qwen3Config in the metadata of a checkpoint of this project."""
    meta = Reader(folder).meta
    if not isinstance(meta.get("model"), dict):
        raise ValueError(f"model={folder!r} has no model config in its metadata; give a checkpoint that a run or hf-to-native saved")
    return Qwen3Config.from_hf(meta["model"])


def _with_config(argv, default):
    """Returns argv, with --config=default if it has no --config. Raises ValueError for a bad config file or an unknown key in argv."""
    options = [*argv[1 : argv.index("--") if "--" in argv else None], ""]
    paths, keys = [], []
    for arg, following in zip(options, options[1:]):
        if match := re.fullmatch(r"--?config(?:=(.*))?", arg):
            paths.append(following if match[1] is None else match[1])
        elif match := re.match(r"--?(?:no)?config\.([^=]*)", arg):
            keys.append(match[1])
    if len(paths) > 1:
        raise ValueError(f"--config is given {len(paths)} times; give one file, and --config.KEY=VALUE for what differs")
    if not paths and default:
        argv, paths = [argv[0], f"--config={default}", *argv[1:]], [default]
    if keys and not paths:
        raise ValueError(f"--config.{keys[0]} needs --config=FILE before it")
    known = _keys(_load(paths[0])) if paths else []
    for key in keys:
        if inside := [k for k in known if k.startswith(key + ".")]:
            raise ValueError(f"--config.{key} is a section; set its keys, such as --config.{inside[0]}")
        if key not in known:
            raise ValueError(f"--config.{key}: there is no key {key!r}{nearest(key, known)}")
    return argv


def _load(path):
    """Loads the config of a file. An error in the file becomes a ValueError with its line: ml_collections' own messages fill pages."""
    if not os.path.isfile(path):
        near = nearest(path, glob.glob(os.path.join(os.path.dirname(path), "*.py")))
        raise ValueError(f"--config={path} is not a file{near}")
    try:
        config = runpy.run_path(path)["get_config"]()
    except Exception as error:
        raise ValueError(f"{path}: {_where(error, path)}{_reason(error)}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"{path}: get_config() returned {type(config).__name__}; return the config of common.get_config()")
    keys, known = _keys(config), _keys(common.get_config())
    for key in keys:
        if key not in known:
            raise ValueError(f"{path}: there is no key {key!r}{nearest(key, known)}")
    if missing := [key for key in known if key not in keys]:
        raise ValueError(f"{path}: {missing[0]!r} is missing; start from common.get_config()")
    return config


def _where(error, path):
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    return f"line {frames[-1].lineno}: {frames[-1].line}: " if frames else ""


def _reason(error):
    """One line of an error's message: ml_collections' hint if there is one; its list of all fields is left out."""
    if hint := re.search("Did you mean .*", str(error)):
        return hint[0]
    return f"{type(error).__name__}: {str(error).split(' Other fields present')[0]}".splitlines()[0]


def _keys(config):
    """The dotted names of all values, such as "train.steps"."""
    out = []
    for key, value in config.items():
        out += [f"{key}.{k}" for k in _keys(value)] if isinstance(value, ConfigDict) else [key]
    return out


def _one_of(*names):
    return (lambda value: value in names), f"is not one of {', '.join(names)}"


def _is_steps(value):
    first, _, last = value.partition(":")
    return value == "" or (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last))


def _is_function(value):
    module, _, function = value.partition(":")
    return function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def _is_split(value):
    try:
        return bool(split_ranges(value, 100))
    except ValueError:
        return False


POSITIVE = (lambda value: value > 0), "must be above 0"
NOT_NEGATIVE = (lambda value: value >= 0), "must be 0 or more"
FRACTION = (lambda value: 0 <= value <= 1), "must be from 0 to 1"
BELOW_ONE = (lambda value: 0 <= value < 1), "must be from 0 to below 1"
CHECKS = {
    **dict.fromkeys(("train.steps", "train.batch_size", "train.seq_len", "train.log_every", "parallel.micro_batches"), POSITIVE),
    **dict.fromkeys(
        (
            "train.eval_every",
            "train.eval_rows",
            "train.seed",
            "train.sample_tokens",
            "train.exact_match_rows",
            "train.monitor_every",
            "train.save_hf_every",
            "train.loss_chunks",
            "train.mup_base_width",
            "data.max_bytes",
            "data.max_samples",
            "data.shuffle_buffer",
        ),
        NOT_NEGATIVE,
    ),
    **dict.fromkeys(("checkpoint.every", "checkpoint.keep_last", "checkpoint.keep_every"), NOT_NEGATIVE),
    "checkpoint.compression": _one_of(*COMPRESSIONS),
    "checkpoint.on_error": _one_of("stop", "continue"),
    "checkpoint.timeout_s": POSITIVE,
    "lora.rank": NOT_NEGATIVE,
    "parallel.stage_layers": (
        (lambda value: all(type(n) is int and 0 <= n <= LIMITS["num_layers"] for n in value)),
        "must be numbers of layers, such as (7,9)",
    ),
    "lora.alpha": POSITIVE,
    **dict.fromkeys(("lora.dropout", "train.ema_decay"), BELOW_ONE),
    "lora.init": _one_of("kaiming", "gaussian"),
    "train.layer_loop": _one_of("auto", "unroll", "scan"),
    "data.format": _one_of("", *FORMATS, *preferences.FORMATS, *prompts.FORMATS),
    "prefer.loss": _one_of("", *LOSSES),
    **dict.fromkeys(("prefer.beta", "prefer.row_pairs"), POSITIVE),
    **dict.fromkeys(("prefer.margin", "prefer.desirable_weight", "prefer.undesirable_weight"), NOT_NEGATIVE),
    "prefer.label_smoothing": ((lambda value: 0 <= value < 0.5), "must be from 0 to below 0.5, at which a pair says nothing"),
    "rl.loss": _one_of("", *RL_LOSSES),
    "rl.reward": (_is_function, "must be module:function, such as experiments.posttrain.rewards:exact_match"),
    **dict.fromkeys(("rl.reward_timeout_s", "rl.reward_processes", "rl.max_new_tokens", "rl.updates", "rl.slots", "rl.clip_low"), POSITIVE),
    "rl.group_size": ((lambda value: value >= 2), "must be 2 or more, as the answers of a group are compared with each other"),
    "rl.clip_high": POSITIVE,
    **dict.fromkeys(("rl.kl_coef", "rl.log_samples"), NOT_NEGATIVE),
    "data.enable_thinking": _one_of("none", "true", "false"),
    "data.packing": _one_of("packed", "padded"),
    "data.too_long": _one_of("truncate", "drop", "error"),
    "train.frozen_dtype": _one_of("auto", *DTYPES),
    "train.recompute": _one_of("none", "full", "attention"),
    **{f"ops.{op}": _one_of("auto", *IMPLEMENTATIONS) for op in OPS},
    "optim.name": _one_of("adamw", "lion", "sgd", "muon"),
    "optim.schedule": _one_of("constant", "linear", "cosine", "wsd"),
    **dict.fromkeys(("optim.lr", "optim.eps", "data.vocab_size"), POSITIVE),
    **dict.fromkeys(("optim.warmup_steps", "optim.weight_decay", "optim.clip_norm", "optim.router_bias_rate"), NOT_NEGATIVE),
    **dict.fromkeys(("optim.decay_fraction", "optim.min_lr_ratio"), FRACTION),
    **dict.fromkeys(("optim.b1", "optim.b2", "optim.muon_momentum", "data.held_out", "optim.warmup_ratio"), BELOW_ONE),
    "optim.skip_spikes": ((lambda value: value == 0 or value > 1), "must be above 1, or 0 for off"),
    "train.profile_steps": (_is_steps, "must be FIRST:LAST, steps counted from 1, such as 10:15"),
    "data.path": ((lambda value: isinstance(value, str | tuple | list)), "must be text, or a list [weight, prefix, ...]"),
    "data.max_documents": (
        (lambda value: value in (-1, 0) or 2 <= value <= LENGTHS),
        f"must be 2 to {LENGTHS}, or 0 for any number by segment ids, or -1 for a choice by train.seq_len",
    ),
    "watch.project": ((lambda value: value != ""), "must name a project; use 'qwen3'"),
    "data.json_key": ((lambda value: value != ""), "must name a key of the records; use 'text'"),
    "data.split": (_is_split, "must be up to three weights of train, valid and test, 0 or more; use '969,30,1'"),
    "yarn.factor": ((lambda value: value == 0 or value >= 1), "must be 1 or more, or 0 to keep the model's own scaling"),
    "yarn.original_max_position": NOT_NEGATIVE,
    "parallel.seq_gather_again": _one_of("auto", "on", "off"),
    "parallel.lowering": _one_of("manual", "shard"),
    "parallel.pp_schedule": _one_of(*SCHEDULES),
    "parallel.virtual_stages": POSITIVE,
    "parallel.cp_attention": _one_of("ring", "ulysses", "hybrid"),
    "parallel.cp_ulysses": POSITIVE,
}


# The most of each number, and why
COUNTED = LARGEST, "an int32 counts them"
FLOAT32 = 3.4e38, "float32 holds no more"
MOST = {
    **dict.fromkeys(
        ("train.steps", "train.batch_size", "train.seq_len", "train.log_every", "train.eval_every", "train.eval_rows"), COUNTED
    ),
    **dict.fromkeys(("train.sample_tokens", "train.exact_match_rows", "train.monitor_every", "train.save_hf_every"), COUNTED),
    **dict.fromkeys(("checkpoint.every", "checkpoint.keep_last", "checkpoint.keep_every", "optim.warmup_steps"), COUNTED),
    **dict.fromkeys(("data.max_samples", "data.shuffle_buffer", "parallel.micro_batches", "yarn.original_max_position"), COUNTED),
    **dict.fromkeys(("optim.lr", "optim.eps", "optim.weight_decay", "optim.clip_norm", "optim.skip_spikes"), FLOAT32),
    "optim.router_bias_rate": FLOAT32,
    **dict.fromkeys(("prefer.beta", "prefer.margin", "prefer.desirable_weight", "prefer.undesirable_weight"), FLOAT32),
    "prefer.label_smoothing": (0.5, "at which a pair says nothing"),
    "prefer.row_pairs": (4096, "the memory of the sums grows with it"),
    **dict.fromkeys(("rl.group_size", "rl.max_new_tokens", "rl.updates", "rl.slots", "rl.log_samples"), COUNTED),
    "rl.reward_timeout_s": (1e9, "that is 30 years"),
    "rl.reward_processes": (number_flags.MOST_PROCESSES, "a machine has no more processes"),
    "rl.clip_low": (1.0, "a probability is never below 0"),
    **dict.fromkeys(("rl.clip_high", "rl.kl_coef"), FLOAT32),
    "data.max_documents": (LENGTHS, "MindSpore's attention takes no more lengths"),
    "train.seed": (2**32 - 1, "the generators take 32 bits of it"),
    "checkpoint.timeout_s": (1e9, "that is 30 years"),
    "lora.rank": (LORA_LIMITS["rank"], "no matrix of a model is so large"),
    "lora.alpha": (LORA_LIMITS["alpha"], "a saved adapter could not be read again"),
    "train.loss_chunks": (LIMITS["vocab_size"], "no model has more words"),
    "train.mup_base_width": (LIMITS["hidden_size"], "no model is wider"),
    "data.vocab_size": (LIMITS["vocab_size"], "no model has more"),
    "data.max_bytes": (2**63 - 1, "an int64 counts them"),
    "yarn.factor": (YARN_LIMIT, "a saved model could not be read again"),
    **dict.fromkeys((f"parallel.{axis}" for axis in AXES), (MOST_RANKS, "no job has more ranks")),
    "parallel.virtual_stages": (LIMITS["num_layers"], "no model has more layers"),
    "parallel.cp_ulysses": (MOST_RANKS, "no job has more ranks"),
}


def check(config):
    """Raises ValueError for a value that is of another type than the key's default, is not finite, or is out of the key's range."""
    defaults = common.get_config()
    for key in _keys(config):
        _check_type(key, _value(config, key), _value(defaults, key))
    for key, (ok, rule) in CHECKS.items():
        value = _value(config, key)
        if not ok(value):
            raise ValueError(f"{key}={value!r} {rule}")
    lr_groups.parse(config.optim.lr_groups)
    batch_ramp.parse(config.train.batch_ramp)
    _check_mup(config)
    trackers.parse(config.watch.trackers)
    for key in _keys(config):
        value = _value(config, key)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}={value} is not a finite number")
    for key, (most, why) in MOST.items():
        value = _value(config, key)
        if value > most:
            raise ValueError(f"{key}={value!r} must be at most {most}: {why}")


def _check_mup(config):
    """Raises ValueError for muP with what has no rule for it."""
    width = config.train.mup_base_width
    if width and config.optim.name == "sgd":
        raise ValueError(
            f"train.mup_base_width={width} with optim.name=sgd: muP has rules for adamw, lion and muon; use one of them, or"
            " train.mup_base_width=0"
        )
    if width and config.lora.rank:
        raise ValueError(
            f"train.mup_base_width={width} with lora.rank={config.lora.rank}: adapters have no rule in muP; use train.mup_base_width=0, or"
            " lora.rank=0"
        )


def _value(config, key):
    return config.get(key) if "." not in key else config[key.split(".")[0]][key.split(".")[1]]


def _check_type(key, value, default):
    """The keys of model_args are checked with the model, and data.path by its rule."""
    if key.startswith("model_args.") or key == "data.path":
        return
    kinds = {bool: (bool,), int: (int,), float: (int, float), str: (str,), tuple: (tuple, list)}[type(default)]
    if type(value) not in kinds:
        needed = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a list"}[type(default)]
        raise ValueError(f"{key}={value!r} must be {needed}")
