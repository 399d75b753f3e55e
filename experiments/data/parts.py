"""What a stream reads: files of records, or a dataset of Hugging Face's `datasets` on disk.

Either has names, one a part; title, for messages; identity, which tells its data apart; and records(part, start, bad), which yields
the Records (see readers.py) of a part, less the first `start`. bad(message) is called for what cannot be read, which is then left out.
"""

import itertools
import os
from pathlib import Path

import numpy as np

from experiments.data import readers
from qwen3.json_files import read_json

SCHEME = "hf:"
INSTALL = "pip install 'datasets>=4' 'numpy<2' 'pyarrow<26'"  # alone, datasets would bring a numpy that MindSpore cannot use


def find(path, key):
    """The parts at data.path; key: where the texts are. FileNotFoundError or ValueError if there are none."""
    path = os.fspath(path)
    return HfParts(path, key) if path.startswith(SCHEME) else FileParts(path, key)


class FileParts:
    """A file of records, or each file of a folder, in the order of their paths."""

    def __init__(self, path, key):
        self.files, self.key = readers.find_files(path, "data.path"), key
        self.names, self.title = [f.name for f in self.files], os.path.basename(path)
        self.identity = [(f.name, f.stat().st_size) for f in self.files]

    def records(self, part, start, bad):
        return itertools.islice(readers.records(self.files[part], columns=[self.key], bad=bad), start, None)


class HfParts:
    """The dataset that save_to_disk wrote to a folder, or that load_dataset makes of the files in it, read where they are.

    path: "hf:FOLDER", "hf:FOLDER#SPLIT" or "hf:FOLDER#CONFIG/SPLIT"; the split is train, or the only one, unless given. A part is a
    file that load_dataset found; a saved dataset is cut into as many parts as it has files. Nothing is downloaded.
    """

    def __init__(self, path, key):
        self.title, self.key = path, key
        folder, _, chosen = path.removeprefix(SCHEME).partition("#")
        self.config, _, self.split = chosen.rpartition("/")
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise FileNotFoundError(f"data.path={path}: {self.folder} is no folder; give hf:FOLDER with a dataset on this disk")
        datasets = _datasets()
        self.data = self._load(datasets)
        names = self.data.column_names  # None where only reading tells
        if names is not None and key not in names:
            raise ValueError(f"data.path={path} has no column {key!r}; the columns are {', '.join(names)}; use data.json_key")
        self.data = self.data if names is None else self.data.select_columns([key])
        self.saved = isinstance(self.data, datasets.Dataset)
        count = max(1, len(self.data.cache_files)) if self.saved else self.data.num_shards
        self.names = [str(i) for i in range(count)]
        files = sorted(f for f in self.folder.rglob("*") if f.is_file() and not f.name.startswith("."))
        self.identity = (chosen, [(f.relative_to(self.folder).as_posix(), f.stat().st_size) for f in files])

    def records(self, part, start, bad):
        rows, number = self._rows(part, start), start
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # whatever the format's reader raises
                if getattr(error, "errno", None):  # of the system, and so perhaps gone on another try
                    raise ValueError(f"{self.title}, part {part} cannot be read: {error}; mend that, nothing of it is left out") from error
                wrong = f"{error} ({type(error).__name__}; the part is not read from here on)"
            else:
                number += 1
                yield readers.Record(row, f"{self.title}, part {part}, row {number}", 0)
                continue
            bad(f"{self.title}, part {part}, row {number + 1}: {wrong}")
            return

    def _rows(self, part, start):
        if not self.saved:
            yield from itertools.islice(self.data.shard(num_shards=len(self.names), index=part), start, None)
            return
        first, stop = np.linspace(0, len(self.data), len(self.names) + 1).astype(int)[part : part + 2].tolist()
        for at in range(first + start, stop, readers.ROWS):
            for value in self.data[at : min(at + readers.ROWS, stop)][self.key]:
                yield {self.key: value}

    def _load(self, datasets):
        """A Dataset, memory-mapped, or an IterableDataset."""
        splits = self.folder / "dataset_dict.json"
        if splits.is_file():
            names = read_json(splits).get("splits")
            if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
                raise ValueError(f'{splits} must have "splits", a list of names; save the dataset again')
            return datasets.load_from_disk(str(self.folder / self._choose(names)))
        if (self.folder / "state.json").is_file():
            if self.split:
                raise ValueError(f"data.path={self.title}: the folder holds one dataset without splits; use hf:{self.folder}")
            return datasets.load_from_disk(str(self.folder))
        try:
            found = datasets.load_dataset(str(self.folder), self.config or None, streaming=True)
        except Exception as error:  # of many types
            said = " ".join(str(error).split())
            choose = "; to choose, use hf:FOLDER#CONFIG/SPLIT" if isinstance(error, ValueError) else ""
            raise ValueError(f"data.path={self.title}: {said} ({type(error).__name__}){choose}") from error
        return found[self._choose(list(found))]

    def _choose(self, splits):
        if not self.split and len(splits) == 1:
            return splits[0]
        if (self.split or "train") not in splits:
            raise ValueError(
                f"data.path={self.title}: there is no split {self.split or 'train'!r}, only {', '.join(splits)};"
                f" use hf:{self.folder}#{f'{self.config}/' if self.config else ''}{splits[0]}"
            )
        return self.split or "train"


def _datasets():
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"data.path={SCHEME}... needs the package datasets ({error}): {INSTALL}") from error
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise ValueError(f"data.path={SCHEME}... needs datasets 4 or later, and {datasets.__version__} is installed: {INSTALL}")
    return datasets
