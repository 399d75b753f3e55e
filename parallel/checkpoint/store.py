"""Arrays in a folder, written by many processes and read by any number: one tensorstore array each, in few files.

A folder is one OCDBT database (manifest.ocdbt, b/, and the values in rank_<r>/d/ by who wrote them), in which each array is a zarr3 array
named as in our tree, and manifest.json: what is in it, and the checksums. Each process writes a database of its own, without a word to the
others, and commit() joins their indices. Every stored byte is under a CRC32C: of a chunk, that of its zarr3 codec, which every reader of
tensorstore checks; of the index, OCDBT's own. Nothing here imports MindSpore.
"""

import hashlib
import json
import math
import os
import shutil
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import tensorstore as ts

from parallel.checkpoint.files import CheckpointError, reason, sizes, sync_file, sync_folder, sync_folders, write_text

FORMAT, VERSION = "qwen3-mindspore checkpoint", 1
MANIFEST = "manifest.json"
CHUNK_BYTES = 8 << 20  # most of a chunk, the least that is read and checked
FILE_BYTES = 128 << 20  # about, of a file of values
BATCH_BYTES = 128 << 20  # about, of the arrays in one transaction
IN_FLIGHT = 4  # transactions at a time, so that one is synced while others are encoded: what a writer holds beside the arrays
CHECKSUMS = 2  # threads, beside tensorstore's own
ZSTD = {"name": "zstd", "configuration": {"level": 1}}
DTYPES = ("float32", "float16", "bfloat16", "float64", "int32", "int64", "uint8", "bool")
INDEX_FILES = ("b", "v", "manifest.ocdbt")  # of a rank's own database; commit() takes over what they say


class Piece(NamedTuple):
    """A block of a global array. shape, chunk: of the whole, the block being a whole number of chunks but at the array's end; start: where
    it begins; data: its elements, a numpy array."""

    name: str
    shape: tuple
    chunk: tuple
    start: tuple
    data: np.ndarray


def piece_of(name, data):
    """The Piece that is all of an array."""
    data = np.asarray(data)
    return Piece(name, data.shape, chunk_shape(data.shape, data.itemsize), (0,) * data.ndim, data)


def chunk_shape(shape, itemsize):
    """The chunks of an array whose ranks hold blocks of `shape`: of at most CHUNK_BYTES, where its dims can be cut evenly.

    The longest dim is cut first, so that a rank of another layout reads little more than its part along whichever dim that is cut.
    """
    chunk = list(shape)
    while math.prod(chunk) * itemsize > CHUNK_BYTES:
        for i in sorted(range(len(chunk)), key=lambda i: -chunk[i]):
            if factor := _smallest_factor(chunk[i]):
                chunk[i] //= factor
                break
        else:
            break  # dims of 1 and large primes
    return tuple(chunk)


def _smallest_factor(n):
    return next((p for p in range(2, min(n, 64) + 1) if n % p == 0), None)


