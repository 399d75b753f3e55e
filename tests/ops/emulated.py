"""What the tests of the AscendC kernels share: calls of an emulated operator without MindSpore, and the emulated chip's size."""

import contextlib
import ctypes

import numpy as np

from ops.ascendc import build


def machine():
    library = ctypes.CDLL(build.emulator())
    library.emulator_message.restype = ctypes.c_char_p
    library.emulator_set_seconds.argtypes = [ctypes.c_double]
    library.emulator_drop.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.emulator_syncs.restype = ctypes.c_int64
    return library


@contextlib.contextmanager
def cores(n):
    """A chip of n cube cores, and twice as many vector cores."""
    machine().emulator_set_cores(n)
    try:
        yield
    finally:
        machine().emulator_set_cores(2)


def call(library, name, inputs, outputs, attrs=None):
    """The emulator's message, empty if all went well. outputs: arrays that are written. attrs: numbers, in order."""
    status = getattr(ctypes.CDLL(library), f"{name}_emulated")(*_arguments(inputs, outputs, attrs), None, None)
    message = machine().emulator_message().decode()
    assert (status == 0) == (message == "")
    return message


def tiled(library, name, inputs, outputs, attrs=None):
    """What the operator's tiling function says of these arrays: (blocks, tiling key, bytes of the workspace, the tiling data)."""
    made, data = (ctypes.c_int64 * 4)(), (ctypes.c_uint8 * 2048)()
    status = getattr(ctypes.CDLL(library), f"{name}_tiled")(*_arguments(inputs, outputs, attrs), made, data, ctypes.c_size_t(len(data)))
    assert status == 0, machine().emulator_message().decode()
    blocks, key, workspace, size = made
    return blocks, key, workspace, np.array(data[:size], np.uint8)


def _arguments(inputs, outputs, attrs):
    """As MindSpore gives them: how many arrays, their data, dims, shapes and dtypes; attributes as one array behind the inputs."""
    arrays = [np.array(x, order="C") for x in inputs]
    arrays += [np.array(attrs, np.float32)] if attrs is not None else []
    arrays += outputs
    n = len(arrays)
    sizes = [(ctypes.c_int64 * max(a.ndim, 1))(*a.shape) for a in arrays]
    pointers = (ctypes.POINTER(ctypes.c_int64) * n)(*(ctypes.cast(s, ctypes.POINTER(ctypes.c_int64)) for s in sizes))
    dtypes = (ctypes.c_char_p * n)(*(str(a.dtype).encode() for a in arrays))
    data = (ctypes.c_void_p * n)(*(a.ctypes.data for a in arrays))
    data.arrays = arrays  # which live as long as the pointers to them
    return n, data, (ctypes.c_int * n)(*(a.ndim for a in arrays)), pointers, dtypes
