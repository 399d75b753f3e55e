"""experiments.dryrun.rank with what DRYRUN_PLANTED names done wrong, for the dry run to find."""

import os
import sys

from experiments.dryrun import rank as dryrun_rank
from layers import loss
from layers.bound_ops import BoundOps
from parallel import collectives, sharding, zero


def full_size_parameter():
    """The feed-forward is split over nothing."""
    for rules in (sharding.RULES, sharding.SEQ_PARALLEL_RULES):
        rules["ffn"] = ()


def unsharded_gradient():
    """ZeRO 2's gradients are summed whole on every rank, and cut then."""

    def whole_then_cut(mesh, atoms):
        add, cut = _psum(mesh, atoms), collectives.split(mesh, atoms)

        def scatter(x):
            return cut(add(x))

        return scatter

    zero.collectives = _Replaced(reduce_scatter=whole_then_cut)


def missing_all_reduce():
    """A rank takes the mean of its own rows' losses."""

    def weighted_mean(op, x, weights):
        return _weighted_mean(BoundOps(op.cfg, sharding.Sharding(), op.kernels), x, weights)

    loss.weighted_mean = weighted_mean


_psum, _weighted_mean = collectives.psum, loss.weighted_mean


class _Replaced:
    """parallel.collectives, some of it in another way."""

    def __init__(self, **functions):
        self.__dict__.update(functions)

    def __getattr__(self, name):
        return getattr(collectives, name)


if __name__ == "__main__":
    for name in os.environ["DRYRUN_PLANTED"].split():
        globals()[name]()
    dryrun_rank.main(sys.argv[1])
