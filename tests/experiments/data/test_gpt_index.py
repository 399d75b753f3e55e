"""The order of training is Megatron-LM's, element for element, and rows keep documents apart."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.data import gpt_index
from experiments.data.gpt_index import (
    GPTDataset,
    blend_exhaustive,
    blend_indices,
    gpt_indices,
    split_range,
    split_ranges,
)
from experiments.data.megatron import IndexedDataset, Writer

GOLDEN = Path(__file__).parents[2] / "golden" / "megatron"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
SPLITS = json.loads((GOLDEN / "units" / "splits.json").read_text())
CASES, BLENDED, UNITS = MANIFEST["cases"], MANIFEST["blended"], MANIFEST["units"]
EOD = 1


def entries(unit):
    return pytest.mark.parametrize("entry", UNITS[unit], ids=[e["key"] for e in UNITS[unit]])


def unit(name, key):
    arrays = np.load(GOLDEN / "units" / f"{name}.npz")
    return {k.removeprefix(f"{key}_"): arrays[k] for k in arrays.files if k.startswith(f"{key}_")}


def same(ours, theirs):
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


def case(name, cache_dir=None):
    c = CASES[name]
    data = IndexedDataset(GOLDEN / "corpora" / c["corpus"])
    span = split_range(c["split"], len(data), c["split_name"])
    assert list(span) == c["split_range"]
    extra = c["add_extra_token_to_sequence"]
    arguments = (c["sequence_length"], c["num_samples_requested"], c["seed"])
    return c, np.load(GOLDEN / c["file"]), GPTDataset(data, span, *arguments, add_extra_token=extra, cache_dir=cache_dir)


def corpus(prefix, seed, sequences=30, most=12):
    """Sequences of ids 100, 101, ... (so that a token names its place); some are empty, and some end with EOD."""
    rng, sizes, number = np.random.default_rng(seed), [], 100
    with Writer(prefix, np.int32) as out:
        for _ in range(sequences):
            n = int(rng.choice([0, 1, 2, rng.integers(1, most)]))
            ids = np.arange(number, number + n)
            if n and rng.random() < 0.6:
                ids[-1] = EOD
            out.add_document([ids])
            number, sizes = number + n, [*sizes, n]
    return IndexedDataset(prefix)


@pytest.mark.parametrize("name", CASES)
def test_indices_are_megatrons(name):
    _, golden, dataset = case(name)
    for key, value in dataset.indices._asdict().items():
        same(value, golden[key])
    assert len(dataset) == len(golden["shuffle_index"])


@pytest.mark.parametrize("name", CASES)
def test_items_are_megatrons(name):
    c, golden, dataset = case(name)
    S = dataset.seq_len
    for tag, flags in c["flag_sets"].items():
        for at, i in enumerate(golden["item_indices"].tolist()):
            row = dataset.row(i, c["tokenizer_eod"], "eod" if flags["reset_position_ids"] else False, flags["eod_mask_loss"])
            get = lambda key, at=at, tag=tag: golden[f"{tag}_{key}"][at]
            np.testing.assert_array_equal(row["tokens"], get("tokens"))
            np.testing.assert_array_equal(row["targets"], get("labels"))
            np.testing.assert_array_equal(row["positions"], get("position_ids"))
            weights = get("loss_mask")
            if flags["reset_position_ids"]:
                weights = weights * (get("tokens") != c["tokenizer_eod"])  # ours: no weight for what attention cannot see
            same(row["loss_weights"], weights)
            if flags["reset_position_ids"] and f"{tag}_attention_mask_packed" in golden:
                segments = row["segment_ids"]
                sees = (segments[:, None] == segments[None]) & np.tri(S, dtype=bool)
                np.testing.assert_array_equal(np.packbits(~sees), get("attention_mask_packed"))
            elif not flags["reset_position_ids"]:
                assert (row["segment_ids"] == 1).all()


@pytest.mark.parametrize("entry", SPLITS, ids=lambda e: e["split"])
def test_split_ranges_are_megatrons(entry):
    for n, bounds in entry["bounds"].items():
        for split in (entry["split"], [float(w) for w in entry["split"].split(",")]):
            assert [r and list(r) for r in split_ranges(split, int(n)).values()] == bounds


@entries("sample_index")
def test_sample_index_is_megatrons(entry):
    u, extra = unit("sample_index", entry["key"]), int(entry["add_extra_token"])
    arguments = (u["sizes"], 0, u["document_index"], entry["sequence_length"], entry["samples"], extra)
    same(gpt_index._sample_index(*arguments), u["sample_index"])


@pytest.mark.parametrize("block", [1, 2, 7])
def test_sample_index_does_not_depend_on_the_block(block, monkeypatch):
    monkeypatch.setattr(gpt_index, "BLOCK", block)
    for entry in UNITS["sample_index"]:
        test_sample_index_is_megatrons(entry)


@entries("shuffling")
def test_shuffles_are_megatrons(entry):
    u, rng = unit("shuffling", entry["key"]), np.random.RandomState(entry["seed"])
    documents = np.tile(u["documents"], entry["num_epochs"])
    separate = entry["separate_final_epoch"] and entry["num_epochs"] > 1
    gpt_index._shuffle_parts(rng, documents, len(u["documents"]) * (entry["num_epochs"] - 1) if separate else 0)
    same(documents, u["document_index"])
    samples = np.arange(entry["shuffle_total"], dtype=np.uint32)
    gpt_index._shuffle_parts(rng, samples, entry["shuffle_first_range"])
    same(samples, u["shuffle_index"])


@entries("blending")
def test_blends_are_megatrons(entry, tmp_path):
    u = unit("blending", entry["key"])
    for cache in (None, tmp_path, tmp_path):
        got = blend_exhaustive(u["sizes"], cache) if "sizes" in u else blend_indices(u["weights"], entry["size"], cache)
        same(got[0], u["dataset_index"])
        same(got[1], u["dataset_sample_index"])


@pytest.mark.parametrize("name", BLENDED)
def test_blended_datasets_are_megatrons(name):
    b, golden = BLENDED[name], np.load(GOLDEN / BLENDED[name]["file"])
    got = blend_indices(b["weights_given"], b["size_given"]) if b["size_given"] else blend_exhaustive(b["weights_given"])
    same(got[0], golden["dataset_index"])
    same(got[1], golden["dataset_sample_index"])
    data, middle = IndexedDataset(GOLDEN / "corpora" / "a"), b["mid_level"][0]
    dataset = GPTDataset(data, middle["split_range"], b["sequence_length"], middle["num_samples_requested"], b["seed"])
    for key, value in dataset.indices._asdict().items():
        same(value, golden[f"mid0_{key}"])
    for at in np.flatnonzero(golden["item_dataset_id"] == 0):
        row = dataset.row(int(got[1][golden["item_indices"][at]]), EOD, reset=False)
        np.testing.assert_array_equal(row["tokens"], golden["item_tokens"][at])
        np.testing.assert_array_equal(row["targets"], golden["item_labels"][at])


def one_by_one(weights, size):
    """The rule of a blend, as it is written down."""
    taken, out = np.zeros(len(weights)), []
    for i in range(size):
        d = int(np.argmax(weights * max(i, 1) - taken))
        out.append((d, taken[d]))
        taken[d] += 1
    return np.array(out, np.int64).T


@pytest.mark.parametrize("weights", [[1], [0.3, 0.7], [1] * 4, [1e-5, 1, 2], *(np.random.default_rng(n).pareto(1, n) for n in (5, 20, 60))])
@pytest.mark.parametrize("warm", [0, 64])
def test_lanes_of_a_blend_take_the_turns_that_one_lane_takes(weights, warm, monkeypatch):
    monkeypatch.setattr(gpt_index, "WARM", warm)  # 0: lanes start from guesses
    redone, in_turn = [], gpt_index._in_turn
    monkeypatch.setattr(gpt_index, "_in_turn", lambda *args: redone.append(args) or in_turn(*args))
    size = gpt_index.LANES_FROM + 77
    got = blend_indices(weights, size)
    assert redone or warm or len(weights) < 20  # the wrong guesses are there
    np.testing.assert_array_equal(np.stack(got), one_by_one(np.array(weights) / np.sum(weights), size))


@pytest.mark.parametrize("counts", [[40_000], [30_000, 7], [1, 1, 50_000], [20_000, 20_000], [9999, 12345, 20_000, 3]])
def test_exhaustive_blend_takes_every_sample_once(counts):
    dataset, sample = blend_exhaustive(counts)
    for d, n in enumerate(counts):
        np.testing.assert_array_equal(sample[dataset == d], np.arange(n))
    weights, left, taken = np.array(counts) / sum(counts), np.array(counts), np.zeros(len(counts))
    for i, d in enumerate(dataset):
        assert d == np.argmax(np.where(left > taken, weights * max(i, 1) - taken, -np.inf))
        taken[d] += 1


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [1, float("nan")], [[1]]])
def test_weights_of_a_blend_are_checked(weights):
    with pytest.raises(ValueError, match="data.path has weights .* above 0"):
        blend_indices(weights, 10)


@pytest.mark.parametrize("extra", [True, False])
@pytest.mark.parametrize("partial", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_every_token_of_the_stream_is_where_the_definition_says(tmp_path, seed, partial, extra):
    data, rng = corpus(tmp_path / "x", seed), np.random.default_rng(seed)
    S, wanted = int(rng.integers(1, 9)), (None, 3, 40)[seed % 3]
    dataset = GPTDataset(data, (2, len(data)), S, wanted, seed, add_extra_token=extra, drop_last_partial=not partial)
    order = dataset.indices.document_index
    stream = np.concatenate([data.tokens(d) for d in order])
    edges = np.cumsum(data.lengths[order])
    usable = len(stream) - extra
    assert len(dataset) == (-(-usable // S) if partial else usable // S) >= (wanted or 0)
    assert sorted(order.tolist()) == sorted([*range(2, len(data))] * (len(order) // (len(data) - 2)))
    assert sorted(dataset.indices.shuffle_index.tolist()) == list(range(len(dataset)))
    for i in rng.permutation(len(dataset)).tolist():
        start = int(dataset.indices.shuffle_index[i]) * S
        item = dataset.item(i)
        np.testing.assert_array_equal(item.tokens, stream[start : start + S + extra])
        assert item.tokens.dtype == np.int32
        row, n = dataset.row(i, EOD), len(item.tokens)
        starts, expected = ({int(p) for p in places if 0 < p < n} for places in (item.starts, edges - start))
        assert starts == expected
        check_row(row, item.tokens, starts, S)
        assert all(len(v) == S for v in row.values()) and row["loss_weights"][max(n - 1, 0) :].sum() == 0


def check_row(row, tokens, starts, S):
    """The row, one token at a time."""
    segment, position = 1, 0
    for place, token in enumerate(tokens[:S]):
        if place and (tokens[place - 1] == EOD or place in starts):
            segment, position = segment + 1, 0
        ends = place + 1 == len(tokens) or place + 1 in starts or token == EOD
        expected = (token, 0 if place + 1 == len(tokens) else tokens[place + 1], 0.0 if ends else 1.0, segment, position)
        assert tuple(row[k][place] for k in ("tokens", "targets", "loss_weights", "segment_ids", "positions")) == expected
        position += 1
    for key, value in row.items():
        assert not value[len(tokens) :].any() and value.dtype == (np.float32 if key == "loss_weights" else np.int32)


def test_items_do_not_depend_on_the_order_of_access(tmp_path):
    data = corpus(tmp_path / "x", 0)
    make = lambda: GPTDataset(data, (0, len(data)), 7, drop_last_partial=False)
    fresh = [make().row(i, EOD, reset=False) for i in range(len(make()))]
    dataset = make()
    for i in np.random.default_rng(0).integers(0, len(dataset), 200).tolist():
        row = dataset.row(i, EOD, reset=False)
        for key, value in fresh[i].items():
            np.testing.assert_array_equal(row[key], value)
            row[key] *= 0  # what a caller does to a row stays with the caller
    for i in (-1, len(dataset)):
        with pytest.raises(IndexError, match=f"item {i} of a dataset of {len(dataset)}"):
            dataset.item(i)


def test_empty_split_is_an_error_that_names_it(tmp_path):
    data = IndexedDataset(GOLDEN / "corpora" / "a")
    for split, name in (("969,30,1", "test"), ("1,0,0", "valid"), ("100", "test"), ("0,1", "train")):
        with pytest.raises(ValueError, match=f"data.split='{split}' leaves the {name} split without"):
            split_range(split, len(data), name)
    for wanted in (None, 0, 5):
        with pytest.raises(ValueError, match="the test split, sequences 50 to 50 of 50, has no token; give test"):
            GPTDataset(data, split_ranges("969,30,1", len(data))["test"], 16, wanted, name="test")
    with pytest.raises(ValueError, match="the valid split has 5509 tokens, too few for .*train.seq_len=5509"):
        GPTDataset(data, (0, 50), 5509, name="valid")
    with Writer(tmp_path / "x", np.int32) as out:
        out.add_document([[], []])
    with pytest.raises(ValueError, match="the train split, sequences 0 to 2 of 2, has no token"):
        GPTDataset(IndexedDataset(tmp_path / "x"), (0, 2), 4, 10)


@pytest.mark.parametrize("split", ["", "a", "1,2,3,4", "-1,2", "nan", "inf,1", "0,0,0", None, 7])
def test_split_is_checked(split):
    with pytest.raises(ValueError, match="data.split=.*use '969,30,1'"):
        split_ranges(split, 10)


@pytest.mark.parametrize("wrong, words", [
    ({"seed": -1}, "data.seed=-1"),
    ({"seed": 2**32}, "data.seed"),
    ({"seq_len": 0}, "train.seq_len=0"),
    ({"num_samples": -1}, "num_samples=-1"),
    ({"first_id": 2**31}, "int32"),
    ({"lengths_of_split": []}, "no token"),
])  # fmt: skip
def test_arguments_are_checked(wrong, words):
    with pytest.raises(ValueError, match=words):
        gpt_indices(**{"lengths_of_split": [3, 4], "first_id": 0, "seq_len": 2, "num_samples": 5, "seed": 0, **wrong})


def test_ids_that_are_none_or_do_not_fit_are_refused(tmp_path):
    for dtype, ids in ((np.float32, [1.0, 2.0]), (np.int64, [1, 2**31])):
        with Writer(tmp_path / np.dtype(dtype).name, dtype) as out:
            out.add_document([ids])
    with pytest.raises(ValueError, match="dtype=float32 holds no token ids"):
        GPTDataset(IndexedDataset(tmp_path / "float32"), (0, 1), 1)
    with pytest.raises(ValueError, match="item 0 has ids from 1 to 2147483648, which do not fit int32"):
        GPTDataset(IndexedDataset(tmp_path / "int64"), (0, 1), 1).row(0, None)


def test_resets_need_an_end_of_document_id_only_where_they_use_it(tmp_path):
    dataset = GPTDataset(corpus(tmp_path / "x", 1), (0, 30), 8)
    assert dataset.row(0, None)["segment_ids"].max() > 1
    for options in ({"reset": "eod"}, {"eod_mask_loss": True}, {"reset": "row"}):
        with pytest.raises(ValueError, match="eod_id=None"):
            dataset.row(0, None, **options)


def test_cache_gives_the_same_indices_and_is_named_by_all_that_makes_them(tmp_path):
    plain, files = case("a_s64_one_more.train")[2], 0
    for name in ("a_s64_one_more.train", "a_s64_3ep_thr.train", "a_s64_none_seed42.train", "c_s20_extra.train", "c_s20_noextra.train"):
        for _ in range(2):
            _, golden, dataset = case(name, tmp_path)
            for key, value in dataset.indices._asdict().items():
                same(value, golden[key])
                assert isinstance(value, np.memmap)
        files += 4
        assert len(list(tmp_path.iterdir())) == files
    np.testing.assert_array_equal(plain.item(5).tokens, case("a_s64_one_more.train", tmp_path)[2].item(5).tokens)


def test_damaged_cache_is_built_again(tmp_path):
    for damage in (b"", b"\0" * 200, None):
        case("a_s64_none.train", tmp_path)
        for path in sorted(tmp_path.iterdir())[:2]:
            path.write_bytes(path.read_bytes()[:-4] if damage is None else damage)
        _, golden, dataset = case("a_s64_none.train", tmp_path)
        for key, value in dataset.indices._asdict().items():
            same(value, golden[key])


def changed_value(path):
    """One number of an array is another, such as a bad disk or a copy that stopped would leave it."""
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes(data)


def test_a_cache_with_another_value_or_without_its_digests_is_built_again(tmp_path):
    case("a_s64_none.train", tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 4 and names[0].endswith(".digests")
    for name in names:
        for harm in (changed_value, Path.unlink):
            harm(tmp_path / name)
            _, golden, dataset = case("a_s64_none.train", tmp_path)
            for key, value in dataset.indices._asdict().items():
                same(value, golden[key])
            assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_empty_arrays_are_cached_too(tmp_path):
    for _ in range(2):
        assert [len(x) for x in blend_indices([1, 2], 0, tmp_path)] == [0, 0]


def test_many_processes_share_a_cache(tmp_path):
    code = """
