"""Saving behind the steps: each rank writes its part in a thread, and rank 0 commits once all parts are on disk.

Ranks find each other through files in the folder that is being written, so that no collective runs beside those of the steps. Nothing here
imports MindSpore.
"""

import contextlib
import json
import os
import shutil
import sys
import threading
import time
from dataclasses import dataclass

from parallel.checkpoint import store as checkpoint_store
from parallel.checkpoint.files import CheckpointError, reason, remove, step_folder, steps, superseded, temporary, write_json, write_text

POLL_S = 0.05


@dataclass(frozen=True)
class Settings:
    """The config's section `checkpoint`, as far as writing goes. timeout_s: for all ranks to have written."""

    keep_last: int = 3
    keep_every: int = 0
    compression: str = "none"
    asynchronous: bool = True
    on_error: str = "stop"
    timeout_s: float = 1800.0


class Saver:
    """Writes the checkpoints of a run; every rank has one. At most one save is under way; the next waits for it.

    rank, world: this process and how many. token: a hexadecimal text that all ranks of this start have in common, and no other start.
    agree(numbers) -> their sums over the ranks, which all call it at the same places; None for processes that cannot, of which each then
    learns of its own errors alone, and rank 0 of all. saved: the step of the last checkpoint.
    """

    def __init__(self, run, rank, world, token, settings, agree=None, saved=None):
        self.run, self.rank, self.world, self.token, self.settings = run, rank, world, token, settings
        self._agree = agree or (lambda numbers: numbers)
        self.saved, self._step, self._folder, self._attempts = saved, None, None, 0
        self._thread, self._error, self._cancel = None, None, threading.Event()

    def save(self, step, make_pieces, meta):
        """Saves in the background, once make_pieces(copy=True) has copied what this rank writes; without settings.asynchronous, here, and
        make_pieces(copy=False) need not copy. meta: rank 0's counts.

        Returns whether the checkpoint before this one is safe; without settings.asynchronous, whether this one is. Raises CheckpointError
        on all ranks where one failed, unless settings.on_error is "continue". A step that is saved already is not saved again.
        """
        well = self.wait()
        if step == self.saved:
            return well
        self._attempts, self._step = self._attempts + 1, step
        self._folder = temporary(self.run, step, f"{self.token}{self._attempts:04x}")
        target = (self._write, self._folder, make_pieces(copy=self.settings.asynchronous), step, meta)
        self._error, self._cancel = None, threading.Event()
        self._thread = threading.Thread(target=self._guarded, args=target, daemon=True, name="checkpoint")
        self._thread.start()
        return well if self.settings.asynchronous else self.wait()

    def failed(self):
        """Whether this rank's part of a save has failed, as far as is known."""
        return self._error is not None

    def wait(self):
        """Waits for the save under way, on all ranks, and deals with its error as save() says. Returns False after one."""
        if self._thread is None:
            return True
        while True:
            running, failed = self._agree([float(self._thread.is_alive()), float(self.failed())])
            if failed:
                self._cancel.set()
            if not running:
                break
            self._thread.join(POLL_S)
        self._thread, error, self._error = None, self._error, None
        if not failed:
            self.saved = self._step
            return True
        if self.rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
        error = error or CheckpointError(f"{self.run}: another rank could not save its part of the checkpoint; see the log of rank 0")
        if self.settings.on_error == "stop":
            raise CheckpointError(f"{error}. The checkpoints before this one are untouched") from error
        print(f"warning: {error}. The run goes on, as checkpoint.on_error=continue", file=sys.stderr, flush=True)
        return False

    def close(self, timeout_s=60):
        """After an error elsewhere, when other ranks may be gone: lets a save under way end, but not for longer than this."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _guarded(self, write, *args):
        found = None
        try:
            write(*args)
        except CheckpointError as error:
            found = error
        except Exception as error:  # whatever it is, the main thread has to know
            found = CheckpointError(reason(error, self._folder, "write"))
        if found is not None and self.rank != 0:
            with contextlib.suppress(OSError):  # rank 0 then gives up at once, and says why
                if not os.path.isdir(self._folder) and os.path.isdir(os.path.dirname(self._folder)):
                    os.makedirs(self._folder, exist_ok=True)  # this rank may fail before any other has begun
                write_text(os.path.join(self._folder, f"{checkpoint_store.rank_folder(self.rank)}.failed"), str(found))
        self._error = found  # after the note, which rank 0 is to find when it hears of an error

    def _write(self, folder, parts, step, meta):
        parent = os.path.dirname(folder)
        if not os.path.isdir(parent):  # tensorstore would make it anew, and nobody would find what is in it
            raise CheckpointError(f"{parent}: cannot write the checkpoint: the folder has vanished; put it back")
        report = checkpoint_store.write_part(folder, self.rank, _consumed(parts), self.settings.compression)
        write_json(os.path.join(folder, f"{checkpoint_store.rank_folder(self.rank)}.json"), report)
        if self.rank == 0:
            checkpoint_store.commit(folder, step_folder(self.run, step), self._reports(folder), meta)
            for old in superseded(steps(self.run), self.settings.keep_last, self.settings.keep_every):
                with contextlib.suppress(OSError):  # the next save tries again
                    remove(step_folder(self.run, old))

    def _reports(self, folder):
        """The reports of all ranks, once they are there."""
        names = [checkpoint_store.rank_folder(rank) for rank in range(self.world)]
        end = time.monotonic() + self.settings.timeout_s
        while True:
            cancelled, there = self._cancel.is_set(), set(os.listdir(folder))
            for rank, name in enumerate(names):
                if f"{name}.failed" in there:
                    with open(os.path.join(folder, f"{name}.failed"), encoding="utf-8") as file:
                        raise CheckpointError(f"rank {rank}: {file.read()}")
            late = [rank for rank, name in enumerate(names) if f"{name}.json" not in there]
            if not late:
                break
            if cancelled:
                raise CheckpointError(f"{folder}: not saved: another rank could not write its part; see the ranks' logs")
            if time.monotonic() > end:
                who, limit = ", ".join(map(str, late[:8])), f"checkpoint.timeout_s={self.settings.timeout_s:g}"
                raise CheckpointError(f"{folder}: not saved: ranks {who} have not written their parts within {limit}; see their logs")
            time.sleep(POLL_S)
        reports = []
        for name in names:
            path = os.path.join(folder, f"{name}.json")
            with open(path, encoding="utf-8") as file:
                reports.append(json.load(file))
            os.remove(path)
        return reports


def _consumed(parts):
    """The Pieces, each let go as the next is asked for: their copies are as large as the state."""
    parts.reverse()
    while parts:
        yield parts.pop()
