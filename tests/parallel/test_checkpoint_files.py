"""What is on the disk: damage is found, a full disk or a vanished folder loses nothing, and what is killed leaves what was there."""

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorstore

from parallel.checkpoint import store as checkpoint_store
from parallel.checkpoint.files import CheckpointError, clean, remove, step_folder, steps, superseded
from parallel.checkpoint.read import Reader, find
from parallel.checkpoint.save import Saver, Settings
from parallel.checkpoint.store import Piece, chunk_shape, save
from tests.parallel.checkpoint_pieces import piece_of

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(3)
ARRAYS = {
    "params/layers.0.attention.wq": RNG.standard_normal((96, 40)).astype(np.float32),
    "params/embed": RNG.standard_normal((31, 8)).astype(ml_dtypes.bfloat16),
    "m/embed": np.zeros((31, 8), np.float32),
    "step": np.array(7, np.int64),
}


def save_arrays(folder, arrays=ARRAYS, **kwargs):
    save(str(folder), (piece_of(name, data) for name, data in arrays.items()), {"step": 7}, **kwargs)
    return str(folder)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_arrays_come_back_bit_for_bit_and_any_reader_of_tensorstore_opens_them(compression, tmp_path):
    folder = save_arrays(tmp_path / "saved", compression=compression)
    reader = Reader(folder)
    assert reader.names == sorted(ARRAYS) and reader.meta == {"step": 7} and reader.verify() == []
    for name, want in ARRAYS.items():
        got = reader.read(name)
        assert (
            got.dtype == want.dtype
            and want.dtype.name == reader.dtype(name)
            and got.shape == reader.shape(name)
            and got.tobytes() == want.tobytes()
        )
    part = reader.read("params/layers.0.attention.wq", (slice(90, 96), slice(3, 5)))
    assert np.array_equal(part, ARRAYS["params/layers.0.attention.wq"][90:, 3:5])
    kvstore = {"driver": "ocdbt", "base": f"file://{folder}/", "path": "params/embed/"}
    plain = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
    assert np.array_equal(plain.read().result(), ARRAYS["params/embed"])
    assert len([path for path in Path(folder).rglob("*") if path.is_file()]) == 4  # two indices, the values, the manifest


def test_chunks_are_bounded_and_divide_the_parts_of_ranks():
    for shape in [(151936, 1024), (128, 2048, 768), (1, 40_000_000), (7919, 4096)]:
        chunk = chunk_shape(shape, 4)
        assert all(n % c == 0 for n, c in zip(shape, chunk)) and np.prod(chunk) * 4 <= checkpoint_store.CHUNK_BYTES
    assert chunk_shape((24, 8), 4) == (24, 8) and chunk_shape((), 4) == ()


def test_the_end_of_a_padded_dim_belongs_to_the_last_rank_with_elements(tmp_path):
    """61 rows over 4 ranks, as 16, 16, 16 and 13."""
    data, folder = RNG.standard_normal((61, 6)).astype(np.float32), str(tmp_path / "tmp")
    parts = [Piece("params/embed", (61, 6), (16, 6), (16 * r, 0), data[16 * r : 16 * r + 16]) for r in range(4)]
    reports = [checkpoint_store.write_part(folder, rank, [part]) for rank, part in enumerate(parts)]
    with pytest.raises(CheckpointError, match="wrote 270 of the 366 elements of array params/embed"):
        checkpoint_store.commit(folder, str(tmp_path / "saved"), reports[:1] + reports[2:], {})
    checkpoint_store.commit(folder, str(tmp_path / "saved"), reports, {})
    assert np.array_equal(Reader(str(tmp_path / "saved")).read("params/embed"), data)


def read_all(folder):
    reader = Reader(folder)
    return {name: reader.read(name).tobytes() for name in reader.names}


