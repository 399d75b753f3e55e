"""The dry run: steps of small models compiled for a rank of a simulated cluster, and what is reported of them.

The default suite compiles one, of one layer.
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import flags as command_line
from experiments.dryrun import jobs as dryrun_jobs
from experiments.dryrun import plot as dryrun_plot
from experiments.dryrun import report as dryrun_report
from experiments.dryrun import shard as dryrun_shard
from experiments.dryrun.search import MACHINE, candidates, estimate, search
from experiments.layout import traffic as layout_traffic
from parallel.mesh import WORLD
from parallel.pipeline.schedule import stage_ranges
from parallel.placement import nbytes, place
from parallel.sharding import Sharding
from parallel.simulation import dryrun
from parallel.simulation.timeline import Machine, Task, flops, read_tasks, timeline
from parallel.trees import tree_leaves
from qwen3.config import SIZES
from qwen3.model import param_specs
from qwen3.stages import stage_specs
from tests.experiments.test_layouts import read

ROOT = Path(__file__).parent.parent.parent
GIB = 2**30
needs_standin = pytest.mark.skipif(dryrun.unavailable() is not None, reason=str(dryrun.unavailable()))

MODEL = (
    "--config=experiments/configs/tiny.py",
    *(f"--config.model_args.{name}={value}" for name, value in dict(vocab_size=61, hidden_size=32, num_layers=2, head_dim=16).items()),
    *(f"--config.model_args.{name}={value}" for name, value in dict(num_heads=4, num_kv_heads=2, ffn_size=48).items()),
    "--config.model_args.compute_dtype=bfloat16",
    "--config.train.batch_size=4",
    "--config.train.seq_len=16",
    "--config.data.vocab_size=61",
)
MOE = (
    "--config.model_args.model_type=qwen3_moe",
    *(f"--config.model_args.{name}={value}" for name, value in dict(num_experts=6, experts_per_token=2, moe_ffn_size=16).items()),
    "--config.model_args.moe_block_size=4",
)
DEEP, FULL = ("--config.model_args.num_layers=4", "--config.model_args.tie_embeddings=true"), ("--config.train.recompute=full",)
INTERLEAVED = ("--config.parallel.pp_schedule=interleaved", "--config.parallel.virtual_stages=2")
WIDE = ("--config.model_args.hidden_size=256", "--config.model_args.ffn_size=512", "--config.train.seq_len=256")
ONE_LAYER = "--config.model_args.num_layers=1"
LAYOUT = ("--dp=2", "--tp=2", "--zero=2", "--seq_parallel")
PLANTED = ("full_size_parameter", "unsharded_gradient", "missing_all_reduce")


def compiled(config, rank=1, depths=(), step="train", planted=(), hbm_gb=58.0):
    module = "tests.experiments.dryrun_planted" if planted else dryrun_jobs.MODULE
    return dryrun_jobs.run(config, step, [rank], list(depths), hbm_gb, module=module, variables={"DRYRUN_PLANTED": " ".join(planted)})[0]


def bytes_of_specs(config, rank=1):
    """{kind: bytes} of a rank, from the specs alone."""
    cfg, parallel = command_line.model_config(config, "any"), config.parallel
    mesh = dryrun_jobs.layout.mesh(cfg, parallel, rank)
    sharding = Sharding(mesh, seq_parallel=parallel.seq_parallel, zero=parallel.zero)
    if mesh.pp > 1:
        layers = stage_ranges(cfg.num_layers, mesh.pp, parallel.virtual_stages)
        mine = range(mesh.index(("pp",)), len(layers), mesh.pp)
        specs = [stage_specs(cfg, layers[s], s == 0, s == len(layers) - 1) for s in mine]
    else:
        specs = param_specs(cfg)
    placed = tree_leaves(place(sharding, specs))
    stored, state = sum(nbytes(mesh, p, "stored") for p in placed), sum(nbytes(mesh, p, "state") for p in placed if p.spec.trains)
    return {"params_bytes": stored, "gradients_bytes": state, "optimizer_bytes": 2 * state}


@pytest.fixture(scope="module")
def fast():
    """The report of the compile of the default suite."""
    return compiled(read(*MODEL, ONE_LAYER, *LAYOUT))


@pytest.fixture(scope="module")
def spoiled():
    """The report of one with three mistakes planted."""
    return compiled(read(*MODEL, *LAYOUT), planted=PLANTED)


@pytest.mark.extended
@needs_standin
def test_a_rank_has_the_bytes_and_the_collectives_that_the_layout_says(fast):
    report, specs = fast, bytes_of_specs(read(*MODEL, ONE_LAYER, *LAYOUT))
    assert {key: report["figures"][key] for key in specs} == specs
    assert report["problems"] == [] and report["fits"]
    kinds = {(kind, axes) for kind, axes, *_ in report["figures"]["collectives"]}
    assert {("ReduceScatter", "tp"), ("AllGather", "tp"), ("ReduceScatter", "dp"), ("AllReduce", "dp+tp")} <= kinds
    assert report["figures"]["local_shapes"]["layers.0.mlp.w_gate"] == [32, 24]
    assert (
        report["figures"]["peak_bytes"] > sum(specs.values())
        and max(live for _, live in report["timeline"]) == report["figures"]["peak_bytes"]
    )
    assert any(place.startswith(("ops/", "layers/", "parallel/")) for *_, place in report["figures"]["largest"])
    step, compute, sent, exposed = (report["figures"][name] for name in dryrun_report.TIMES)
    rows = [row for row in report["figures"]["collectives"] if row[3]]
    assert all(waits >= 0 and took > 0 for *_, took, waits in rows)
    assert sum(row[5] for row in rows) == pytest.approx(sent) and sum(row[6] for row in rows) == pytest.approx(exposed) and exposed > 0
    assert max(compute, sent) < step <= compute + sent and step == pytest.approx(compute + exposed, rel=0.05)


@pytest.mark.extended
@needs_standin
@pytest.mark.slow
def test_what_is_planted_is_found(spoiled):
    assert "WRONG at 2 layers: params: layers.0.mlp.w_gate" in "\n".join(dryrun_report.text(spoiled))
    found = "\n".join(spoiled["problems"])
    assert "params: layers.0.mlp.w_gate is 32 x 48 in the compiled step, but 32 x 24 in the layout" in found
    assert "optimizer: m.layers.1.mlp.w_down is 24 x 32 in the compiled step, but 12 x 32 in the layout" in found
    assert "ReduceScatter" in found and "over ranks 1 3: 0 in a step, but 1 by the signatures" in found  # the gradients'
    assert "AllReduce of 1 elements of 4 bytes over ranks 1 3: 0 in a step, but 2 by the signatures" in found  # the loss'


@pytest.mark.extended
@needs_standin
def test_a_report_reads_as_text_and_as_a_picture(fast, tmp_path):
    text = "\n".join(dryrun_report.text(fast))
    assert "fits: peak" in text and "every shard and every collective is as the layout says" in text and "ReduceScatter" in text
    dryrun_plot.plot([fast], 58.0, tmp_path / "memory.svg")
    assert "<svg" in (tmp_path / "memory.svg").read_text()


@pytest.mark.extended
@needs_standin
@pytest.mark.slow
@pytest.mark.parametrize("planted", PLANTED)
def test_each_mistake_alone_is_found(planted):
    assert compiled(read(*MODEL, *LAYOUT), planted=(planted,))["problems"]


@needs_standin
@pytest.mark.slow
@pytest.mark.parametrize(
    "model, layout",
    [
        ((), ("--dp=1",)),
        ((), ("--dp=2", "--tp=2")),
        ((), ("--dp=2", "--tp=2", "--zero=1", "--micro_batches=2")),
        ((), ("--dp=2", "--tp=2", "--zero=3", "--seq_parallel", "--config.model_args.tie_embeddings=true")),
        ((), ("--dp=1", "--tp=4", "--seq_parallel")),  # kv heads twice
        (MOE, ("--dp=2", "--tp=2", "--ep=2", "--seq_parallel")),
        (DEEP, ("--pp=2", "--tp=2", "--seq_parallel", "--micro_batches=4")),
        (DEEP, ("--pp=2", "--dp=2", "--zero=2", "--micro_batches=2", *INTERLEAVED)),
        ((*DEEP, *MOE), ("--pp=2", "--tp=2", "--ep=2", "--seq_parallel", "--micro_batches=2")),
        (("--config.lora.rank=4",), ("--dp=2", "--tp=2", "--seq_parallel", "--micro_batches=2")),
        (("--config.train.recompute=attention",), ("--dp=2", "--tp=2", "--seq_parallel")),
        ((), ("--cp=2", "--tp=2")),
    ],
)
def test_small_models_have_the_bytes_of_their_specs(model, layout):
    config = read(*MODEL, *model, *layout)
    rank = min(1, math.prod(config.parallel[axis] for axis in WORLD) - 1)
    report, specs = compiled(config, rank), bytes_of_specs(config, rank)
    assert {key: report["figures"][key] for key in specs} == specs and report["problems"] == []


@needs_standin
@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, layers, depths",
    [(LAYOUT, 12, (2, 6)), (("--pp=2", "--micro_batches=4", *FULL), 12, (1, 3))],
)
def test_two_depths_foretell_a_third(layout, layers, depths):
    """To 3 %. The widths are such that a layer, and not a rounding, is what grows."""
    deep = read(*MODEL, *WIDE, *layout, f"--config.model_args.num_layers={layers}")
    foretold, whole = compiled(deep, depths=depths)["figures"], compiled(deep)["figures"]
    for key in ("params_bytes", "gradients_bytes", "optimizer_bytes"):
        assert foretold[key] == whole[key]
    assert foretold["peak_bytes"] == pytest.approx(whole["peak_bytes"], rel=0.03)
    sent = [sum(row[4] for row in figures["collectives"]) for figures in (foretold, whole)]
    assert sent[0] == pytest.approx(sent[1], rel=0.03)


TWO_ROWS = ("--config.train.batch_size=2", "--micro_batches=2")
RECOMMENDED = [  # config and options, pipeline stages of one layer, rank
    (("qwen3_32b",), 4, 12),
    (("qwen3_30b_a3b",), 4, 12),
    (("qwen2p5_7b", "--config.train.batch_size=16", "--micro_batches=8"), 4, 6),
    (("qwen3_14b", *TWO_ROWS), 1, 0),
    (("finetune_qwen3_8b_lora", "--config.model=qwen3-14b", *TWO_ROWS), 1, 0),
]


@needs_standin
@pytest.mark.slow
@pytest.mark.parametrize("options, stages, rank", RECOMMENDED)
def test_recommended_layouts_at_small_depth(options, stages, rank):
    """Their own widths, and the layouts that their configs have by default. The formula of the search is near the compiled peak."""
    name, *more = options
    config = read(f"--config=experiments/configs/{name}.py", f"--config.model_args.num_layers={stages}", *more)
    report = compiled(config, rank=rank)
    assert report["problems"] == [] and report["fits"]
    assert estimate(config)[0]["peak"] == pytest.approx(report["figures"]["peak_bytes"], rel=0.15)


@needs_standin
@pytest.mark.slow
def test_zero_1_takes_less_by_what_it_splits():
    """Half of the moments of 2 ranks, and no second copy of the parameters that it gathers."""
    config = [read(*MODEL, *WIDE, "--dp=2", f"--zero={zero}", "--config.model_args.num_layers=4") for zero in (0, 1)]
    whole, split = (compiled(each, rank=0)["figures"] for each in config)
    saved = whole["optimizer_bytes"] - split["optimizer_bytes"]
    assert saved > 0.4 * whole["optimizer_bytes"]
    assert whole["peak_bytes"] - split["peak_bytes"] > 0.8 * saved


@needs_standin
@pytest.mark.slow
def test_generation_compiles():
    report = compiled(read(*MODEL), rank=0, step="generate")
    figures = report["figures"]
    assert report["problems"] == [] and figures["cache_bytes"] == 2 * 2 * 4 * 64 * 2 * 16 * 2
    # the weights are there once, though a graph for the prompt and one for a token take them
    given = {what: size for size, _, what in figures["largest"]}[dryrun_report.NAMES["input"]]
    assert figures["params_bytes"] + figures["cache_bytes"] <= given < 2 * figures["params_bytes"] + figures["cache_bytes"]


@needs_standin
@pytest.mark.slow
@pytest.mark.parametrize(
    "model, layout", [((), ("--dp=2", "--tp=2", "--seq_parallel")), (MOE, ("--dp=2", "--tp=2", "--ep=2", "--seq_parallel"))]
)
def test_mindspore_partitions_as_the_signatures_say(model, layout):
    """The same local shapes in both lowerings, and every collective foretold; what they send differs in sums alone."""
    config = read(*MODEL, *model, *layout)
    manual, shard = (compiled(dryrun_jobs.lowered(config, lowering), rank=0) for lowering in ("manual", "shard"))
    assert manual["problems"] == shard["problems"] == []
    assert manual["figures"]["local_shapes"] == shard["figures"]["local_shapes"]
    rest = [[row[:5] for row in report["figures"]["collectives"] if row[0] != "AllReduce"] for report in (manual, shard)]
    assert rest[0] == rest[1] != []
    text = "\n".join(dryrun_report.beside(manual, shard))
    assert "the local shapes of all" in text and "peak with fragments" in text


VOCABULARY = ("--config.model_args.vocab_size=64", "--config.model_args.tie_embeddings=false")  # whose parts divide again


@needs_standin
@pytest.mark.slow
@pytest.mark.parametrize(
    "model, layout",
    [
        ((), ("--dp=2", "--tp=2", "--seq_parallel", "--zero=1")),
        (VOCABULARY, ("--dp=2", "--tp=2", "--zero=3", *FULL)),
        ((*MOE, *VOCABULARY), ("--dp=2", "--tp=2", "--ep=2", "--seq_parallel", "--zero=2", "--config.train.recompute=attention")),
        (VOCABULARY, ("--dp=2", "--tp=2", "--seq_parallel", "--zero=3", "--micro_batches=2")),
    ],
)
def test_mindspore_splits_the_state_and_recomputes_as_foretold(model, layout):
    """Every part and collective; and parameters and moments are in parts, of as many ranks as have the part alike."""
    found = compiled(dryrun_jobs.lowered(read(*MODEL, *model, *layout), "shard"), rank=0)
    assert found["problems"] == []
    shapes = found["figures"]["local_shapes"]
    assert shapes["layers.0.attention.wq"] == [16, 32] and shapes["layers.1.attention_norm"] == [8]  # over dp; over dp and tp
    assert shapes["embed"] == ([16, 32] if model else [31, 32])  # 2 ranks do not divide 31
    assert found["figures"]["optimizer_bytes"] == 2 * found["figures"]["params_bytes"]
    assert any(kind == "ReduceScatter" and axes == "dp" for kind, axes, *_ in found["figures"]["collectives"])


@needs_standin
@pytest.mark.slow
def test_mindspores_recompute_lowers_the_peak():
    peaks = {}
    for recompute in ("none", "attention", "full"):
        config = read(
            *MODEL, *WIDE, "--dp=2", "--tp=2", "--seq_parallel", "--config.model_args.num_layers=4", f"--config.train.recompute={recompute}"
        )
        found = compiled(dryrun_jobs.lowered(config, "shard"), rank=0)
        assert found["problems"] == []
        peaks[recompute] = found["figures"]["peak_bytes"]
    assert peaks["full"] < 0.85 * peaks["none"] and peaks["full"] < peaks["attention"] < 0.95 * peaks["none"]


def test_what_the_partitioner_is_not_given_is_refused_by_its_key():
    for option, step, message in (
        ("--pp=2", "train", "parallel.pp=2 with parallel.lowering=shard: a dry run does not know the messages"),
        ("--cp=2", "train", "parallel.cp=2 with parallel.lowering=shard: MindSpore has no rule for a ring"),
        ("--config.optim.skip_spikes=2.0", "train", "optim.skip_spikes=2.0 with parallel.lowering=shard"),
        ("--config.optim.name=muon", "train", "optim.name=muon with parallel.lowering=shard: it needs whole matrices"),
        ("--seq_parallel", "generate", "--step=generate with parallel.lowering=shard"),
    ):
        config = read(*MODEL, "--dp=2", "--tp=2", option)
        with pytest.raises(ValueError, match=re.escape(message)):
            dryrun_shard.check(config, command_line.model_config(config, "any"), step)


REFUSED = [  # options, ranks, depths, what the error says
    ((), [4], [], "--ranks=4: the layout has ranks 0 to 3"),
    ((), [0], [2], "--layers=2 must be two depths"),
    ((), [0], [2, 99], "--layers=99 is more than the model's 2 layers"),
    (("--config.train.layer_loop=scan",), [0], [], "use --config.train.layer_loop=unroll"),
]


@pytest.mark.parametrize("options, ranks, depths, message", REFUSED)
def test_what_cannot_be_asked_for_is_refused_before_anything_compiles(options, ranks, depths, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dryrun_jobs.check(read(*MODEL, *LAYOUT, *options), 4, ranks, depths)


@pytest.mark.slow
def test_axes_that_are_not_given_are_one_and_dp_is_what_is_left():
    command = [sys.executable, "-m", "experiments.dryrun", *MODEL, "--world_size=6", "--tp=4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "parallel.dp=-1: 6 ranks are not a multiple of tp=4" in done.stderr


def test_an_unknown_mindspore_is_named(monkeypatch):
    monkeypatch.setattr(dryrun.importlib.metadata, "version", lambda name: "2.11.0")
    reason = dryrun.unavailable()
    assert "MindSpore 2.7.1 and 2.10.0 writes" in reason and "this is 2.11.0; pip install mindspore==2.10.0" in reason


BLOCKS = """start_time_stamp,end_time_stamp,size,type,task_name,node_name,graph_name
1,9,1024,Kernel,kernel_graph_0_HostDSActor,kernel_graph_0_HostDSActor,
2,9,512,ConstantValue,SyncTensorData,Default/data-2,
3,5,2048,Kernel,3_Default/Mul-op1,Default/Mul-op1,kernel_graph0
5,7,4096,Kernel,4_Default/Add-op7,Default/Add-op7,kernel_graph0
8,9,64,PyNativeOutput,PyNative,Mul,
8,9,64,PyNativeOutput,PyNative,Muls,
"""


def test_a_block_that_ends_makes_room_for_one_that_begins(tmp_path):
    path = tmp_path / "memory_block.csv"
    path.write_text(BLOCKS)
    blocks = dryrun.read_blocks(path)
    top, live = dryrun.peak(blocks)
    assert top == 1024 + 512 + 4096 and [block.kind for block in live] == ["input", "constant", "kernel"]
    assert dryrun.peaks(blocks) == {"": 1024 + 512, "kernel_graph0": 1024 + 512 + 4096}
    assert dryrun.timeline(blocks)[0] == [(1, 1024), (2, 1536), (3, 3584), (5, 5632), (7, 1536), (8, 1664), (9, 0)]
    assert [block.kind for block in blocks[-2:]] == ["input", "input"]  # MindSpore 2.7.1 and 2.10.0


TASKS = """() = WaitEvent(), task_info: 346, attrs {event=0;stream_id=0}
    () <- ()
