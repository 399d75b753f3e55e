"""Runs the processes of a dry run, one for each rank and depth, and makes a report of each rank."""

import math
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ml_collections import ConfigDict, FrozenConfigDict

from experiments import flags as command_line
from experiments.dryrun import report as dryrun_report
from experiments.dryrun import shard as dryrun_shard
from experiments.layout import check as layout
from experiments.layout import table as layout_table
from experiments.layout.sharding import sharding_of
from parallel.mesh import WORLD, Mesh
from parallel.pipeline.schedule import stage_ranges
from parallel.simulation import dryrun

MODULE = "experiments.dryrun.rank"


def check(config, world, ranks, depths):
    """Raises ValueError for ranks or depths that the layout does not have, and RuntimeError if this machine cannot compile for Ascend."""
    cfg = command_line.model_config(config, "any")
    for rank in ranks:
        if not 0 <= rank < world:
            raise ValueError(f"--ranks={rank}: the layout has ranks 0 to {world - 1}")
    if depths and (len(depths) != 2 or not 1 <= depths[0] < depths[1]):
        raise ValueError(f"--layers={','.join(map(str, depths))} must be two depths, the smaller first, such as --layers=2,6")
    layers = max(map(len, _stages(config, cfg)))
    if depths and depths[1] > layers:
        whose = "a stage's" if config.parallel.pp > 1 else "the model's"
        raise ValueError(f"--layers={depths[1]} is more than {whose} {layers} layers; leave --layers out to compile all")
    if config.train.layer_loop == "scan":
        raise ValueError("train.layer_loop='scan': in simulation a loop does not end; use --config.train.layer_loop=unroll")
    if reason := dryrun.unavailable():
        raise RuntimeError(reason)


def compiled(config, lowerings, step, ranks, depths, hbm_gb, jobs):
    """Compiles a layout. Prints its reports, and returns them as JSON. With two lowerings, the two reports of a rank are neighbours."""
    check(config, math.prod(config.parallel[axis] for axis in WORLD), ranks, depths)
    if "shard" in lowerings:
        dryrun_shard.check(config, command_line.model_config(config, "any"), step)
    print(
        f"{config.model}, {step} step, {layout_table.summary(config)}\ncompiled for Ascend in simulation; not run on a device", flush=True
    )
    each = [run(lowered(config, lowering), step, ranks, depths, hbm_gb, jobs) for lowering in lowerings]
    reports = [report for of_rank in zip(*each) for report in of_rank]
    print("\n".join(line for report in reports for line in dryrun_report.text(report)), flush=True)
    for both in zip(*each) if len(each) > 1 else ():
        print("\n".join(dryrun_report.beside(*both)))
    return {"config": config.to_dict(), "step": step, "hbm_gb": hbm_gb, "ranks": reports}


def run(config, step, ranks, depths, hbm_gb, jobs=1, module=MODULE, variables=None):
    """Returns a report of each rank, as JSON: {lowering, rank, layers, of, figures (of all layers), compiled: [[layers, figures]],
    problems, fits, verdict, timeline (of the deepest compile, for a plot)}.

    Under a pipeline, layers and depths count the layers of a stage; if the stages of the rank differ, their mean. For tests: module, the
    program of the process that compiles, and variables, additions to its environment.
    """
    cfg = command_line.model_config(config, "any")
    stages, wanted = _stages(config, cfg), depths or [None]
    todo = [Job.of(config, step, rank, layers) for rank in ranks for layers in wanted]
    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(lambda job: job.compiled(module, variables), todo))
    each, out = [done[i : i + len(wanted)] for i in range(0, len(done), len(wanted))], []
    for rank, compiled in zip(ranks, each):
        mesh = layout.mesh(cfg, config.parallel, rank)
        own = list(map(len, stages[mesh.index(("pp",)) :: mesh.pp]))
        head = {"lowering": config.parallel.lowering, "rank": rank, "layers": sum(own) / len(own)}
        head["of"] = " of a stage" if mesh.pp > 1 else ""
        out.append(_report(head, depths or [head["layers"]], compiled, hbm_gb))
    return out


def _stages(config, cfg):
    parallel = config.parallel
    return stage_ranges(cfg.num_layers, parallel.pp, parallel.virtual_stages, tuple(parallel.stage_layers))


class Job(NamedTuple):
    """One step to compile. wanted: the shapes and collectives that the layout expects in it."""

    config: FrozenConfigDict
    step: str
    mesh: Mesh
    wanted: dryrun_report.Expected

    @classmethod
    def of(cls, config, step, rank, layers):
        """Returns the Job of a rank with this many layers; None: all. It must be called in the main thread: it counts collectives with
        MindSpore's eager gradients, which work only there."""
        config = _at_depth(config, layers)
        cfg = command_line.model_config(config, "any")
        mesh = layout.mesh(cfg, config.parallel, rank)
        sharding = sharding_of(config, cfg, mesh)
        return cls(config, step, mesh, dryrun_report.expected(config, cfg, sharding, step))

    def compiled(self, module, variables):
        """Compiles the step in a process. Returns (figures, problems, timeline)."""
        job = {"config": self.config.to_dict(), "step": self.step}
        with tempfile.TemporaryDirectory(prefix="dryrun-") as folder:
            trace = dryrun.trace(module, job, self.mesh.world, self.mesh.rank, folder, variables)
        problems = dryrun_report.problems(trace, self.wanted)
        return dryrun_report.figures(trace, self.mesh), problems, dryrun.timeline(trace.blocks)[0]


def lowered(config, lowering):
    """Returns the config with another lowering; the other mains accept only `manual`."""
    config = ConfigDict(config.to_dict(), convert_dict=True)
    config.parallel.lowering = lowering
    return FrozenConfigDict(config)


def _at_depth(config, layers=None):
    """Returns the config with this many layers (under a pipeline: in each stage), unrolled, because a loop never ends in simulation. Its
    model's folder is absolute, as the process that compiles runs in a folder of its own."""
    config = ConfigDict(config.to_dict(), convert_dict=True)
    config.train.layer_loop = "unroll"
    if os.path.isdir(config.model):
        config.model = os.path.abspath(config.model)
    if layers:
        config.model_args.num_layers, config.parallel.stage_layers = layers * config.parallel.pp * config.parallel.virtual_stages, ()
    return FrozenConfigDict(config)


def _report(head, depths, compiled, hbm_gb):
    figures = [(layers, found) for layers, (found, _, _) in zip(depths, compiled)]
    found = figures[0][1] if len(figures) == 1 else dryrun_report.extrapolated(*figures, head["layers"])
    wrong = [f"at {layers:g} layers: {line}" for layers, (_, lines, _) in zip(depths, compiled) for line in lines]
    fits, verdict = dryrun_report.verdict(found, hbm_gb)
    return {
        **head,
        "figures": found,
        "compiled": figures,
        "problems": wrong,
        "fits": fits,
        "verdict": verdict,
        "timeline": compiled[-1][2],
    }
