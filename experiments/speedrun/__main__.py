"""The speedrun on a laptop: train to a fixed held-out loss with fewer FLOPs than the record before.

run RECORD ... [--seeds=5]      trains the missing seeds of records, the baseline beside them in turns, and writes results.json
check RECORD [--seeds=5]        trains the record, the one before it and the baseline in turns with other seeds, and says whether the record
                                holds; the exit status is 1 if it does not
board [--html=FILE]             prints the table of all records as markdown, and writes it as a page

    python -m experiments.speedrun check experiments/speedrun/records/01_small_steps

A record is a folder of experiments/speedrun/records; docs/speedrun.md has the rules. Nothing here changes a record's results but `run`.
"""

import sys
import tempfile

from absl import flags

from experiments import flags as command_line
from experiments import number_flags
from parallel.hints import nearest

FLAGS = flags.FLAGS
COMMANDS = ("run", "check", "board")
WORDS = []  # the command and its records, which are removed from sys.argv


def define_flags():
    number_flags.integer("seeds", 5, "with run and check: seeds of each record", 1, 1000)
    flags.DEFINE_string("records", None, "folder of all records; default: those of this project")
    flags.DEFINE_string("workdir", None, "with run and check: folder for the runs; default: a temporary one, which is removed")
    flags.DEFINE_string("html", None, "with board: a file for the page")


def main(_):
    name, folders = (WORDS or [""])[0], WORDS[1:]
    if name not in COMMANDS:
        raise ValueError(f"the command {name!r} is not one of {', '.join(COMMANDS)}{nearest(name, COMMANDS)}; see --help")
    if name == "check" and len(folders) != 1 or name == "run" and not folders:
        number = "one record" if name == "check" else "records"
        raise ValueError(f"{name} needs {number}, such as experiments/speedrun/records/01_small_steps")
    from experiments.speedrun import board, record, run  # imported here, because they import MindSpore, which takes seconds

    of_all = FLAGS.records or record.RECORDS
    everything = record.read_all(of_all)
    if name == "board":
        print(board.markdown(everything), end="")
        if FLAGS.html:
            with open(FLAGS.html, "w", encoding="utf-8") as file:
                file.write(board.page(everything))
        return 0
    names = {found.name: found for found in everything}
    chosen = [record.read(folder) for folder in folders]
    if strange := [found.name for found in chosen if found.name not in names]:
        raise ValueError(f"{strange[0]} is not in {of_all}; give a record of that folder, or its own folder as --records")
    with tempfile.TemporaryDirectory() as temporary:
        workdir = FLAGS.workdir or temporary
        if name == "run":
            run.in_turns(chosen, everything[0], range(FLAGS.seeds), workdir, record.save)
            return 0
        verdict = run.check(chosen[0], everything, FLAGS.seeds, workdir)
    print("\n".join(verdict.lines))
    return 0 if verdict.holds else 1


if __name__ == "__main__":
    while len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        WORDS.append(sys.argv.pop(1))
    command_line.run(main, define_flags, is_rank=False)
