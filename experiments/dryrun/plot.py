"""A plot of device memory over a dry run."""

from matplotlib.figure import Figure

GIB = 2**30


def plot(reports, hbm_gb, path):
    """Writes the picture of draw(). The path's extension gives the format."""
    draw(reports, hbm_gb).savefig(path)


def draw(reports, hbm_gb):
    """Returns a Figure of each rank's live memory over the tracker's count of events, at the depth that was compiled, and as a line across
    what the verdict is about: the peak of all layers with fragments and the margin."""
    figure = Figure(figsize=(10, 4))
    axes = figure.subplots()
    for i, report in enumerate(reports):
        moments, live = zip(*report["timeline"][:-1])  # at the end all is given back
        depth, layers, figures = report["compiled"][-1][0], report["layers"], report["figures"]
        name = f"rank {report['rank']}, {depth:g}{f' of {layers:g}' if depth != layers else ''} layers"
        axes.step(moments, [size / GIB for size in live], where="post", label=name, color=f"C{i}")
        needed = (figures["with_fragments_bytes"] + figures["margin_bytes"]) / GIB
        words = f"rank {report['rank']}, all {layers:g} layers with margin: {needed:.1f}, {'fits' if report['fits'] else 'DOES NOT FIT'}"
        axes.axhline(needed, color=f"C{i}", linestyle=":", label=words)
    axes.axhline(hbm_gb, color="black", linestyle="--", label=f"limit: {hbm_gb:g}")
    axes.set(xlabel="events: buffers made and given back, ops run", ylabel="GiB", ylim=(0, None))
    axes.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    return figure
