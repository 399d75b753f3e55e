"""experiments.pretrain of which rank 1 is killed once, after a step: python -m tests.experiments.lost_rank STEP MARK [flags of pretrain]

MARK: a file that is made when it happens, so that it happens once.
"""

import os
import signal
import sys
from functools import partial

from experiments import flags, pretrain
from experiments.train import checkpoints, command


def main():
    step, mark = int(sys.argv.pop(1)), sys.argv.pop(1)
    after_step = checkpoints.Saving.after_step

    def lost(self, state, done, tokens):
        stops = after_step(self, state, done, tokens)
        if done == step and self.mesh.rank == 1 and not os.path.exists(mark):
            open(mark, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return stops

    checkpoints.Saving.after_step = lost
    flags.run(pretrain.main, partial(command.define_flags, "experiments.pretrain"))


if __name__ == "__main__":
    main()
