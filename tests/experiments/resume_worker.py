"""Runs on data ranks, one after the other in one job, for tests/experiments/test_resume_rules.py."""

import json

from experiments import pretrain
from tests.experiments.test_resume import config_of


def main(text, path):
    """path: a JSON file of [[folder of a run, {key: value}], ...]. Returns for each run, by its number, how it ended on this rank: with the
    words of its error, or with "" ."""
    ends = {}
    with open(path) as f:
        runs = json.load(f)
    for number, (folder, changes) in enumerate(runs):
        try:
            pretrain.pretrain(config_of(text, **changes), folder)
            ends[str(number)] = ""
        except (ValueError, FileNotFoundError) as error:
            ends[str(number)] = f"{error}"
    return ends
