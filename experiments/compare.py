"""Compares runs: python -m experiments.compare RUN_OR_SWEEP... [--metric=loss --metric=eval_loss] [--x=step|tokens|time] [--smooth=50]

Writes compare.html, a page that needs no other file, and a PNG for each metric to the folder --output. Prints the last values and the
config keys in which the runs differ. The runs may still be training.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

from absl import app, flags

from experiments import interrupts, number_flags
from experiments.sweep import compare_page
from experiments.watch import records
from parallel.checkpoint.files import write_text
from qwen3.text_stream import printable

FLAGS = flags.FLAGS
POINTS = 1000  # most points drawn of a run


def define_flags():
    flags.DEFINE_multi_string("metric", ["loss", "eval_loss"], "a name in metrics.jsonl; repeat the flag for several")
    flags.DEFINE_enum("x", "step", list(records.AXES), "the horizontal axis: steps, tokens seen, or hours of training")
    number_flags.integer("smooth", 1, "draw the mean of this many values at each point, but not of evaluations", 1)
    flags.DEFINE_string("output", "compare", "folder for the page and the pictures; made if missing")


def main(argv):
    folders = runs_in([os.path.normpath(folder) for folder in argv[1:]])
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda folder: records.series(folder, FLAGS.metric, FLAGS.x), folders))
        trained = list(pool.map(lambda folder: records.of_training_steps(folder, FLAGS.metric), folders))
    names = short_names(folders)
    for metric in FLAGS.metric:
        if not any(metric in run for run in found):
            raise ValueError(f"--metric={metric}: none of the runs has it")
    differences = records.config_differences(folders)
    groups = compare_page.groups(differences, names)
    curves = {
        metric: {
            name: drawn(*run[metric], FLAGS.smooth if metric in each_step else 1)
            for name, run, each_step in zip(names, found, trained)
            if metric in run
        }
        for metric in FLAGS.metric
    }
    os.makedirs(FLAGS.output, exist_ok=True)
    for metric, lines in curves.items():
        compare_page.plot(os.path.join(FLAGS.output, f"{safe(metric)}.png"), lines, metric, FLAGS.x, groups, FLAGS.smooth)
    page = os.path.join(FLAGS.output, "compare.html")
    write_text(page, compare_page.page(curves, differences, names, FLAGS.x, FLAGS.smooth, groups))
    print(table(names, found, FLAGS.metric))
    for key, values in differences.items():
        print(printable(f"{key}: {values_of(values)}"))
    print(f"wrote {page}")


def runs_in(paths):
    """Returns the folders of runs among the paths and, of a sweep's folder, those in it. Prints which paths are left out."""
    if not paths:
        raise ValueError("nothing to compare; give folders of runs, such as runs/a runs/b, or of a sweep")
    found, other = [], []
    for path in paths:
        inside = sorted(os.path.join(path, name) for name in os.listdir(path)) if os.path.isdir(path) else []
        runs = [path] if is_run(path) else [folder for folder in inside if is_run(folder)]
        found += runs
        other += [path] * (not runs)
    if not found:
        raise ValueError(f"{paths[0]} has no {records.METRICS}; give the folder of a run, its --workdir, or of a sweep")
    if other:
        print(f"left out {', '.join(other)}: no folder of a run or of a sweep has this name")
    return found


def is_run(path):
    return os.path.isfile(os.path.join(path, records.METRICS))


def drawn(x, values, smooth):
    return records.thinned(x, records.smoothed(values, smooth), POINTS)


def short_names(folders):
    """The paths relative to their common folder: ["runs/a", "runs/b"] -> ["a", "b"]. Raises ValueError for a path given twice."""
    if len(folders) == 1:
        return [os.path.basename(folders[0])]
    common = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    names = [os.path.relpath(os.path.abspath(folder), common) for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is given twice")
    return names


def values_of(values, most=8):
    """The distinct values as text, in order; after the first `most`, only how many there are in all."""
    different = sorted(set(map(str, values)), key=lambda text: (len(text), text) if text.lstrip("-").isdigit() else (0, text))
    return ", ".join(different[:most]) + (f", ... ({len(different)} in all)" if len(different) > most else "")


def safe(name):
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)


def table(names, found, metrics):
    """Lines of text: the last value of each metric for each run."""
    width = max(len("run"), *map(len, names))
    lines = [f"{'run':{width}}" + "".join(f"  {metric:>14}" for metric in metrics)]
    for name, run in zip(names, found):
        lines.append(f"{name:{width}}" + "".join(f"  {run[metric][1][-1]:14.4f}" if metric in run else f"  {'':14}" for metric in metrics))
    return "\n".join(lines)


def run():
    define_flags()
    interrupts.main_runs()
    try:
        app.run(main)
    except KeyboardInterrupt:
        print(interrupts.WORDS, file=sys.stderr)
        sys.exit(interrupts.STATUS)
    except ValueError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run()
