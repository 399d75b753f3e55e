"""The benchmarks at small sizes: what they print is there, contestants do the same work, and the ops' table fits the ops."""

import importlib
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest

from experiments.bench import cases as bench_cases
from experiments.bench import ops as bench_ops
from experiments.bench import peers as bench_peers
from experiments.bench import turns as bench_turns
from experiments.bench.decode import bench_decode
from experiments.bench.int8 import bench_int8
from experiments.bench.monitors import bench_monitors
from experiments.bench.serve import PARTS, bench_serve, load_figures, requests
from experiments.bench.train import LOSS_TOLERANCE, MODEL, bench_train, packed_batch
from ops import build, registry
from qwen3.config import Qwen3Config

SMALL = dict(MODEL, vocab_size=128, hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=64)
SMALL_MOE = dict(SMALL, model_type="qwen3_moe", num_experts=4, experts_per_token=2, moe_ffn_size=32)
SIZES = {"dense": SMALL, "moe": SMALL_MOE}
PEER_PYTHON = os.environ.get("PEER_PYTHON")  # an interpreter with the peers that this one does not have
FIGURES = ("step_time_s", "tokens_per_s", "mfu", "peak_mem_gib", "compile_time_s", "loss_after_10_steps")
CONTESTANT = """
import os, sys, time
sys.path.insert(0, {root!r})
from experiments.bench.turns import serve

def job(job):
    print("to standard error")
    if job["fails"]:
        raise KeyError("the reason")
    return {{"seen": job}}, lambda: {{"step_time_s": job["step_time_s"], "at": time.monotonic()}}

serve({{"test": job}})
"""


def options(**changes):
    defaults = dict(moe=False, steps=1, layer_loop="auto", kernels="auto", check=False, peer=[], peer_python=PEER_PYTHON, batch=[2], ops=[])
    return SimpleNamespace(**{**defaults, **changes})


def contestant(name, step_time_s, fails=False):
    command = [sys.executable, "-c", CONTESTANT.format(root=str(bench_peers.ROOT))]
    return bench_peers.Contestant(name, command, {"step_time_s": step_time_s}, {"what": "test", "fails": fails, "folder": ""})


def need(peer):
    try:
        bench_peers.command(peer, PEER_PYTHON)
    except ValueError as error:
        pytest.skip(str(error))


def state(process):
    with open(f"/proc/{process.pid}/stat", encoding="utf-8") as file:
        return file.read().rsplit(")", 1)[1].split()[0]


def wait_until_stopped(process):
    until = time.monotonic() + 5
    while state(process) != "T" and time.monotonic() < until:
        time.sleep(0.01)
    return state(process) == "T"


def test_a_contestant_is_stopped_but_for_its_turns():
    with contestant("one", 0.5) as one:
        assert one.facts["seen"]["step_time_s"] == 0.5
        assert wait_until_stopped(one.process)
        one.turn(3)
        assert wait_until_stopped(one.process)
        assert [len(steps) for steps in one.rounds] == [3] and one.rounds[0][0]["step_time_s"] == 0.5
        assert 0 < one.peak_mem_gib < 1 and 0 <= one.others[0] <= 1
    assert one.process.returncode == 0


def test_a_stopped_contestant_ends_with_a_benchmark_that_is_killed():
    lines = ["import os, signal", "from tests.experiments.test_bench import contestant", "one = contestant('one', 0.5)"]
    lines += ["print(one.process.pid, flush=True)", "os.kill(os.getpid(), signal.SIGKILL)"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=bench_peers.ROOT)
    pid, until = int(done.stdout), time.monotonic() + 5
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < until:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{pid}")


def test_a_contestant_that_fails_says_why():
    with pytest.raises(RuntimeError, match="(?s)broken ended early.*the reason"):
        contestant("broken", 0.5, fails=True)


def test_the_ratio_is_the_median_over_rounds():
    def steps(*times):
        return [{"s": t} for t in times]

    ours, other = [steps(1, 1, 5), steps(2, 2), steps(4)], [steps(2), steps(8), steps(4)]
    assert bench_peers.ratio(ours, other, lambda step: step["s"]) == 2.0
    assert bench_peers.median(ours, lambda step: step["s"]) == 2.0


def test_a_peer_that_is_not_installed_is_an_error_that_names_the_fix(monkeypatch):
    monkeypatch.setitem(bench_peers.PEERS, "jax", ("no_such_package", "jax_qwen3.py", {}))
    with pytest.raises(ValueError, match="--peer=jax needs no_such_package.*--peer_python"):
        bench_peers.command("jax", None)


def test_peak_memory_is_of_this_process_alone():
    """getrusage in a new process starts from the memory of the one that started it."""
    ballast = np.ones(1 << 26, np.float32)  # 256 MB
    code = "from experiments.bench.turns import peak_mem_gib; print(peak_mem_gib())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=bench_peers.ROOT, check=True).stdout
    assert ballast[0] and float(out) < 0.2 < bench_turns.peak_mem_gib()