def write_part(folder, rank, pieces, compression="none"):
    """Writes what this rank has to write, from an iterator of Pieces, of which IN_FLIGHT batches are held. Returns the
    report that commit() wants, of plain JSON types. All is on disk then. Raises CheckpointError, or what the iterator raises."""
    arrays, place, shared = {}, os.path.join(folder, rank_folder(rank)), context()
    batch, size, under_way = [], 0, deque()
    try:
        os.makedirs(place, exist_ok=True)
        with ThreadPoolExecutor(CHECKSUMS) as pool:
            for piece in pieces:
                batch.append((piece, _describe(arrays, piece, compression), pool.submit(crc, piece.data)))
                size += piece.data.nbytes
                if size >= BATCH_BYTES:
                    under_way.append(_write_batch(place, batch, compression, shared))
                    batch, size = [], 0
                    if len(under_way) == IN_FLIGHT:
                        _end_batch(*under_way.popleft())
            under_way.append(_write_batch(place, batch, compression, shared))
            while under_way:
                _end_batch(*under_way.popleft())
        files = sizes(place)
        for name in files:
            sync_file(os.path.join(place, name))
        sync_folders(place)
    except (OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(reason(error, folder, "write")) from error
    return {"arrays": arrays, "files": {f"{rank_folder(rank)}/{n}": size for n, size in files.items() if n.split("/")[0] == "d"}}


def rank_folder(rank):
    return f"rank_{rank:05}"


def _describe(arrays, piece, compression):
    """Notes a piece in a report. Returns its entry there, which still lacks the checksum."""
    data, dtype = piece.data, piece.data.dtype.name
    assert dtype in DTYPES, f"{piece.name}: {dtype}"
    stop = tuple(a + n for a, n in zip(piece.start, data.shape))
    assert all(a % c == 0 and (b % c == 0 or b == n) for a, b, c, n in zip(piece.start, stop, piece.chunk, piece.shape)), piece[:4]
    same = {"shape": list(piece.shape), "dtype": dtype, "chunk": list(piece.chunk), "compression": compression}
    entry = arrays.setdefault(piece.name, {**same, "regions": []})
    assert {**same, "regions": entry["regions"]} == entry, f"{piece.name}: pieces of different arrays"
    region = [list(piece.start), list(stop)]
    entry["regions"].append(region)
    return region


def crc(data, before=0):
    """CRC-32 of the elements in row-major order; `before`: that of the rows above."""
    return zlib.crc32(np.ascontiguousarray(data).reshape(-1).view(np.uint8), before)


def _write_batch(place, batch, compression, shared):
    """Begins to write (piece, region, checksum) items. Returns the future of its end and, without what is large, the items."""
    transaction, writes = ts.Transaction(), []
    for piece, *_ in batch:
        metadata = zarr_metadata(piece.shape, piece.data.dtype.name, piece.chunk, compression)
        array = ts.open(
            {**zarr(place, piece.name, **_writing(0)), "metadata": metadata, "store_data_equal_to_fill_value": True},
            open=True,
            assume_metadata=True,  # commit() writes it, once
            context=shared,
            transaction=transaction,
        ).result()
        block = tuple(slice(a, a + n) for a, n in zip(piece.start, piece.data.shape))
        writes.append(array[block].write(piece.data, can_reference_source_data_indefinitely=True))
    for write in writes:
        write.copy.result()
    return transaction.commit_async(), [(region, checksum) for _, region, checksum in batch]


def _end_batch(written, batch):
    written.result()
    for region, checksum in batch:
        region.append(checksum.result())


def zarr_metadata(shape, dtype, chunk, compression):
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(1, n) for n in chunk]}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, *[ZSTD] * (compression == "zstd"), {"name": "crc32c"}],
        "fill_value": False if dtype == "bool" else 0,
        "attributes": {},
    }


def zarr(folder, name, **writing):
    """The spec of an array of a checkpoint for tensorstore. writing: members of the database's spec."""
    return {"driver": "zarr3", "kvstore": _database(folder, f"{name}/", **writing), "cache_pool": "cache_pool#chunks"}


def _database(folder, path="", **writing):
    base = {"driver": "file", "path": os.path.abspath(folder) + "/"}
    return {"driver": "ocdbt", "base": base, "path": path, **writing}


def _writing(inline):
    """inline: most bytes of a value that lies in the index itself."""
    return {
        "config": {"max_inline_value_bytes": inline},
        "target_data_file_size": FILE_BYTES,
        "value_data_prefix": "d/",
        "btree_node_data_prefix": "b/",
        "version_tree_node_data_prefix": "v/",
    }


def context():
    """Of tensorstore, for one folder at a time. The index is cached, chunks are not."""
    return ts.Context({"cache_pool": {"total_bytes_limit": 64 << 20}, "cache_pool#chunks": {"total_bytes_limit": 0}})


