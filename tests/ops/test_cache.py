"""The folder of built libraries: nobody else's files are loaded, and damaged ones are built again."""

import os
import stat
from pathlib import Path
from unittest import mock

import pytest

from ops import cache


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def build(file):
    file.write_bytes(b"built")


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.fixture
def no_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def test_folders_and_libraries_are_the_users_alone_whatever_the_umask(home, no_umask):
    folder = cache.folder("kernels")
    assert folder == home / "qwen3_mindspore" / "kernels"
    path = Path(cache.library(folder / "a.so", build))
    assert [mode(p) for p in (home, folder.parent, folder, path)] == [0o700] * 4


def test_a_relative_cache_home_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert cache.folder("kernels") == tmp_path / ".cache" / "qwen3_mindspore" / "kernels"
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("which", ["qwen3_mindspore", "qwen3_mindspore/kernels"])
def test_a_folder_of_another_user_is_refused(home, which):
    cache.folder("kernels")
    real = os.lstat

    def of_another(path, **options):
        found = real(path, **options)
        if str(path) != str(home / which):
            return found
        return os.stat_result((found.st_mode, found.st_ino, found.st_dev, found.st_nlink, 12345, *tuple(found)[5:]))

    with mock.patch.object(os, "lstat", of_another), pytest.raises(RuntimeError, match="belongs to user 12345.*set XDG_CACHE_HOME"):
        cache.folder("kernels")


def test_files_of_a_folder_that_others_could_write_to_go(home):
    folder = cache.folder("kernels")
    (folder / "planted.so").write_bytes(b"planted")
    (folder / "more").mkdir()
    folder.chmod(0o777)
    assert cache.folder("kernels") == folder
    assert not list(folder.iterdir()) and mode(folder) == 0o700


def damaged(path):
    path.write_bytes(b"buil")


def replaced(path):
    path.write_bytes(b"other")


def without_digest(path):
    path.with_suffix(".sha256").unlink()


def with_other_digest(path):
    path.with_suffix(".sha256").write_bytes(b"\xff\xfe")


def writable(path):
    path.chmod(0o777)


def linked(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize("harm", [damaged, replaced, without_digest, with_other_digest, writable, linked])
def test_a_library_that_is_not_the_one_that_was_built_is_built_again(home, harm):
    path, builds = cache.folder("kernels") / "a.so", []

    def counted(file):
        builds.append(file)
        build(file)

    for _ in range(2):
        assert cache.library(path, counted) == str(path)
    assert len(builds) == 1
    harm(path)
    for _ in range(2):
        cache.library(path, counted)
        assert path.read_bytes() == b"built" and not path.is_symlink() and mode(path) == 0o700
    assert len(builds) == 2


def test_a_build_that_fails_leaves_no_file(home):
    path = cache.folder("kernels") / "a.so"

    def fails(file):
        file.write_bytes(b"half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cache.library(path, fails)
    assert [file.name for file in path.parent.iterdir()] == ["a.lock"]
