"""What a layout may be for a model and a batch, and the table of one."""

import re
import subprocess
import sys
from unittest import mock

import pytest
from absl import flags as absl_flags

from experiments import flags
from experiments.configs import common
from experiments.layout import check as layout_check
from experiments.layout import table as layout_table

TINY, MOE = "--config=experiments/configs/tiny.py", "--config=experiments/configs/tiny_moe.py"


def read(*argv, world=0):
    values = absl_flags.FlagValues()
    flags.define(None, values)
    with mock.patch.object(sys, "argv", ["main", *argv]):
        flags.parse(sys.argv, values)
    return flags.resolve(values, world)


# arguments -> what the error says
REFUSED = [
    ([TINY, "--tp=3"], "parallel.tp=3 must divide num_heads=4 of model=tiny; use 1, 2, 4"),
    (
        [TINY, "--config.model_args.num_heads=12", "--config.model_args.num_kv_heads=4", "--tp=6"],
        "parallel.tp=6 must divide num_kv_heads=4 or be a multiple of it, for the kv heads of model=tiny; use 1, 2, 4, 12",
    ),
    ([TINY, "--config.model_args.ffn_size=99", "--tp=2"], "parallel.tp=2 must divide ffn_size=99 of model=tiny; use 1, 3, 9, 11, 33, 99"),
    ([TINY, "--dp=2", "--ep=2"], "parallel.ep=2 splits experts, and model=tiny is dense; use --ep=1"),
    ([MOE, "--dp=3", "--ep=3"], "parallel.ep=3 must divide num_experts=8 of model=tiny-moe; use 1, 2, 4, 8"),
    ([MOE, "--tp=2", "--ep=2"], "parallel.ep=2 uses 2 of the tp=2 ranks, which then must have different tokens; use --seq_parallel"),
    ([MOE, "--config.model_args.moe_ffn_size=99", "--tp=2"], "leaves 2 ranks beside ep=1, which must divide moe_ffn_size=99"),
    ([TINY, "--dp=3"], "train.batch_size=16 must be a multiple of parallel.dp=3 times parallel.micro_batches=1; use"),
    ([TINY, "--dp=8", "--micro_batches=4"], "use --config.train.batch_size=32"),
    (
        [TINY, "--dp=16", "--tp=2", "--seq_parallel", "--config.train.seq_len=33"],
        "parallel.seq_parallel splits the 33 tokens of a data rank's micro-batch over tp=2 ranks, which must divide them; use"
        " --config.train.seq_len=34",
    ),
    ([TINY, "--pp=7"], "parallel.pp=7 x virtual_stages=1: stage 5 of (0, 1, 1, 1, 1, 0, 0) has no layer"),
    ([TINY, "--pp=2", "--config.parallel.stage_layers=(3,2)"], "parallel.stage_layers=(3, 2) must be 2 numbers"),
    ([TINY, "--pp=2", "--config.parallel.virtual_stages=2"], "parallel.virtual_stages=2 needs parallel.pp_schedule=interleaved, not 1f1b"),
    (
        [TINY, "--pp=2", "--config.parallel.pp_schedule=interleaved", "--micro_batches=1"],
        "parallel.micro_batches=1 must be a multiple of parallel.pp=2 for pp_schedule=interleaved; use --micro_batches=2, or 1f1b",
    ),
    ([TINY, "--pp=2", "--config.parallel.pp_schedule=zigzag"], "parallel.pp_schedule='zigzag' is not one of gpipe, 1f1b, interleaved"),
    ([TINY, "--config.parallel.stage_layers=(2,2)"], "parallel.stage_layers=(2, 2) needs a pipeline, but parallel.pp=1; use --pp=2"),
    ([TINY, "--pp=2", "--config.train.layer_loop=scan"], "train.layer_loop=scan: the layers of a pipeline stage are unrolled"),
    (
        [TINY, "--cp=8", "--config.parallel.cp_attention=ulysses"],
        "parallel.cp_attention=ulysses shares 4 heads over 8 ranks of cp, which must divide them, and divide 2 kv heads or be a multiple"
        " (num_heads=4 and num_kv_heads=2 of model=tiny, tp=1); share them over 1, 2, 4, or use parallel.cp_attention=ring",
    ),
    ([TINY, "--cp=2", "--config.parallel.cp_ulysses=2"], "parallel.cp_ulysses=2 needs parallel.cp_attention=hybrid, but"),
    (
        [TINY, "--cp=4", "--config.parallel.cp_attention=hybrid", "--config.parallel.cp_ulysses=4"],
        "parallel.cp_ulysses=4 must divide parallel.cp=4, and must not be 1 or 4, for parallel.cp_attention=hybrid; use 2",
    ),
    (
        [TINY, "--cp=2", "--config.parallel.cp_attention=hybrid"],
        "for parallel.cp_attention=hybrid; parallel.cp=2 has none; use parallel.cp_attention=ring or ulysses",
    ),
    (
        [TINY, "--dp=16", "--cp=2", "--tp=4", "--seq_parallel", "--config.train.seq_len=33"],
        "parallel.seq_parallel splits the 18 tokens of a data rank's micro-batch",
    ),
    ([TINY, "--zero=4"], "parallel.zero=4 must be 0, 1, 2 or 3"),
    (
        [TINY, "--dp=2", "--config.train.batch_size=16", "--config.data.max_documents=129"],
        "data.max_documents=129 for each of the 8 rows of a rank's micro-batch is more than the 1024 documents that MindSpore's attention"
        " takes; use --config.data.max_documents=128 or less",
    ),
    ([TINY, "--config.data.max_documents=1"], "data.max_documents=1 must be 2 to 1024, or 0 for any number"),
]