(%1) = Default/AllGather-op0(%2), task_info: 7, attrs {group=ranks_a;comm_rank=0 8;stream_id=2}
    (BFloat16:[8, 4]) <- (BFloat16:[4, 4])
(%3) = Default/AllReduce-op0(%2), task_info: 8, attrs {group=ranks_a;comm_rank=0 8;stream_id=2}
    (Float32:[]) <- (Float32:[])
(%3) = Default/AllReduce-op0(%2), task_info: 9, attrs {group=ranks_a;comm_rank=0 8;stream_id=2}
    (Float32:[]) <- (Float32:[])
(%4) = Default/AllToAll-op1(%2), task_info: 10, attrs {group=ranks_a;comm_rank=0 8;stream_id=2}
    (Int32:[2, 64]) <- (Int32:[2, 64])
(%5) = Default/Unheard-op0(%2), task_info: 11, attrs {group=ranks_a;comm_rank=0 8;stream_id=2}
    (Int32:[2]) <- (Int32:[2])
(%7) = DistCommIsend(%7), task_info: 13, attrs {stream_id=3}
    (BFloat16:[8, 32]) <- (BFloat16:[8, 32])
(%6) = Default/Mul-op0(%2), task_info: 12, attrs {stream_id=0}
    (Int32:[2]) <- (Int32:[2])
