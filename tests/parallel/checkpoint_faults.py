"""Processes that save in a loop and are killed at random moments; see test_checkpoint_files.py. Runs without MindSpore:

    python -m tests.parallel.checkpoint_faults FOLDER ROUNDS SEED

Each round starts RANKS processes where the last committed checkpoint ends, and kills one or all of them. What is committed then has to
verify, to be what was saved, and to be no older than the last that was reported safe. Prints counts as JSON.
"""

import json
import os
import random
import signal
import sys
import time
from functools import partial

import numpy as np

from parallel.checkpoint.files import FOLDER, clean, step_folder, steps
from parallel.checkpoint.read import Reader
from parallel.checkpoint.save import Saver, Settings
from parallel.checkpoint.store import Piece

RANKS, ROWS, WIDTH = 3, 8, 20000
SETTINGS = Settings(keep_last=2, keep_every=5, timeout_s=60)


def blocks(step):
    """{name: array} of a step."""
    rows = np.arange(RANKS * ROWS, dtype=np.float32)[:, None]
    return {"params/w": np.sin(rows + step) + np.zeros((1, WIDTH), np.float32), "m/norm": np.full(7, step, np.float32)}


def pieces(step, rank, copy):
    arrays = blocks(step)
    w = arrays["params/w"]
    out = [Piece("params/w", w.shape, (ROWS // 2, WIDTH), (rank * ROWS, 0), w[rank * ROWS : (rank + 1) * ROWS])]
    return out + [Piece("m/norm", (7,), (7,), (0,), arrays["m/norm"])] * (rank == 1)


def save_forever(run, rank, token):
    saver, step = Saver(run, rank, RANKS, token, SETTINGS), (steps(run) or [0])[-1]
    while True:
        step += 1
        saver.save(step, partial(pieces, step, rank), {"step": step})
        saver.wait()
        if rank == 0:
            with open(os.path.join(run, "reported"), "a") as file:
                file.write(f"{step}\n")
        while (steps(run) or [0])[-1] < step:
            time.sleep(0.002)


def check(run):
    """Exits with 1 and says what is lost, or with 0."""
    found, reported = steps(run), 0
    if os.path.exists(os.path.join(run, "reported")):
        with open(os.path.join(run, "reported")) as file:
            reported = max([0, *(int(line) for line in file.read().split())])
    last = found[-1] if found else 0
    assert last >= reported, f"step {reported} was reported safe, and {last} is the newest"
    for step in found[-2:]:
        reader = Reader(step_folder(run, step))
        assert reader.meta == {"step": step} and reader.verify() == []
        for name, want in blocks(step).items():
            assert reader.read(name).tobytes() == want.tobytes(), (step, name)
    clean(run)
    assert all(name.startswith("step_") for name in os.listdir(os.path.join(run, FOLDER))), os.listdir(os.path.join(run, FOLDER))


def forked(function, *args):
    """Calls a function in a process of its own, as tensorstore's threads do not outlive a fork. Returns its number."""
    if pid := os.fork():
        return pid
    try:
        function(*args)
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def main(run, rounds, seed):
    rng, killed = random.Random(seed), {"one": 0, "all": 0}
    os.makedirs(os.path.join(run, FOLDER), exist_ok=True)
    for number in range(rounds):
        ranks = [forked(save_forever, run, rank, f"{number:06x}") for rank in range(RANKS)]
        time.sleep(rng.uniform(0.0, 0.35))
        victims = rng.choice(("one", "all"))
        killed[victims] += 1
        if victims == "one":
            os.kill(rng.choice(ranks), signal.SIGKILL)
            time.sleep(rng.uniform(0.0, 0.2))  # the others go on as far as they can
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
        ends = [os.waitpid(pid, 0)[1] for pid in ranks]
        assert all(os.WIFSIGNALED(end) for end in ends), ends
        assert os.waitpid(forked(check, run), 0)[1] == 0, f"round {number}, {victims} killed"
    print(json.dumps({**killed, "steps": steps(run)[-1]}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
