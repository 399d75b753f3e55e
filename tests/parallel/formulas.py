"""Closed forms of quantities that the product computes from a schedule."""


def live_formula(name, rank, ranks, micro_batches, virtual_stages=1):
    """Returns parallel.pipeline.schedule.live() of a rank's actions in the schedule `name`."""
    if name == "gpipe":
        return micro_batches
    if name == "1f1b":
        return min(micro_batches, ranks - rank)
    return min(micro_batches * virtual_stages, 2 * (ranks - 1 - rank) + (virtual_stages - 1) * ranks + 1)
