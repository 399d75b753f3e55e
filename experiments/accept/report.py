"""The report of the acceptance kit: one HTML file that needs no other, and one JSON file with the same facts.

Neither has names of hosts or users, addresses, or paths of this machine: clean() replaces them in every text.
"""

import functools
import getpass
import html
import json
import math
import os
import re
import socket
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from experiments.accept import machine
from experiments.accept.outcome import FAIL, NOT_HERE, NOT_RUN, PASS
from experiments.accept.page import PAGE
from parallel.checkpoint.files import write_text

HTML, JSON = "report.html", "report.json"
ROOT = Path(__file__).parents[2]
SHOWN = "/usr/ /proc/ /sys/ /dev/ /lib/ /lib64/ /bin/ /etc/".split()  # paths that every machine has
PATH = re.compile(r"(?<![\w.~<>/-])~?(/[\w.+@~%-]+){2,}/?")
ADDRESS = re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b(?=:\d|/\d|\b)")


def write(out, results, options, began, ended):
    """Writes both files, each atomically. results: of experiments/accept/supervise.py. ended: whether all stages have run."""
    facts = made(results, options, began, ended)
    write_text(os.path.join(out, JSON), json.dumps(facts, indent=1) + "\n")
    write_text(os.path.join(out, HTML), page(facts))


def made(results, options, began, ended):
    """Returns the facts of a report, a JSON value."""
    stages = [cleaned(asdict(result), options) for result in results]
    outcomes = [check["outcome"] for stage in stages for check in stage["checks"]]
    failed = [stage["name"] for stage in stages if stage["outcome"] == FAIL]
    counts = {outcome: outcomes.count(outcome) for outcome in (PASS, FAIL, NOT_HERE)}
    result = FAIL if failed else "unfinished" if not ended else PASS if counts[PASS] else NOT_HERE
    about = {"device": machine.device_name(), **_facts_of(stages, "devices")}
    versions = {name: machine.version_of(name) for name, _, _ in machine.VERSIONS}
    return {
        "format": 1,
        "result": result,
        "date": time.strftime("%Y-%m-%d", time.gmtime(began)),
        "seconds": sum(stage["seconds"] for stage in stages),
        "quick": options.quick,
        "ranks": options.nproc * options.nnodes,
        "nodes": options.nnodes,
        "machine": {key: about[key] for key in ("device", "devices", "memory_gib", "cores", "system") if key in about},
        "versions": {name: version for name, version in versions.items() if version},
        "checks": counts,
        "failed": failed,
        "stages": stages,
    }


def _facts_of(stages, name):
    """Returns the facts of all checks of a stage together."""
    found = {}
    for check in next((stage["checks"] for stage in stages if stage["name"] == name), ()):
        found.update(check["facts"])
    return found


