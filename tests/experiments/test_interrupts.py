"""Ctrl-C of every main, while it imports and while it works: one line on stderr and status 130, whatever library is being imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.experiments.test_flags import MAINS, PACKAGES

ROOT = Path(__file__).parents[2]
# Python imports it before any main: it sends SIGINT to the process itself where the import of the module $AT begins
HOOK = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["AT"]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""
TRAINS = ["experiments.pretrain", "--config=experiments/configs/tiny.py"]


@pytest.fixture(scope="module")
def hook(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hook")
    (folder / "sitecustomize.py").write_text(HOOK)
    return folder


def interrupted(hook, at, *command):
    env = {**os.environ, "PYTHONPATH": f"{hook}{os.pathsep}{ROOT}", "AT": at}
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def check(done):
    assert (done.returncode, done.stderr) == (130, "stopped    by Ctrl-C\n"), (done.returncode, done.stderr)


@pytest.mark.extended(but=("*pretrain*", "*serve*"))
@pytest.mark.parametrize("main", MAINS + PACKAGES)
def test_a_main_that_still_imports_ends_with_one_line(main, hook):
    check(interrupted(hook, "numpy", f"experiments.{main}"))


@pytest.mark.parametrize("at", ["mindspore", "mindspore._c_expression", "experiments.train.run"])
def test_also_where_mindspore_is_imported(at, hook, tmp_path):
    check(interrupted(hook, at, *TRAINS, f"--workdir={tmp_path}/run"))


WORKING = """
import os, signal, sys
sys.argv[:] = ["main", *sys.argv[1:]]
from experiments import flags, interrupts
interrupts.install()
def main(_):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    finally:
        print("unwound", flush=True)
flags.run(main)
"""


def test_a_main_that_works_is_unwound_first():
    done = subprocess.run([sys.executable, "-c", WORKING], cwd=ROOT, capture_output=True, text=True, timeout=60)
    check(done)
    assert done.stdout == "unwound\n"
    shown = subprocess.run([sys.executable, "-c", WORKING, "--traceback"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "KeyboardInterrupt" in shown.stderr and "Traceback" in shown.stderr


def test_a_process_that_was_started_to_ignore_it_does_and_a_notebook_keeps_its_own():
    code = "import signal; import experiments; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "True\n"
    command = f"trap '' INT; {sys.executable} -m experiments.compare --help >/dev/null & kill -INT $!; wait $!"
    assert subprocess.run(["bash", "-c", command], cwd=ROOT, timeout=60, capture_output=True).returncode == 1  # that of --help
