"""Batches: an order that depends on seed and sample number alone, each row once an epoch, resumed on any number of ranks."""

import json
import threading
import time

import numpy as np
import pytest

from experiments.data.gpt_index import GPTDataset, blend_indices
from experiments.data.loader import Loader, epoch_order, eval_batches, first_rows, rank_rows, take
from experiments.data.megatron import IndexedDataset, Writer
from experiments.data.packing import pack
from experiments.data.rows import Blend, PackedRows, PairRows
from experiments.data.stream import TextStream
from qwen3.tokenizer import train_bpe

EOD = 0


def rows_of(count, seq_len=3, first=0):
    """Rows whose tokens are their number."""
    rows = pack([list(range(count * seq_len))], seq_len, 0)
    rows["tokens"] = np.repeat(np.arange(first, first + count, dtype=np.int32)[:, None], seq_len, axis=1)
    return rows


def make_pair(prefix, lengths, first=1):
    """Documents of unique ids, each closed by EOD."""
    with Writer(prefix, np.int32) as out:
        for length in lengths:
            out.add_document([[*range(first, first + length), EOD]])
            first += length
    return str(prefix)


def pair_rows(prefix, seq_len=5, **options):
    indexed = IndexedDataset(prefix)
    return PairRows(indexed, (0, len(indexed)), seq_len, EOD, **{"vocab_size": 10**6, **options})


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    lines = [f"line {i} of a text, " + "and more " * (i % 7) for i in range(60)]
    for part in range(3):
        records = [json.dumps({"text": line}) for line in lines[part * 20 : part * 20 + 20]]
        (folder / f"part_{part}.jsonl").write_text("\n".join(records))
    return folder, train_bpe(lines, 280)


@pytest.fixture(params=["packed", "pair", "blend", "stream"])
def source(request, tmp_path, texts):
    if request.param == "packed":
        return PackedRows(pack([list(range(1, 40)), [], list(range(50, 70))], 4, EOD))
    if request.param == "stream":
        return TextStream(texts[0], texts[1], 16)
    pairs = [pair_rows(make_pair(tmp_path / f"pair_{i}", [7, 1, 30, 12 + i], 1 + 100 * i)) for i in range(2)]
    return pairs[0] if request.param == "pair" else Blend(pairs, [0.3, 0.7])


def order(source, steps, batch_size, seed):
    with Loader(source, batch_size, seed) as loader:
        return np.concatenate([next(loader)["tokens"][:, 0] for _ in range(steps)])


def joined(batches):
    return {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)
        assert a[key].dtype == b[key].dtype