def cleaned(value, options=None, addresses=False):
    """Returns a JSON value in which every text is clean, and every number that JSON lacks is a text.

    addresses: whether what looks like an address may stay, as versions of four numbers are among facts.
    """
    if isinstance(value, dict):
        return {key: cleaned(each, options, addresses or key == "facts") for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [cleaned(each, options, addresses) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return clean(value, options, addresses) if isinstance(value, str) else value


def clean(text, options=None, addresses=False):
    """Returns a text without names of hosts and users, without addresses, and without paths of this machine.

    Folders that the reader knows have names: of the source, of --out and of the model. Of another path its last part stays.
    """
    text = text if addresses else ADDRESS.sub(_address, text)
    for folder, name in _folders(options):
        text = re.sub(rf"{re.escape(folder)}(?=/|\W|$)", name, text)
    text = PATH.sub(_short, text)
    for name, word in _names():
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", word, text)
    return "".join(c for c in text if c.isprintable() or c == "\n")


def _folders(options):
    """Returns [(a path, what stands for it)], the longest first."""
    pairs = [(sys.prefix, "PYTHON"), (sys.base_prefix, "PYTHON"), (str(ROOT), "."), (os.getcwd(), "."), (tempfile.gettempdir(), "TMP")]
    pairs.append((os.path.expanduser("~"), "~"))
    for name in ("out", "hf_dir", "goldens", "write_goldens") if options else ():
        if options[name].value:
            path, word = os.path.expanduser(options[name].value), "FOLDER" if name == "out" else name.upper()
            pairs += [(os.path.abspath(path), word), (options[name].value, word)]
    pairs = [(os.path.normpath(path), word) for path, word in pairs if len(os.path.normpath(path)) > 4 or word == "~"]
    return sorted(((path, word) for path, word in pairs if path != "/"), key=lambda pair: -len(pair[0]))


def _short(found):
    path = found[0]
    return path if path.startswith(tuple(SHOWN)) else f".../{path.rstrip('/').rsplit('/', 1)[-1]}"


@functools.cache
def _names():
    """Returns [(a name of this machine or its user, what stands for it)]. Root and localhost say nothing."""
    host = socket.gethostname()
    names = [(host, "HOST"), (host.split(".")[0], "HOST"), (socket.getfqdn(), "HOST")]
    try:
        names.append((getpass.getuser(), "USER"))
    except (KeyError, OSError):  # a user without a name
        pass
    names += [(os.environ[key], "USER") for key in ("USER", "LOGNAME", "SUDO_USER") if os.environ.get(key)]
    return [(name, word) for name, word in dict(names).items() if name not in ("", "root", "localhost")]


def _address(found):
    return found[0] if found[0].startswith("127.") else "ADDRESS"


def page(facts):
    """Returns the HTML of the facts. It holds them as JSON too, in an element that no browser runs."""
    text = json.dumps(facts, separators=(",", ":")).replace("<", "\\u003c")  # so that no text in it can close the element
    parts = {"HEAD": _head(facts), "SUMMARY": _summary(facts), "STAGES": "".join(map(_stage, facts["stages"])), "DATA": text}
    return re.sub("@(HEAD|SUMMARY|STAGES|DATA)@", lambda match: parts[match[1]], PAGE)


def row(facts):
    """Returns the row of the table in docs/status.md that this report fills."""
    machine, versions = facts["machine"], facts["versions"]
    where = f"{facts['ranks']} x {machine.get('device', 'unknown device')}" + f", {facts['nodes']} nodes" * (facts["nodes"] > 1)
    counts = facts["checks"]
    how = f"{counts[PASS]} pass, {counts[FAIL]} fail, {counts[NOT_HERE]} not possible" + ", quick" * facts["quick"]
    cells = (where, versions.get("MindSpore", ""), versions.get("CANN", "none"), f"{facts['result']}: {how}", facts["date"])
    return f"| {' | '.join(cells)} |"


def _head(facts):
    words = {PASS: "Nothing failed", FAIL: f"Failed: {', '.join(facts['failed'])}", NOT_HERE: "Nothing was possible here"}
    return f'<p class="result {_class(facts["result"])}">{_text(words.get(facts["result"], "Unfinished"))}</p>'


def _summary(facts):
    counts, versions = facts["checks"], facts["versions"]
    form = "short form (--quick)" if facts["quick"] else "full form"
    nodes = f" on {facts['nodes']} nodes" * (facts["nodes"] > 1)
    lines = {
        "checks": ", ".join(f"{count} {outcome}" for outcome, count in counts.items()),
        "run": f"{facts['date']}, {form}, {facts['ranks']} rank{'s' * (facts['ranks'] > 1)}{nodes}, {_duration(facts['seconds'])}",
        **{key.replace("_gib", ""): f"{_number(value)}{' GiB' * key.endswith('_gib')}" for key, value in facts["machine"].items()},
        "versions": ", ".join(f"{key} {value}" for key, value in versions.items()),
    }
    rows = "".join(f"<tr><th>{_text(key)}</th><td>{_text(value)}</td></tr>" for key, value in lines.items() if value)
    index = "".join(
        f"<tr><td>{_mark(stage['outcome'])}</td>"
        f'<td><a href="#{stage["name"]}">{_text(stage["name"])}</a></td><td class="title">{_text(stage["title"])}</td>'
        f'<td class="number">{_duration(stage["seconds"])}</td></tr>'
        for stage in facts["stages"]
    )
    line = f"<p>Its row for docs/status.md:</p><pre>{_text(row(facts))}</pre>"
    return f'<table class="plain">{rows}</table><table class="index">{index}</table>{line}'


def _stage(stage):
    counts = [(o, sum(check["outcome"] == o for check in stage["checks"])) for o in (PASS, FAIL, NOT_HERE, NOT_RUN)]
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts if count)
    repeat = f"<p>To repeat it: <code>{_text(stage['command'])}</code></p>"
    checks = sorted(stage["checks"], key=lambda check: (FAIL, PASS, NOT_HERE, NOT_RUN).index(check["outcome"]))
    is_open = " open" * (stage["outcome"] == FAIL or len(checks) <= 12)
    return (
        f'<section id="{stage["name"]}"><h2>{_mark(stage["outcome"])} '
        f'{_text(stage["name"])}</h2><p class="title">{_text(stage["title"])}.</p>{repeat if stage["outcome"] == FAIL else ""}'
        + (f"<details{is_open}><summary>{_text(said)}</summary>{_table(checks)}</details>" if checks else "")
        + "</section>"
    )


def _table(checks):
    columns = '<colgroup><col class="mark"><col class="name"><col><col class="time"></colgroup>'
    head = '<tr><th></th><th>check</th><th>what was found</th><th class="number">time</th></tr>'
    return f'<table class="checks">{columns}{head}{"".join(map(_checks, _alike(checks)))}</table>'


def _alike(checks):
    """Returns lists of checks: those that end alike, for one reason, are told together."""
    groups = {}
    for number, check in enumerate(checks):
        together = check["outcome"] in (NOT_HERE, NOT_RUN) and not check["facts"]
        groups.setdefault((check["outcome"], check["text"]) if together else number, []).append(check)
    return groups.values()


def _checks(checks):
    """Returns the row of some checks that end alike."""
    check, names = checks[0], "<br>".join(_text(check["name"]) for check in checks)
    facts = "".join(f'<span class="fact"><b>{_text(key)}</b> {_text(_number(value))}</span> ' for key, value in check["facts"].items())
    text = f"<pre>{_text(check['text'].strip())}</pre>" if "\n" in check["text"].strip() else _text(check["text"])
    return (
        f'<tr class="{_class(check["outcome"])}"><td>{_mark(check["outcome"])}</td><td>{names}</td>'
        f"<td>{text}{'<br>' * bool(text and facts and '<pre>' not in text)}{facts}</td>"
        f'<td class="number">{_duration(sum(check["seconds"] for check in checks))}</td></tr>'
    )


def _mark(outcome):
    return f'<span class="mark {_class(outcome)}">{_text(outcome)}</span>'


def _class(outcome):
    return {PASS: "pass", FAIL: "fail"}.get(outcome, "other")


def _text(value):
    return html.escape(str(value))


def _number(value):
    if isinstance(value, float):
        small = 0 < abs(value) < 1e-3
        return f"{value:.2g}" if small or not math.isfinite(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, list):
        return ", ".join(map(_number, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _duration(seconds):
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"
