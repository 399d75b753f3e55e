"""experiments.convert: both ways bit for bit, what inspect, diff and verify find, and what bad input and a kill leave."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from experiments.configs import common
from experiments.convert import look, lora
from experiments.convert import weights as convert
from experiments.train import program as train_program
from experiments.train import weights
from experiments.train.run_folder import TOKENIZER
from parallel.checkpoint import store as checkpoint_store
from parallel.checkpoint.arrays import pieces
from parallel.checkpoint.files import step_folder
from parallel.mesh import ONE_DEVICE
from parallel.trees import tree_paths
from qwen3 import hf
from qwen3.tokenizer import Tokenizer, train_bpe
from tests.parallel.checkpoint_pieces import piece_of
from tests.qwen3.hf_folders import GOLDEN, MODELS, ROOT, arrays, contents, edit_tensors

DTYPES = ("float32", "bfloat16", "float16")


def run(command, source, output, dtype=None):
    return list(convert.write(command, str(source), str(output), dtype))


def saved_by_hand(name, folder, dtype):
    cfg, params = hf.load(GOLDEN / name, dtype)
    hf.save(folder, cfg, params)
    return contents(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A golden model with a tokenizer and settings of its own for generation."""
    folder = shutil.copytree(GOLDEN / "dense_tied", tmp_path_factory.mktemp("model") / "with_tokenizer")
    train_bpe(["plain words and long words " * 9], 300).save(folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    return folder


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native") / "dense_tied"
    run("hf-to-native", GOLDEN / "dense_tied", folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder with two checkpoints of a state, layers in a loop; and the states' parameters by step."""
    folder, cfg = tmp_path_factory.mktemp("run"), hf.Reader(GOLDEN / "dense_untied").config
    program, params = train_program.build_program(cfg, common.get_config()), {}
    read = hf.Reader(GOLDEN / "dense_untied").read
    (folder / "checkpoints").mkdir()
    for step in (3, 7):
        state = program.init(lambda path, slices, step=step: read(path, slices) * np.float32(step))
        held = pieces(ONE_DEVICE, program.held(state))
        checkpoint_store.save(step_folder(str(folder), step), iter(held), {"step": step, "model": cfg.to_hf()})
        params[step] = {path: leaf.asnumpy().copy() for path, leaf in tree_paths(program.params(state))}
    return folder, params


@pytest.mark.parametrize("name, dtype", [(name, None) for name in MODELS] + [(n, d) for n in ("moe_mixed", "qwen2_bias") for d in DTYPES])
def test_there_and_back_is_the_same_folder(name, dtype, tmp_path):
    run("hf-to-native", GOLDEN / name, tmp_path / "native", dtype)
    run("native-to-hf", tmp_path / "native", tmp_path / "hf")
    assert contents(tmp_path / "hf") == saved_by_hand(name, tmp_path / "hand", dtype)
    run("hf-to-native", tmp_path / "hf", tmp_path / "again")
    assert look.diff(*(convert.open_weights("input", tmp_path / x) for x in ("native", "again")))[0][0].absolute == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_to_hf_casts(native, dtype, tmp_path):
    run("native-to-hf", native, tmp_path / "hf", dtype)
    assert contents(tmp_path / "hf") == saved_by_hand("dense_tied", tmp_path / "hand", dtype)


def test_arrays_of_many_blocks_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(checkpoint_store, "CHUNK_BYTES", 300)
    run("hf-to-native", GOLDEN / "moe_norm", tmp_path / "native", "bfloat16")
    opened = convert.open_weights("input", tmp_path / "native")
    assert len(opened.blocks("embed")) > 5 and look.verify_native(opened) == []
    run("native-to-hf", tmp_path / "native", tmp_path / "hf")
    assert contents(tmp_path / "hf") == saved_by_hand("moe_norm", tmp_path / "hand", "bfloat16")


@pytest.mark.parametrize("name", ["dense_tied", "dense_untied", "moe_mixed", "qwen2_bias"])
def test_transformers_opens_what_was_converted_to_the_same_logits(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    run("hf-to-native", GOLDEN / name, tmp_path / "native")
    run("native-to-hf", tmp_path / "native", tmp_path / "hf")
    tokens = torch.from_numpy(np.load(GOLDEN / name / "reference.npz")["tokens"])
    with torch.no_grad():
        models = [transformers.AutoModelForCausalLM.from_pretrained(f).eval() for f in (tmp_path / "hf", GOLDEN / name)]
        ours, theirs = (model(tokens).logits.numpy() for model in models)
    np.testing.assert_array_equal(ours, theirs)


def test_the_newest_checkpoint_of_a_run_is_converted_or_the_one_named(trained, tmp_path):
    folder, params = trained
    for source, step in ((folder, 7), (folder / "checkpoints" / "step_000003", 3)):
        lines = run("native-to-hf", source, tmp_path / str(step))
        cfg, found = hf.load(tmp_path / str(step))
        assert cfg == hf.Reader(GOLDEN / "dense_untied").config and f"step {step}" in lines[0]
        for path, value in arrays(found).items():
            np.testing.assert_array_equal(value, params[step][path], err_msg=path)


def test_tokenizer_and_settings_for_generation_are_carried_along(tokenizer, tmp_path):
    lines = run("hf-to-native", tokenizer, tmp_path / "native") + run("native-to-hf", tmp_path / "native", tmp_path / "hf")
    assert sum("tokenizer of" in line for line in lines) == 2
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tokenizer / name).read_bytes()
    ids = Tokenizer.load(tmp_path / "native" / TOKENIZER).encode("plain words")
    assert Tokenizer.load(tmp_path / "hf").encode("plain words") == ids
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")("plain words")["input_ids"] == ids


def test_a_converted_folder_starts_a_run(native):
    config = common.get_config()
    config.init_from = str(native)
    read, text, _ = weights.initial_params(hf.Reader(GOLDEN / "dense_tied").config, config)
    whole = hf.Reader(GOLDEN / "dense_tied")
    for path in whole.paths:
        part = tuple(slice(n // 2, n) for n in whole.shape(path))
        assert read(path, part).tobytes() == whole.read(path, part).tobytes(), path
    assert str(native) in text


def test_inspect_tells_shapes_sizes_and_norms_with_the_state_if_asked(trained, native, monkeypatch):
    folder, params = trained
    monkeypatch.setattr(convert, "BLOCK_BYTES", 1000)
    lines = list(look.inspect(convert.open_weights("input", folder, state=True), norms=True))
    total = sum(w.size for w in params[7].values())
    assert f"qwen3: {total:,} parameters in {3 * len(params[7])} arrays, {3 * 4 * total / 1e3:.2f} kB" in lines[1]
    rows = {line.split()[0]: line.split()[1:] for line in lines[3:]}
    assert len(rows) == 3 * len(params[7]) and rows["m/embed"][-1] == rows["v/final_norm"][-1] == "0"
    for path, w in params[7].items():
        shape, dtype, _, _, norm, largest = rows[path]
        assert shape == "x".join(map(str, w.shape)) and dtype == "float32"
        assert float(norm) == pytest.approx(np.linalg.norm(w.astype(np.float64)), rel=1e-3)
        assert float(largest) == pytest.approx(np.abs(w).max(), rel=1e-3)
    for source, message in (
        (GOLDEN / "moe_mixed", "has no optimizer state; leave --state out"),
        (native, "has no optimizer state; leave --state out"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.open_weights("input", source, state=True)
    quick = list(look.inspect(convert.open_weights("input", GOLDEN / "moe_mixed"), norms=False))
    assert len(quick) == 3 + len(hf.Reader(GOLDEN / "moe_mixed").paths) and "norm" not in quick[2].split()


def test_diff_names_what_differs_and_by_how_much(native, tmp_path):
    cfg, params = hf.load(GOLDEN / "dense_tied")
    changed = {path: value.copy() for path, value in arrays(params).items()}
    changed["embed"][3, 2] += 0.25
    changed["final_norm"][:2] = np.nan, np.inf
    tree = hf.unflatten(hf.param_specs(cfg), list(changed.values()))
    hf.save(tmp_path / "b", cfg, tree)
    a, b, half = (convert.open_weights("input", f) for f in (native, tmp_path / "b", tmp_path / "b"))
    found, other = look.diff(a, b)
    assert [d.name for d in found[:2]] == ["final_norm", "embed"] and not other
    assert found[0].absolute == np.inf and found[0].differing == 2
    assert found[1].absolute == 0.25 and found[1].differing == 1
    assert found[1].relative == pytest.approx(0.25 / np.abs(arrays(params)["embed"]).max())
    assert all(d.absolute == 0 == d.differing for d in found[2:])
    assert look.diff(b, half)[0][0].absolute == 0  # the same infinities and NaNs
    assert look.describe(found, other, 1, None)[1] is False and look.describe(found, other, 1, 1e-3)[1] is True
    hf.save(tmp_path / "half", cfg, params, dtype="bfloat16")
    half = convert.open_weights("input", tmp_path / "half")
    assert 0 < look.diff(a, half)[0][0].relative < 2**-8 and look.diff(a, half, "bfloat16")[0][0].absolute == 0


def test_diff_of_other_models_names_the_arrays(native):
    found, other = look.diff(convert.open_weights("input", native), convert.open_weights("output", GOLDEN / "moe_mixed"))
    assert f"lm_head is only in {GOLDEN / 'moe_mixed'}" in other
    assert any(text.startswith("embed is [101, 40] in ") and "[101, 32] in" in text for text in other)
    lines, failed = look.describe(found, other, 0, 1e9)
    assert failed and lines[0].startswith("differs    ")


@pytest.mark.extended
def test_verify_finds_a_bit_that_flipped_in_a_checkpoint(native, tmp_path):
    folder = shutil.copytree(native, tmp_path / "native")
    assert look.verify_native(convert.open_weights("input", folder)) == []
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    wrong = look.verify_native(convert.open_weights("input", folder))
    assert len(wrong) == 1 and "array params/" in wrong[0] and str(folder) in wrong[0]
    with pytest.raises(ValueError, match="array params/"):
        run("native-to-hf", folder, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    done = subprocess.run([*COMMAND, "verify", f"--input={folder}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "wrong      " in done.stdout and ": 1 error\n" in done.stdout


@pytest.fixture
def shards(tmp_path):
    hf.save(tmp_path / "shards", *hf.load(GOLDEN / "dense_untied"), max_shard_bytes=60_000)
    return tmp_path / "shards"


def sums_of(folder, change=lambda lines: lines):
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}" for p in sorted(folder.iterdir())]
    (folder.parent / "sums").write_text("\n".join(change(lines)) + "\n")
    return folder.parent / "sums"


def test_verify_of_a_folder_checks_index_files_and_sums(shards):
    assert look.verify_hugging_face(shards, None) == [] == look.verify_hugging_face(shards, sums_of(shards))
    first = sorted(shards.glob("*.safetensors"))[0]
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    sums = sums_of(shards)
    first.write_bytes(data)
    (wrong,) = look.verify_hugging_face(shards, sums)
    assert f"{first} has sha256" in wrong and str(sums) in wrong
    first.write_bytes(bytes(data[:-1]) + bytes([data[-1] ^ 1]))
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] += 1
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(first, shards / "other.safetensors")
    wrong = look.verify_hugging_face(shards, None)
    assert len(wrong) == 2 and "gives total_size=" in wrong[0] and "other.safetensors is not used by the model" in wrong[1]


SUMS = {
    "malformed": (lambda lines: ["abc  model"], "line 1: 'abc  model' is no line of sha256sum"),
    "outside": (lambda lines: [*lines, "0" * 64 + "  ../secret"], "leads outside"),
    "empty": (lambda lines: [], "is empty; give one as"),
}


@pytest.mark.parametrize("case", SUMS)
def test_bad_lists_of_sums_are_refused(case, shards):
    with pytest.raises(ValueError, match=SUMS[case][1]):
        look.verify_hugging_face(shards, sums_of(shards, SUMS[case][0]))


def test_files_that_are_listed_and_gone_or_used_and_not_listed_are_wrong(shards):
    (shards / "notes.txt").write_text("x")
    sums = sums_of(shards, lambda lines: [line.replace("  ", " *") for line in lines if "00001-of" not in line])
    (shards / "notes.txt").unlink()
    first, second = look.verify_hugging_face(shards, sums)
    assert "model-00001-of" in first and "is not in --sha256=" in first
    assert "notes.txt, listed in --sha256=" in second and "is missing" in second
    with pytest.raises(ValueError, match="--sha256=absent is not a file"):
        look.verify_hugging_face(shards, "absent")


def _cut(folder):
    os.truncate(folder / "model.safetensors", 1000)
    return folder


def _no_model(folder):
    checkpoint_store.save(str(folder / "bare"), iter([piece_of("params/x", np.ones(3, np.float32))]), {})
    return folder / "bare"


def _other_model(folder):
    cfg = hf.Reader(GOLDEN / "dense_tied").config
    data = [piece_of("params/embed", np.ones((101, 40), np.float32))]
    checkpoint_store.save(str(folder / "less"), iter(data), {"model": cfg.to_hf()})
    return folder / "less"


def _empty_run(folder):
    (folder / "run" / "checkpoints").mkdir(parents=True)
    return folder / "run"


BAD = {  # the input, made from a copy of dense_tied, the command, and the message
    "truncated": (_cut, "hf-to-native", "--input=.*: .*model.safetensors: a header of .* fetch it again"),
    "no folder": (lambda f: f / "absent", "hf-to-native", "--input=.*absent does not exist; give the folder of"),
    "a file": (lambda f: f / "config.json", "native-to-hf", "--input=.*config.json is a file; give the folder of"),
    "nothing": (lambda f: "", "native-to-hf", "--input is missing; give the folder of"),
    "no model": (lambda f: f.parent, "hf-to-native", "--input=.*config.json is missing; give the folder that holds it"),
    "the wrong way": (lambda f: f, "native-to-hf", "is a Hugging Face folder, and native-to-hf takes a checkpoint; use hf-to-native, or"),
    "a run without": (_empty_run, "native-to-hf", "--input=.*run: it has no checkpoint in checkpoints/; give a run that has saved one"),
    "not ours": (_no_model, "native-to-hf", "does not name its model"),
    "another model": (_other_model, "native-to-hf", "missing: params/final_norm|missing: params/"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, tmp_path):
    make, command, message = BAD[case]
    source = make(shutil.copytree(GOLDEN / "dense_tied", tmp_path / "in" / "model"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(command, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["hf-to-native", "native-to-hf"])
def test_an_output_that_exists_is_left_alone(command, native, tmp_path):
    source = native if command == "native-to-hf" else GOLDEN / "dense_tied"
    (tmp_path / "out").mkdir()
    run(command, source, tmp_path / "out")  # empty
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="--output=.*out exists already; give another name, or remove it"):
        run(command, source, tmp_path / "out")
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    with pytest.raises(ValueError, match="--output is missing"):
        run(command, source, "")


def test_a_value_too_large_for_float16_leaves_nothing(tmp_path):
    model = shutil.copytree(GOLDEN / "dense_tied", tmp_path / "model")
    edit_tensors(model, lambda t: t.update({"model.norm.weight": t["model.norm.weight"] * 1e6}))
    run("hf-to-native", model, tmp_path / "native")
    for command, source in (("hf-to-native", model), ("native-to-hf", tmp_path / "native")):
        with pytest.raises(ValueError, match="final_norm has values above 65504"):
            run(command, source, tmp_path / "out", "float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "native"]


COMMAND = [sys.executable, "-m", "experiments.convert"]
KILLED = """
import os, signal, sys
from experiments.convert import weights as convert_weights
from parallel.checkpoint import store as checkpoint_store
from qwen3 import hf
command, source, output = sys.argv[1:]
read, calls = convert_weights._as_numpy, []
def killed(function, at):
    def wrapped(*args):
        calls.append(args)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return wrapped
if command == "native-to-hf":
    convert_weights._as_numpy = killed(convert_weights._as_numpy, 9)
else:
    checkpoint_store._write_manifest = killed(checkpoint_store._write_manifest, 1)
list(convert_weights.write(command, source, output, None))
"""


@pytest.mark.extended
@pytest.mark.parametrize("command", ["hf-to-native", "native-to-hf"])
def test_killed_conversion_leaves_no_output_and_the_next_one_cleans_up(command, native, tmp_path):
    source = native if command == "native-to-hf" else GOLDEN / "dense_tied"
    done = subprocess.run([sys.executable, "-c", KILLED, command, source, tmp_path / "out"], cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.") and list(left.rglob("*"))
    run(command, source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    opened = convert.open_weights("input", tmp_path / "out")
    assert look.diff(opened, convert.open_weights("input", GOLDEN / "dense_tied"))[0][0].absolute == 0


@pytest.mark.slow
def test_the_command_line_prints_one_line_and_fails():
    done = subprocess.run([*COMMAND, "inspect", "a", "--top=3"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "error: --top has no use with inspect; leave it out" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.extended
def test_the_command_line_compares_two_folders(native, tmp_path):
    hf.save(tmp_path / "half", *hf.load(GOLDEN / "dense_tied"), dtype="bfloat16")
    command = [*COMMAND, "diff", native, tmp_path / "half", "--max_diff=1e-6", "--top=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 3 and "24 of 24 arrays differ" in done.stdout, done.stderr


def test_merging_an_adapter_that_is_missing_names_the_folder(tmp_path):
    with pytest.raises(ValueError, match="^--input=.*nowhere is not a folder; give the folder of an adapter in PEFT's format, or of a run"):
        list(lora.merge(str(tmp_path / "nowhere"), str(tmp_path / "merged"), None, None))
