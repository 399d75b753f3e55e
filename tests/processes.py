"""A function on several processes, for tests: started once by the launcher, it makes many checks' results, which the test then judges.

    results = run("tests.parallel.collectives_worker:main", 4)

calls main() in each of 4 processes; what rank r returns, a dict of arrays, numbers or strings, is results[r]. Arguments are strings.
"""

import faulthandler
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
LAUNCH = "import json, sys; from parallel.launch import job as launch; sys.exit(launch.run(launch.Job(**json.loads(sys.argv[1]))))"
LATE_S = 20  # after which a launcher whose ranks should have given up is killed


def run(function, nproc, *args, timeout_s=240):
    """Calls `function`, a "module:name", with the strings `args` in each of nproc processes. Returns one dict of numpy arrays a rank.

    A rank that fails, or has not ended after timeout_s, is an AssertionError with what the launcher says of it: which, and its log's end.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = {"target": ["tests.processes", function, folder, str(timeout_s), *args], "nproc": nproc, "log_dir": folder}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOG_v": "3"}
        command = [sys.executable, "-c", LAUNCH, json.dumps(job)]
        # in `folder`, as MindSpore writes files where it runs
        popen = subprocess.Popen(command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            _, err = popen.communicate(timeout=timeout_s + LATE_S)
        finally:
            popen.kill()  # the ranks die with it
            popen.wait()
        assert popen.returncode == 0, f"{function} on {nproc} processes:\n{err}"
        return [_load(f"{folder}/rank_{rank}.npz") for rank in range(nproc)]


def _load(path):
    with np.load(path) as found:
        return dict(found)


def main(function, folder, timeout_s, *args):
    """In each process."""
    faulthandler.dump_traceback_later(float(timeout_s), exit=True)  # its log then ends in the stacks, and the launcher shows it
    module, _, name = function.partition(":")
    results = getattr(importlib.import_module(module), name)(*args)
    arrays = {key: np.asarray(value) for key, value in results.items()}
    # numpy's files keep no bfloat16
    arrays = {key: array.astype(np.float32) if array.dtype.name == "bfloat16" else array for key, array in arrays.items()}
    assert all(array.dtype != object for array in arrays.values()), {key: array.dtype for key, array in arrays.items()}
    np.savez(f"{folder}/rank_{os.environ['RANK_ID']}.npz", **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
