"""Runs the stages one after another, each in processes of its own, and writes the report after each.

A check that crashes its process, kills it or does not end within its limit has failed, and the stage goes on with the next check in a new
process. This process does not import MindSpore. On several nodes each has such a process, and the launcher joins the jobs of a stage.
"""

import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from experiments import job_flags
from experiments.accept import report
from experiments.accept.child import JOB
from experiments.accept.outcome import FAIL, NOT_HERE, NOT_RUN, PASS
from ops.ascendc import build as ascendc
from parallel.launch.process import Process, end, last_lines

ROOT = Path(__file__).parents[2]
POLL_S, GRACE_S = 0.1, 10
BEGIN_S = 900  # in which a process has to begin its first check, which includes building kernels and joining the others
PACKAGE = "package"  # the folder in --out in which the stage `package` installs our kernels for Ascend


@dataclass
class Check:
    """A check of a stage, as in the report."""

    name: str
    outcome: str = NOT_RUN
    text: str = ""
    facts: dict = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Result:
    """A stage, as in the report. command: what repeats it."""

    name: str
    title: str
    command: str
    outcome: str = NOT_RUN
    seconds: float = 0.0
    checks: list = field(default_factory=list)


def run(chosen, options):
    """Runs the chosen stages. options: the flags of experiments.accept. Returns the exit status: 1 if a stage failed, else 0."""
    out = os.path.abspath(os.path.expanduser(options.out))
    os.makedirs(os.path.join(out, "logs"), exist_ok=True)
    work = os.path.join(out, f"work_node_{options.node_rank}" if options.node_rank else "work")
    results, began = [Result(stage.name, stage.title, command_of(stage, options)) for stage in chosen], time.time()
    writes = not options.node_rank
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        for number, (stage, result) in enumerate(zip(chosen, results), 1):
            if stage.ranks == "one" and not writes:
                continue  # node 0 runs it
            print(f"{f'{number}/{len(chosen)}':10} {stage.name}: {stage.title}", flush=True)
            run_stage(stage, options, out, work, result)
            print(f"{'':10} {said(result)}", flush=True)
            if writes:
                report.write(out, results, options, began, ended=number == len(chosen))
    except BaseException:  # Ctrl-C or SIGTERM, mostly: the report tells what was found until then
        if writes:
            report.write(out, results, options, began, ended=False)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    failed = [result for result in results if result.outcome == FAIL]
    for result in failed:
        print(f"failed     {result.name}; to repeat it: {result.command}")
    if writes:
        print(f"report     {os.path.join(options.out, report.HTML)}, to attach to an issue; {report.JSON} has the same facts", flush=True)
    return int(bool(failed))


def command_of(stage, options):
    """Returns the command that repeats a stage."""
    words = ["experiments.accept", f"--stages={stage.name}", f"--out={options.out}"]
    words += ["--quick"] * options.quick
    words += [f"--{name}={options[name].value}" for name in ("limit_s", "hf_dir", "goldens", "write_goldens") if options[name].value]
    job = [f"--{name}={options[name].value}" for name in job_flags.NAMES if options[name].value != options[name].default]
    if job and (stage.ranks == "all"):
        words = ["experiments.launch", *job, "--", *words]
    return "python -m " + shlex.join(words)


def said(result):
    """Returns a line of text about how a stage ended, and a line for each check that failed."""
    counts = {outcome: sum(check.outcome == outcome for check in result.checks) for outcome in (PASS, FAIL, NOT_HERE)}
    parts = [f"{count} {outcome}" for outcome, count in counts.items() if count]
    lines = [f"{result.outcome} in {result.seconds:.0f} s: {', '.join(parts) or 'nothing'}"]
    for check in result.checks:
        if check.outcome == FAIL or (check.outcome == NOT_HERE and result.outcome == NOT_HERE):
            lines.append(f"    {check.name}: {check.text.strip().splitlines()[0] if check.text.strip() else check.outcome}")
    return f"\n{'':10} ".join(lines)


def run_stage(stage, options, out, work, result):
    """Runs a stage to its end, in as many processes as it takes, and fills in its Result. work: a folder of this node alone."""
    began, first, attempt, names = time.monotonic(), 0, 0, []
    work = os.path.join(work, stage.name)
    shutil.rmtree(work, ignore_errors=True)
    while True:
        attempt += 1
        folder = os.path.join(work, f"attempt_{attempt}")
        os.makedirs(folder)
        node = f"_node_{options.node_rank}" if options.node_rank else ""
        log = os.path.join(out, "logs", f"{stage.name}{f'_{attempt}' if attempt > 1 else ''}{node}.log")
        try:
            ended, why = _attempt(stage, options, out, folder, first, log)
        except BaseException:
            _take_what_has_ended(result, _progress(folder))
            raise
        ranks = _progress(folder)
        names = names or next((found["names"] for found in ranks.values() if found["names"]), [])
        if not names:
            result.checks = [Check("start", FAIL, why or "the process ended without a word")]
            break
        result.checks += [Check(name) for name in names[len(result.checks) :]]
        reached = max((max([*found["begun"], -1]) for found in ranks.values()), default=-1)
        for number in range(first, reached + 1):
            _merge(result.checks[number], number, ranks, why)
        if ended or reached + 1 >= len(names):
            break
        if reached < first:  # no check has begun in this process
            _set(result.checks[first], FAIL, why)
            break
        first = reached + 1
    outcomes = [check.outcome for check in result.checks]
    result.outcome = FAIL if FAIL in outcomes or NOT_RUN in outcomes else PASS if PASS in outcomes else NOT_HERE
    result.seconds = time.monotonic() - began


