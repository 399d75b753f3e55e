"""A plot of device memory over a dry run."""

from matplotlib.figure import Figure


def plot(reports, hbm_gb, path):
    """Writes a picture of each rank's live memory over the tracker's count of events. The path's extension gives the format."""
    figure = Figure(figsize=(10, 4))
    axes = figure.subplots()
    for report in reports:
        moments, live = zip(*report["timeline"][:-1])  # at the end all is given back
        name = f"rank {report['rank']}, {report['compiled'][-1][0]} layers"
        axes.step(moments, [size / 2**30 for size in live], where="post", label=name)
    axes.axhline(hbm_gb, color="black", linestyle="--", label="limit")
    axes.set(xlabel="events: buffers made and given back, ops run", ylabel="GiB", ylim=(0, None))
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
