"""The log-probabilities of the reference model, for training of all weights: computed once, and kept in the run's folder.

    RUN/reference/train.npy, held_out.npy   float32 [rows, S], the nats of each target
    RUN/reference/reference.json            the fingerprints of the model and of the rows

The reference model is the one that training starts from: the weights of config.init_from, or random ones.
"""

import os
import shutil

import numpy as np

from experiments.data import loader
from experiments.data.rows import digest
from experiments.train import adapter, run_folder, weights
from parallel import collectives
from parallel.checkpoint.files import sync_folder, write_json
from qwen3.json_files import read_json

FOLDER, NOTES = "reference", "reference.json"
PARTS = ("train", "held_out")


def with_reference(workdir, cfg, config, mesh, program, data):
    """Returns the corpus with the nats of the reference model in its rows, from the run's folder or computed here. All ranks call it.

    Raises ValueError if the folder has those of another model or of other rows.
    """
    read, text, _ = weights.initial_params(cfg, config)
    notes = {"model": adapter.fingerprint(cfg, read), "train": data.train.fingerprint, "held_out": digest(*data.held_out.values())}
    folder = os.path.join(workdir, FOLDER)
    found = run_folder.agreed(mesh, _check(folder, notes) if mesh.rank == 0 else 0)
    if not found:
        _compute(folder, notes, read, text, config, mesh, program, data)
    train, held_out = (np.load(os.path.join(folder, f"{part}.npy"), mmap_mode="r", allow_pickle=False) for part in PARTS)
    data.train.reference = train
    return data._replace(held_out={**data.held_out, "reference": np.array(held_out)})


def check(noted, cfg, config, folder):
    """Raises ValueError if the checkpoint in `folder` was trained against another reference model than that of `config`. noted: that of the
    checkpoint, see adapter.base_of."""
    base = adapter.base_of(cfg, config, weights.initial_params(cfg, config)[0])
    if noted and noted["fingerprint"] != base["fingerprint"]:
        raise ValueError(
            f"{folder} was trained against the reference model {noted['path']} (fingerprint {noted['fingerprint']}), and this is"
            f" {base['path']} ({base['fingerprint']}); give the model that training started from by --hf_dir or --init_from"
        )


def _check(folder, notes):
    """Returns whether the folder is complete. Raises ValueError if it is of another model or of other rows than `notes` say."""
    path = os.path.join(folder, NOTES)
    if not os.path.exists(path):
        return False
    kept = read_json(path)
    for key, what in (("model", "another model"), ("train", "other rows"), ("held_out", "other rows")):
        if kept.get(key) != notes[key]:
            raise ValueError(
                f"{folder} holds the log-probabilities of {what}: {key}={kept.get(key)!r} instead of {notes[key]!r}; give the run's own"
                f" --hf_dir or --init_from and data.path, or remove {folder} to compute them again"
            )
    return True


def _compute(folder, notes, read, text, config, mesh, program, data):
    """Computes the nats of all rows, and writes them on rank 0. The model is in memory only here."""
    if mesh.rank == 0:
        print(f"reference  {text}: log-probabilities of {len(data.train):,} training rows, once", flush=True)
    state, size = program.init(read), config.train.batch_size
    train = nats_of_rows(program, state, mesh, size, (loader.rows_at(data.train, i, size) for i in range(0, len(data.train), size)))
    held_out = nats_of_rows(program, state, mesh, size, [data.held_out])
    if mesh.rank == 0:
        aside = f"{folder}.new"
        shutil.rmtree(aside, ignore_errors=True)
        os.makedirs(aside)
        for part, values in zip(PARTS, (train, held_out)):
            with open(os.path.join(aside, f"{part}.npy"), "wb") as file:
                np.save(file, values, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        write_json(os.path.join(aside, NOTES), notes)
        sync_folder(aside)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(aside, folder)
    run_folder.agreed(mesh, 0)  # the other ranks wait for the files


def nats_of_rows(program, state, mesh, batch_size, parts):
    """Returns float32 [rows, S], the nats of each target, on every rank. parts: dicts of full rows, all the rows of all ranks."""
    place, out = mesh.index(("dp",)), []
    mine = np.array(loader.rank_rows(batch_size, place, mesh.dp))
    for rows in parts:
        count, length = rows["tokens"].shape
        for start, batch in zip(range(0, count, batch_size), loader.eval_batches(rows, batch_size, place, mesh.dp)):
            nats = np.zeros((batch_size, length), np.float32)
            nats[mine] = program.score(state, batch)
            nats = collectives.host_sum(mesh, ("dp",), nats) if mesh.dp > 1 else nats
            out.append(np.asarray(nats)[: count - start])
    return np.concatenate(out)