"""


def test_collectives_are_read_as_often_as_they_ran(tmp_path):
    path = tmp_path / "tracker_graph.ir"
    path.write_text(TASKS)
    gather, reduce = dryrun.Exchange("AllGather", (0, 8), 32, 2), dryrun.Exchange("AllReduce", (0, 8), 1, 4)
    exchange, unknown = dryrun.Exchange("AlltoAll", (0, 8), 128, 4), dryrun.Exchange("Unheard", (0, 8), 2, 4)
    send = dryrun.Exchange("Send", (), 256, 2)
    assert dryrun.exchanges_of(read_tasks(path)) == {gather: 1, reduce: 2, exchange: 1, unknown: 1, send: 1}
    assert (gather.sent(), reduce.sent(), send.sent()) == (32, 4, 512)


QUEUED = """(%9) = Muls(%8), task_info: 0, attrs {stream_id=0}
    (Float32:[1000, 1000]) <- (Float32:[1000, 1000])
(%1) = Default/MatMul-op0(%2, %3), task_info: 1, attrs {stream_id=0}
    (Float32:[10, 30]) <- (Float32:[10, 20], Float32:[20, 30])
() = RecordEvent(), task_info: 2, attrs {event=1;stream_id=0}
    () <- ()
() = WaitEvent(), task_info: 3, attrs {event=1;stream_id=2}
    () <- ()
