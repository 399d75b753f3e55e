"""A process that saves one checkpoint after another until it is killed: python -m experiments.accept.save_forever FOLDER."""

import os
import sys

import numpy as np

from parallel.checkpoint.files import FOLDER, clean, steps
from parallel.checkpoint.save import Saver, Settings
from parallel.checkpoint.store import Piece

ROWS, WIDTH = 16, 20000


def pieces(step, copy):
    w = np.sin(np.arange(ROWS, dtype=np.float32)[:, None] + step) + np.zeros((1, WIDTH), np.float32)
    return [Piece("params/w", w.shape, (4, WIDTH), (0, 0), w)]


def main(run):
    os.makedirs(os.path.join(run, FOLDER), exist_ok=True)
    clean(run)
    saver, step = Saver(run, 0, 1, "abcdef", Settings(keep_last=3)), (steps(run) or [0])[-1]
    while True:
        step += 1
        saver.save(step, lambda copy, step=step: pieces(step, copy), {"step": step})
        saver.wait()


if __name__ == "__main__":
    main(sys.argv[1])
