"""The indexed dataset: Megatron-LM's bytes both ways, and nothing but an error from a file that is not whole."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from experiments.data.megatron import DTYPES, HEADER, IndexedDataset, Writer, best_dtype

GOLDEN = Path(__file__).parents[2] / "golden" / "megatron"
CORPORA = json.loads((GOLDEN / "manifest.json").read_text())["corpora"]


def pair(prefix):
    return [Path(f"{prefix}{end}").read_bytes() for end in (".bin", ".idx")]


def write(prefix, documents, dtype=np.int32):
    with Writer(prefix, dtype) as out:
        for sequences in documents:
            out.add_document(sequences)
    return prefix


def random_documents(seed, dtype):
    """Documents of 0 to 3 sequences of 0 to 20 values over the whole range of dtype."""
    rng = np.random.default_rng(seed)
    draw = lambda n: (
        rng.integers(0, 256, n * dtype.itemsize, np.uint8).view(dtype) if dtype.kind in "iu" else rng.normal(size=n).astype(dtype)
    )
    return [[draw(rng.integers(0, 20)) for _ in range(rng.integers(0, 4))] for _ in range(rng.integers(1, 12))]


@pytest.mark.parametrize("name", CORPORA)
def test_reads_what_megatron_wrote(name):
    data, expected = IndexedDataset(GOLDEN / "corpora" / name), np.load(GOLDEN / "corpora" / f"{name}.npz")
    assert data.dtype == CORPORA[name]["bin_dtype"] == best_dtype(CORPORA[name]["vocab_size"]) and data.modes is None
    assert len(data) == CORPORA[name]["sequences"] and len(data.document_indices) == CORPORA[name]["documents"] + 1
    for key, value in (("lengths", "sequence_lengths"), ("offsets", "sequence_pointers"), ("document_indices", "document_indices")):
        np.testing.assert_array_equal(getattr(data, key), expected[value])
    ends = np.cumsum(expected["sequence_lengths"])[:-1]
    for i, sequence in enumerate(np.split(expected["tokens"], ends)):
        np.testing.assert_array_equal(data.tokens(i), sequence)


@pytest.mark.parametrize("name", CORPORA)
def test_writes_the_bytes_that_megatron_writes(tmp_path, name):
    source = GOLDEN / "corpora" / name
    expected = np.load(f"{source}.npz")
    sequences = iter(np.split(expected["tokens"], np.cumsum(expected["sequence_lengths"])[:-1]))
    documents = [[next(sequences).tolist() for _ in range(n)] for n in expected["sequences_per_document"]]
    write(tmp_path / "x", documents, best_dtype(CORPORA[name]["vocab_size"]))
    assert pair(tmp_path / "x") == pair(source)
    assert sorted(os.listdir(tmp_path)) == ["x.bin", "x.idx"]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("seed", range(3))
def test_round_trip(tmp_path, dtype, seed):
    documents = random_documents(seed, np.dtype(dtype))
    data = IndexedDataset(write(str(tmp_path / "x"), documents, dtype))
    sequences = [s for d in documents for s in d]
    assert data.dtype == dtype and data.lengths.dtype == np.int32 and data.lengths.tolist() == [len(s) for s in sequences]
    assert data.document_indices.tolist() == np.cumsum([0, *map(len, documents)]).tolist()
    for i, s in enumerate(sequences):
        np.testing.assert_array_equal(data.tokens(i), s)
        for cut in ((2,), (1, 3), (-2,), (3, 1), (0, -1), (5, 99)):
            np.testing.assert_array_equal(data.tokens(i, *cut), s[slice(*cut) if len(cut) > 1 else slice(cut[0], None)])
        assert not data.tokens(i).flags.writeable
    for i in (-1, len(sequences)):
        with pytest.raises(IndexError, match=f"sequence {i} of .*{len(sequences)}"):
            data.tokens(i)


def test_modes_are_read(tmp_path):
    write(tmp_path / "x", [[[1, 2], [3]]])
    with open(tmp_path / "x.idx", "ab") as file:
        file.write(bytes([0, 1]))
    assert IndexedDataset(tmp_path / "x").modes.tolist() == [0, 1]


def test_no_document_is_a_pair_too(tmp_path):
    assert len(IndexedDataset(write(tmp_path / "x", []))) == 0


@pytest.mark.parametrize("dtype, values, words", [
    (np.uint16, [1, 65536], "id 65536 does not fit dtype=uint16"),
    (np.uint16, [-1, 5], "id -1 does not fit"),
    (np.int32, [2**31], "id 2147483648"),
    (np.int32, [0.5], "float64 do not fit"),
    (np.int32, [[1]], r"shape \(1, 1\)"),
    (np.float32, ["a"], "do not fit dtype=float32"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_and_nothing_is_left(tmp_path, dtype, values, words):
    with pytest.raises(ValueError, match=words):
        write(tmp_path / "x", [[[1, 2]], [values]], dtype)
    assert not os.listdir(tmp_path)


def test_document_not_ended_and_dtypes_without_a_code_are_refused(tmp_path):
    with pytest.raises(ValueError, match="1 sequences of a document not ended; call end_document"):
        with Writer(tmp_path / "x", np.int32) as out:
            out.add([1])
    with pytest.raises(ValueError, match="dtype=uint32 is none of .*best_dtype"):
        Writer(tmp_path / "x", np.uint32)
    assert not os.listdir(tmp_path)


def test_error_keeps_the_older_pair_and_success_replaces_it(tmp_path):
    write(tmp_path / "x", [[[1, 2, 3]]])
    before = pair(tmp_path / "x")
    with pytest.raises(KeyError):
        with Writer(tmp_path / "x", np.int32) as out:
            out.add_document([[4]])
            raise KeyError
    assert pair(tmp_path / "x") == before and len(os.listdir(tmp_path)) == 2
    write(tmp_path / "x", [[[4]]])
    assert IndexedDataset(tmp_path / "x").flat.tolist() == [4]


def test_second_writer_of_a_prefix_is_refused(tmp_path):
    with Writer(tmp_path / "x", np.int32) as out:
        out.add_document([[1]])
        with pytest.raises(ValueError, match="another process is writing it"):
            Writer(tmp_path / "x", np.int32)
    assert IndexedDataset(tmp_path / "x").flat.tolist() == [1]


KILLED = """
import os, signal, sys
from experiments.data.megatron import Writer
real = os.replace
def dies(step):
    def replace(*args):
        if step == 1:
            real(*args)
        os.kill(os.getpid(), signal.SIGKILL)
    return replace
