"""The command line: what is accepted, which value wins, and the one line a mistake gets."""

import dataclasses
import glob
import json
import os
import re
import runpy
import subprocess
import sys

import pytest
from absl import flags as absl_flags

from experiments import flags
from experiments.configs import common
from qwen3.config import SIZES, Qwen3Config, RopeScaling
from qwen3.tokenizer import train_bpe

TINY = "--config=experiments/configs/tiny.py"
OTHERS = ("finetune", "prefer", "rl", "ladder")  # whose configs begin with their names; the others are of pretrain
FILES = sorted(set(glob.glob("experiments/configs/*.py")) - {f"experiments/configs/{n}.py" for n in ("__init__", "common")})
MAIN = """
from absl.flags import FLAGS
from experiments import flags
flags.define()
flags.run(lambda argv: print(flags.resolve(FLAGS).train.steps))
"""


def read(monkeypatch, *args, default=None):
    """The resolved config of a command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["main", *args])
    values = absl_flags.FlagValues()
    flags.define(default, values)
    flags.parse(sys.argv, values)
    return flags.resolve(values)


def command(*args):
    return subprocess.run([sys.executable, "-c", MAIN, *args], capture_output=True, text=True, timeout=60)


BAD = [
    # keys
    ("--config.train.stepz=5", "--config.train.stepz: there is no key 'train.stepz'; did you mean 'train.steps'?"),
    ("--config.trian.steps=5", "did you mean 'train.steps'?"),
    ("--config.model_args.num_layer=2", "did you mean 'model_args.num_layers'?"),
    ("--noconfig.train.save_h", "did you mean 'train.save_hf'?"),
    ("--config.train.steps.x=5", "there is no key 'train.steps.x'; did you mean 'train.steps'?"),
    ("--config.zzzzzz=5", "there is no key 'zzzzzz'"),
    ("--config.train=5", "--config.train is a section; set its keys, such as --config.train.batch_ramp"),
    ("--stepz=5", "Unknown command line flag 'stepz'"),
    ("train.steps=5", "unexpected argument 'train.steps=5'; write options as --name=value"),
    ("--config=experiments/configs/tiny_moe.py", "--config is given 2 times"),
    # types
    ("--config.train.steps=abc", "flag --config.train.steps=abc: invalid literal for int()"),
    ("--config.train.steps=1.5", "flag --config.train.steps=1.5"),
    ("--config.optim.lr=fast", "flag --config.optim.lr=fast"),
    ("--config.train.save_hf=maybe", "Non-boolean argument"),
    ("--tp=two", "flag --tp=two"),
    # values
    ("--config.train.steps=0", "train.steps=0 must be above 0"),
    ("--config.train.batch_size=-1", "train.batch_size=-1 must be above 0"),
    ("--config.train.log_every=0", "train.log_every=0 must be above 0"),
    ("--config.train.eval_every=-1", "train.eval_every=-1 must be 0 or more"),
    ("--config.train.layer_loop=loop", "train.layer_loop='loop' is not one of auto, unroll, scan"),
    ("--config.optim.lr=0", "optim.lr=0.0 must be above 0"),
    ("--config.optim.lr=nan", "optim.lr=nan must be above 0"),
    ("--config.optim.lr=inf", "optim.lr=inf is not a finite number"),
    ("--config.optim.eps=inf", "optim.eps=inf is not a finite number"),
    ("--config.lora.alpha=inf", "lora.alpha=inf is not a finite number"),
    ("--config.checkpoint.timeout_s=inf", "checkpoint.timeout_s=inf is not a finite number"),
    ("--config.model_args.rms_norm_eps=inf", "model_args.rms_norm_eps=inf is not a finite number"),
    ("--config.model_args.rope_theta=inf", "model_args.rope_theta=inf is not a finite number"),
    ("--config.model_args.initializer_range=-0.1", "initializer_range=-0.1 must be 0 or more"),
    ("--config.model_args.router_z_coef=-1.0", "router_z_coef=-1.0 must be 0 or more"),
    ("--config.yarn.factor=-2.0", "yarn.factor=-2.0 must be 1 or more"),
    ("--config.optim.schedule=step", "optim.schedule='step' is not one of constant, linear, cosine, wsd"),
    ("--config.optim.decay_fraction=1.1", "optim.decay_fraction=1.1 must be from 0 to 1"),
    ("--config.optim.b2=1.0", "optim.b2=1.0 must be from 0 to below 1"),
    ("--config.optim.skip_spikes=0.5", "optim.skip_spikes=0.5 must be above 1, or 0 for off"),
    ("--config.data.held_out=1", "data.held_out=1.0 must be from 0 to below 1"),
    ("--config.data.split=80,20,0,5", "data.split='80,20,0,5' must be up to three weights of train, valid and test"),
    ("--config.data.split=0,0,0", "data.split='0,0,0' must be up to three weights"),
    ("--config.data.path=7", "data.path=7 must be text, or a list [weight, prefix, ...]"),
    ("--config.data.json_key=", "data.json_key='' must name a key of the records; use 'text'"),
    # layouts
    ("--tp=2", "tp=2 is 2 ranks, and the job has 1; start it with `python -m experiments.launch --nproc=2 -- ...`"),
    ("--dp=-2", "parallel.dp=-2 must be 1 or more, or -1 for all remaining ranks"),
    ("--config.parallel.ep=4", "parallel.ep=4 must divide dp x cp x tp = 1 x 1 x 1 = 1; use 1"),
    ("--zero=4", "parallel.zero=4 must be 0, 1, 2 or 3"),
    ("--lowering=magic", "parallel.lowering='magic' is not one of manual, shard"),
    ("--micro_batches=0", "parallel.micro_batches=0 must be above 0"),
    (
        "--micro_batches=3",
        "train.batch_size=16 must be a multiple of parallel.dp=1 times parallel.micro_batches=3; use --config.train.batch_size=18",
    ),
]


@pytest.mark.parametrize("arg, message", BAD)
def test_a_bad_option_is_named_in_one_line(monkeypatch, arg, message):
    with pytest.raises((ValueError, absl_flags.Error), match=re.escape(message)) as error:
        read(monkeypatch, TINY, arg)
    assert "\n" not in str(error.value)


def test_a_missing_config_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="--config is missing"):
        read(monkeypatch)
    with pytest.raises(ValueError, match="--config.train.steps needs --config=FILE before it"):
        read(monkeypatch, "--config.train.steps=5")
    with pytest.raises(ValueError, match=r"tinny.py is not a file; did you mean 'experiments/configs/tiny.py'\?"):
        read(monkeypatch, "--config=experiments/configs/tinny.py")


BAD_FILES = [
    ("c.train.stepz = 5", 'line 6: c.train.stepz = 5: Did you mean "steps" instead of "stepz"?'),
    ("c.trian.steps = 5", 'line 6: c.trian.steps = 5: Did you mean "train" instead of "trian"?'),
    ("c.zzzzzz = 5", 'line 6: c.zzzzzz = 5: AttributeError: \'Key "zzzzzz" does not exist'),
    ("c.train.steps = 'many'", "line 6: c.train.steps = 'many': TypeError: Could not override field 'steps'"),
    ("c.unlock(); c.train.stepz = 5", "there is no key 'train.stepz'; did you mean 'train.steps'?"),
    ("c.unlock(); del c.train.steps", "'train.steps' is missing; start from common.get_config()"),
    ("c = {}", "get_config() returned dict; return the config of common.get_config()"),
    ("c = (", "SyntaxError"),
    ("import nowhere", "line 6: import nowhere: ModuleNotFoundError: No module named 'nowhere'"),
]


@pytest.mark.parametrize("line, message", BAD_FILES)
def test_a_mistake_in_a_config_file_is_named_in_one_line(monkeypatch, tmp_path, line, message):
    path = tmp_path / "mine.py"
    head = "from experiments.configs import common\n\n\ndef get_config():\n    c = common.get_config()\n"
    path.write_text(f"{head}    {line}\n    return c\n")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read(monkeypatch, f"--config={path}")
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_layout_flags_override_the_command_line_which_overrides_the_file(monkeypatch):
    assert read(monkeypatch, TINY).train.steps == 400
    assert read(monkeypatch, TINY, "--config.train.steps=70").train.steps == 70
    assert read(monkeypatch, "--config", TINY.split("=")[1], "--config.train.steps", "80").train.steps == 80
    assert read(monkeypatch, TINY, "--config.parallel.micro_batches=2").parallel.micro_batches == 2
    assert read(monkeypatch, TINY, "--config.parallel.micro_batches=2", "--micro_batches=4").parallel.micro_batches == 4
    big = read(monkeypatch, "--config=experiments/configs/qwen3_32b.py", "--tp=1", "--pp=1")
    assert big.parallel.tp == big.parallel.pp == 1 and big.parallel.micro_batches == 4


def test_a_blend_is_a_list_in_a_file_and_text_or_a_list_on_the_command_line(monkeypatch, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from experiments.configs import common\n\n\ndef get_config():\n"
        "    c = common.get_config()\n    c.data.path = [0.3, 'a/b', 0.7, 'c']\n    return c\n"
    )
    assert read(monkeypatch, f"--config={path}").data.path == (0.3, "a/b", 0.7, "c")
    assert read(monkeypatch, TINY, "--config.data.path=0.3,a/b,0.7,c").data.path == "0.3,a/b,0.7,c"
    assert read(monkeypatch, TINY, "--config.data.path=[0.3,'a/b',0.7,'c']").data.path == (0.3, "a/b", 0.7, "c")
    assert read(monkeypatch, TINY, "--config.data.path=a/b.txt").data.path == "a/b.txt"


def test_a_default_config_is_used_where_none_is_given(monkeypatch):
    path = "experiments/configs/tiny_moe.py"
    assert read(monkeypatch, default=path).model == "tiny-moe"
    assert read(monkeypatch, "--config.train.steps=70", default=path).train.steps == 70
    assert read(monkeypatch, TINY, default=path).model == "tiny"
    with pytest.raises(ValueError, match="did you mean 'train.steps'"):
        read(monkeypatch, "--config.train.stepz=70", default=path)


def test_the_resolved_config_cannot_change_and_is_plain_json(monkeypatch):
    config = read(monkeypatch, TINY, "--config.model_args.num_layers=2")
    with pytest.raises(AttributeError):
        config.train.steps = 1
    assert json.loads(config.to_json())["model_args"]["num_layers"] == 2


def test_an_axis_may_be_what_is_left_of_the_ranks(monkeypatch):
    monkeypatch.setenv("MS_WORKER_NUM", "8")
    parallel = read(monkeypatch, TINY, "--dp=-1", "--tp=2").parallel
    assert (parallel.dp, parallel.tp) == (4, 2)


@pytest.mark.parametrize("path", FILES)
def test_every_config_file_loads_and_gives_its_command(path):
    module = runpy.run_path(path)
    config = module["get_config"]()
    assert config.is_locked
    doc = " ".join(module["__doc__"].split())
    main = next((name for name in OTHERS if f"{name}_" in path), "pretrain")
    assert f"python -m experiments.{main} --config={path} --workdir=" in doc
    assert "Hardware:" in doc and "Expected time and loss:" in doc
    dtype = config.model_args.compute_dtype or "float32"
    cfg = flags.model_config(config, device="Ascend")
    assert cfg.base == SIZES[config.model].replace(compute_dtype=dtype)


def test_every_size_has_a_config_file():
    pretraining = [path for path in FILES if not any(f"{main}_" in path for main in OTHERS)]
    assert sorted(runpy.run_path(path)["get_config"]().model for path in pretraining) == sorted(SIZES)


@pytest.mark.parametrize("path", FILES)
def test_every_config_file_resolves_on_one_device(monkeypatch, path):
    one = ("--dp=1", "--tp=1", "--pp=1", "--cp=1", "--ep=1", "--zero=0", "--seq_parallel=false")
    config = read(monkeypatch, f"--config={path}", *one, "--config.model_args.compute_dtype=float32")
    assert flags.model_config(config).compute_dtype == "float32"


def test_model_args_cover_the_model_fields():
    fields = {f.name for f in dataclasses.fields(Qwen3Config)}
    assert set(common.get_config().model_args) == fields - {
        "rope_scaling",
        "lora",
        "frozen",
        "frozen_dtype",
        "mup_base_width",
        "num_labels",
    }


def test_yarn_is_put_on_a_model(monkeypatch):
    """With the positions that the model has, or those that are given; a wrong one is named."""
    plain = flags.model_config(read(monkeypatch, TINY))
    assert flags.model_config(read(monkeypatch, TINY, "--config.yarn.factor=4")).rope_scaling == RopeScaling(4.0, plain.max_position)
    both = ("--config.yarn.factor=2", "--config.yarn.original_max_position=128")
    assert flags.model_config(read(monkeypatch, TINY, *both)).rope_scaling == RopeScaling(2.0, 128)
    with pytest.raises(ValueError, match="yarn.factor=0.5 must be 1 or more"):
        read(monkeypatch, TINY, "--config.yarn.factor=0.5")
    with pytest.raises(ValueError, match="yarn.original_max_position=128 has no use without yarn.factor; set yarn.factor too"):
        read(monkeypatch, TINY, both[1])


def test_model_args_change_the_model(monkeypatch):
    args = ["num_layers=2", "tie_embeddings=false", "rope_theta=5e6", "mlp_only_layers=(0,1)", "eos_id=3"]
    config = read(monkeypatch, "--config=experiments/configs/tiny_moe.py", *(f"--config.model_args.{a}" for a in args))
    want = dict(num_layers=2, tie_embeddings=False, rope_theta=5e6, mlp_only_layers=(0, 1), eos_id=3)
    assert flags.model_config(config) == SIZES["tiny-moe"].replace(**want)


def test_a_model_folder_gives_its_config(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SIZES["tiny"].to_hf()))
    config = read(monkeypatch, TINY, f"--config.model={tmp_path}", "--config.model_args.num_layers=3")
    assert flags.model_config(config) == SIZES["tiny"].replace(num_layers=3)


BAD_MODELS = [
    ("model=qwen3-0.5b", "model='qwen3-0.5b' is neither a size nor a folder; did you mean 'qwen3-0.6b'?"),
    ("model=Qwen/Qwen3-8B", "did you mean 'qwen3-8b'?"),
    ("model_args.num_kv_heads=3", "num_kv_heads=3 must divide num_heads=4; use 1, 2, 4"),
    ("model_args.compute_dtype=bfloat16", "MindSpore has no bfloat16 matmul on CPU; use --config.model_args.compute_dtype=float32"),
    ("model_args.compute_dtype=float16", "the CPU ops compute in float32 only; use --config.model_args.compute_dtype=float32"),
    ("model_args.compute_dtype=fp8", "compute_dtype='fp8' is not one of float32, float16, bfloat16"),
    ("model_args.mlp_only_layers=all", "model_args.mlp_only_layers=('all',) must be layer numbers, such as (0,1)"),
]


@pytest.mark.parametrize("arg, message", BAD_MODELS)
def test_a_model_that_cannot_be_built_is_named(monkeypatch, arg, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        flags.model_config(read(monkeypatch, TINY, f"--config.{arg}"))


def test_a_bad_model_folder_is_named(monkeypatch, tmp_path):
    arguments = TINY, f"--config.model={tmp_path}"
    with pytest.raises(FileNotFoundError, match="the folder has no config.json"):
        read(monkeypatch, *arguments)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: broken JSON"):
        read(monkeypatch, *arguments)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type='llama'"):
        read(monkeypatch, *arguments)


def test_a_main_runs_and_its_mistakes_exit_with_status_2_and_one_line():
    good = command(TINY, "--config.train.steps=70")
    assert (good.returncode, good.stdout.strip(), good.stderr) == (0, "70", "")
    for arg in ("--config.train.steps=abc", "--config.train.stepz=5"):
        bad = command(TINY, arg)
        assert bad.returncode == 2 and bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1, bad.stderr
    late = command(TINY, "--tp=2")
    assert late.returncode == 2 and late.stderr.splitlines()[1] == "(--traceback shows where)", late.stderr
    shown = command(TINY, "--tp=2", "--traceback")
    assert shown.returncode == 1 and "in axis_sizes" in shown.stderr


NOT_UTF8 = """
import sys
from absl import flags as absl_flags
from experiments import flags
def main(_):
    raise ValueError(f"--workdir={absl_flags.FLAGS.workdir} \\x1b[31m \\x07is wrong")
