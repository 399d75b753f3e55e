"""The file format of checkpoints: a folder of arrays, in few files, written by many processes with tensorstore.

A folder has one OCDBT database (manifest.ocdbt and b/ are the index, rank_<r>/d/ has the values that rank r wrote) and manifest.json, which
lists the arrays with their checksums. Each array is a zarr3 array with the name of our tree. Each process writes a database of its own,
without communication, and commit() merges their indices. Every stored byte has a CRC32C: chunks that of their zarr3 codec, which every
tensorstore reader checks, and the index that of OCDBT. Nothing here imports MindSpore.
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
CHUNK_BYTES = 8 << 20  # the largest chunk; a chunk is read and checked as one
FILE_BYTES = 128 << 20  # the approximate size of a file of values
BATCH_BYTES = 128 << 20  # the approximate size of the arrays in one transaction
IN_FLIGHT = 4  # transactions at a time, so that one is synced while others are encoded; they bound the memory of a writer
CHECKSUMS = 2  # threads that compute checksums, besides the threads of tensorstore
ZSTD = {"name": "zstd", "configuration": {"level": 1}}
DTYPES = ("float32", "float16", "bfloat16", "float64", "int32", "int64", "uint8", "bool")
INDEX_FILES = ("b", "v", "manifest.ocdbt")  # the index of a rank's own database, which commit() removes


class Piece(NamedTuple):
    """A block of a global array to write.

    name: of the array. shape: of the global array. chunk: the shape of its chunks; a block consists of complete chunks, except at the end
    of the array. start: the index of the block's first element. data: the elements, a numpy array.
    """

    name: str
    shape: tuple
    chunk: tuple
    start: tuple
    data: np.ndarray


def chunk_shape(shape, itemsize):
    """Returns the shape of the chunks of an array that ranks write in blocks of `shape`: at most CHUNK_BYTES, if dims divide evenly.

    The longest dim is divided first, so that chunks are compact and a rank of another layout reads little more than its own shard.
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
    """Writes the Pieces of this rank to disk and returns the report for commit(), of JSON types.

    pieces: an iterator, of which at most IN_FLIGHT batches are in memory. Raises CheckpointError, or the errors of the iterator.
    """
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
    """Returns the name of the folder of a rank's files."""
    return f"rank_{rank:05}"


def _describe(arrays, piece, compression):
    """Adds a piece to the report. Returns its entry [start, stop], to which the checksum is appended later."""
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
    """Returns the CRC-32 of the elements in row-major order. before: the CRC-32 of preceding rows."""
    return zlib.crc32(np.ascontiguousarray(data).reshape(-1).view(np.uint8), before)


def _write_batch(place, batch, compression, shared):
    """Starts to write (piece, region, checksum) items. Returns the future of the transaction and the items without their pieces."""
    transaction, writes = ts.Transaction(), []
    for piece, *_ in batch:
        metadata = zarr_metadata(piece.shape, piece.data.dtype.name, piece.chunk, compression)
        array = ts.open(
            {**zarr(place, piece.name, **_writing(0)), "metadata": metadata, "store_data_equal_to_fill_value": True},
            open=True,
            assume_metadata=True,  # commit() writes the metadata
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
    """Returns the tensorstore spec of an array. writing: further members of the spec of the database."""
    return {"driver": "zarr3", "kvstore": _database(folder, f"{name}/", **writing), "cache_pool": "cache_pool#chunks"}


def _database(folder, path="", **writing):
    base = {"driver": "file", "path": os.path.abspath(folder) + "/"}
    return {"driver": "ocdbt", "base": base, "path": path, **writing}


def _writing(inline):
    """Returns members of the spec of a database for writing. inline: the largest value in bytes that is stored in the index."""
    return {
        "config": {"max_inline_value_bytes": inline},
        "target_data_file_size": FILE_BYTES,
        "value_data_prefix": "d/",
        "btree_node_data_prefix": "b/",
        "version_tree_node_data_prefix": "v/",
    }


def context():
    """Returns a tensorstore context for one folder. It caches the index, and no chunks."""
    return ts.Context({"cache_pool": {"total_bytes_limit": 64 << 20}, "cache_pool#chunks": {"total_bytes_limit": 0}})


def commit(folder, target, reports, meta):
    """Merges the databases of the ranks in `folder` and, when all is on disk, renames it to `target`, which must not exist.

    reports: the reports of write_part, in the order of ranks. meta: a JSON value to save. The rename is the last step, so `target` is never
    incomplete. Raises CheckpointError for disk errors, and if the pieces do not cover each array exactly.
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
    """Returns the digest of a manifest (without its member `digest`), which does not depend on the format of its text."""
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def save(target, pieces, meta, compression="none"):
    """Writes a complete checkpoint from one process. pieces: an iterator of Pieces. `target` exists only when all is on disk."""
    target = os.path.abspath(target)
    if os.path.exists(target):
        raise CheckpointError(f"{target} exists already; remove it, or save under another name")
    folder = os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.{os.getpid()}.tmp")
    try:
        commit(folder, target, [write_part(folder, 0, pieces, compression)], meta)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _join(folder, reports):
    """Returns {name: entry} with the regions of all reports. Raises CheckpointError if these do not cover each array exactly."""
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
    """Merges the indices of the ranks' databases into one and removes them."""
    shared, transaction = context(), ts.Transaction()
    merged = ts.KvStore.open(_database(folder, **_writing(1024)), context=shared).result().with_transaction(transaction)
    for rank in range(ranks):
        place = os.path.join(folder, rank_folder(rank))
        if os.path.exists(os.path.join(place, "manifest.ocdbt")):  # a rank without pieces has no database
            ts.KvStore.open(_database(place), context=shared).result().experimental_copy_range_to(merged).result()
    for name, entry in arrays.items():
        metadata = zarr_metadata(entry["shape"], entry["dtype"], entry["chunk"], entry["compression"])
        merged[f"{name}/zarr.json"] = json.dumps(metadata, separators=(",", ":")).encode()
    transaction.commit_async().result()
    for rank in range(ranks):
        for name in INDEX_FILES:
            path = os.path.join(folder, rank_folder(rank), name)
            if os.path.isdir(path):
                shutil.rmtree(path)
            elif os.path.exists(path):
                os.remove(path)
