"""The folder of a run: config.json, metrics.jsonl, tensorboard/, and what the main adds."""

import json
import os
import secrets
import subprocess

from parallel import collectives


def make(path, mesh):
    """Makes the run's folder, on rank 0, and checks that every rank sees it. All ranks call it.

    Raises ValueError without a path, where a run already is, or on a rank that does not see the folder.
    """
    if mesh.rank == 0:
        _make(path)
    if mesh.world == 1:
        return
    mark = os.path.join(path or "", f".rank_0_{int(_sum(mesh, secrets.randbelow(1 << 24) * (mesh.rank == 0)))}")
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


def _sum(mesh, number):
    """Over all ranks, which wait for each other."""
    return collectives.host_sum(mesh, tuple(mesh.sizes), [number])[0]


def _make(path):
    if not path:
        raise ValueError("--workdir is missing; give a folder for the run, such as --workdir=runs/tiny")
    if os.path.exists(os.path.join(path, "config.json")):
        raise ValueError(f"--workdir={path} already holds a run; give another folder, or remove this one")
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--workdir={path} cannot be made: {error.strerror}") from error


def write_config(workdir, config):
    """config.json: the resolved config, with the git hash of the code, or null."""
    with open(os.path.join(workdir, "config.json"), "w", encoding="utf-8") as file:
        json.dump({**json.loads(config.to_json()), "git_hash": _git_hash()}, file, indent=2)


def _git_hash():
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        git = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:  # no git on this machine
        return None
    return git.stdout.strip() or None