import sys
from tests.experiments.data.test_gpt_index import case
sys.stdin.readline()
for i in range(30):
    _, golden, dataset = case("a_s16_2ep_sep.train", f"{sys.argv[1]}/{i}")
    assert all((value == golden[key]).all() for key, value in dataset.indices._asdict().items())
"""
    run, root = [sys.executable, "-c", code, tmp_path], Path(__file__).parents[3]
    children = [subprocess.Popen(run, cwd=root, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    for child in children:
        assert not child.communicate()[1] and child.returncode == 0
    assert len(list(tmp_path.glob("*/*"))) == 30 * 4


@pytest.mark.parametrize("seed", range(8))
def test_megatron_core_gives_the_same_on_random_input(seed):
    """Live: with megatron-core installed."""
    helpers = pytest.importorskip("megatron.core.datasets.helpers")
    rng = np.random.default_rng(seed)
    for S in (1, 3, 50):
        sizes = rng.integers(0, 40, 200).astype(np.int32)
        for extra in (True, False):
            ours = gpt_indices(sizes, 0, S, 3 * int(sizes.sum()) // S, seed, extra, seed % 2)
            epochs = len(ours.document_index) // 200
            theirs = helpers.build_sample_idx(sizes, ours.document_index, S, epochs, int(sizes.sum()), bool(seed % 2), extra)
            same(ours.sample_index, theirs)
    weights = rng.pareto(1, rng.integers(2, 30)) + 1e-4
    out = np.zeros(50_000, np.int16), np.zeros(50_000, np.int64)
    helpers.build_blending_indices(*out, weights / weights.sum(), len(weights), 50_000, False)
    for ours, theirs in zip(blend_indices(weights, 50_000), out):
        same(ours, theirs)
    counts = rng.integers(1, 20_000, rng.integers(1, 12))
    out = np.zeros(counts.sum(), np.int16), np.zeros(counts.sum(), np.int64)
    helpers.build_exhaustive_blending_indices(*out, counts, len(counts))
    for ours, theirs in zip(blend_exhaustive(counts), out):
        same(ours, theirs)