def test_the_batch_has_two_documents_a_row_and_no_loss_between_them():
    batch = packed_batch(61, 3, 8)
    assert batch["segment_ids"].tolist() == [[1] * 4 + [2] * 4] * 3
    assert batch["positions"].tolist() == [[0, 1, 2, 3] * 2] * 3
    assert batch["loss_weights"].tolist() == [[1, 1, 1, 0] * 2] * 3
    assert (batch["targets"][:, :-1] == batch["tokens"][:, 1:]).all() and batch["tokens"].max() < 61


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_training_with_default_and_reference_ops_gives_one_loss(name):
    found = bench_train(options(check=True), SIZES[name], 2, 16)
    assert all(np.isfinite(found[key]) and np.isfinite(found[f"reference_{key}"]) for key in FIGURES)
    assert found["loss_difference"] <= LOSS_TOLERANCE and found["over_reference"] > 0
    assert found["tokens_per_s"] == pytest.approx(32 / found["step_time_s"])
    assert found["model"] == Qwen3Config(**SIZES[name]).model_type
    json.dumps(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_only_a_watched_step_writes_and_none_trains_otherwise(name):
    found = bench_monitors(options(), SIZES[name], 2, 16)
    assert found["loss_difference"] == 0 and found["off_values"] == found["between_values"] == 0
    assert found["watched_values"] > 5 and found["between_over_off"] > 0 and found["watched_over_off"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("peer", bench_peers.PEERS)
@pytest.mark.parametrize("name", SIZES)
def test_peers_train_to_the_same_loss(name, peer):
    need(peer)
    found = bench_train(options(peer=[peer]), SIZES[name], 2, 16)
    assert found["loss_difference"] <= LOSS_TOLERANCE
    assert all(np.isfinite(found[f"{peer}_{key}"]) for key in FIGURES) and found[f"over_{peer}"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_transformers_generates_the_same_tokens(name):
    need("transformers")
    found = bench_decode(options(peer=["transformers"]), SIZES[name], 8, 8)
    assert found["transformers_same_ids"] == found["engine_same_ids"] == 1.0
    for part in ("", "prefill_", "total_"):
        assert found[f"{part}over_transformers"] > 0 and found[f"engine_{part}over_transformers"] > 0


@pytest.mark.slow
def test_decoding_with_default_and_reference_ops_gives_the_same_tokens():
    found = bench_decode(options(check=True), SMALL, 8, 8)
    assert found["reference_same_ids"] == found["engine_same_ids"] == 1.0
    assert found["engine_requests"] == 400 and found["engine_grown_mib"] < 20  # of some 400
    assert all(found[key] > 0 for key in ("decode_tokens_per_s", "tokens_per_s", "prefill_tokens_per_s", "prefill_s", "peak_mem_gib"))
    assert found["engine_prefill_tokens_per_s"] > 0 and "engine_decode_tokens_per_s" in found  # of so few tokens a difference of two times


def test_peers_that_do_not_generate_are_refused():
    with pytest.raises(ValueError, match="--peer=jax does not generate"):
        bench_decode(options(peer=["jax"]))
    with pytest.raises(ValueError, match="--peer=jax does not generate"):
        bench_serve(options(peer=["jax"]))


WORK = {"prompt": 12, "prompts": 3, "lengths": (2, 9), "answers": (1, 5)}
WORK |= {"written": 20, "sharing": 4, "shared": 20, "suffix": 3, "replies": 2, "arrivals": 6, "texts": 2, "beginning": 8}


def test_the_requests_of_the_load_arrive_at_their_rate_and_half_of_them_begin_alike():
    work = {**WORK, "arrivals": 400}
    found = requests(61, work, 5.0)
    assert found == requests(61, work, 5.0)
    at = np.array([each["at"] for each in found["load"]])
    assert (np.diff(at) > 0).all() and at[-1] == pytest.approx(400 / 5, rel=0.15)
    assert len({tuple(each["prompt"][:8]) for each in found["load"][1::2]}) == 2
    assert {len(each["prompt"]) for each in found["load"][1::2]} == set(range(10, 18))
    assert {len(each["prompt"]) for each in found["load"][::2]} == set(range(2, 10))
    assert {each["new_tokens"] for each in found["load"]} == set(range(1, 6)) and len(found["one"]) == 12


def test_answers_in_time_are_counted_by_their_first_token_and_those_after_it():
    load = [{"at": 1.0, "new_tokens": 3}, {"at": 2.0, "new_tokens": 1}, {"at": 3.0, "new_tokens": 5}]
    rounds = [[{"first": [1.5, 5.0, 3.5], "last": [1.9, 5.0, 5.5]}]]
    found = load_figures(rounds, load, 1.0, 0.25)
    assert found["load_first_s"] == 0.5 and found["load_token_s"] == pytest.approx(0.2) and found["load_tokens_per_s"] == 2.0
    assert found["load_in_time"] == pytest.approx(1 / 3) and found["load_goodput_per_s"] == pytest.approx(1 / 4.5)


def test_a_clock_of_cpu_time_counts_what_is_waited():
    clock = bench_turns.Clock("cpu_s")
    clock.wait_until(100.0)
    time.sleep(0.2)
    assert 100.0 <= clock.now() < 100.1
    clock.wait_until(50.0)
    assert 100.0 <= clock.now() < 100.1


@pytest.mark.slow
def test_serving_gives_figures_of_every_part_and_the_tokens_of_transformers():
    given = options(part=list(PARTS), shape="tiny", threads=1, rate=50.0, page=8, peer=["transformers"])
    try:
        bench_peers.command("transformers", PEER_PYTHON)
    except ValueError:
        given.peer = []
    found = bench_serve(given, {**SMALL, "vocab_size": 300}, WORK)
    assert found["reuse_read"] + found["reuse_reused"] == 4 * 23 and found["reuse_reused"] >= 3 * 16
    assert all(
        found[f"{name}_cpu_s"] > 0 < found[f"{name}_s"]
        for name in ("prefill_one", "prefill_many", "batch", "reuse", "reuse_warm", "reuse_suffixes")
    )
    assert 0 <= found["load_in_time"] <= 1 and found["load_first_p90_s"] >= found["load_first_s"] > 0 and found["reuse_over_warm"] > 0
    assert found["guess_edit_1_per_step"] > found["guess_random_1_per_step"] >= 1 and found["plain_over_guess_edit_4"] > 0
    if given.peer:
        assert found["transformers_same_ids"] == 1.0 and found["transformers_load_first_s"] > 0
        assert all(found[f"{name}_over_transformers"] > 0 for name in ("prefill_one", "prefill_many", "prefill_grouped", "batch"))
    json.dumps(found)


def test_every_op_has_a_case_and_every_case_its_factories():
    table = bench_cases.cases()
    assert {case.op for case in table.values()} == set(registry.OPS)
    kernel_alone = [name for name, case in table.items() if not hasattr(_module(case), _factory("reference", case))]
    assert kernel_alone == ["attention_8192"]  # whose reference has no room
    for case in table.values():
        assert hasattr(_module(case), _factory("cpu", case))
        assert (case.flop[1] is None) == (not case.inputs("cpu")[0]) or case.alone


def _module(case):
    return importlib.import_module(f"ops.{case.op}")


def _factory(implementation, case):
    return "_".join(filter(None, (implementation, case.function)))


def test_an_op_is_measured_with_its_share_of_the_peaks(monkeypatch):
    monkeypatch.setattr(bench_ops, "COPIED", 1 << 20)
    found = bench_ops.bench_ops(options(ops=["swiglu"], kernels="reference"))
    elements = 2048 * 768
    assert found["swiglu.forward.bytes"] == 3 * 4 * elements and found["swiglu.forward_backward.bytes"] == 8 * 4 * elements
    assert found["swiglu.forward.flop"] == 5 * elements
    seconds = found["swiglu.forward.reference_s"]
    assert found["swiglu.forward.reference_of_copy"] == pytest.approx(12 * elements / seconds / found["copy_gb_per_s"] / 1e9)
    assert not any(key.startswith("rope") or "cpu" in key.split(".")[-1] for key in found)


def test_the_scalar_of_an_op_passes_the_weights_back_as_its_gradient():
    rng = np.random.default_rng(0)
    x, y, dx, dy = (ms.Tensor(rng.normal(0, 1, (3, 5)).astype(np.float32)) for _ in range(4))

    def two(x, y):
        return x * y, x + 2 * y

    scalar = bench_ops._seeded(two, True, (0, 1))
    value, (to_x, to_y) = bench_ops.value_and_grad(scalar, compiled=True)((x, y), (), (dx, dy))
    x, y, dx, dy = (a.asnumpy() for a in (x, y, dx, dy))
    np.testing.assert_allclose(value.asnumpy(), (x * y)[0, 0] + (x + 2 * y)[0, 0], rtol=1e-6)
    np.testing.assert_allclose(to_x.asnumpy(), dx * y + dy, rtol=1e-6)
    np.testing.assert_allclose(to_y.asnumpy(), dx * x + 2 * dy, rtol=1e-6)


@pytest.mark.skipif(build.compiler() is None, reason="no g++")
def test_an_op_in_place_is_measured_too(monkeypatch):
    monkeypatch.setattr(bench_ops, "COPIED", 1 << 20)
    found = bench_ops.bench_ops(options(ops=["cache_write", "sampling_greedy"]))
    assert found["cache_write.forward.reference_over_cpu"] > 0 and found["sampling_greedy.forward.cpu_s"] > 0
    assert "cache_write.forward_backward.cpu_s" not in found


def test_an_unknown_case_is_refused():
    with pytest.raises(ValueError, match="--ops=nothing is not a case; use rms_norm"):
        bench_ops.bench_ops(options(ops=["nothing"]))


def test_weights_in_8_bits_take_turns_with_floats():
    figures = bench_int8(SimpleNamespace(batch=[2], steps=1, layers=1), Qwen3Config(**SMALL))
    assert figures["layers"] == 1 and figures["float_over_int8"] > 0
    assert figures["float_cpu_s"] > 0 and figures["int8_cpu_s"] > 0 and figures["int8_gib"] < figures["float_gib"] / 2
