"""hf_files.TensorFile and write_tensors: what is read of a file for a slice, and that each array is written as it is, by either writer."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from qwen3 import hf_files
from tests.qwen3.hf_folders import by_hand, peak_memory

MB = 1 << 20
ROWS, COLUMNS = 4096, 4096
TENSOR = ROWS * COLUMNS * 4
SLACK = 12 * MB  # of Python, pytest and what the system maps around a page


@pytest.fixture(params=["the package", "the writer here"])
def either_writer(request, monkeypatch):
    if request.param == "the writer here":
        monkeypatch.setattr(hf_files, "PACKAGE_BYTES", -1)


def forms(dtype):
    base = np.arange(24).astype(dtype).reshape(4, 6)
    return {
        "plain": base,
        "transposed": base.T,
        "strided": base[::2, ::3],
        "reversed": base[::-1, ::-1],
        "one column": base[:, 1],
        "in Fortran order": np.asfortranarray(base),
        "of three dims, swapped": base.reshape(2, 3, 4).swapaxes(0, 2),
        "broadcast": np.broadcast_to(base[0], (3, 6)),
        "empty": base[:0],
        "of no dim": base[2, 3:4].reshape(()),
    }


@pytest.mark.parametrize("code", hf_files.DTYPES)
def test_arrays_that_are_not_contiguous_are_written_right(code, either_writer, tmp_path):
    given = forms(hf_files.DTYPES[code])
    entries = [(name, code, array.shape) for name, array in given.items()]
    hf_files.write_tensors(tmp_path / "x", entries, iter(given.values()))
    judged, theirs, ours = by_hand(tmp_path / "x"), load_file(tmp_path / "x"), hf_files.TensorFile(tmp_path / "x")
    assert judged.keys() == theirs.keys() == ours.entries.keys() == given.keys() and ours.metadata == {"format": "pt"}
    for name, array in given.items():
        for read in (judged[name], theirs[name], ours.array(name)):
            assert read.shape == array.shape and read.tobytes() == array.tobytes(), name
        assert ours.array(name).dtype == array.dtype


def test_the_package_writes_small_files_without_metadata_alone(monkeypatch, tmp_path):
    """Its order of two texts of metadata is random: the same adapter would give other bytes each time."""
    written = []
    monkeypatch.setattr(hf_files, "save", lambda tensors, metadata: written.append(list(tensors)) or b"")
    monkeypatch.setattr(hf_files, "PACKAGE_BYTES", 8)
    array = np.zeros(2, np.float32)
    hf_files.write_tensors(tmp_path / "small", [("a", "F32", (2,))], [array])
    hf_files.write_tensors(tmp_path / "large", [("a", "F32", (2,)), ("b", "F32", (2,))], [array, array])
    files = set()
    for _ in range(20):
        hf_files.write_tensors(tmp_path / "metadata", [("a", "F32", (2,))], [array], {"base_fingerprint": "abc"})
        files.add((tmp_path / "metadata").read_bytes())
    assert written == [["a"]] and len(files) == 1
    assert hf_files.TensorFile(tmp_path / "metadata").metadata == {"format": "pt", "base_fingerprint": "abc"}


def test_a_written_file_has_the_mode_of_any_new_file(either_writer, tmp_path):
    """save_file of release 0.8 makes one that only its owner can read."""
    (tmp_path / "plain").write_bytes(b"")
    hf_files.write_tensors(tmp_path / "x", [("a", "F32", (2,))], [np.zeros(2, np.float32)])
    assert os.stat(tmp_path / "x").st_mode == os.stat(tmp_path / "plain").st_mode


@pytest.mark.parametrize("code", hf_files.DTYPES)
def test_slices_are_those_of_numpy(code, tmp_path):
    """Also those that the package refuses or reads otherwise: empty ones at an end, negative bounds, fewer slices than dims."""
    array = np.arange(5 * 4 * 3).astype(hf_files.DTYPES[code]).reshape(5, 4, 3)
    hf_files.write_tensors(tmp_path / "x", [("a", code, array.shape)], [array])
    file, every = hf_files.TensorFile(tmp_path / "x"), (slice(None), slice(1, 3), slice(0, 0), slice(-2, None), slice(2, 99), slice(3, 3))
    pairs = [(a, b) for a in every for b in every]
    for index in [(), *((a,) for a in every), *pairs, *((slice(None), *pair) for pair in pairs)]:
        part = file.array("a", index)
        assert part.dtype == array.dtype and part.shape == array[index].shape and part.tobytes() == array[index].tobytes(), index
        assert part.flags.writeable and part.flags.c_contiguous
    with pytest.raises(AssertionError):
        file.array("a", (slice(0, 4, 2),))


def test_bfloat16_has_the_type_of_mindspore(tmp_path):
    array = np.arange(6).astype(ml_dtypes.bfloat16).view(hf_files.DTYPES["BF16"])
    hf_files.write_tensors(tmp_path / "x", [("a", "BF16", array.shape)], [array])
    with safe_open(tmp_path / "x", framework="numpy") as theirs:
        assert theirs.get_slice("a").get_dtype() == "BF16" and theirs.get_slice("a")[1:3].tobytes() == array[1:3].tobytes()
    assert hf_files.TensorFile(tmp_path / "x").array("a").dtype == hf_files.DTYPES["BF16"] != np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def large(tmp_path):
    """Three tensors of 64 MB, in a file of holes, which take no room on the disk."""
    header = {n: {"dtype": "F32", "shape": [ROWS, COLUMNS], "data_offsets": [i * TENSOR, (i + 1) * TENSOR]} for i, n in enumerate("abc")}
    text = json.dumps(header).encode()
    path = tmp_path / "large"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + 3 * TENSOR)
    return hf_files.TensorFile(path)


def test_rows_of_a_large_tensor_take_the_memory_of_those_rows(large):
    """8 of 64 MB: the array and the pages that it is copied from."""
    with peak_memory() as peak:
        part = large.array("b", (slice(1024, 1536),))
    assert part.nbytes == 8 * MB and peak[0] < 2 * part.nbytes + SLACK, peak
    assert peak[1] < part.nbytes + SLACK, peak  # the pages are unmapped


def test_columns_of_a_large_tensor_touch_its_pages_but_leave_the_columns_alone(large):
    """1 of 64 MB, 256 bytes of each row of 16 kB. The system maps pages in groups of 64 kB, so all of the tensor is mapped for a moment,
    and none of the tensors beside it. Nothing stays mapped."""
    with peak_memory() as peak:
        part = large.array("b", (slice(None), slice(64, 128)))
    assert part.nbytes == 1 * MB and peak[0] < TENSOR + part.nbytes + SLACK and peak[1] < part.nbytes + SLACK, peak


def test_many_tensors_are_read_one_at_a_time(large):
    """Of three tensors, each of MAPPED_BYTES, the pages of one are mapped and one array is held."""
    large.array("a")  # so that the pages of the libraries, which the system may have put away, are there before the memory is measured
    with peak_memory() as peak:
        for array in large.arrays("abc"):
            assert array.shape == (ROWS, COLUMNS)
            del array
    assert peak[0] < 2 * TENSOR + SLACK and peak[1] < SLACK, peak


def test_a_file_is_opened_once_for_many_small_tensors_and_anew_after_mapped_bytes(tmp_path, monkeypatch):
    names, opened = [f"t{i}" for i in range(6)], []
    array = np.zeros(4, np.float32)
    hf_files.write_tensors(tmp_path / "x", [(name, "F32", (4,)) for name in names], [array] * 6)
    file = hf_files.TensorFile(tmp_path / "x")
    monkeypatch.setattr(hf_files, "safe_open", lambda *args, **options: opened.append(args) or safe_open(*args, **options))
    assert len(list(file.arrays(names))) == 6 and len(opened) == 1
    monkeypatch.setattr(hf_files, "MAPPED_BYTES", 32)
    assert len(list(file.arrays(names))) == 6 and len(opened) == 1 + 3


def test_a_file_that_is_cut_short_after_it_was_opened_is_refused_by_name(tmp_path):
    hf_files.write_tensors(tmp_path / "x", [("a", "F32", (4,))], [np.zeros(4, np.float32)])
    file = hf_files.TensorFile(tmp_path / "x")
    os.truncate(tmp_path / "x", os.path.getsize(tmp_path / "x") - 4)
    with pytest.raises(ValueError, match="x: the safetensors package refuses the file .* fetch it again, or update safetensors"):
        file.array("a")
