"""The acceptance kit: what it reports of a machine, and that it names the stage in which something is wrong."""

import html.parser
import importlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.accept import cases as accept_cases
from experiments.accept import kernels, machine, ranks, report, stages, supervise
from experiments.accept.kernels import error_of
from experiments.accept.outcome import FAIL, NOT_HERE, NOT_RUN, PASS, Failed
from experiments.launch import STARTS_JOBS
from ops import registry
from qwen3 import hf
from tests.tiny import DENSE, random_params

ROOT = Path(__file__).parents[2]
# Functions of ops that have no case of their own, and what tries them instead
ELSEWHERE = {
    "attention.parts": "the rings of the stage layouts",
    "attention.spans": "the rings of the stage layouts, where they take documents by their lengths",
    "stack_write.new": "makes an array whose numbers do not matter",
    **dict.fromkeys(
        [f"{op}.int8" for op in ("matmul", "grouped_matmul", "embedding", "decode_attention", "decode_mlp")] + ["embedding.int8_part"],
        "weights in 8 bits, which only CPU takes: tests/ops/test_int8.py",
    ),
}


def kit(folder, *arguments, nproc=1, planted="", timeout_s=500):
    """Runs the kit. Returns (the exit status, its output, the facts of its report)."""
    paths = [*([str(Path(__file__).parent / "accept_planted")] if planted else []), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "ACCEPT_PLANTED": planted}
    command = ["experiments.accept", f"--out={folder}/out", *arguments]
    if nproc > 1:
        command = ["experiments.launch", f"--nproc={nproc}", "--", *command]
    done = subprocess.run([sys.executable, "-m", *command], cwd=folder, env=env, capture_output=True, text=True, timeout=timeout_s)
    path = Path(folder, "out", report.JSON)
    return done.returncode, done.stdout + done.stderr, json.loads(path.read_text()) if path.is_file() else None


@pytest.fixture(scope="module")
def cheap(tmp_path_factory):
    """Two stages in one process: (the folder of the report, its facts)."""
    folder = tmp_path_factory.mktemp("accept")
    status, said, facts = kit(folder, "--stages=versions,devices", "--quick")
    assert status == 0, said
    return folder / "out", facts


def outcomes(facts, stage):
    """Returns {check: outcome} of a stage."""
    return {check["name"]: check["outcome"] for each in facts["stages"] if each["name"] == stage for check in each["checks"]}


def failed(facts):
    return {stage["name"] for stage in facts["stages"] if stage["outcome"] == FAIL}


@pytest.mark.extended
def test_a_report_says_what_this_machine_is(cheap):
    _, facts = cheap
    assert facts["result"] == PASS and facts["quick"] and facts["ranks"] == 1 and facts["failed"] == []
    assert facts["versions"]["MindSpore"].startswith("2.10") and facts["versions"]["Python"] == sys.version.split()[0]
    assert facts["machine"]["device"].startswith("CPU") and facts["machine"]["memory_gib"] > 0
    of_versions, of_devices = outcomes(facts, "versions"), outcomes(facts, "devices")
    assert of_versions["MindSpore"] == of_versions["numpy"] == of_devices["product"] == PASS
    if not os.path.isdir("/usr/local/Ascend"):
        assert of_versions["CANN"] == of_versions["driver"] == of_devices["links between NPUs"] == NOT_HERE
    assert facts["checks"][PASS] == sum(outcome == PASS for stage in (of_versions, of_devices) for outcome in stage.values())


