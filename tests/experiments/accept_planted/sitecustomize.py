"""Plants a mistake in the processes of the acceptance kit, for tests/experiments/test_accept.py.

Python imports this module when it starts, where its folder is in PYTHONPATH. $ACCEPT_PLANTED names the mistake; it is put into its module
when that is imported, so the product has no place for it.
"""

import importlib.abc
import importlib.util
import os
import signal
import sys
import time


def wrong_kernel(module):
    whole = module.cpu

    def cpu(eps):
        norm = whole(eps)

        def rms_norm(x, w):
            return norm(x, w) * 1.001

        return rms_norm

    module.cpu = cpu


def dropped_rank(module):
    whole = module.psum

    def psum(mesh, axes, partial=False):
        total = whole(mesh, axes, partial)
        if mesh.rank != 1 or mesh.size(axes) == 1:
            return total

        def without_this_rank(x):
            return total(x * 0)

        return without_this_rank

    module.psum = psum


def wrong_gradient(module):
    whole = module.sum_gradients

    def sum_gradients(sharding, placed):
        total = whole(sharding, placed)
        if sharding.mesh.dp == 1:
            return total

        def doubled(grads):
            out = total(grads)
            return (out[0] * 2,) + tuple(out[1:])

        return doubled

    module.sum_gradients = sum_gradients


def flipped_byte(module):
    whole = module.commit

    def commit(folder, target, *args):
        done = whole(folder, target, *args)
        paths = [os.path.join(place, name) for place, _, names in os.walk(target) for name in names if "/rank_" in f"{place}/"]
        path = max(paths, key=os.path.getsize)
        with open(path, "r+b") as file:
            file.seek(os.path.getsize(path) // 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
        return done

    module.commit = commit


def killed(module):
    module._libraries = lambda: os.kill(os.getpid(), signal.SIGKILL)


def hangs(module):
    module._libraries = lambda: time.sleep(1000)


def raises(module):
    def libraries():
        raise RuntimeError(f"no such thing in {os.path.expanduser('~')}/secret/place on {os.uname().nodename}")

    module._libraries = libraries


PLANTED = {
    "wrong_kernel": ("ops.rms_norm", wrong_kernel),
    "dropped_rank": ("parallel.collectives", dropped_rank),
    "wrong_gradient": ("parallel.zero", wrong_gradient),
    "flipped_byte": ("parallel.checkpoint.store", flipped_byte),
    "killed": ("experiments.accept.machine", killed),
    "hangs": ("experiments.accept.machine", hangs),
    "raises": ("experiments.accept.machine", raises),
}


class Planter(importlib.abc.MetaPathFinder):
    def __init__(self, module, plant):
        self.module, self.plant = module, plant

    def find_spec(self, name, path, target=None):
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_plant(module):
            load(module)
            self.plant(module)

        spec.loader.exec_module = load_and_plant
        return spec


if os.environ.get("ACCEPT_PLANTED"):
    sys.meta_path.insert(0, Planter(*PLANTED[os.environ["ACCEPT_PLANTED"]]))
