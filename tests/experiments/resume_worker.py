"""Runs on data ranks, for tests/experiments/test_resume_rules.py."""

import json

from experiments import pretrain
from tests.experiments.test_resume import config_of


def main(text, path):
    """Makes runs one after the other. path: a JSON file of [[folder of a run, {key: value}], ...]."""
    with open(path) as f:
        runs = json.load(f)
    for folder, changes in runs:
        pretrain.pretrain(config_of(text, **changes), folder)
    return {}
