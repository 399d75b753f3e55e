"""The processes of a dry run: which ranks at which depths, and a report of each rank."""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ml_collections import ConfigDict, FrozenConfigDict

from experiments import dryrun_report, layout
from experiments import flags as command_line
from parallel import dryrun
from parallel.mesh import Mesh
from parallel.sharding import Sharding

MODULE = "experiments.dryrun_rank"


def check(config, world, ranks, depths):
    """Raises ValueError for ranks or depths that cannot be, RuntimeError where nothing can be compiled for Ascend."""
    layers = command_line.model_config(config, "any").num_layers
    for rank in ranks:
        if not 0 <= rank < world:
            raise ValueError(f"--ranks={rank}: the layout has ranks 0 to {world - 1}")
    if depths and (len(depths) != 2 or not 1 <= depths[0] < depths[1]):
        raise ValueError(f"--layers={','.join(map(str, depths))} must be two depths, the smaller first, such as --layers=2,6")
    if depths and depths[1] > layers:
        raise ValueError(f"--layers={depths[1]} is more than the model's {layers} layers; leave --layers out to compile all")
    if config.train.layer_loop == "scan":
        raise ValueError("train.layer_loop='scan': a loop does not end where nothing is computed; use --config.train.layer_loop=unroll")
    if reason := dryrun.unavailable():
        raise RuntimeError(reason)


def run(config, step, ranks, depths, hbm_gb, jobs=1, module=MODULE, variables=None):
    """A report of each rank, as JSON: {rank, layers, figures of the whole model, compiled: [[layers, figures]], problems, fits, verdict},
    and, for a plot, the timeline of its deepest compile. module: the process that compiles, and more
    variables of its environment, for tests."""
    whole = command_line.model_config(config, "any").num_layers
    depths = depths or [whole]
    todo = [Job.of(config, step, rank, layers) for rank in ranks for layers in depths]
    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(lambda job: job.compiled(module, variables), todo))
    each = [done[i : i + len(depths)] for i in range(0, len(done), len(depths))]
    return [_report(rank, whole, depths, compiled, hbm_gb) for rank, compiled in zip(ranks, each)]


class Job(NamedTuple):
    """One compile, and what it is to be like."""

    config: FrozenConfigDict
    step: str
    mesh: Mesh
    wanted: dryrun_report.Expected

    @classmethod
    def of(cls, config, step, rank, layers):
        """Of a rank at a depth. For the main thread, as MindSpore's eager gradients, which count the calls, are."""
        config = _at_depth(config, layers)
        cfg, parallel = command_line.model_config(config, "any"), config.parallel
        mesh = layout.mesh(cfg, parallel, rank)
        sharding = Sharding(mesh, seq_parallel=parallel.seq_parallel, zero=parallel.zero)
        return cls(config, step, mesh, dryrun_report.expected(config, cfg, sharding, step))

    def compiled(self, module, variables):
        """(figures, problems, timeline)"""
        job = {"config": self.config.to_dict(), "step": self.step}
        with tempfile.TemporaryDirectory(prefix="dryrun-") as folder:
            trace = dryrun.trace(module, job, self.mesh.world, self.mesh.rank, folder, variables)
        problems = dryrun_report.problems(trace, self.wanted)
        return dryrun_report.figures(trace, self.mesh), problems, dryrun.timeline(trace.blocks)[0]


def _at_depth(config, layers):
    """The config of the same model with so many layers, which are unrolled: in simulation a loop does not end."""
    config = ConfigDict(config.to_dict(), convert_dict=True)
    config.model_args.num_layers, config.train.layer_loop = layers, "unroll"
    return FrozenConfigDict(config)


def _report(rank, whole, depths, compiled, hbm_gb):
    figures = [(layers, found) for layers, (found, _, _) in zip(depths, compiled)]
    found = figures[0][1] if len(figures) == 1 else dryrun_report.extrapolated(*figures, whole)
    wrong = [f"at {layers} layers: {line}" for layers, (_, lines, _) in zip(depths, compiled) for line in lines]
    fits, verdict = dryrun_report.verdict(found, hbm_gb)
    out = {"rank": rank, "layers": whole, "figures": found, "compiled": figures, "problems": wrong, "fits": fits, "verdict": verdict}
    return {**out, "timeline": compiled[-1][2]}