def test_every_flipped_bit_and_every_cut_is_found(tmp_path):
    """A bit of each stretch of each file, cuts, and files that are gone: opening and reading all is an error."""
    folder = save_arrays(tmp_path / "saved")
    tried = 0
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        content = path.read_bytes()
        for place in np.unique(np.linspace(0, 8 * len(content) - 1, 150).astype(int) ^ RNG.integers(0, 8)):
            if place < 8 * len(content):
                damaged = bytearray(content)
                damaged[place // 8] ^= 1 << (place % 8)
                path.write_bytes(damaged)
                with pytest.raises(CheckpointError, match="saved"):
                    read_all(folder)
                tried += 1
        for length in (0, 1, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            with pytest.raises(CheckpointError, match="saved"):
                read_all(folder)
        path.unlink()
        with pytest.raises((CheckpointError, FileNotFoundError), match="saved"):
            read_all(folder)
        path.write_bytes(content)
    assert tried > 500 and Reader(folder).verify() == []


def test_verify_names_the_array_and_a_rank_reads_only_what_it_needs(tmp_path):
    folder, data = str(tmp_path / "tmp"), RNG.standard_normal((64, 32)).astype(np.float32)
    parts = [Piece("params/w", (64, 32), (32, 32), (32 * r, 0), data[32 * r : 32 * r + 32]) for r in range(2)]
    reports = [checkpoint_store.write_part(folder, rank, [part]) for rank, part in enumerate(parts)]
    checkpoint_store.commit(folder, str(tmp_path / "saved"), reports, {})
    (values,) = (tmp_path / "saved" / "rank_00001" / "d").iterdir()
    values.write_bytes(bytes(len(values.read_bytes())))
    reader = Reader(str(tmp_path / "saved"))
    assert np.array_equal(reader.read("params/w", (slice(0, 32), slice(8, 20))), data[:32, 8:20])  # of the other rank's file
    (wrong,) = reader.verify()
    assert wrong.startswith(f"array params/w of {tmp_path / 'saved'}: cannot read the checkpoint")
    with pytest.raises(CheckpointError, match="take an older checkpoint: remove this folder"):
        reader.read("params/w", (slice(31, 33), slice(0, 1)))


def saver_of(run, **settings):
    os.makedirs(run / "checkpoints", exist_ok=True)
    return Saver(str(run), 0, 1, "abcdef", Settings(**settings))


def save_step(saver, step, value, size=1000):
    saver.save(step, lambda copy: [piece_of("params/w", np.full(size, value, np.float32))], {"step": step})


def test_the_newest_and_the_marked_are_kept(tmp_path):
    saver = saver_of(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 10):
        save_step(saver, step, step)
    assert saver.wait() and steps(str(tmp_path)) == [4, 8, 9] and find(str(tmp_path)) == step_folder(str(tmp_path), 9)
    assert superseded([1, 2, 3], 0, 0) == [] and superseded([1, 2, 3], 1, 0) == [1, 2]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_000004", "step_000008", "step_000009"]


def test_a_step_waits_for_the_copy_alone(tmp_path, monkeypatch):
    """The background is held up, and the arrays change in place."""
    go, write = threading.Event(), checkpoint_store.write_part
    monkeypatch.setattr(checkpoint_store, "write_part", lambda *args: go.wait(20) and write(*args))
    saver, state = saver_of(tmp_path), np.ones(1000, np.float32)
    saver.save(1, lambda copy: [piece_of("params/w", state.copy())], {})
    state *= 2
    assert steps(str(tmp_path)) == []
    go.set()
    assert saver.wait() and steps(str(tmp_path)) == [1]
    assert np.array_equal(Reader(step_folder(str(tmp_path), 1)).read("params/w"), np.ones(1000, np.float32))
    saver.save(1, None, {})  # it is there already


FULL = """
import json, sys
import numpy as np
from parallel.checkpoint.save import Saver, Settings
from tests.parallel.checkpoint_pieces import piece_of
from parallel.checkpoint.files import steps
run, said = sys.argv[1], []
for on_error in ("stop", "continue"):
    saver = Saver(run, 0, 1, on_error.encode().hex(), Settings(on_error=on_error))
    saver.save(2, lambda copy: [piece_of("params/w", np.random.default_rng(0).standard_normal(3_000_000))], {})
    try:
        said.append(str(saver.wait()))
    except ValueError as error:
        said.append(str(error))
print(json.dumps([said, steps(run)]))
"""


@pytest.mark.parametrize("how", ["tmpfs", "limit"])
def test_a_full_disk_loses_nothing(how, tmp_path):
    """A small tmpfs where this user may mount one, and everywhere a limit on the size of files, which is ENOSPC's twin EFBIG."""
    run, mounted = tmp_path / "disk", False
    run.mkdir()
    if how == "tmpfs":
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", run], capture_output=True).returncode == 0
    try:
        saver = saver_of(run)
        save_step(saver, 1, 1.0)
        assert saver.wait()
        limit = None if mounted else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))
        done = subprocess.run([sys.executable, "-c", FULL, run], cwd=ROOT, capture_output=True, text=True, preexec_fn=limit, check=True)
        (stopped, went_on), found = json.loads(done.stdout)
        assert f"{run}/checkpoints/.step_000002" in stopped and "the disk or a quota is full" in stopped and "make room" in stopped
        assert "The checkpoints before this one are untouched" in stopped and ("No space left" in stopped or not mounted)
        assert went_on == "False" and "The run goes on, as checkpoint.on_error=continue" in done.stderr
        assert found == [1] and os.listdir(run / "checkpoints") == ["step_000001"] and Reader(step_folder(str(run), 1)).verify() == []
        save_step(saver, 2, 2.0)  # and there is room again
        assert saver.wait() and steps(str(run)) == [1, 2]
    finally:
        if mounted:
            subprocess.run(["umount", run], check=True)