@pytest.mark.parametrize("count, batch_size", [(12, 4), (10, 4), (7, 1), (5, 5), (3, 8)])
def test_every_epoch_takes_each_row_once(count, batch_size):
    taken = order(PackedRows(rows_of(count)), 4 * count, batch_size, seed=0)
    for epoch in taken[: len(taken) // count * count].reshape(-1, count):
        assert sorted(epoch) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own():
    rows = PackedRows(rows_of(50))
    first, second = order(rows, 10, 10, seed=0).reshape(2, 50)
    other = order(rows, 5, 10, seed=1)
    assert not np.array_equal(first, np.arange(50))
    assert not np.array_equal(first, second) and not np.array_equal(first, other) and not np.array_equal(second, other)


def test_order_stays_the_same_between_releases():
    assert order(PackedRows(rows_of(8)), 1, 8, seed=0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_rows_keep_their_columns_and_dtypes_together():
    rows = pack([list(range(1, 40)), list(range(50, 70))], 4, 0)
    with Loader(PackedRows(rows), 3, seed=-1) as loader:
        out = next(loader)
    assert {k: (v.shape, v.dtype) for k, v in out.items()} == {k: ((3, 4), v.dtype) for k, v in rows.items()}
    for i in range(3):
        (place,) = [r for r in range(len(rows["tokens"])) if (rows["tokens"][r] == out["tokens"][i]).all()]
        assert all((out[k][i] == rows[k][place]).all() for k in rows)


@pytest.mark.parametrize("stop", [0, 1, 4, 7, 13])
@pytest.mark.parametrize("ranks, batch_size", [(1, 12), (2, 12), (3, 12), (12, 12), (2, 2), (1, 1)])
def test_a_restored_loader_goes_on_with_the_same_rows_on_any_ranks(source, stop, ranks, batch_size):
    """Stopped after `stop` batches of 4 on two ranks, restored on `ranks` ranks with batches of another size."""
    want = first_rows(source, stop * 4 + 24, seed=3)
    loaders = [Loader(source, 4, 3, rank, 2) for rank in range(2)]
    before = [joined([next(loader) for loader in loaders]) for _ in range(stop)]
    states = [json.loads(json.dumps(loader.state())) for loader in loaders]
    assert states[0] == states[1] and states[0]["sample"] == 4 * stop
    [loader.close() for loader in loaders]
    loaders = [Loader(source, batch_size, 3, rank, ranks, state=states[0]) for rank in range(ranks)]
    after = [joined([next(loader) for loader in loaders]) for _ in range(24 // batch_size)]
    [loader.close() for loader in loaders]
    same(joined(before + after), want)
    assert loaders[-1].state()["sample"] == stop * 4 + 24


def test_a_rank_builds_its_own_rows_alone():
    class Counted(PackedRows):
        def row(self, i):
            asked.append(i)
            return super().row(i)

    asked = []
    with Loader(Counted(rows_of(40)), 8, 0, rank=1, ranks=4, prefetch=1) as loader:
        next(loader), next(loader)
    assert set(asked) <= set(epoch_order(0, 0, 40).reshape(5, 4, 2)[:, 1].ravel())


def test_a_pair_gives_megatrons_order_in_its_first_epoch_and_every_token_pair_once_in_each(tmp_path):
    rows = pair_rows(make_pair(tmp_path / "a", [4, 1, 9, 30, 2, 60, 3]), seq_len=4)
    dataset = GPTDataset(rows.indexed, rows.span, 4, None, 5)
    assert len(rows) == len(dataset)
    for i in range(len(rows)):
        same(rows.sample(i, 5), dataset.row(i, EOD))
    epochs = [joined([{k: v[None] for k, v in rows.sample(e * len(rows) + i, 5).items()} for i in range(len(rows))]) for e in range(3)]
    assert not np.array_equal(epochs[0]["tokens"], epochs[1]["tokens"])
    for epoch in epochs:
        ids = epoch["tokens"][epoch["tokens"] != EOD]
        assert len(set(ids.tolist())) == len(ids) >= 109 - 4  # of the 109; a rest shorter than a row is left out


def test_no_token_attends_across_documents(source):
    rows = first_rows(source, 60, seed=1)
    eod = 0 if not isinstance(source, TextStream) else source.tokenizer.eod_id
    after_eod = (rows["tokens"][:, :-1] == eod) & (rows["segment_ids"][:, 1:] > 0)
    assert after_eod.any()
    assert (np.diff(rows["segment_ids"], axis=1)[after_eod] == 1).all() and (rows["positions"][:, 1:][after_eod] == 0).all()
    inside = (rows["segment_ids"][:, 1:] == rows["segment_ids"][:, :-1]) & (rows["segment_ids"][:, 1:] > 0)
    assert (np.diff(rows["positions"], axis=1)[inside] == 1).all()
    assert (rows["loss_weights"][:, :-1][after_eod] == 0).all()


def test_reset_off_reads_a_row_as_one_text(tmp_path, texts):
    pair = pair_rows(make_pair(tmp_path / "a", [4, 1, 9, 30]), reset=False)
    for source in (pair, TextStream(texts[0], texts[1], 16, reset=False), PackedRows(pack([[1, 2], [3] * 9], 4, EOD, reset=False))):
        rows = first_rows(source, 2, 0)
        assert (rows["segment_ids"] == 1).all() and (rows["loss_weights"] == 1).all()
        assert (rows["positions"] == np.arange(rows["tokens"].shape[1])).all()


def test_a_blend_takes_turns_as_megatron_and_repeats_nothing_within_a_sources_epoch():
    blend = Blend([PackedRows(rows_of(5)), PackedRows(rows_of(20, first=100)), PackedRows(rows_of(9, first=200))], [1, 3, 1])
    taken = np.array([blend.sample(i, 7)["tokens"][0] for i in range(200)])
    np.testing.assert_array_equal(taken // 100, blend_indices([0.2, 0.6, 0.2], 200)[0])
    for d, count in enumerate((5, 20, 9)):
        own = taken[taken // 100 == d]
        for epoch in own[: len(own) // count * count].reshape(-1, count):
            assert sorted(epoch) == list(range(100 * d, 100 * d + count))
    assert np.array_equal(taken, [blend.sample(i, 7)["tokens"][0] for i in range(200)])


def test_blends_may_hold_blends():
    inner = Blend([PackedRows(rows_of(5)), PackedRows(rows_of(5, first=100))], [1, 1])
    outer = Blend([inner, PackedRows(rows_of(5, first=200))], [2, 1])
    taken = np.array([take(outer, i, 0)["tokens"][0] for i in range(30)]) // 100
    assert [np.count_nonzero(taken == d) for d in range(3)] == [10, 10, 10]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data": "other 3x4 00"}, "the state is of the data 'other 3x4 00', but data.path gives 'packed 12x3 .*'"),
        ({"seed": 4}, "train.seed=0, but the state is of seed 4, .*--config.train.seed=4"),
        ({"sample": -1}, "is no state of a loader"),
        ({"sample": "7"}, "is no state of a loader"),
    ],
)
def test_a_state_of_other_data_is_refused(change, message):
    source = PackedRows(rows_of(12))
    with Loader(source, 2, 0) as loader:
        state = loader.state()
    with pytest.raises(ValueError, match=message):
        Loader(source, 2, 0, state={**state, **change})


def test_fingerprints_tell_data_and_settings_apart(tmp_path):
    make_pair(tmp_path / "a", [4, 1, 9, 30]), make_pair(tmp_path / "b", [4, 1, 9, 31]), make_pair(tmp_path / "c", [4, 1, 9, 30], first=2)
    seen = [pair_rows(tmp_path / name).fingerprint for name in "abc"]
    seen += [pair_rows(tmp_path / "a", seq_len=4).fingerprint, pair_rows(tmp_path / "a", reset=False).fingerprint]
    seen += [PackedRows(rows_of(4)).fingerprint, PackedRows(rows_of(4, first=1)).fingerprint]
    assert len(set(seen)) == len(seen)
    assert pair_rows(tmp_path / "a").fingerprint == seen[0]


class Failing(PackedRows):
    def sample(self, number, seed):
        if number >= 5:
            raise OSError(f"the disk lost sample {number}")
        return self.row(number)


def test_an_error_surfaces_in_the_step_that_needs_the_batch():
    with Loader(Failing(rows_of(12)), 2, 0, prefetch=8) as loader:
        next(loader), next(loader)
        for _ in range(2):
            with pytest.raises(OSError, match="the disk lost sample 5"):
                next(loader)
        assert loader.state()["sample"] == 4


def test_state_counts_batches_given_not_batches_ready():
    with Loader(PackedRows(rows_of(12)), 2, 0, prefetch=4) as loader:
        for _ in range(200):
            if loader._ready.full():
                break
            time.sleep(0.01)
        assert loader._ready.full() and loader.state()["sample"] == 0
        next(loader)
        assert loader.state()["sample"] == 2


def test_close_ends_the_thread_and_next_says_so():
    before = threading.active_count()
    loader = Loader(PackedRows(rows_of(12)), 2, 0)
    next(loader)
    loader.close(), loader.close()
    assert threading.active_count() == before and loader.state()["sample"] == 2
    with pytest.raises(ValueError, match="the loader is closed"):
        next(loader)


@pytest.mark.parametrize("count, batch_size", [(6, 3), (7, 3), (1, 4)])
def test_eval_batches_give_all_rows_in_order_then_rows_without_weight(count, batch_size):
    rows = rows_of(count)
    batches = list(eval_batches(rows, batch_size))
    out = joined(batches)
    assert all(len(b["tokens"]) == batch_size for b in batches) and len(batches) == -(-count // batch_size)
    for key, value in out.items():
        np.testing.assert_array_equal(value[:count], rows[key])
        assert not value[count:].any() and value.dtype == rows[key].dtype


def test_what_cannot_be_loaded_is_an_error_naming_the_keys(tmp_path):
    with pytest.raises(ValueError, match="data.path has too little text .* train.seq_len"):
        Loader(PackedRows(pack([], 64, 0)), 2, 0)
    with pytest.raises(ValueError, match="train.batch_size=0"):
        Loader(PackedRows(rows_of(2)), 0, 0)
    with pytest.raises(ValueError, match="train.batch_size=6 .* 4 data parallel ranks"):
        Loader(PackedRows(rows_of(2)), 6, 0, 0, 4)
    prefix = make_pair(tmp_path / "a", [4, 1, 9, 30])
    with pytest.raises(ValueError, match="train split has 48 tokens, too few for one sample of train.seq_len=50"):
        pair_rows(prefix, seq_len=50)
    with pytest.raises(ValueError, match="ids from .* to 44 in sample .*, but data.tokenizer has 44 tokens"):
        first_rows(pair_rows(prefix, vocab_size=44), 9, 0)


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_a_micro_batch_has_the_same_rows_on_any_number_of_ranks(micro_batches):
    """Else the losses of a mixture of experts, which are not linear in the batch, would depend on the layout."""
    for ranks in (1, 2, 4):
        each = [rank_rows(24, rank, ranks, micro_batches) for rank in range(ranks)]
        part = 24 // micro_batches
        for m in range(micro_batches):
            rows = [rows[m * part // ranks : (m + 1) * part // ranks] for rows in each]
            assert sum(rows, []) == list(range(m * part, (m + 1) * part))


class Numbered:
    """A blend whose rows hold their number, from which their source follows."""

    names, fingerprint = ("a", "b", "c"), "numbered"

    def __len__(self):
        return 50

    def sample(self, number, seed):
        return {key: value[0] for key, value in rows_of(1, first=number).items()}

    def source_of(self, number):
        return number * number % 3


@pytest.mark.parametrize("rank, ranks", [(0, 1), (1, 2)])
def test_the_sources_are_those_of_the_batch_that_was_given(rank, ranks):
    source = Numbered()
    with Loader(source, 8, 0, rank, ranks, micro_batches=2) as loader:
        for _ in range(3):
            batch = next(loader)
            time.sleep(0.02)  # so that the next ones are built
            assert loader.sources() == (source.names, [source.source_of(int(number)) for number in batch["tokens"][:, 0]])
