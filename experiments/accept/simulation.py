"""The stage `dryrun`: training steps compiled for a rank of simulated NPUs. No number is computed."""

from functools import partial

from ml_collections import FrozenConfigDict

from experiments import flags as command_line
from experiments.accept import tiny
from experiments.accept.outcome import Failed, NotHere
from experiments.configs import common
from experiments.dryrun import jobs
from experiments.layout import check as layout
from parallel.simulation import dryrun

WORLD, RANK, HBM_GB = 4, 1, 58.0
CASES = (  # (model, changes to config.parallel)
    ("tiny", {"dp": 2, "tp": 2, "zero": 2, "seq_parallel": True}),
    ("tiny-moe", {"dp": 2, "tp": 2, "ep": 2}),
    ("tiny", {"dp": 2, "tp": 2, "lowering": "shard"}),
)


def dryrun_checks(job):
    cases = CASES[:1] if job.quick else CASES
    return {_title(model, parallel): partial(_compiles, job, model, parallel) for model, parallel in cases}


def _title(model, parallel):
    return f"{model}, {tiny.title(parallel)}{', by the partitioner' if parallel.get('lowering') == 'shard' else ''}"


def _compiles(job, model, parallel):
    if reason := dryrun.unavailable():
        raise NotHere(reason)
    config = common.get_config()
    config.model, config.train.batch_size, config.train.seq_len = model, 8, 128
    config.model_args.num_layers, config.model_args.compute_dtype = (1 if job.quick else 2), "bfloat16"
    config.parallel.update(parallel)
    config.parallel.update(layout.check(config, command_line.model_config(config, "any"), WORLD))
    (found,) = jobs.run(FrozenConfigDict(config), "train", [RANK], [], HBM_GB)
    figures = found["figures"]
    facts = {"peak MiB": figures["peak_bytes"] / 2**20, "parameters MiB": figures["params_bytes"] / 2**20}
    facts["collectives"] = ", ".join(sorted({f"{kind} over {axes}" for kind, axes, *_ in figures["collectives"]}))
    if found["problems"]:
        raise Failed("the compiled step is not what the layout says: " + "; ".join(found["problems"][:4]), facts)
    return facts