with Writer(sys.argv[1], "int32") as out:
    for _ in range(1000):
        out.add_document([range(1000)])
    if sys.argv[2] == "adding":
        print("ready", flush=True)
        sys.stdin.read()
    os.replace = dies(int(sys.argv[2] == "between"))
"""


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("when", ["adding", "before", "between"])
def test_kill_leaves_nothing_new_that_opens_and_the_next_writer_cleans_up(tmp_path, when, older):
    prefix = tmp_path / "x"
    if older:
        write(prefix, [[[7]]])
    child = subprocess.Popen([sys.executable, "-c", KILLED, prefix, when], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    if when == "adding":
        assert child.stdout.readline() == b"ready\n"
        child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert {"adding": "x.bin.partial", "before": "x.bin.partial", "between": "x.idx.partial"}[when] in os.listdir(tmp_path)
    if older and when == "adding":
        assert IndexedDataset(prefix).flat.tolist() == [7]
    else:
        with pytest.raises(FileNotFoundError):
            IndexedDataset(prefix)
    write(prefix, [[[8]]])
    assert IndexedDataset(prefix).flat.tolist() == [8] and sorted(os.listdir(tmp_path)) == ["x.bin", "x.idx"]


def test_memory_of_a_writer_does_not_grow_with_the_documents(tmp_path):
    ids, held = np.arange(3, dtype=np.int32), []
    with Writer(tmp_path / "a", np.int32) as out:
        tracemalloc.start()
        for _ in range(3):
            for _ in range(30_000):
                out.add(ids)
                out.end_document()
            held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert held[2] - held[0] < 100_000, held  # 12 bytes each would be 720,000
    pair = IndexedDataset(tmp_path / "a")
    assert len(pair) == 90_000 and (pair.document_indices == np.arange(90_001)).all() and (pair.offsets == np.arange(90_000) * 12).all()


def header(magic=b"MMIDIDX\0\0", version=1, code=4, count=2, documents=2):
    return HEADER.pack(magic, version, code, count, documents)


def body(lengths=(2, 1), offsets=(0, 8), documents=(0, 2)):
    return struct.pack(f"<{len(lengths)}i{len(offsets)}q{len(documents)}q", *lengths, *offsets, *documents)


@pytest.mark.parametrize("idx, words", [
    (b"", "0 bytes, shorter than the header"),
    (header()[:-1], "33 bytes, shorter"),
    (header(magic=b"TNTIDX\0\0\0") + body(), "no Megatron-LM index"),
    (header(version=2) + body(), "version 2"),
    (header(code=0) + body(), "dtype code 0"),
    (header(code=9) + body(), "dtype code 9"),
    (header(count=2**64 - 1) + body(), "18446744073709551615 sequences"),
    (header(documents=2**62) + body(), "document indices need"),
    (header() + body()[:-1], "cut or damaged"),
    (header() + body() + b"\0", "cut or damaged"),
    (header() + body(lengths=(-2, 1)), "sequence 0 has length -2"),
    (header() + body(offsets=(0, 4)), "sequence 1 is at byte 4, but those before it end at 8"),
    (header() + body(offsets=(0, -8)), "sequence 1 is at byte -8"),
    (header() + body(offsets=(2**62, 8)), "sequence 0 is at byte"),
    (header() + body(documents=(0, 1)), "document indices are 0 to 1, not 0 to 2"),
    (header() + body(documents=(1, 2)), "document indices are 1 to 2"),
    (header(documents=4) + body(documents=(0, 2, 1, 2)), "document 1 ends before"),
    (header(documents=5) + body(documents=(0, 2**63 - 1, -(2**63), -1, 2)), "document 1 ends before"),
    (header(documents=0) + body(documents=()), "document indices are none"),
    (header() + body(lengths=(2, 2)), "12 bytes, but .* describes 4 tokens of 4 bytes"),
    (header() + body(lengths=(2, 0)), "12 bytes, but .* describes 2 tokens"),
    (header() + body(lengths=(2, 2**31 - 1)), "describes 2147483649 tokens"),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_damage_is_an_error_that_names_the_file_and_the_damage(tmp_path, idx, words):
    write(tmp_path / "x", [[[1, 2], [3]]])
    assert (tmp_path / "x.idx").read_bytes() == header() + body()
    (tmp_path / "x.idx").write_bytes(idx)
    with pytest.raises(ValueError, match=f"{tmp_path}/x.*{words}"):
        IndexedDataset(tmp_path / "x")


def test_missing_files_and_what_is_no_file_are_named(tmp_path):
    write(tmp_path / "x", [[[1, 2], [3]]])
    (tmp_path / "x.bin").unlink()
    with pytest.raises(FileNotFoundError, match="x.bin does not exist"):
        IndexedDataset(tmp_path / "x")
    os.mkfifo(tmp_path / "x.bin")
    with pytest.raises(ValueError, match="x.bin is not a regular file"):
        IndexedDataset(tmp_path / "x")


def mutated(raw, rng):
    """raw with bits flipped, a part cut out or put in, or a field set to a value that breaks careless readers."""
    raw = bytearray(raw)
    kind = rng.integers(4)
    if kind == 0:
        for at in rng.integers(0, len(raw), rng.integers(1, 4)):
            raw[at] ^= 1 << rng.integers(8)
    elif kind == 1:
        del raw[rng.integers(len(raw)) :]
    elif kind == 2:
        at = rng.integers(len(raw))
        raw[at : at + rng.integers(0, 9)] = rng.bytes(rng.integers(0, 9))
    else:
        value = int(rng.choice([0, 1, 2**31 - 1, 2**31, 2**32, 2**61, 2**62, 2**63 - 1]))
        at = int(rng.choice([18, 26, int(rng.integers(34, len(raw) - 8))]))
        raw[at : at + 8] = struct.pack("<Q", value * int(rng.choice([1, 2**64 - 1])) % 2**64)
    return bytes(raw)


@pytest.mark.parametrize("name", ["c", "d"])
def test_mutated_index_is_an_error_or_reads_within_the_file(tmp_path, name):
    rng, started, opened = np.random.default_rng(0), time.monotonic(), 0
    original = pair(GOLDEN / "corpora" / name)
    (tmp_path / "x.bin").write_bytes(original[0])
    tracemalloc.start()
    for _ in range(1500):
        (tmp_path / "x.idx").write_bytes(mutated(original[1], rng))
        try:
            data = IndexedDataset(tmp_path / "x")
        except ValueError as e:
            assert str(tmp_path) in str(e)
            continue
        opened += 1
        assert sum(len(data.tokens(i)) for i in range(len(data))) == len(data.flat) == len(original[0]) // data.dtype.itemsize
        assert data.document_indices[-1] == len(data)
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()
    assert 0 < opened < 300 and time.monotonic() - started < 60


def test_megatron_core_reads_what_is_written_here(tmp_path):
    """Live: with megatron-core installed."""
    peer = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    for code, dtype in DTYPES.items():
        documents = random_documents(code, np.dtype(dtype)) + [[np.ones(3, dtype)]]
        prefix = write(str(tmp_path / f"x{code}"), documents, dtype)
        theirs, ours = peer.IndexedDataset(prefix), IndexedDataset(prefix)
        assert len(theirs) == len(ours) and theirs.index.dtype == dtype
        np.testing.assert_array_equal(theirs.document_indices, ours.document_indices)
        for i in range(len(ours)):
            np.testing.assert_array_equal(theirs[i], ours.tokens(i))
