"""The folder of a run: config.json, metrics.jsonl, tensorboard/, checkpoints/, and what the main adds; who may write there, and what is
there already."""

import contextlib
import fcntl
import json
import os
import secrets
import subprocess

from experiments.watch.records import CONFIG, METRICS, flat
from parallel import collectives
from parallel.checkpoint.files import FOLDER, clean, steps, write_json

LOCK, FINISHED, TOKENIZER = ".lock", "finished.json", "tokenizer"
# What may change between the starts of one run: how it is computed, watched and saved, and how long it is.
MAY_CHANGE = ("parallel.", "ops.", "checkpoint.", "init_from", "resume_from", "partial", "data.cache_dir", "data.skip_bad")
MAY_CHANGE += tuple(f"train.{key}" for key in ("steps", "log_every", "eval_every", "eval_rows", "layer_loop", "save_hf"))
MAY_CHANGE += ("train.monitor_every", "train.profile_steps", "train.sample_tokens", "train.sample_prompt", "train.exact_match_rows")
MAY_CHANGE_ELSEWHERE = (*MAY_CHANGE, "optim.", "train.batch_size")  # when another run goes on in a folder of its own


@contextlib.contextmanager
def held(path, mesh):
    """Makes a run's folder and keeps others out of it, on rank 0, and checks that every rank sees it. All ranks use it together.

    What killed runs had begun to save is removed. Raises ValueError without a path, where another process runs, or on a rank that does not
    see the folder.
    """
    with contextlib.ExitStack() as locks:
        if mesh.rank == 0:
            _make(path)
            locks.enter_context(_lock(path))
            clean(path)
        if mesh.world > 1:
            _check_seen(path, mesh)
        yield


def _check_seen(path, mesh):
    mark = os.path.join(path or "", f".rank_0_{agreed(mesh, secrets.randbelow(1 << 24))}")
    if mesh.rank == 0:
        open(mark, "w").close()
    _sum(mesh, 0)  # the mark is there
    seen = os.path.exists(mark)
    missing = _sum(mesh, not seen)
    if mesh.rank == 0:
        os.remove(mark)
    if missing:
        who = f"{missing:.0f} other ranks" if seen else f"rank {mesh.rank}"
        raise ValueError(f"--workdir={path} of {who} is not the folder of rank 0; give a folder that all nodes share")


def agreed(mesh, number):
    """Rank 0's number, from 0 to below 2**24, on all ranks."""
    return int(_sum(mesh, number * (mesh.rank == 0)))


def _sum(mesh, number):
    """Over all ranks, which wait for each other."""
    return collectives.host_sum(mesh, tuple(mesh.sizes), [number])[0]


def _make(path):
    if not path:
        raise ValueError("--workdir is missing; give a folder for the run, such as --workdir=runs/tiny")
    try:
        os.makedirs(os.path.join(path, FOLDER), exist_ok=True)
    except OSError as error:
        raise ValueError(f"--workdir={path} cannot be made: {error.strerror}") from error


@contextlib.contextmanager
def _lock(path):
    """The system releases it when the process ends, however it ends."""
    with open(os.path.join(path, LOCK), "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip() or "another process"
            raise ValueError(f"--workdir={path}: {who} trains there now; wait for it, or give another folder") from None
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield


def own_step(path, config):
    """The step of the newest checkpoint in a run's folder, 0 where there is none, so that the run begins anew. For rank 0.

    Raises ValueError for the folder of a finished run, or of one with another config.
    """
    saved = _read(os.path.join(path, CONFIG))
    if saved is None:
        return 0
    if changed := differences(saved, to_dict(config), MAY_CHANGE):
        raise ValueError(
            f"--workdir={path} already holds a run with {changed[0]}; give another folder, or the run's own config. Another folder with"
            f" --resume_from={path} goes on from it with other optim keys"
        )
    found, finished = steps(path), _read(os.path.join(path, FINISHED))
    if finished and (config.train.steps <= finished["step"] or not found):
        raise ValueError(
            f"--workdir={path} already holds a finished run of {finished['step']} steps; give another folder,"
            " or more --config.train.steps to go on from its checkpoint"
        )
    if not found:
        with contextlib.suppress(FileNotFoundError):  # an earlier try that saved nothing
            os.replace(os.path.join(path, METRICS), os.path.join(path, "metrics.before.jsonl"))
    return found[-1] if found else 0


def saved_config(workdir):
    """What begin() wrote of a run's config, None where there is no run."""
    return _read(os.path.join(workdir, CONFIG))


def finished_step(workdir):
    """The steps of a run that has done all, None of one that has not."""
    done = _read(os.path.join(workdir, FINISHED))
    return done["step"] if done else None


def _read(path):
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); is this the folder of a run?") from error


def to_dict(config):
    """A config as JSON has it."""
    return json.loads(config.to_json())


def differences(old, new, may_change):
    """["key=new instead of old"] for the keys that differ. may_change: keys, and prefixes of keys that end in a dot, that do not count."""
    old, new = flat(old), flat(new)
    keys = [key for key in new if not any(key == m or (m.endswith(".") and key.startswith(m)) for m in may_change)]
    return [f"{key}={old[key]!r} instead of {new[key]!r}" for key in keys if key in old and old[key] != new[key]]


def begin(workdir, config, tokenizer):
    """Writes config.json, the resolved config with the git hash of the code, or null, and once the tokenizer."""
    if not os.path.isdir(os.path.join(workdir, TOKENIZER)):
        aside = os.path.join(workdir, f".{TOKENIZER}.new")
        tokenizer.save(aside)
        os.rename(aside, os.path.join(workdir, TOKENIZER))
    write_json(os.path.join(workdir, CONFIG), {**to_dict(config), "git_hash": _git_hash()})
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(workdir, FINISHED))


def finish(workdir, step):
    """Notes that a run of so many steps has done all."""
    write_json(os.path.join(workdir, FINISHED), {"step": step})


def _git_hash():
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        git = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:  # no git on this machine
        return None
    return git.stdout.strip() or None
