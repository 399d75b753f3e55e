"""Stands in for experiments.pretrain where sweeps are tested: python -m tests.experiments.fake_run CONFIG_JSON FOLDER

Twenty steps, each a line of metrics whose loss follows from the config; goes on from the steps that are there, and leaves finished.json.
Fails where optim.lr is 1.
"""

import json
import os
import sys
import time

from experiments.watch.records import read_records

STEPS = 20


def main(config, folder):
    config = json.loads(config)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file)
    path, lr, seed = os.path.join(folder, "metrics.jsonl"), config["optim"]["lr"], config["train"]["seed"]
    done = len(read_records(path))
    for step in range(done + 1, STEPS + 1):
        if lr == 1 and step == 5:
            sys.exit("error: it diverged")
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "loss": 3 / step + lr + seed / 100, "eval_loss": 3 / step + lr}) + "\n")
        time.sleep(0.02)
    with open(os.path.join(folder, "finished.json"), "w", encoding="utf-8") as file:
        json.dump({"step": STEPS}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
