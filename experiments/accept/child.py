"""A process that makes the checks of one stage: python -m experiments.accept.child STAGE, started by experiments/accept/supervise.py.

$ACCEPT_JOB names a file with its job, a JSON object: first, the number of the check to begin with; folder, an empty one of this node, in
which the process writes `rank_R.jsonl`, a line when a check begins and one when it ends; scratch, a folder for files that the checks
share; package, the folder of our operators for Ascend; and flags of the kit.
"""

import importlib
import json
import os
import sys
import time
import traceback
from types import SimpleNamespace

from experiments.accept.outcome import FAIL, NOT_HERE, PASS, Failed, NotHere
from experiments.accept.stages import STAGES
from parallel.mesh import world_size

JOB = "ACCEPT_JOB"
WORDS, FRAMES = 1200, 4  # characters of a message, and frames of its traceback, that go into the report


def main(name):
    with open(os.environ[JOB], encoding="utf-8") as file:
        job = SimpleNamespace(**json.load(file))
    stage, job.rank, job.world, agree = STAGES[name], 0, world_size(), None
    if stage.starts:
        from parallel import collectives

        job.rank, _ = collectives.start()
    if job.world > 1:
        agree = _agreement(job)
        job.first = round(float(agree([job.first if job.rank == 0 else 0])[0]))
    os.chdir(job.folder)  # MindSpore writes files where it runs
    with open(os.path.join(job.folder, f"rank_{job.rank}.jsonl"), "w", encoding="utf-8") as progress:

        def write(**line):
            progress.write(json.dumps(line) + "\n")
            progress.flush()

        checks = getattr(importlib.import_module(f"experiments.accept.{stage.module}"), stage.function)(job)
        write(checks=list(checks))
        for number, check in list(enumerate(checks.values()))[job.first :]:
            write(begins=number)
            began = time.monotonic()
            outcome, text, facts, unexpected = _made(check)
            if agree and not unexpected:
                others = round(float(agree([outcome == FAIL])[0])) - (outcome == FAIL)
                if others and outcome != FAIL:
                    outcome, text = FAIL, f"failed on {others} other rank{'s' * (others > 1)} of {job.world}"
            write(ends=number, outcome=outcome, text=text, facts=facts, seconds=time.monotonic() - began)
            if unexpected and agree:
                sys.exit(1)  # the other ranks may wait for this one in a collective; the launcher ends them
        write(done=True)


def _agreement(job):
    """Returns sums(numbers) -> their sums over all ranks."""
    from parallel import collectives
    from parallel.mesh import Mesh

    mesh = Mesh(dp=job.world, rank=job.rank)
    return lambda numbers: collectives.host_sum(mesh, ("dp",), numbers)


def _made(check):
    """Makes a check. Returns (outcome, text, facts, whether an exception ended it that is none of ours)."""
    try:
        return PASS, "", check() or {}, False
    except NotHere as reason:
        return NOT_HERE, str(reason), {}, False
    except Failed as found:
        return FAIL, str(found), found.facts, False
    except Exception as error:
        traceback.print_exc()
        words = "".join(traceback.format_exception_only(error)).strip()[:WORDS]
        frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
        return FAIL, "\n".join([words, *(f"  {frame.filename}:{frame.lineno} {frame.line}" for frame in frames)]), {}, True


if __name__ == "__main__":
    main(sys.argv[1])
