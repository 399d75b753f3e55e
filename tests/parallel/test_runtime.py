"""The runtime on CPU: set_up() says nothing, sets what it should, and leaves alone what a user has set."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os
import mindspore as ms
from parallel.graph import runtime
from parallel.graph.jit import jit

{before}

def double(x):
    return x * 2

y = jit(double)(ms.Tensor([3.0]) + 1)
print(y, os.environ.get("MS_DEV_RUNTIME_CONF"))
"""


def run(tmp_path, before, **env):
    path = tmp_path / "script.py"  # a file, as MindSpore reads the source of what it compiles
    path.write_text(SCRIPT.format(before=before))
    env = {**{name: value for name, value in os.environ.items() if name != "MS_DEV_RUNTIME_CONF"}, "PYTHONPATH": os.getcwd(), **env}
    done = subprocess.run([sys.executable, str(path)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_silent_and_repeatable(tmp_path):
    assert run(tmp_path, "runtime.set_up(); runtime.set_up()").split("\n") == ["[8.] None", ""]


def test_what_a_user_has_set_stays(tmp_path):
    out = run(tmp_path, "ms.runtime.dispatch_threads_num(3); runtime.set_up()", MS_DEV_RUNTIME_CONF="pipeline:false")
    assert out.split("\n") == ["[8.] pipeline:false", ""]


@pytest.mark.slow
def test_without_it_mindspore_announces_the_variable(tmp_path):
    """The trap that set_up() works around."""
    assert "[MS_DEV_RUNTIME_CONF]" in run(tmp_path, "", MS_DEV_RUNTIME_CONF="graph_pipeline:false")
