"""The process of one simulated rank: python -m experiments.dryrun.rank job.json, in the environment of parallel/simulation/dryrun.py.

Compiles a step for this rank of a layout, calls it, and prints the shapes and dtypes of its inputs.
"""

import json
import os
import resource
import sys
import time

import mindspore as ms
from mindspore.communication import init
from ml_collections import FrozenConfigDict

from experiments import flags as command_line
from experiments.dryrun import shard as dryrun_shard
from experiments.dryrun.steps import STEPS
from experiments.layout import check as layout
from experiments.layout.sharding import sharding_of
from parallel.simulation.dryrun import RESULT


def main(path):
    with open(path, encoding="utf-8") as file:
        job = json.load(file)
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("Ascend")
    init()
    config = FrozenConfigDict(job["config"])
    cfg, rank = command_line.model_config(config, "any"), int(os.environ["RANK_ID"])
    sharding = sharding_of(config, cfg, layout.mesh(cfg, config.parallel, rank), device="Ascend")
    began = time.perf_counter()
    step, times = STEPS[job["step"]]
    if config.parallel.lowering == "shard":
        step = dryrun_shard.train_step
    found = step(config, cfg, sharding)
    found.update(steps=times, compile_s=time.perf_counter() - began, host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    print(RESULT + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
