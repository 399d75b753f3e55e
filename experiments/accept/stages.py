"""The stages of the acceptance kit, in the order in which they run."""

from dataclasses import dataclass

from parallel.hints import nearest


@dataclass(frozen=True)
class Stage:
    """A stage, which runs in processes of its own.

    title: what it shows, in one line. module: the module of experiments.accept with its function `function(job)`, which returns its checks,
    {name: a function that makes the check}. ranks: "one" process, or "all" ranks of the job. limit_s: seconds in which each check has to
    end. starts: whether MindSpore is set up before the checks are made.
    """

    name: str
    title: str
    module: str
    ranks: str = "one"
    limit_s: int = 600
    starts: bool = True

    @property
    def function(self):
        return f"{self.name}_checks"


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "versions",
            "Python, MindSpore, CANN, driver, firmware and libraries, against what this project is written for",
            "machine",
            starts=False,
        ),
        Stage("devices", "the devices and their memory, a product on each rank, and the links between NPUs", "machine", "all"),
        Stage(
            "package",
            "our kernels for Ascend: built by CANN, or by the emulator on CPU, and compared with the emulator",
            "kernels",
            limit_s=1800,
            starts=False,
        ),
        Stage("ops", "every implementation of every op against its reference: values and gradients, by dtype", "kernels"),
        Stage("collectives", "what ranks send each other: values, gradients and bandwidth", "ranks", "all"),
        Stage("layouts", "each layout that fits the number of ranks against one process: losses, gradients, weights", "ranks", "all"),
        Stage("step", "whole training steps on this device against the references on CPU", "training"),
        Stage("checkpoint", "checkpoints saved and read in the same and in another layout, bit for bit; damage; kills", "training", "all"),
        Stage(
            "hf",
            "a released model (--hf_dir): logits and greedy text against goldens, and a round trip through its files",
            "released",
            limit_s=3600,
        ),
        Stage("dryrun", "training steps compiled for simulated NPUs: shapes, memory and collectives", "simulation", limit_s=1800),
        Stage("speed", "training and decoding in tokens a second, MFU, and each kernel beside its roofline", "speed", "all", limit_s=3600),
    )
}


def chosen(names):
    """Returns the stages of these names, in their own order; all for an empty list. Raises ValueError for a name that does not exist."""
    for name in names:
        if name not in STAGES:
            raise ValueError(f"--stages={name}: there is no such stage{nearest(name, STAGES)}; they are {', '.join(STAGES)}")
    return [stage for stage in STAGES.values() if not names or stage.name in names]
