"""Saves checkpoints in the background: each rank writes its blocks in a thread, and rank 0 commits when all blocks are on disk.

The threads communicate through files in the checkpoint's folder, so that no collective runs at the same time as those of the steps. Nothing
here imports MindSpore.
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
    """The keys of the config section `checkpoint` for writing. timeout_s: how long rank 0 waits for the other ranks to write."""

    keep_last: int = 3
    keep_every: int = 0
    compression: str = "none"
    asynchronous: bool = True
    on_error: str = "stop"
    timeout_s: float = 1800.0


class Saver:
    """Writes the checkpoints of a run. Every rank has a Saver. At most one save runs at a time; the next one waits for it.

    rank, world: this rank and the number of ranks. token: a hexadecimal text, equal on all ranks and different in each start of the run.
    agree: agree(numbers) returns their sums over the ranks; all ranks call it together. With None a rank learns only of its own errors, and
    rank 0 of all errors. saved: the step of the last checkpoint.
    """

    def __init__(self, run, rank, world, token, settings, agree=None, saved=None):
        self.run, self.rank, self.world, self.token, self.settings = run, rank, world, token, settings
        self._agree = agree or (lambda numbers: numbers)
        self.saved, self._step, self._folder, self._attempts = saved, None, None, 0
        self._thread, self._error, self._cancel = None, None, threading.Event()

    def save(self, step, make_pieces, meta):
        """Starts a save in the background; without settings.asynchronous, waits for its end. A step is saved once only.

        make_pieces(copy): returns the Pieces of this rank; copy=True for a save in the background. meta: a JSON value; that of rank 0 is
        saved. Returns whether the previous save succeeded; without settings.asynchronous, whether this one did. Raises CheckpointError on
        all ranks if a save failed on any, unless settings.on_error is "continue".
        """
        succeeded = self.wait()
        if step == self.saved:
            return succeeded
        self._attempts, self._step = self._attempts + 1, step
        self._folder = temporary(self.run, step, f"{self.token}{self._attempts:04x}")
        target = (self._write, self._folder, make_pieces(copy=self.settings.asynchronous), step, meta)
        self._error, self._cancel = None, threading.Event()
        self._thread = threading.Thread(target=self._guarded, args=target, daemon=True, name="checkpoint")
        self._thread.start()
        return succeeded if self.settings.asynchronous else self.wait()

    def failed(self):
        """Whether the running save is known to have failed on this rank."""
        return self._error is not None

    def wait(self):
        """Waits for the running save on all ranks. Returns whether it succeeded; raises as save() does."""
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
        """Waits at most timeout_s for the running save. For use after an error, when other ranks may no longer run."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _guarded(self, write, *args):
        found = None
        try:
            write(*args)
        except CheckpointError as error:
            found = error
        except Exception as error:  # the main thread reports any error
            found = CheckpointError(reason(error, self._folder, "write"))
        if found is not None and self.rank != 0:
            with contextlib.suppress(OSError):  # rank 0 reads this file, gives up and reports the cause
                if not os.path.isdir(self._folder) and os.path.isdir(os.path.dirname(self._folder)):
                    os.makedirs(self._folder, exist_ok=True)  # this rank may fail before another has made the folder
                write_text(os.path.join(self._folder, f"{checkpoint_store.rank_folder(self.rank)}.failed"), str(found))
        self._error = found  # after the file, so that rank 0 finds it when it learns of the error

    def _write(self, folder, parts, step, meta):
        parent = os.path.dirname(folder)
        if not os.path.isdir(parent):  # tensorstore would make a new folder, which no other rank uses
            raise CheckpointError(f"{parent}: cannot write the checkpoint: the folder has vanished; put it back")
        report = checkpoint_store.write_part(folder, self.rank, _consumed(parts), self.settings.compression)
        write_json(os.path.join(folder, f"{checkpoint_store.rank_folder(self.rank)}.json"), report)
        if self.rank == 0:
            checkpoint_store.commit(folder, step_folder(self.run, step), self._reports(folder), meta)
            for old in superseded(steps(self.run), self.settings.keep_last, self.settings.keep_every):
                with contextlib.suppress(OSError):  # the next save tries again
                    remove(step_folder(self.run, old))

    def _reports(self, folder):
        """Waits for the reports of all ranks and returns them."""
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
    """Yields the Pieces and frees each when the next is taken, since their copies are as large as the state."""
    parts.reverse()
    while parts:
        yield parts.pop()
