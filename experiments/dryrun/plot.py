"""A plot of device memory over a dry run."""

from matplotlib.figure import Figure


def plot(reports, hbm_gb, path):
    """Plots each rank's live memory over the number of memory events. The extension of the path gives the format."""
    figure = Figure(figsize=(10, 4))
    axes = figure.subplots()
    for report in reports:
        moments, live = zip(*report["timeline"][:-1])  # without the last one, at which all memory is freed
        name = f"rank {report['rank']}, {report['compiled'][-1][0]} layers"
        axes.step(moments, [size / 2**30 for size in live], where="post", label=name)
    axes.axhline(hbm_gb, color="black", linestyle="--", label="limit")
    axes.set(xlabel="events: buffers allocated and freed, ops run", ylabel="GiB", ylim=(0, None))
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
