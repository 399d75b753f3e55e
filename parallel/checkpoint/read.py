"""Reads a checkpoint: slices of its arrays, with checksums checked on reading, and verifies all of it."""

import math
import os

import tensorstore as ts

from parallel.checkpoint.files import CheckpointError, reason, step_folder, steps
from parallel.checkpoint.store import FORMAT, MANIFEST, VERSION, context, crc, digest, zarr
from parallel.json_text import loads

PART_BYTES = 64 << 20  # verify() reads about so many bytes of an array at a time


def find(path):
    """Returns `path` if it is a checkpoint, the folder of the newest checkpoint if `path` is a run, and None if there is none."""
    if os.path.isfile(os.path.join(path, MANIFEST)):
        return path
    found = steps(path)
    return step_folder(path, found[-1]) if found else None


class Reader:
    """An open checkpoint. meta: the JSON value that was saved with it.

    Opening checks the digest of manifest.json and the sizes of the files. Raises CheckpointError if these are wrong, and FileNotFoundError
    if `folder` is no checkpoint.
    """

    def __init__(self, folder):
        self.folder = folder
        manifest = _manifest(folder)
        self.meta, self._arrays, self._files = manifest["meta"], manifest["arrays"], manifest["files"]
        self._check_files()
        self._context, self._open = context(), {}

    @property
    def names(self):
        """The names of the arrays."""
        return list(self._arrays)

    @property
    def files(self):
        """The paths, relative to the folder, of the files of the arrays."""
        return list(self._files)

    @property
    def nbytes(self):
        """The bytes of all arrays in memory."""
        return sum(math.prod(self.shape(name)) * ts.dtype(self.dtype(name)).numpy_dtype.itemsize for name in self._arrays)

    def shape(self, name):
        """Returns the global shape of an array."""
        return tuple(self._arrays[name]["shape"])

    def dtype(self, name):
        """Returns the numpy name of the dtype of an array, or "bfloat16"."""
        return self._arrays[name]["dtype"]

    def read(self, name, slices=None):
        """Returns elements of an array as a numpy array.

        slices: one slice with bounds for each dim; None selects all. Only the chunks with these elements are read, and the checksum of each
        is checked. Raises CheckpointError if a file is damaged or missing.
        """
        return self.start(name, slices)()

    def start(self, name, slices=None):
        """Starts read() and returns a function that waits for its result."""
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
        """Reads all arrays and compares them with the checksums in the manifest. Returns a list of error texts, empty if all are right.

        progress(nbytes): called after each read with the number of bytes.
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
        """Returns the checksum of a block of an array, which is read a few rows of chunks at a time."""
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
            found = loads(file.read())
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