def _take_what_has_ended(result, ranks):
    """Fills in the checks that all ranks have ended when the kit is stopped; the others stay `not run`."""
    names = next((found["names"] for found in ranks.values() if found["names"]), [])
    result.checks += [Check(name) for name in names[len(result.checks) :]]
    for number in set.intersection(*(set(found["ended"]) for found in ranks.values())) if ranks else ():
        _merge(result.checks[number], number, ranks, "")


def _set(check, outcome, text):
    check.outcome, check.text = outcome, text


def _attempt(stage, options, out, folder, first, log):
    """Runs the processes of a stage from the check with the number `first` on. Returns (whether they came to their end, why not)."""
    scratch = os.path.join(out, "work", f"{stage.name}_scratch")  # of all nodes
    os.makedirs(scratch, exist_ok=True)
    job = {"first": first, "folder": folder, "scratch": scratch, "package": os.path.join(out, PACKAGE), "quick": options.quick}
    for name in ("hf_dir", "goldens", "write_goldens"):
        job[name] = os.path.abspath(os.path.expanduser(options[name].value)) if options[name].value else None
    path = os.path.join(os.path.dirname(folder), "job.json")
    with open(path, "w", encoding="utf-8") as file:
        json.dump(job, file)
    process = Process(stage.name, _command(stage, options, folder), {**_environment(out), JOB: path}, log)
    limit_s = options.limit_s or stage.limit_s
    waits = options.node_rank  # another node's stages before this one may take long, and its limits end this one too
    seen, last, begun = -1, time.monotonic(), False
    try:
        while process.poll() is None:
            size = sum(path.stat().st_size for path in Path(folder).glob("rank_*.jsonl"))
            if size != seen:
                seen, last, begun = size, time.monotonic(), bool(size)
            limit = max(limit_s, 0 if begun else BEGIN_S)
            if not waits and time.monotonic() - last > limit:
                return False, f"it did not end within its limit of {limit:g} s"
            time.sleep(POLL_S)
    finally:
        code = process.code
        end([process], GRACE_S)
    return code == 0, "" if code == 0 else _why(code, process, log)


def _why(code, process, log):
    lines = last_lines(log)
    told = [line for line in lines if line.startswith("error: ")]  # the launcher's, of the rank that failed first
    how = process.cause().how if not told else re.sub(r"; its last lines.*", "", told[0].removeprefix("error: "))
    return "\n".join([f"the process {how}" if not told else how, *lines[-12:]])


def _command(stage, options, folder):
    child = ["experiments.accept.child", stage.name]  # equal on all nodes
    if stage.ranks == "one" or options.nproc * options.nnodes == 1:
        return [sys.executable, "-m", *child]
    job = [f"--{name}={options[name].value}" for name in job_flags.NAMES if options[name].value is not None]
    return [sys.executable, "-m", "experiments.launch", *job, f"--log_dir={folder}/logs", "--save_s=1", "--", *child]


def _environment(out):
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    vendor = os.path.join(out, PACKAGE, "vendors", ascendc.VENDOR)
    if os.path.isdir(vendor):
        env["ASCEND_CUSTOM_OPP_PATH"] = os.pathsep.join([vendor, *filter(None, [env.get("ASCEND_CUSTOM_OPP_PATH")])])
    return env


def _progress(folder):
    """Returns {rank: {names, begun: a set of numbers, ended: {number: its line}}} from what the ranks on this node have written."""
    ranks = {}
    for path in sorted(Path(folder).glob("rank_*.jsonl")):
        found = ranks[int(path.stem.removeprefix("rank_"))] = {"names": [], "begun": set(), "ended": {}}
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                said = json.loads(line)
            except ValueError:  # cut off when the process was killed
                continue
            found["names"] = said.get("checks", found["names"])
            if "begins" in said:
                found["begun"].add(said["begins"])
            if "ends" in said:
                found["ended"][said["ends"]] = said
    return ranks


def _merge(check, number, ranks, why):
    """Fills in a Check from what each rank says of it. The facts are those of the lowest rank that has ended it."""
    ended = {rank: found["ended"][number] for rank, found in ranks.items() if number in found["ended"]}
    if ended:
        one = ended[min(ended)]
        check.outcome, check.text, check.facts, check.seconds = one["outcome"], one["text"], one["facts"], one["seconds"]
    failed = {rank: line for rank, line in ended.items() if line["outcome"] == FAIL and not line["text"].startswith("failed on ")}
    if failed:
        texts = [f"rank {rank}: {line['text']}" if len(ranks) > 1 else line["text"] for rank, line in failed.items()]
        check.outcome, check.text = FAIL, "\n".join(texts)
        check.facts = next((line["facts"] for line in failed.values() if line["facts"]), check.facts)
    elif len(ended) < len(ranks) and check.outcome != FAIL:
        _set(check, FAIL, why or "the process ended in the middle of it")
