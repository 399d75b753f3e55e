"""The folder of a run: config.json, metrics.jsonl, tensorboard/, checkpoints/, and files that the main adds.

Locks the folder for one job, and checks that what is already there belongs to the same run.
"""

import contextlib
import fcntl
import json
import os
import secrets
import subprocess

from experiments.configs import common
from experiments.run_tokenizer import FOLDER as TOKENIZER
from experiments.train import resume_rules
from experiments.watch.records import CONFIG, METRICS, flat
from parallel import collectives
from parallel.checkpoint.files import FOLDER, clean, steps, sync_file, sync_folder, write_json
from parallel.json_text import loads
from qwen3.json_files import read_text

LOCK, FINISHED = ".lock", "finished.json"
MAY_CHANGE = resume_rules.keys(resume_rules.IN_PLACE)
MAY_CHANGE_ELSEWHERE = resume_rules.keys(resume_rules.IN_PLACE, resume_rules.ELSEWHERE)  # for --resume_from


@contextlib.contextmanager
def locked(path, mesh):
    """Makes a run's folder and locks it against other jobs, on rank 0, and checks that every rank sees it. All ranks enter it together.

    Removes unfinished checkpoints of killed runs. Raises ValueError without a path, if another process trains there, or if a rank does not
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
    _sum(mesh, 0)  # waits until rank 0 has made the mark
    seen = os.path.exists(mark)
    missing = _sum(mesh, not seen)
    if mesh.rank == 0:
        os.remove(mark)
    if missing:
        who = f"{missing:.0f} other ranks" if seen else f"rank {mesh.rank}"
        raise ValueError(f"--workdir={path} of {who} is not the folder of rank 0; give a folder that all nodes share")


def agreed(mesh, number):
    """Returns rank 0's number on all ranks. It must be 0 or more and below 2**24, because it is sent as float32."""
    return int(_sum(mesh, number * (mesh.rank == 0)))


def _sum(mesh, number):
    """Sums a number over all ranks, which thereby wait for each other."""
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
    """Locks the folder for this process. The system releases the lock when the process ends, also after a kill."""
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
    """Returns the step of the newest checkpoint in a run's folder; 0 if there is none and the run starts from its first step. For rank 0.

    Raises ValueError for the folder of a finished run, or of one with another config, and for checkpoints without the config of their run.
    """
    saved, found = saved_config(path), steps(path)
    if saved is None and found:
        raise ValueError(
            f"--workdir={path} holds checkpoints, and no {CONFIG}, which says of which run; put it back, or use another folder with"
            f" --resume_from={path} or --init_from={path}"
        )
    if saved is None:
        return 0
    if changed := differences(saved, to_dict(config), MAY_CHANGE):
        raise ValueError(
            f"--workdir={path} already holds a run with {changed[0]}; give another folder, or the run's own config. To continue it"
            f" with other optim keys, use another folder and --resume_from={path}"
        )
    finished = finished_step(path)
    if finished is not None and (config.train.steps <= finished or not found):
        raise ValueError(
            f"--workdir={path} already holds a finished run of {finished} steps; give another folder,"
            " or more --config.train.steps to continue from its checkpoint"
        )
    if not found:
        with contextlib.suppress(FileNotFoundError):  # keeps the metrics of an earlier start that saved no checkpoint
            os.replace(os.path.join(path, METRICS), os.path.join(path, "metrics.before.jsonl"))
    return found[-1] if found else 0


def saved_config(workdir):
    """Returns the config that begin() wrote, as a dict; None if there is none. Raises ValueError for a file that is no such config."""
    path = os.path.join(workdir, CONFIG)
    saved = _read(path)
    if saved is not None and not all(isinstance(saved.get(section), dict) for section in ("data", "optim", "train")):
        raise ValueError(f"{path} is not the config of a run; put back the one that the run wrote, or give another folder")
    return saved


def finished_step(workdir):
    """Returns the steps of a finished run, None if the run is not finished. Raises ValueError for a file that does not say it."""
    path = os.path.join(workdir, FINISHED)
    done = _read(path)
    step = done.get("step") if done is not None else None
    if done is not None and (type(step) is not int or step < 0):
        raise ValueError(f'{path} must be {{"step": N}} with a whole number; remove it, and the run goes on from its checkpoint')
    return step


def _read(path):
    """Returns the JSON object in a file; None if there is no file."""
    if not os.path.exists(path):
        return None
    text = read_text(path)
    try:
        found = loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); is this the folder of a run?") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {json.dumps(found)[:20]}, not a JSON object; is this the folder of a run?")
    return found


def to_dict(config):
    """Returns a config as a dict of JSON values."""
    return json.loads(config.to_json())


def differences(old, new, may_change):
    """["key=old value instead of new value"] for keys that differ. may_change: keys, or prefixes such as "model_args.", that are ignored. A
    key that `old` lacks, as a config of an earlier release may, had the value that is now its default. An empty `old` says nothing."""
    if not old:
        return []
    old, new = {**flat(to_dict(common.get_config())), **flat(old)}, flat(new)
    keys = [key for key in new if not any(key == m or (m.endswith(".") and key.startswith(m)) for m in may_change)]
    return [f"{key}={old[key]!r} instead of {new[key]!r}" for key in keys if key in old and old[key] != new[key]]


def begin(workdir, config, tokenizer):
    """Writes config.json, the resolved config with the code's git hash (null without git), and the tokenizer if it is not there yet."""
    if not os.path.isdir(os.path.join(workdir, TOKENIZER)):
        aside = os.path.join(workdir, f".{TOKENIZER}.new")
        tokenizer.save(aside)
        for name in os.listdir(aside):
            sync_file(os.path.join(aside, name))
        sync_folder(aside)
        os.rename(aside, os.path.join(workdir, TOKENIZER))
    write_json(os.path.join(workdir, CONFIG), {**to_dict(config), "git_hash": _git_hash()})
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(workdir, FINISHED))


def finish(workdir, step):
    """Marks the run as finished after `step` steps."""
    write_json(os.path.join(workdir, FINISHED), {"step": step})


def _git_hash():
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        git = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:  # no git on this machine
        return None
    return git.stdout.strip() or None