(%4) = Default/AllReduce-op0(%1), task_info: 4, attrs {group=a;comm_rank=0 1;stream_id=2}
    (Float32:[10, 30]) <- (Float32:[10, 30])
() = RecordEvent(), task_info: 5, attrs {event=2;stream_id=2}
    () <- ()
(%1) = Default/Reshape-op0(%1, %7), task_info: 6, attrs {stream_id=0}
    (Float32:[30, 10]) <- (Float32:[10, 30], Int64:[2])
(%5) = Default/MatMul-op1(%2, %3), task_info: 7, attrs {stream_id=0}
    (Float32:[10, 30]) <- (Float32:[10, 20], Float32:[20, 30])
() = WaitEvent(), task_info: 8, attrs {event=2;stream_id=0}
    () <- ()
(%6) = Default/Mul-op0(%4, %5), task_info: 9, attrs {stream_id=0}
    (Float32:[10, 30]) <- (Float32:[10, 30], Float32:[10, 30])
"""


def test_the_timeline_of_a_step_is_that_of_its_queues(tmp_path):
    """Two products of 12,000 FLOPs, an all-reduce of 1,200 bytes that needs the first, and a product of vectors that needs both."""
    path = tmp_path / "tracker_graph.ir"
    path.write_text(QUEUED)
    tasks = read_tasks(path)  # without the copy before the step
    assert [task.kind for task in tasks if task.event is None] == ["MatMul", "AllReduce", "Reshape", "MatMul", "Mul"]
    machine = Machine(flops=2000, products=0.5, memory=3600, inside=75, call_s=1)  # seconds: 12, 17, 0, 12, 1
    found = timeline(tasks, machine)
    group = ("AllReduce", (0, 1))
    assert (found.total, found.compute, found.sent[group], found.exposed[group]) == (30, 25, 17, 5)
    late = [*tasks[:2], *tasks[6:7], *tasks[2:6], *tasks[7:]]  # the second product is queued first, and nothing hides the all-reduce
    again = timeline([late[2], *late[:2], *late[3:]], machine)
    assert (again.total, again.compute, again.exposed[group]) == (42, 25, 17)


@pytest.mark.parametrize(
    "kind, operands, results, wanted",
    [
        ("BatchMatMul", ((5, 2, 3), (5, 3, 4)), ((5, 2, 4),), 2 * 5 * 2 * 3 * 4),
        ("GroupedMatmul", ((6, 3), (2, 3, 4), (2,)), ((6, 4),), 2 * 6 * 3 * 4),
        ("FlashAttentionScore", ((1, 8, 4, 16), (1, 8, 2, 16), (1, 8, 2, 16)), ((1, 8, 4, 16),), 4 * 8 * 8 * 4 * 16 // 2),
        ("Add", ((2, 3), (2, 3)), ((2, 3),), 0),
    ],
)
def test_flops_of_an_op(kind, operands, results, wanted):
    task = Task(kind, 0, False, None, (), *(tuple((shape, 2) for shape in each) for each in (results, operands)))
    assert flops(task) == pytest.approx(wanted)


def test_each_graphs_peak_goes_on_its_own_line():
    """The update's is the higher of two at two depths, and grows less; what fragments lose does not grow."""
    low = {"peaks": {"backward": 50, "update": 100}, "with_fragments_bytes": 130, "peak_bytes": 100, "margin_bytes": 5}
    high = {"peaks": {"backward": 110, "update": 120}, "with_fragments_bytes": 130, "peak_bytes": 120, "margin_bytes": 5}
    low, high = ({**each, **dict.fromkeys(dryrun_report.TIMES, 1.0), "collectives": [], "largest": []} for each in (low, high))
    found = dryrun_report.extrapolated((2, low), (6, high), 14)
    assert (found["peak_bytes"], found["with_fragments_bytes"], found["margin_bytes"]) == (230, 260, 5)


