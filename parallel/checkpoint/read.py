"""Reading a checkpoint: slices of its arrays, each checked as it is read, and the whole of it against its checksums."""

import json
import math
import os

import tensorstore as ts

from parallel.checkpoint.files import CheckpointError, reason, step_folder, steps
from parallel.checkpoint.store import FORMAT, MANIFEST, VERSION, context, crc, digest, zarr

PART_BYTES = 64 << 20  # about, of what verify() holds of an array, where its regions allow


def find(path):
    """The folder of a checkpoint, for that folder itself or a run, whose newest it is then; None where there is none."""
    if os.path.isfile(os.path.join(path, MANIFEST)):
        return path
    found = steps(path)
    return step_folder(path, found[-1]) if found else None


class Reader:
    """An opened checkpoint. meta: what was saved with it. Opening reads manifest.json and the sizes of the files, and checks both.

    Raises CheckpointError, and FileNotFoundError where no checkpoint is at `folder`.
    """

    def __init__(self, folder):
        self.folder = folder
        manifest = _manifest(folder)
        self.meta, self._arrays, self._files = manifest["meta"], manifest["arrays"], manifest["files"]
        self._check_files()
        self._context, self._open = context(), {}

    @property
    def names(self):
        return list(self._arrays)

    @property
    def files(self):
        """The paths within the folder of the files that hold the arrays."""
        return list(self._files)

    @property
    def nbytes(self):
        """Of all arrays in memory."""
        return sum(math.prod(self.shape(name)) * ts.dtype(self.dtype(name)).numpy_dtype.itemsize for name in self._arrays)

    def shape(self, name):
        return tuple(self._arrays[name]["shape"])

    def dtype(self, name):
        """numpy's name of the dtype, or "bfloat16"."""
        return self._arrays[name]["dtype"]

    def read(self, name, slices=None):
        """The elements that `slices` select, one slice with bounds a dim, as a numpy array; None is all. Only the chunks that have them are
        read, and each is checked. Raises CheckpointError for what is damaged or gone."""
        return self.start(name, slices)()

    def start(self, name, slices=None):
        """Begins read(), and returns the function that waits for its result."""
        try:
            if name not in self._open:
                self._open[name] = ts.open(zarr(self.folder, name), read=True, open=True, context=self._context).result()
            array = self._open[name]
            assert array.shape == self.shape(name), (name, array.shape)
            future = (array if slices is None else array[tuple(slices)]).read()
        except (OSError, ValueError, KeyError, NotImplementedError) as error:
            raise self._damaged(name, error) from error

        def result():
            try:
                return future.result()
            except (OSError, ValueError, NotImplementedError) as error:
                raise self._damaged(name, error) from error

        return result

    def _damaged(self, name, error):
        return CheckpointError(
            f"array {name} of {reason(error, self.folder, 'read')}. If the file is damaged, take an older checkpoint: remove this folder"
        )

    def _check_files(self):
        for name, size in self._files.items():
            path = os.path.join(self.folder, name)
            try:
                found = os.path.getsize(path)
            except OSError as error:
                raise CheckpointError(reason(error, path, "read")) from error
            if found != size:
                raise CheckpointError(
                    f"{path} has {found} bytes instead of {size}: the file is damaged; take an older checkpoint: remove this folder"
                )

    def verify(self, progress=lambda nbytes: None):
        """Reads everything. Returns a list of what is wrong, one text each; empty where every bit is as it was saved.

        progress(bytes) is called as arrays are done.
        """
        wrong = []
        for name, array in self._arrays.items():
            for start, stop, saved in array["regions"]:
                try:
                    found = self._crc(name, start, stop, progress)
                except CheckpointError as error:
                    wrong.append(str(error))
                    continue
                if found != saved:
                    wrong.append(f"array {name} of {self.folder}: elements {start} to {stop} are not those that were saved")
        return wrong

    def _crc(self, name, start, stop, progress):
        """Of a region, read some rows of chunks at a time."""
        if not start:
            return crc(self.read(name))
        chunk, out = self._arrays[name]["chunk"][0], 0
        row_bytes = math.prod(b - a for a, b in zip(start[1:], stop[1:])) * ts.dtype(self.dtype(name)).numpy_dtype.itemsize
        rows = chunk * max(1, PART_BYTES // max(1, row_bytes * chunk))
        for first in range(start[0], stop[0], rows):
            block = slice(first, min(first + rows, stop[0])), *(slice(a, b) for a, b in zip(start[1:], stop[1:]))
            data = self.read(name, block)
            out = crc(data, out)
            progress(data.nbytes)
        return out


def _manifest(folder):
    path = os.path.join(folder, MANIFEST)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{folder} is no checkpoint: it has no {MANIFEST}; give a folder such as RUN/checkpoints/step_000100")
    try:
        with open(path, encoding="utf-8") as file:
            found = json.loads(file.read())
        sound = found.pop("digest") == digest(found)
    except OSError as error:
        raise CheckpointError(reason(error, path, "read")) from error
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path} is damaged; take an older checkpoint: remove this folder")
    if found["format"] != FORMAT or found["version"] != VERSION:
        raise CheckpointError(f"{path} is of format {found['format']!r}, version {found['version']}; this program reads {VERSION}")
    return found