class Page(html.parser.HTMLParser):
    """Collects tags with their attributes, the visible text, and the JSON of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.facts, self._within = [], [], "", ""

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._within = tag

    def handle_endtag(self, tag):
        self._within = ""

    def handle_data(self, data):
        if self._within == "script":
            self.facts += data
        elif self._within != "style":
            self.text.append(data)


def page_of(out):
    page = Page()
    page.feed((out / report.HTML).read_text())
    return page


@pytest.mark.extended
def test_the_page_loads_nothing_and_has_the_facts_of_the_json_file(cheap):
    out, facts = cheap
    page, source = page_of(out), (out / report.HTML).read_text()
    assert json.loads(page.facts) == facts
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "embed", "base"}
    for tag, attributes in page.tags:
        assert "src" not in attributes and not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert attributes.get("href", "#").startswith("#"), attributes
        assert tag != "script" or attributes["type"] == "application/json"
    assert not re.search(r"url\(|@import|https?://|//cdn", source)
    visible = " ".join(page.text)
    for stage in facts["stages"]:
        for check in stage["checks"]:
            assert check["name"] in visible and all(key in visible for key in check["facts"]), check


def test_a_report_names_neither_the_host_nor_the_user_nor_their_folders(tmp_path):
    status, said, facts = kit(tmp_path, "--stages=versions", planted="raises")
    assert status == 1 and failed(facts) == {"versions"}, said
    text = (tmp_path / "out" / report.HTML).read_text() + (tmp_path / "out" / report.JSON).read_text()
    (words,) = [check["text"] for check in facts["stages"][0]["checks"] if check["outcome"] == FAIL]
    assert "RuntimeError: no such thing in" in words and "secret" not in text and "on HOST" in words
    for private in (socket.gethostname(), str(tmp_path), str(ROOT), os.path.expanduser("~/")):
        assert private not in text, private


def test_texts_are_cleaned(monkeypatch):
    report._names.cache_clear()
    monkeypatch.setattr(socket, "gethostname", lambda: "node17.lab.example.org")
    monkeypatch.setattr(socket, "getfqdn", lambda: "node17.lab.example.org")
    monkeypatch.setattr(report.getpass, "getuser", lambda: "ada")
    for key in ("USER", "LOGNAME", "SUDO_USER"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", "/home/ada")
    try:
        for given, wanted in (
            ("/home/ada/models/x is missing, and ~/y too", ".../x is missing, and ~/y too"),
            ("from /data/teams/ada/run7/log.txt", "from .../log.txt"),
            (f'File "{ROOT}/ops/rope.py", line 3', 'File "./ops/rope.py", line 3'),
            ("node17 and node17.lab.example.org and node170", "HOST and HOST and node170"),
            ("ada said; adamw said", "USER said; adamw said"),
            ("scheduler at 10.1.2.3:8118, not 127.0.0.1:9", "scheduler at ADDRESS:8118, not 127.0.0.1:9"),
            ("/usr/local/Ascend/driver/version.info", "/usr/local/Ascend/driver/version.info"),
            ("a\x1b[31mb\n", "a[31mb\n"),
        ):
            assert report.clean(given) == wanted
        facts = report.cleaned({"text": "at 10.1.2.3", "facts": {"found": "24.1.0.3", "rate": float("inf")}})
        assert facts == {"text": "at ADDRESS", "facts": {"found": "24.1.0.3", "rate": "inf"}}
    finally:
        report._names.cache_clear()


@pytest.mark.parametrize("planted, words", [("killed", "was killed by SIGKILL"), ("hangs", "did not end within its limit of 4 s")])
def test_a_check_that_kills_its_process_or_hangs_has_failed_and_the_next_is_made(planted, words, tmp_path):
    status, said, facts = kit(tmp_path, "--stages=versions", "--limit_s=4", planted=planted)
    found = outcomes(facts, "versions")
    assert status == 1 and [name for name, outcome in found.items() if outcome == FAIL] == ["libraries"], said
    assert found["C++ compiler"] == PASS and found["Python"] == PASS
    assert words in next(check["text"] for check in facts["stages"][0]["checks"] if check["name"] == "libraries")
    assert "python -m experiments.accept --stages=versions" in said and "--limit_s=4" in facts["stages"][0]["command"]
    assert not (tmp_path / "out" / "work").exists()


def test_a_kit_that_is_stopped_reports_what_it_has_found(tmp_path):
    paths = [str(Path(__file__).parent / "accept_planted"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "ACCEPT_PLANTED": "hangs"}
    command = [sys.executable, "-m", "experiments.accept", "--out=out", "--stages=versions,devices"]
    popen = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        progress, end = tmp_path / "out" / "work" / "versions" / "attempt_1" / "rank_0.jsonl", time.monotonic() + 100
        while not (progress.is_file() and '{"begins": 6}' in progress.read_text()) and time.monotonic() < end:
            time.sleep(0.05)
        popen.terminate()
        said, _ = popen.communicate(timeout=60)
    finally:
        popen.kill()
    assert popen.returncode == 143, said
    facts = json.loads((tmp_path / "out" / report.JSON).read_text())
    found = outcomes(facts, "versions")
    assert facts["result"] == "unfinished" and found["Python"] == PASS and found["libraries"] == found["C++ compiler"] == NOT_RUN
    assert facts["stages"][1]["outcome"] == NOT_RUN and not (tmp_path / "out" / "work").exists()


def test_what_one_rank_finds_is_what_the_stage_says():
    def line(outcome, text="", **facts):
        return {"outcome": outcome, "text": text, "facts": facts, "seconds": 1.0}

    def merged(*ranks, why=""):
        check = supervise.Check("c")
        given = {r: {"names": ["c"], "begun": {0}, "ended": {} if each is None else {0: each}} for r, each in enumerate(ranks)}
        supervise._merge(check, 0, given, why)
        return check

    assert merged(line(PASS, x=1), line(PASS, x=2)) == supervise.Check("c", PASS, "", {"x": 1}, 1.0)
    other = merged(line(FAIL, "failed on 1 other rank of 2", x=1), line(FAIL, "3 numbers are wrong", wrong=3))
    assert (other.outcome, other.text, other.facts) == (FAIL, "rank 1: 3 numbers are wrong", {"wrong": 3})
    assert merged(line(FAIL, "failed on 1 other rank of 4")).text == "failed on 1 other rank of 4"  # of another node
    lost = merged(line(PASS), None, why="it did not end")
    assert (lost.outcome, lost.text) == (FAIL, "it did not end")


def test_every_function_of_every_op_has_a_case():
    table = accept_cases.cases()
    for op in registry.OPS:
        module = importlib.import_module(f"ops.{op}")
        for name in vars(module):
            if name == "reference" or (name.startswith("reference_") and name not in ("reference_block",)):
                function = name.removeprefix("reference").removeprefix("_")
                case = f"{op}.{function}" if function else op
                assert case in table or case in ELSEWHERE, case
    assert not set(ELSEWHERE) & set(table)


def test_the_table_of_versions_is_what_the_package_asks_for():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = setup["options"]["install_requires"].split()
    table = {name: written for name, written, _ in machine.VERSIONS}
    assert f"mindspore>={table['MindSpore'][0]},<2.11" in wanted and f"numpy>={table['numpy'][0]},<2" in wanted
    assert setup["options"]["python_requires"].strip() == f">={table['Python'][0]}"


def test_errors_are_measured():
    assert error_of([1.0, 2.0], [1.0, 2.02]) == pytest.approx(0.01)
    assert error_of([1, 2, 3, 4], [1, 2, 3, 5]) == 0.25
    assert error_of([1.0], [float("nan")]) == error_of([1.0, 2.0], [1.0]) == error_of([float("inf")], [float("-inf")]) == float("inf")
    assert error_of([float("-inf"), 1.0], [float("-inf"), 1.0]) == error_of([0.0], [0.0]) == 0.0


def test_a_reference_of_zeros_judges_nothing():
    zeros = SimpleNamespace(of=lambda name, dtype: {key: np.zeros((37, 80), np.float32) for key in ("value 0", "gradient 0", "gradient 1")})
    with pytest.raises(Failed, match="the reference gives only zeros, so it can judge nothing: value 0, gradient 0, gradient 1"):
        kernels._against_reference(zeros, "swiglu", "cpu", "float32", "CPU")
    nothing = {"loss 0": np.float64(0), "norm 0": np.float64(0)}
    with pytest.raises(Failed, match="so it judges nothing"):
        ranks.compared(nothing, nothing, {"loss": 1e-5, "norm": 1e-5})


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stages=layout", "--out=x"], "--stages=layout: there is no such stage; did you mean 'layouts'?"),
        (["--quick"], "--out is missing"),
        (["--out=x", "--goldens=setup.cfg"], "--goldens is of a model; give --hf_dir=FOLDER too"),
        (["--out=x", "--hf_dir=nowhere"], "--hf_dir=nowhere does not exist"),
    ],
)
def test_a_mistake_gets_one_line(arguments, message):
    done = subprocess.run([sys.executable, "-m", "experiments.accept", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_the_launcher_leaves_the_jobs_to_the_kit():
    command = [sys.executable, "-m", "experiments.launch", "--nproc=3", "--", STARTS_JOBS, "--list"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.split()[0] == "versions" and len(done.stdout.splitlines()) == len(stages.STAGES)
    done = subprocess.run([*command[:4], "--simulate", *command[4:]], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--simulate has no use with experiments.accept" in done.stderr


def test_a_failing_stage_of_a_job_is_repeated_by_a_job():
    values = {"out": "runs/a", "quick": True, "limit_s": None, "hf_dir": None, "goldens": None, "write_goldens": None}
    job = {"nproc": (4, 1), "nnodes": (1, 1), "node_rank": (None, None), "master_addr": (None, None), "master_port": (None, None)}

    class Options(SimpleNamespace):
        def __getitem__(self, name):
            value, default = job.get(name, (values.get(name, 600), values.get(name, 600)))
            return SimpleNamespace(value=value, default=default)

    options = Options(**values)
    of = {name: supervise.command_of(stages.STAGES[name], options) for name in ("layouts", "ops")}
    assert of["ops"] == "python -m experiments.accept --stages=ops --out=runs/a --quick"
    assert of["layouts"] == ("python -m experiments.launch --nproc=4 -- experiments.accept --stages=layouts --out=runs/a --quick")


def failing_checks(facts, stage):
    return [name for name, outcome in outcomes(facts, stage).items() if outcome == FAIL]


@pytest.mark.slow
def test_a_wrong_kernel_fails_the_stages_that_use_it(tmp_path):
    status, said, facts = kit(tmp_path, "--stages=ops,step,checkpoint", "--quick", planted="wrong_kernel", timeout_s=1500)
    assert status == 1 and failed(facts) == {"ops", "step"}, said
    assert failing_checks(facts, "ops") == ["rms_norm, cpu, float32"]
    assert outcomes(facts, "ops")["rms_norm, ascendc, float32"] == outcomes(facts, "ops")["matmul, cpu, float32"] == PASS
    assert "to repeat it: python -m experiments.accept --stages=ops" in said


@pytest.mark.slow
def test_a_collective_that_drops_a_rank_fails_it(tmp_path):
    """What ranks tell each other about failures goes through that collective too."""
    status, said, facts = kit(tmp_path, "--stages=devices,collectives", "--quick", nproc=2, planted="dropped_rank", timeout_s=1500)
    assert status == 1 and failed(facts) == {"devices", "collectives"}, said
    assert failing_checks(facts, "collectives") == ["psum, all ranks"]
    assert failing_checks(facts, "devices") == ["place of each rank"]
    assert "to repeat it: python -m experiments.launch --nproc=2 -- experiments.accept --stages=collectives" in said


@pytest.mark.slow
def test_a_layouts_wrong_gradient_fails_that_layout(tmp_path):
    status, said, facts = kit(tmp_path, "--stages=collectives,layouts", "--quick", nproc=2, planted="wrong_gradient", timeout_s=1500)
    assert status == 1 and failed(facts) == {"layouts"}, said
    found = outcomes(facts, "layouts")
    assert {name for name, outcome in found.items() if outcome == FAIL} == {name for name in found if "dp 2" in name}
    assert [name for name, outcome in found.items() if outcome == PASS]


@pytest.mark.slow
def test_a_flipped_byte_in_a_checkpoint_fails_it(tmp_path):
    status, said, facts = kit(tmp_path, "--stages=versions,checkpoint", "--quick", planted="flipped_byte", timeout_s=1500)
    assert status == 1 and failed(facts) == {"checkpoint"}, said
    assert {"save", "go on in the same layout", "a process that is killed while it saves"} <= set(failing_checks(facts, "checkpoint"))


@pytest.mark.slow
def test_a_model_is_judged_by_goldens(tmp_path):
    model, other = tmp_path / "model", tmp_path / "other"
    for folder, seed in ((model, 0), (other, 1)):
        hf.save(str(folder), DENSE, random_params(DENSE, seed))
    goldens = tmp_path / "goldens.npz"
    status, said, facts = kit(tmp_path, "--stages=hf", f"--hf_dir={model}", f"--write_goldens={goldens}")
    assert status == 0 and outcomes(facts, "hf")["logits"] == PASS and outcomes(facts, "hf")["greedy text"] == NOT_HERE, said
    assert str(tmp_path) not in json.dumps(facts)
    status, said, facts = kit(tmp_path, "--stages=hf", f"--hf_dir={model}", f"--goldens={goldens}")
    assert status == 0 and set(outcomes(facts, "hf").values()) == {PASS}, said
    status, said, facts = kit(tmp_path, "--stages=hf", f"--hf_dir={other}", f"--goldens={goldens}")
    assert status == 1 and {"logits", "greedy text"} <= set(failing_checks(facts, "hf")), said
    goldens.write_bytes(b"not a zip file")
    status, said, facts = kit(tmp_path, "--stages=hf", f"--hf_dir={model}", f"--goldens={goldens}")
    assert status == 1 and "is not a file of --write_goldens" in said


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 4])
def test_everything_passes_on_cpu(nproc, tmp_path):
    status, said, facts = kit(tmp_path, nproc=nproc, timeout_s=5000)
    assert status == 0 and facts["result"] == PASS and not facts["failed"], said
    of = {stage["name"]: stage["outcome"] for stage in facts["stages"]}
    assert list(of) == list(stages.STAGES)
    needs_ranks = {name for name, outcome in of.items() if outcome == NOT_HERE}
    assert needs_ranks - {"dryrun"} == ({"hf", "collectives", "layouts"} if nproc == 1 else {"hf"})
    assert facts["ranks"] == nproc and json.loads(page_of(tmp_path / "out").facts) == facts
