"""A machine that loses power while it saves: every state in which its disk can be left has sound checkpoints, none older than promised.

A killed process does not show a missing fsync, because the system still writes what it has. So the file operations of a save are recorded
here. Of a file only what was there at its last fsync is sure to be on the disk. Of a folder the entries at its last fsync are, and any
number of the changes since then may be, in their order.
"""

import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from parallel.checkpoint.files import CheckpointError, steps, write_text
from parallel.checkpoint.read import Reader
from parallel.checkpoint.save import Saver, Settings
from parallel.checkpoint.store import save
from tests.parallel.checkpoint_pieces import piece_of


class Disk:
    """Records the file operations below `root`. Everything has a number, since a name may move and the system uses its own numbers again.

    synced: {number of a file: its bytes at its last fsync}. entries: {number of a folder: every {name: number} since its last fsync}.
    """

    def __init__(self, root, monkeypatch):
        self.root, self.numbers, self.next, self.synced, self.entries, self.folders = Path(root), {}, itertools.count(), {}, {}, set()
        self.real = {name: getattr(os, name) for name in ("fsync", "rename", "remove", "rmdir", "replace")}
        monkeypatch.setattr(os, "fsync", self.fsync)
        for name in ("rename", "remove", "rmdir", "replace"):
            monkeypatch.setattr(os, name, self.noted(name))
        monkeypatch.setattr(shutil, "rmtree", self.rmtree)
        self.states, self.safe = [], None
        self.scan()
        for folder in list(self.entries):
            self.entries[folder] = self.entries[folder][-1:]

    def number(self, path):
        return self.numbers.setdefault(os.lstat(path).st_ino, next(self.next))

    def scan(self):
        """Notes the entries of every folder as they are, and the states in which the disk may be from here on."""
        for place, folders, names in os.walk(self.root):
            found = {name: self.number(os.path.join(place, name)) for name in (*folders, *names)}
            self.folders |= {found[name] for name in folders}
            versions = self.entries.setdefault(self.number(place), [{}])
            if versions[-1] != found:
                versions.append(found)
        top = self.number(self.root)
        for which in (0, -1):  # of the folders below: their oldest and their newest entries
            for lists in itertools.product(*(self.entries[n] for n in self.moving(top))):
                state = self.tree(top, dict(zip(self.moving(top), lists)), which)
                if (state, self.safe) not in self.states:
                    self.states.append((state, self.safe))

    def moving(self, top):
        """The folders of whose entries every version is tried: the root and the one that holds the checkpoints."""
        inner = self.entries[top][-1].get("checkpoints")
        return [top] if inner is None else [top, inner]

    def tree(self, folder, chosen, which):
        """{name: bytes, or the tree of a folder} after a crash; a file that was never synced is empty."""
        found = chosen.get(folder) or self.entries.get(folder, [{}])[which]
        return {
            name: self.tree(number, chosen, which) if number in self.folders else self.synced.get(number, b"")
            for name, number in found.items()
        }

    def fsync(self, handle):
        self.scan()
        path = os.readlink(f"/proc/self/fd/{handle}")
        if Path(path) == self.root or self.root in Path(path).parents:
            number = self.number(path)
            if os.path.isdir(path):
                self.entries[number] = self.entries[number][-1:]
            else:
                self.synced[number] = Path(path).read_bytes()
        self.real["fsync"](handle)
        self.scan()

    def noted(self, name):
        def call(path, *args, **kwargs):
            self.scan()
            gone = os.lstat(path).st_ino if name in ("remove", "rmdir") and os.path.lexists(path) else None
            self.real[name](path, *args, **kwargs)
            self.numbers.pop(gone, None)
            self.scan()

        return call

    def rmtree(self, path, ignore_errors=False):
        for place, _, names in os.walk(path, topdown=False):
            for name in names:
                os.remove(os.path.join(place, name))
            os.rmdir(place)


def made(tree, folder):
    """Writes a state as files."""
    folder.mkdir()
    for name, value in tree.items():
        if isinstance(value, dict):
            made(value, folder / name)
        else:
            (folder / name).write_bytes(value)


def array_of(step):
    return np.full((3, 500), step, np.float32)


@pytest.mark.parametrize("keep_last", [1, 2])
def test_whatever_reached_the_disk_is_sound_and_no_older_than_was_promised(keep_last, tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    disk = Disk(run, monkeypatch)
    saver = Saver(str(run), 0, 1, "abcdef", Settings(keep_last=keep_last, asynchronous=False))
    for step in (1, 2, 3):
        assert saver.save(step, lambda copy, step=step: [piece_of("params/w", array_of(step))], {"step": step})
        disk.safe = step
        disk.scan()
    monkeypatch.undo()
    seen = set()
    for i, (state, safe) in enumerate(disk.states):
        made(state, tmp_path / str(i))
        found = steps(str(tmp_path / str(i)))
        assert not safe or (found and found[-1] >= safe), f"state {i}: step {safe} was reported safe, and the disk has {found}"
        for step in found:
            folder = tmp_path / str(i) / "checkpoints" / f"step_{step:06}"
            reader = Reader(str(folder))
            assert reader.verify() == [] and reader.meta == {"step": step}
            assert np.array_equal(reader.read("params/w"), array_of(step))
        seen.add(tuple(found))
    assert {(), (1,), (3,)} <= seen or {(), (1,), (1, 2), (2, 3)} <= seen, seen
    assert len(disk.states) > 30


def test_a_text_file_is_the_old_or_the_new_one_and_on_disk_once_written(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    disk = Disk(folder, monkeypatch)
    write_text(folder / "a.json", "old")
    disk.safe = "old"
    disk.scan()
    write_text(folder / "a.json", "new")
    disk.safe = "new"
    disk.scan()
    for state, safe in disk.states:
        text = state.get("a.json")
        assert text in {None: (None, b"old"), "old": (b"old", b"new"), "new": (b"new",)}[safe]


@pytest.mark.parametrize("change", [lambda data: data + b"\0", lambda data: data[:-1]], ids=["longer", "shorter"])
def test_opening_checks_the_size_of_every_file(change, tmp_path):
    """Before anything is read, so that a run that goes on reports it at once."""
    folder = tmp_path / "saved"
    save(str(folder), [piece_of("params/w", array_of(1))], {})
    for path in [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]:
        content = path.read_bytes()
        path.write_bytes(change(content))
        with pytest.raises(CheckpointError, match=f"{path.name} has {len(change(content))} bytes instead of {len(content)}"):
            Reader(str(folder))
        path.write_bytes(content)
    Reader(str(folder))