@pytest.mark.parametrize(
    "error, said",
    [
        (PermissionError(13, "Permission denied"), "permission is denied .* give this user the right to write there"),
        (OSError(30, "Read-only file system"), "the disk is read-only .* mount it for writing"),
        (OSError(28, "No space left on device"), "the disk or a quota is full .* make room"),
        (
            ValueError("PERMISSION_DENIED: Error writing x [os_error_code='13'] [source locations='tensorstore/y.cc:3']"),
            "permission is denied",
        ),
        (RuntimeError("odd"), r"cannot write the checkpoint \(odd\)"),
    ],
)
def test_an_error_of_the_disk_says_where_and_what_helps(error, said, tmp_path, monkeypatch):
    """Injected, as nothing is denied to root."""
    saver = saver_of(tmp_path)
    save_step(saver, 1, 1.0)
    assert saver.wait()

    def refuse(*_):
        raise error

    for name in ("_write_batch", "sync_file", "_write_manifest"):
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=f"step_000002.*{said}"):
            patch.setattr(checkpoint_store, name, refuse)
            save_step(saver, 2, 2.0)
            save_step(saver, 3, 3.0)  # where the error of the one before comes out
        assert os.listdir(tmp_path / "checkpoints") == ["step_000001"]
    save_step(saver, 2, 2.0)
    assert saver.wait() and steps(str(tmp_path)) == [1, 2]


def test_a_vanished_folder_is_an_error_and_not_made_anew(tmp_path):
    saver = saver_of(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    save_step(saver, 1, 1.0)
    with pytest.raises(CheckpointError, match="run/checkpoints: cannot write the checkpoint: the folder has vanished; put it back"):
        saver.wait()
    assert not (tmp_path / "run").exists()


def test_ranks_that_do_not_write_are_named(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    savers = [Saver(str(tmp_path), rank, 3, "abcdef", Settings(timeout_s=0.3)) for rank in range(3)]
    for saver in savers[:2]:
        save_step(saver, 1, 1.0)
    with pytest.raises(CheckpointError, match=r"not saved: ranks 2 have not written their parts within checkpoint.timeout_s=0.3; see"):
        savers[0].wait()
    assert steps(str(tmp_path)) == []


def test_leftovers_go_and_a_deleted_checkpoint_is_none_at_any_moment(tmp_path, monkeypatch):
    saver = saver_of(tmp_path)
    save_step(saver, 1, 1.0)
    assert saver.wait()
    folder = tmp_path / "checkpoints"
    (folder / ".step_000002.abc0001.tmp" / "rank_00000").mkdir(parents=True)
    (folder / "notes").mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # killed just then
    remove(str(folder / "step_000001"))
    assert steps(str(tmp_path)) == []
    monkeypatch.undo()
    clean(str(tmp_path))
    assert os.listdir(folder) == ["notes"]


def test_what_is_no_checkpoint_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no checkpoint: it has no manifest.json"):
        Reader(str(tmp_path))
    (tmp_path / "manifest.json").write_text('{"format": "x"}')
    with pytest.raises(CheckpointError, match="manifest.json is damaged"):
        Reader(str(tmp_path))
    other = {"format": checkpoint_store.FORMAT, "version": 99}
    (tmp_path / "manifest.json").write_text(json.dumps({**other, "digest": checkpoint_store.digest(other)}))
    with pytest.raises(CheckpointError, match="version 99; this program reads 1"):
        Reader(str(tmp_path))
    save_arrays(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="saved exists already"):
        save_arrays(tmp_path / "saved")


@pytest.mark.extended
@pytest.mark.parametrize("rounds", [40, pytest.param(240, marks=pytest.mark.slow)])
def test_processes_killed_as_they_save_lose_nothing(rounds, tmp_path):
    command = [sys.executable, "-m", "tests.parallel.checkpoint_faults", tmp_path / "run", str(rounds), str(rounds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)
    assert counts["one"] + counts["all"] == rounds and counts["one"] and counts["all"] and counts["steps"] > rounds / 4, counts