@pytest.mark.parametrize("arguments, message", REFUSED)
def test_a_layout_that_does_not_fit_is_refused_before_anything_starts(arguments, message):
    """By the launcher too, which asks the same."""
    with pytest.raises(ValueError, match=re.escape(message)):
        read(*arguments)
    world = 1
    for axis in ("--dp=", "--tp=", "--pp=", "--cp="):
        world *= int(next((a[len(axis) :] for a in arguments if a.startswith(axis)), 1))
    with pytest.raises(ValueError, match=re.escape(message)):
        flags.check_layout(["experiments.pretrain", *arguments], world)


def test_the_launcher_counts_the_ranks():
    with pytest.raises(ValueError, match=re.escape("dp=2 x tp=2 is 4 ranks, and the job has 3")):
        flags.check_layout(["experiments.pretrain", TINY, "--dp=2", "--tp=2"], 3)
    flags.check_layout(["experiments.pretrain", TINY, "--dp=-1", "--tp=2", "--print_layout"], 4)
    flags.check_layout(["some.module", "--dp=2"], 3)  # has no layout of ours


def test_a_layout_is_checked_without_mindspore():
    """What makes the launcher's answer quick."""
    code = (
        "import sys; from experiments import flags; flags.check_layout(['experiments.pretrain', '--dp=2'], 2);"
        " assert 'mindspore' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def rows(text):
    return {line.split()[0]: re.split(r"  +", line) for line in text.splitlines() if "  " in line}


def test_the_table_has_each_parameter_and_the_bytes_of_a_rank():
    text = layout_table.describe(read(TINY, "--dp=2", "--tp=2", "--seq_parallel", "--zero=1"))
    table = rows(text)
    assert text.startswith("4 ranks: dp 2 x tp 2, sequence parallel, ZeRO 1")
    assert table["layers.0-3.attention.wq"][1:] == ["128 x 128", "embed heads", "- tp", "128 x 64", f"{4 * 128 * 64 * 4:,}"]
    assert table["embed"][1:] == ["512 x 128", "vocab embed", "tp -", "256 x 128", f"{256 * 128 * 4:,}"]
    parameters = re.search(r"parameters +([\d.]+) MiB", text)[1]
    state = re.search(r"optimizer state +([\d.]+) MiB", text)[1]
    assert float(state) == pytest.approx(float(parameters), abs=0.02)  # two moments, over two data ranks


def test_the_table_of_a_model_too_large_for_this_machine():
    """32 billion parameters on 16 ranks: the sizes, by arithmetic on the released config."""
    layout = ("--dp=2", "--tp=8", "--pp=1", "--zero=3", "--micro_batches=2")
    text = layout_table.describe(read("--config=experiments/configs/qwen3_32b.py", *layout))
    table = rows(text)
    assert table["layers.0-63.mlp.w_gate"][1:5] == ["5120 x 25600", "embed ffn", "zero tp", "2560 x 3200"]
    assert table["layers.0-63.attention.wk"][4] == "2560 x 128"
    assert float(re.search(r"parameters +([\d.]+) GiB", text)[1]) == pytest.approx(32.76e9 * 4 / 16 / 2**30, rel=0.01)


def test_experts_and_padding_in_the_table():
    text = layout_table.describe(
        read(MOE, "--dp=2", "--tp=2", "--ep=2", "--config.model_args.vocab_size=511", "--config.data.vocab_size=511")
    )
    table = rows(text)
    experts = next(row for name, row in table.items() if name.endswith("moe.w_gate"))
    assert experts[3] == "ep - tp-ep" and experts[4].startswith("4 x ")
    assert table["embed"][1] == "511 x 128" and table["embed"][4] == "256 x 128"


def test_the_table_ends_with_what_a_rank_sends():
    """Sequence parallel: a gather before attention, feed-forward and head, over tp, of bfloat16 [rows, D]; twice more for looped layers."""
    layout = ("--dp=2", "--tp=8", "--pp=1", "--micro_batches=1", "--seq_parallel")
    text = layout_table.describe(read("--config=experiments/configs/qwen3_32b.py", *layout))
    sent = sent_of(text)
    gathers, size = 2 * 64 + 1, 4 * 4096 // 2 * 5120 * 2 * 7 // 8
    assert sent["forward", "AllGather", "tp"] == [gathers, gathers * size]
    assert sent["forward", "ReduceScatter", "tp"] == [gathers, (gathers + 1) * size]  # the embedding's is of float32
    assert sent["backward", "AllGather", "tp"] == [gathers + 2 * 128, (gathers + 1 + 2 * 128) * size]
    assert sent["update", "AllReduce", "dp+tp"] == [1, 7]
    local = float(re.search(r"parameters +([\d.]+) GiB", text)[1]) * 2**30
    assert sent["update", "AllReduce", "dp"][1] == pytest.approx(local, rel=1e-3)  # in a ring of two, all of them once


def sent_of(text):
    """{(phase, kind, axes): [calls, bytes]} of a table of what a rank sends."""
    each = [re.split(r"  +", line) for line in text.splitlines()]
    return {tuple(c[:3]): [int(n.replace(",", "")) for n in c[4:]] for c in each if c[0] in ("forward", "backward", "update")}


def test_zero_1_and_2_send_as_much_as_no_zero():
    """Half of it is the reduce-scatter of the gradients, half the all-gather of the new parameters. A ring's all-reduce is both."""
    layout = ("--config=experiments/configs/qwen3_32b.py", "--dp=2", "--tp=8", "--pp=1", "--micro_batches=1")
    plain, *sharded = (sent_of(layout_table.describe(read(*layout, f"--zero={zero}"))) for zero in (0, 1, 2))
    size = plain["update", "AllReduce", "dp"][1]
    assert size > 2**33
    for sent in sharded:
        assert sent["update", "ReduceScatter", "dp"][1] == sent["update", "AllGather", "dp"][1] == pytest.approx(size / 2, rel=1e-3)
        assert ("update", "AllReduce", "dp") not in sent


def test_the_table_of_a_pipeline_has_each_ranks_layers_and_bytes_and_the_schedule():
    """4 layers, tied: the embedding is on both ends, each rank has half of the rest; the second keeps one input, the first only tokens."""
    text = layout_table.describe(read(TINY, "--pp=2", "--micro_batches=4"))
    assert text.startswith("2 ranks: pp 2, 2 stages, 1f1b, 4 micro-batches")
    table = {line.split()[0]: re.split(r"  +", line) for line in text.splitlines() if re.match(r"[01]  ", line)}
    layer = sum(int(row[-1].replace(",", "")) for name, row in rows(text).items() if name.startswith("layers.0-3")) // 4
    rows_of_input, tied = 16 // 4 * 256 * 128 * 4, 512 * 128 * 4
    numbers = {rank: [int(cell.replace(",", "")) for cell in row[2:]] for rank, row in table.items()}
    first, second = tied + 2 * layer, tied + 2 * layer + 128 * 4
    assert table["0"][1] == "embedding 0-1" and numbers["0"] == [first, first, 2 * first, 2, 0, 4 * rows_of_input]
    assert table["1"][1] == "2-3 head" and numbers["1"] == [second, second, 2 * second, 1, rows_of_input, 4 * rows_of_input]
    assert "ranks wait 20.0% of the time" in text
    assert text.splitlines()[-1].startswith("rank 1      F0 B0--- F1 B1---")


def test_the_table_of_an_interleaved_pipeline_of_a_large_model():
    layout = ("--config.parallel.pp_schedule=interleaved", "--config.parallel.virtual_stages=2", "--micro_batches=4", "--tp=4", "--pp=4")
    text = layout_table.describe(read("--config=experiments/configs/qwen3_32b.py", *layout))
    assert "16 ranks: tp 4 x pp 4, 8 stages, interleaved" in text
    assert "embedding 0-7, 32-39" in text and "24-31, 56-63 head" in text and text.splitlines()[-1].startswith("rank 3 ")


@pytest.mark.parametrize(
    "device, changes, most",
    [
        ("Ascend", {}, 0),  # short rows: the mask is small
        ("Ascend", {"train.seq_len": 8193}, 128),  # of 1,024, for 8 rows
        ("Ascend", {"train.seq_len": 8193, "parallel.micro_batches": 8}, 1024),
        ("Ascend", {"train.seq_len": 8193, "ops.attention": "ascendc"}, 0),  # needs no mask
        ("Ascend", {"parallel.cp": 2}, 128),  # a ring, which MindSpore's attention does not compute otherwise
        ("Ascend", {"parallel.cp": 2, "parallel.cp_attention": "ulysses"}, 0),
        ("Ascend", {"train.seq_len": 8193, "data.max_documents": 0}, 0),
        ("CPU", {"train.seq_len": 8193}, 0),
        ("CPU", {"data.max_documents": 7}, 7),
    ],
    ids=str,
)
def test_when_attention_takes_the_lengths_of_documents(device, changes, most):
    config = common.get_config()
    config.train.batch_size = 8
    for key, value in changes.items():
        section, _, name = key.partition(".")
        config[section][name] = value
    assert layout_check.documents(config, device) == most