flags.run(main, lambda: absl_flags.DEFINE_string("workdir", None, ""))
"""


def test_an_argument_that_is_not_utf8_is_named_and_errors_show_no_control_characters():
    def told(argument):
        return subprocess.run([sys.executable, "-c", NOT_UTF8, argument], capture_output=True, text=True, timeout=60).stderr.splitlines()

    assert told(b"--workdir=runs/\xff") == [
        r"error: '--workdir=runs/\udcff' is not UTF-8; rename the file or folder that it names, and write its new name"
    ]
    assert told("--workdir=é\x1b]0;x\x07")[0] == r"error: --workdir=é\x1b]0;x\x07 \x1b[31m \x07is wrong"


LOGGING = """
import logging, sys
from experiments import flags
def main(_):
    logging.getLogger("matplotlib").info("made a cache")
    logging.getLogger("matplotlib").warning("no font")
flags.run(main)
"""


def test_a_main_shows_warnings_of_libraries_and_not_their_notes():
    quiet, asked = (
        subprocess.run([sys.executable, "-c", LOGGING, *more], capture_output=True, text=True, timeout=60).stderr
        for more in ((), ("--verbosity=0",))
    )
    assert "no font" in quiet and "made a cache" not in quiet and "made a cache" in asked


def test_help_lists_the_layout_flags(tmp_path):
    main = tmp_path / "main.py"
    main.write_text(MAIN)
    path = {**os.environ, "PYTHONPATH": os.getcwd()}
    out = subprocess.run([sys.executable, main, "--help"], capture_output=True, text=True, timeout=60, env=path).stdout
    assert all(f"--{name}" in out.replace("[no]", "") for name in ("config", "workdir", "tp", "seq_parallel", "lowering"))


def test_another_vocabulary_drops_the_token_ids_of_the_released_one():
    config = common.get_config()
    config.model, config.model_args.vocab_size = "qwen3-0.6b", 512
    cfg = flags.model_config(config)
    assert (cfg.vocab_size, cfg.eos_id, cfg.pad_id) == (512, None, None)


MAINS = ["pretrain", "finetune", "prefer", "rl", "launch", "preprocess", "compare"]
PACKAGES = ["generate", "serve", "evaluate", "convert", "sweep", "dryrun", "bench"]


@pytest.mark.extended(but=("pretrain", "serve*"))
@pytest.mark.parametrize("main", [*MAINS, *(f"{name}.__main__" for name in PACKAGES)])
def test_a_main_checks_its_flags_before_it_imports_mindspore(main):
    """The import takes seconds, which a wrong flag need not wait for."""
    code = f"import sys, experiments.{main}; sys.exit('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


WRONG = {
    "generate": ([], ["--hf_dir=a", "--workdir=b", "--prompt=x"], ["--hf_dir=a"], ["--hf_dir=a", "--prompt=x", "--stop_ids=a"]),
    "serve": ([], ["--hf_dir=a", "--port=-1"], ["--hf_dir=a", "--api_key_file=/nothing"]),
    "evaluate": (["--data=a"], ["--hf_dir=a", "--zero=1"], ["--hf_dir=a", "--lowering=shard"]),
    "convert": ([], ["inspekt"], ["verify", "--top=3"]),
    "sweep": ([], ["--workdir=a", "--config=/nothing"]),
    "dryrun": (["--search"], ["--config.train.stepz=3"], ["--config=experiments/configs/tiny.py", "--world_size=2", "--tp=7"]),
    "bench": (["--what=speed"], ["--peer=nobody"], ["--steps=0"]),
}
ANSWERED = """
import runpy, sys
for arguments in {arguments}:
    sys.argv = ["main", *arguments]
    pid = __import__("os").fork()
    if not pid:
        try:
            runpy.run_module("experiments.{main}", run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            print(ended.code, "mindspore" in sys.modules, flush=True)
        __import__("os")._exit(0)
    __import__("os").waitpid(pid, 0)
"""


@pytest.mark.extended(but=("evaluate",))
@pytest.mark.parametrize("main", PACKAGES)
def test_wrong_flags_are_answered_before_mindspore_is_imported(main):
    code = ANSWERED.format(arguments=WRONG[main], main=main)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["2 False"] * len(WRONG[main]), done.stdout + done.stderr
    assert done.stderr.count("error: ") == len(WRONG[main]), done.stderr


def test_a_fresh_model_gets_as_many_ids_as_its_tokenizer_needs(monkeypatch, tmp_path):
    small, large = (train_bpe(["".join(map(chr, range(200, 2000)))] * 3, size) for size in (300, 700))
    for name, tokenizer in (("small", small), ("large", large)):
        tokenizer.save(tmp_path / name)
    assert small.vocab_size < 512 < large.vocab_size
    given = [TINY, f"--config.data.tokenizer={tmp_path}/large"]
    config = read(monkeypatch, *given)
    assert config.model_args.vocab_size == flags.model_config(config).vocab_size == large.vocab_size
    assert read(monkeypatch, *given, "--config.model_args.vocab_size=600").model_args.vocab_size == 600  # an error once the data are read
    for more in (f"--config.data.tokenizer={tmp_path}/small", "--config.data.tokenizer=nowhere"):
        assert read(monkeypatch, TINY, more).model_args.vocab_size is None