@pytest.mark.extended
def test_the_search_ranks_what_fits_and_says_how():
    config = read(
        "--config=experiments/configs/qwen3_0p6b.py",
        "--config.model_args.num_layers=4",
        "--dp=1",
        "--tp=1",
        "--config.train.batch_size=4",
        "--noseq_parallel",
        "--micro_batches=1",
    )
    lines, found = search(config, 4, 58.0, 3)
    assert len(found) == 3 and lines[2].startswith(f"--dp={found[0].parallel.dp} --tp={found[0].parallel.tp}")
    assert " fit 58 GiB" in lines[0] and lines[2].startswith("--dp=") and any("seconds of a step" in line for line in lines)
    for each in candidates(config, 2):
        memory, seconds = estimate(each)
        assert memory["peak"] >= memory["state"] + memory["gradients"] and (seconds["bubble"] > 0) == (each.parallel.pp > 1)
    times = [sum(map(float, line.split()[-3:])) for line in lines[2:5]]
    assert times == sorted(times)
    assert "none fits" in "\n".join(search(config, 2, 0.5, 3)[0])


def test_the_margin_counts_in_the_verdict_and_in_the_search():
    for used, spare, fits in ((54, 4, True), (54, 4.1, False), (60, 0, False)):
        found, text = dryrun_report.verdict({"with_fragments_bytes": used * GIB, "margin_bytes": spare * GIB}, 58.0)
        assert found == fits and text.startswith("fits: " if fits else "DOES NOT FIT: ") and f"= {used + spare:.1f} GiB, of 58" in text
    config = read(*MODEL)
    memory, _ = estimate(next(candidates(config, 1)))
    assert memory["margin"] > GIB
    peaks = [estimate(each)[0]["peak"] + estimate(each)[0]["margin"] for each in candidates(config, 1)]
    least = min(peaks) / GIB
    assert search(config, 1, least - 0.01, 9)[1] == [] and len(search(config, 1, least + 0.01, 9)[1]) >= 1


