"""Training with --lowering=shard: on CPU it is held to the manual lowering; for Ascend whole runs are simulated, in both lowerings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.configs import common
from experiments.layout.check import check_partitioned
from experiments.train import partitioned_stages
from experiments.train.program import build_program
from parallel.checkpoint.read import Reader
from parallel.sharding import Sharding
from parallel.simulation import dryrun, standin
from parallel.trees import tree_map, tree_paths
from tests.experiments.partitioned_cuts import CASES as CUTS
from tests.experiments.partitioned_cuts import RESULT
from tests.parallel import layouts
from tests.tiny import error

ROOT = Path(__file__).parents[2]
needs_standin = pytest.mark.skipif(dryrun.unavailable() is not None, reason=str(dryrun.unavailable()))
WORLD = 4
CASES = [  # model, options of a run
    ("adapters", dict(micro=2)),  # frozen weights, dropout
    pytest.param("moe", {}, marks=pytest.mark.slow),
    pytest.param("frozen", dict(micro=2), marks=pytest.mark.slow),
    pytest.param("norms around", dict(optim="lion"), marks=pytest.mark.slow),
    pytest.param("dense", dict(optim="sgd"), marks=pytest.mark.slow),
]


def program_of(model, options, lowering):
    cfg, config = layouts.MODELS[model], layouts.run_config(options)
    config.parallel.lowering = lowering
    program = build_program(cfg, config, Sharding(lowering=lowering))
    return cfg, program, program.init(tree_map(lambda w: w.asnumpy(), layouts.parameters(cfg)))


@pytest.mark.extended
@pytest.mark.parametrize("model, options", CASES)
def test_one_process_trains_as_the_manual_lowering_does(model, options):
    runs = {}
    for lowering in ("manual", "shard"):
        cfg, program, state = program_of(model, options, lowering)
        series = []
        for at in range(3):
            state, metrics = program.step(state, layouts.batch_of(cfg, options, at, slice(None)), 1e-2, at)
            series.append((metrics["objective"], metrics["grad_norm"]))
        loss = program.evaluate(state, [layouts.batch_of(cfg, options, 3, slice(None))])
        arrays = {held.names: held.data.asnumpy() for held in program.held(state)}
        runs[lowering] = sorted(metrics), series, loss, arrays
        if lowering == "shard":
            spoiled = layouts.batch_of(cfg, options, 4, slice(None))
            spoiled["loss_weights"] = spoiled["loss_weights"] * np.float32("nan")
            state, metrics = program.step(state, spoiled, 1e-2, 4)
            assert not np.isfinite(metrics["grad_norm"])
            for held in program.held(state):  # an update that is not finite changes nothing
                np.testing.assert_array_equal(held.data.asnumpy(), arrays[held.names], err_msg=str(held.names))
    manual, shard = runs["manual"], runs["shard"]
    assert manual[0] == shard[0] and list(manual[3]) == list(shard[3])
    assert error(np.array(manual[1]), np.array(shard[1])) <= 1e-6
    assert shard[2] == pytest.approx(manual[2], rel=1e-6)
    for names, want in manual[3].items():
        assert error(want, shard[3][names]) <= 1e-5, names


def test_a_state_is_restored_into_the_other_lowering():
    options = dict(micro=2)
    _, program, state = program_of("adapters", options, "shard")
    saved = {name: held.data.asnumpy() + 1 for held in program.held(state) for name in held.names}
    frozen = dict(tree_paths(program.params(state)))

    def read(name, slices):
        return saved[name][slices] if name in saved else frozen[name.partition("/")[2]].asnumpy()[slices]

    for lowering in ("manual", "shard"):
        _, program, _ = program_of("adapters", options, lowering)
        for held in program.held(program.restore(read, 0.5)):
            np.testing.assert_array_equal(held.data.asnumpy(), saved[held.names[0]], err_msg=held.names[0])


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("parallel.cp", 2, "no rule for a ring"),
        ("optim.skip_spikes", 3.0, "optim.skip_spikes=3.0"),
        ("optim.name", "muon", "needs whole matrices"),
        ("train.layer_loop", "scan", "its layers are unrolled"),
        ("train.monitor_every", 5, "monitors read gradients"),
    ],
)
def test_what_the_partitioner_cannot_train_is_refused_by_name(key, value, said):
    config = common.get_config()
    config.parallel.lowering = "shard"
    section, name = key.split(".")
    config[section][name] = value
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        check_partitioned(config, layouts.MODELS["dense"])


@pytest.mark.parametrize(
    "model, change, parallel, said",
    [
        ("moe", {}, {}, "a stage of MindSpore's sends one tensor"),
        ("dense", {"tie_embeddings": True}, {}, "model_args.tie_embeddings=false"),
        ("dense", {"tie_embeddings": False}, {"zero": 1}, "parallel.zero=1: MindSpore's compiler fails; use --zero=0 or 3"),
        ("dense", {"tie_embeddings": False}, {"pp_schedule": "gpipe"}, "MindSpore's is 1f1b"),
    ],
)
def test_what_mindspores_pipeline_cannot_train_is_refused_by_name(model, change, parallel, said):
    config = common.get_config()
    config.parallel.lowering, config.parallel.pp = "shard", 2
    config.parallel.update(parallel)
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        check_partitioned(config, layouts.MODELS[model].replace(**change))


@pytest.mark.parametrize("at", range(2))
def test_a_micro_batch_of_a_pipeline_has_its_share_of_the_loss_weight(at):
    weights = np.array([[1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 0, 0]], np.float32)
    batch = partitioned_stages.with_shares({"tokens": np.ones((4, 3), np.int32), "loss_weights": weights}, 2)
    assert batch["shares"].shape == (4, 3)
    assert batch["shares"][2 * at : 2 * at + 2].sum() == pytest.approx([5 / 6, 1 / 6][at])


def run_main(*words, env=None):
    """Runs `python -m` with these words; returns its output."""
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def small(config, text):
    flags = [f"--config={ROOT}/experiments/configs/{config}.py", "--config.train.steps=2", "--config.train.batch_size=4"]
    flags += ["--config.train.seq_len=64", "--config.train.eval_rows=4", "--config.train.sample_tokens=0", f"--config.data.path={text}"]
    return [*flags, "--config.model_args.num_layers=1", "--config.model_args.vocab_size=515", "--config.checkpoint.every=1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((Path(os.__file__).parent / "argparse.py").read_text() * 2)
    return path


DEEP = "--config.model_args.num_layers=2", "--config.model_args.tie_embeddings=false"
RUNS = {  # name -> (config, flags); vocabulary 515, so that its shards are padded
    "manual, dp2 tp2": ("tiny", ("--dp=2", "--tp=2")),
    "manual, pp2 tp2": ("tiny", ("--pp=2", "--tp=2", "--micro_batches=2", "--config.model_args.num_layers=2")),
    "manual, dp2 tp2 ep2, ZeRO 1": ("tiny_moe", ("--dp=2", "--tp=2", "--ep=2", "--zero=1")),
    "shard, dp2 tp2, bfloat16": ("tiny", ("--lowering=shard", "--dp=2", "--tp=2", "--config.model_args.compute_dtype=bfloat16")),
    "shard, dp2 tp2, ZeRO 1, micro-batches": ("tiny", ("--lowering=shard", "--dp=2", "--tp=2", "--zero=1", "--micro_batches=2")),
    "shard, dp2 tp2, ZeRO 3, sequence parallel": ("tiny", ("--lowering=shard", "--dp=2", "--tp=2", "--zero=3", "--seq_parallel")),
    "shard, pp2 tp2, sequence parallel": ("tiny", ("--lowering=shard", "--pp=2", "--tp=2", "--seq_parallel", "--micro_batches=2", *DEEP)),
    "shard, dp2 tp2 ep2": ("tiny_moe", ("--lowering=shard", "--dp=2", "--tp=2", "--ep=2")),
}


@needs_standin
@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_from_flags_to_saved_checkpoints_in_simulation(tmp_path, text, name):
    """All ranks at once, which exchange files and no values. Then one CPU process continues from the checkpoint."""
    config, layout = RUNS[name]
    flags = small(config, text)
    launch = "experiments.launch", "--simulate", f"--nproc={WORLD}", f"--log_dir={tmp_path}/logs", "--"
    done = run_main(*launch, "experiments.pretrain", *flags, *layout, f"--workdir={tmp_path}/run")
    assert "simulated  NPUs" in done and "which transformers opens" in done
    assert json.loads((tmp_path / "run" / "finished.json").read_text())["step"] == 2
    names = Reader(tmp_path / "run" / "checkpoints" / "step_000002").names
    assert {"params/embed", "m/embed", "v/layers.0.attention.wq"} <= set(names)
    one = [flag.replace("steps=2", "steps=3") for flag in (*flags, *layout) if flag.startswith("--config") and "compute" not in flag]
    one += ["--partial"] if "bfloat16" in name else []  # CPU computes in float32
    run_main("experiments.pretrain", *one, f"--resume_from={tmp_path}/run", f"--workdir={tmp_path}/one")
    assert json.loads((tmp_path / "one" / "finished.json").read_text())["step"] == 3


@needs_standin
@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("name", CUTS)
def test_mindspore_cuts_each_parameter_as_the_layout_says(name, rank):
    """Checkpoints and Hugging Face folders are written from these shards, by the layout's offsets."""
    env = {**os.environ, **standin.environment(WORLD, rank), "GLOG_v": "3", "OMP_NUM_THREADS": "1"}
    found = json.loads(run_main("tests.experiments.partitioned_cuts", name, env=env).partition(RESULT)[2])
    assert found["cut"] >= 10 and not found["wrong"]