def commit(folder, target, reports, meta):
    """Joins what the ranks wrote into `folder` and, once all is on disk, gives it the name `target`, which must not exist.

    reports: one of each rank that wrote, from 0. meta: what else is to be kept, of JSON types. Before the rename there is no `target`,
    whatever happens; after it, all of it. Raises CheckpointError, also where the pieces do not make up whole arrays.
    """
    arrays = _join(folder, reports)
    try:
        _merge(folder, len(reports), arrays)
        files = {name: size for report in reports for name, size in report["files"].items()}
        found = sizes(folder)
        files.update({name: size for name, size in found.items() if not name.startswith("rank_")})
        if lost := [name for name, size in files.items() if found.get(name) != size]:
            raise CheckpointError(f"{os.path.join(folder, lost[0])} is not as it was written; do others write into this folder?")
        _write_manifest(folder, {"format": FORMAT, "version": VERSION, "arrays": arrays, "files": files, "meta": meta})
        for name in files:
            if not name.startswith("rank_"):
                sync_file(os.path.join(folder, name))
        sync_folders(folder)
        if os.path.exists(target):
            raise CheckpointError(f"{target} exists already; remove it, or save under another name")
        os.rename(folder, target)
        sync_folder(os.path.dirname(os.path.abspath(target)))
    except CheckpointError:
        raise
    except (OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(reason(error, folder, "write")) from error


def _write_manifest(folder, manifest):
    write_text(os.path.join(folder, MANIFEST), json.dumps({**manifest, "digest": digest(manifest)}))


def digest(manifest):
    """Of a manifest without its digest, whichever way its text is laid out."""
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def save(target, pieces, meta, compression="none"):
    """A whole checkpoint from one process: `target` appears once all is on disk. pieces: an iterator, held a part at a time."""
    target = os.path.abspath(target)
    if os.path.exists(target):
        raise CheckpointError(f"{target} exists already; remove it, or save under another name")
    folder = os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.{os.getpid()}.tmp")
    try:
        commit(folder, target, [write_part(folder, 0, pieces, compression)], meta)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _join(folder, reports):
    """{name: array} of all reports, whose regions have to cover each array once."""
    arrays = {}
    for report in reports:
        for name, entry in report["arrays"].items():
            known = arrays.setdefault(name, {**entry, "regions": []})
            if {**known, "regions": 0} != {**entry, "regions": 0}:
                raise CheckpointError(f"{folder}: ranks disagree on array {name}: {known} and {entry}")
            known["regions"] += entry["regions"]
    for name, entry in arrays.items():
        covered = sum(math.prod(b - a for a, b in zip(start, stop)) for start, stop, _ in entry["regions"])
        if covered != math.prod(entry["shape"]):
            raise CheckpointError(f"{folder}: the ranks wrote {covered} of the {math.prod(entry['shape'])} elements of array {name}")
    return dict(sorted(arrays.items()))


def _merge(folder, ranks, arrays):
    """One index of all that the ranks wrote, whose own indices go."""
    shared, transaction = context(), ts.Transaction()
    whole = ts.KvStore.open(_database(folder, **_writing(1024)), context=shared).result().with_transaction(transaction)
    for rank in range(ranks):
        place = os.path.join(folder, rank_folder(rank))
        if os.path.exists(os.path.join(place, "manifest.ocdbt")):  # not that of a rank that had nothing to write
            ts.KvStore.open(_database(place), context=shared).result().experimental_copy_range_to(whole).result()
    for name, entry in arrays.items():
        metadata = zarr_metadata(entry["shape"], entry["dtype"], entry["chunk"], entry["compression"])
        whole[f"{name}/zarr.json"] = json.dumps(metadata, separators=(",", ":")).encode()
    transaction.commit_async().result()
    for rank in range(ranks):
        for name in INDEX_FILES:
            path = os.path.join(folder, rank_folder(rank), name)
            if os.path.isdir(path):
                shutil.rmtree(path)
            elif os.path.exists(path):
                os.remove(path)