def of_layout(*flags):
    """(the model's bytes in float32, what the search estimates of MODEL in a layout)"""
    config = read(*MODEL, "--config.train.batch_size=16", *flags)
    specs = tree_leaves(param_specs(command_line.model_config(config, "any")))
    return 4 * sum(math.prod(spec.shape) for spec in specs), *estimate(config)


def test_the_search_counts_the_bytes_that_each_zero_stage_splits():
    """Parameters, gradients and the two moments of AdamW, over 4 data ranks. Norms of a few elements are split too, or not: within 2 %."""
    for zero, (params, gradients, moments) in enumerate([(1, 1, 2), (1, 1, 2 / 4), (1, 1 / 4, 2 / 4), (1 / 4, 1 / 4, 2 / 4)]):
        size, memory, _ = of_layout("--dp=4", f"--zero={zero}")
        assert memory["state"] == pytest.approx((params + moments) * size, rel=0.02)
        assert memory["gradients"] == pytest.approx(gradients * size, rel=0.02)


def test_the_search_counts_the_bubble_of_a_pipeline():
    for pp, micro in ((2, 2), (2, 8), (4, 8)):
        more = (f"--pp={pp}", f"--micro_batches={micro}", *DEEP)
        _, _, seconds = of_layout(*more)
        assert seconds["bubble"] == pytest.approx(seconds["compute"] * (pp - 1) / micro) and seconds["compute"] > 0


