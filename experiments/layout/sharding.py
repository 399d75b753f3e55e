"""The Sharding of a run, from its config."""

from experiments.layout.check import documents
from experiments.train.state import uses_scan
from parallel.sharding import Sharding


def sharding_of(config, cfg, mesh, lowering=None, device=None):
    """Returns the Sharding of a run on a mesh. lowering: in place of config.parallel's. device: MindSpore's name of the device for which
    the model is built, on which it depends how attention knows the documents of a row; None for what only places and counts."""
    parallel, lowering = config.parallel, lowering or config.parallel.lowering
    more = {"gathers_again": lowering == "manual" and gathers_again(config, cfg), "documents": documents(config, device) if device else 0}
    return Sharding(mesh, seq_parallel=parallel.seq_parallel, zero=parallel.zero, lowering=lowering, **more)


def gathers_again(config, cfg):
    """Whether the backward gathers the rows of sequence parallel again, as parallel.seq_gather_again says.

    auto: where layers keep their activations. A layer that is computed again keeps none of what it gathered.
    """
    parallel = config.parallel
    if not parallel.seq_parallel or parallel.seq_gather_again == "off":
        return False
    kept = config.train.recompute == "none" and not (parallel.pp == 1 and uses_scan(cfg, config.train.layer_loop))
    return parallel.seq_gather_again == "on" or kept
