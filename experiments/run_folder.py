"""The folder of a run: config.json, metrics.jsonl, tensorboard/, and what the main adds."""

import json
import os
import subprocess


def make(path):
    """Makes the run's folder. Raises ValueError without a path, or where a run already is."""
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