def test_what_stays_in_a_node_is_sent_at_the_rate_of_a_node():
    """One group of 8 ranks, and groups that reach over two nodes, send the same bytes."""
    same = ("--dp=8", "--zero=0")
    _, _, inside = of_layout(*same)
    config = read(*MODEL, "--config.train.batch_size=16", *same)
    cfg = command_line.model_config(config, "any")
    sharding = Sharding(dryrun_jobs.layout.mesh(cfg, config.parallel, 0))
    calls = layout_traffic.step_calls(config, cfg, sharding)
    sent, count = sum(n * call.sent(sharding.mesh) for call, n in calls.items()), sum(calls.values())
    assert sent > 1e5 and inside["sent"] == pytest.approx(sent / MACHINE.inside + count * MACHINE.call_s, rel=1e-6)
    config = read(*MODEL, "--config.train.batch_size=16", "--dp=16", "--zero=0")
    sharding = Sharding(dryrun_jobs.layout.mesh(cfg, config.parallel, 0))
    calls = layout_traffic.step_calls(config, cfg, sharding)
    sent, count = sum(n * call.sent(sharding.mesh) for call, n in calls.items()), sum(calls.values())
    assert estimate(config)[1]["sent"] == pytest.approx(sent / MACHINE.between + count * MACHINE.call_s, rel=1e-6)
    assert MACHINE.inside > MACHINE.between
    for ranks, rate in (((0, 7), "inside"), ((8, 9), "inside"), ((7, 8), "between"), ((0, 8), "between")):
        assert MACHINE.rate(ranks) == getattr(MACHINE, rate)


def test_the_folder_of_a_model_is_found_from_the_process_that_compiles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SIZES["tiny"].to_hf()))
    config = dryrun_jobs._at_depth(read(f"--config={ROOT}/experiments/configs/tiny.py", "--config.model=model"), 2)
    monkeypatch.chdir(ROOT)
    assert command_line.model_config(config, "any").num_layers == 2


def test_the_plot_of_two_depths_shows_the_peak_of_all_layers():
    """Where that of the compiled layers is below the limit, it must not look as if the layout fits."""
    figures = {"with_fragments_bytes": 104 * GIB, "margin_bytes": 2 * GIB}
    report = {"rank": 3, "layers": 16, "compiled": [(1, {}), (2, {})], "figures": figures, "fits": False}
    axes = dryrun_plot.draw([{**report, "timeline": [(0, 0), (1, 37 * GIB), (2, 0)]}], 58.0).axes[0]
    lines = {line.get_label(): max(line.get_ydata()) for line in axes.lines}
    assert lines == {"rank 3, 2 of 16 layers": 37, "rank 3, all 16 layers with margin: 106.0, DOES NOT FIT": 106, "limit: 58": 58}
    assert axes.get_ylim()[1] > 106
